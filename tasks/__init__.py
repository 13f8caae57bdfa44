"""Tasks: causal models that write their own labels, and the data sets that go with them.

    task = task_named("ioi").for_tokenizer(tokenizer)
    pairs = task.pairs("test", variable="position", n=1000)
    print(check(task, pairs))

Text tasks are in `TASKS`. `HierarchicalEquality`, whose inputs are vectors, stands apart: it has no prompts. Nothing
here imports torch, transformers or `intervene`; a tokenizer comes in as an argument.
"""

from __future__ import annotations

from collections.abc import Callable

from tasks.base import SPLITS, Example, Pair, PairSet, Task
from tasks.capitals import Attributes, cities, countries
from tasks.causal_model import CausalModel
from tasks.checks import PairReport, baselines, check, distinguishes, inspect, leakage
from tasks.errors import BadData, BadModel, NotEnough, TaskError, UnknownName
from tasks.errors import require_known as _require_known
from tasks.files import read_pairs, write_pairs
from tasks.hierarchical_equality import HierarchicalEquality, VectorExamples, VectorPairs
from tasks.ioi import IOI
from tasks.tokens import single_tokens, token_span

__all__ = [
    "IOI",
    "SPLITS",
    "TASKS",
    "Attributes",
    "BadData",
    "BadModel",
    "CausalModel",
    "Example",
    "HierarchicalEquality",
    "NotEnough",
    "Pair",
    "PairReport",
    "PairSet",
    "Task",
    "TaskError",
    "UnknownName",
    "VectorExamples",
    "VectorPairs",
    "baselines",
    "check",
    "cities",
    "countries",
    "distinguishes",
    "inspect",
    "leakage",
    "read_pairs",
    "single_tokens",
    "task_named",
    "token_span",
    "write_pairs",
]

TASKS: dict[str, Callable[[], Task]] = {"ioi": IOI, "cities": cities, "countries": countries}


def task_named(name: str) -> Task:
    """Return the text task of that name.

    Raises:
        UnknownName: there is none of that name; the message names the nearest.
    """
    _require_known("Task", name, TASKS)
    return TASKS[name]()
