"""Tasks: causal models that write their own labels, and the data sets that go with them.

    task = task_named("ioi").for_tokenizer(tokenizer)
    pairs = task.pairs("test", variable="position", n=1000)
    print(check(task, pairs))

Text tasks are in `TASKS`; `task_named("my_task.py")` reads one of your own (see `tasks/user.py`).
`HierarchicalEquality` and `DistributiveLaw`, whose inputs are vectors, stand apart: they have no prompts. Nothing here
imports torch, transformers or `intervene`; a tokenizer comes in as an argument.
"""

from __future__ import annotations

from collections.abc import Callable

from tasks.addition import Addition
from tasks.base import SPLITS, Example, Pair, PairSet, Task
from tasks.boolean import DistributiveLaw
from tasks.capitals import Attributes, cities, countries
from tasks.causal_model import CausalModel
from tasks.checks import PairReport, baselines, check, distinguishes, inspect, leakage
from tasks.errors import BadData, BadModel, NotEnough, TaskError, UnknownName
from tasks.errors import require_known as _require_known
from tasks.files import read_pairs, write_pairs
from tasks.hierarchical_equality import HierarchicalEquality
from tasks.ioi import IOI
from tasks.lint import Lint, SplitLint, lint, require_distinguishable
from tasks.multiple_choice import MultipleChoice
from tasks.original import OriginalPairs, as_original, read_original, write_original
from tasks.planted import Planted
from tasks.price_tagging import PriceTagging
from tasks.tokens import single_tokens, token_span
from tasks.user import UserTask, task_from_file
from tasks.vectors import VectorExamples, VectorPairs

__all__ = [
    "IOI",
    "SPLITS",
    "TASKS",
    "Addition",
    "Attributes",
    "BadData",
    "BadModel",
    "CausalModel",
    "DistributiveLaw",
    "Example",
    "HierarchicalEquality",
    "Lint",
    "MultipleChoice",
    "NotEnough",
    "OriginalPairs",
    "Pair",
    "PairReport",
    "PairSet",
    "Planted",
    "PriceTagging",
    "SplitLint",
    "Task",
    "TaskError",
    "UnknownName",
    "UserTask",
    "VectorExamples",
    "VectorPairs",
    "as_original",
    "baselines",
    "check",
    "cities",
    "countries",
    "distinguishes",
    "inspect",
    "leakage",
    "lint",
    "read_original",
    "read_pairs",
    "require_distinguishable",
    "single_tokens",
    "task_from_file",
    "task_named",
    "token_span",
    "write_original",
    "write_pairs",
]

TASKS: dict[str, Callable[[], Task]] = {
    "ioi": IOI,
    "cities": cities,
    "countries": countries,
    "addition": Addition,
    "multiple_choice": MultipleChoice,
    "planted": Planted,
    "price_tagging": PriceTagging,
}


def task_named(name: str) -> Task:
    """Return the text task of that name; a name that ends in ".py" is a file that defines one.

    Raises:
        UnknownName: there is none of that name; the message names the nearest.
        BadData: the file does not define a task; see `task_from_file`.
    """
    if name.endswith(".py"):
        return task_from_file(name)
    _require_known("Task", name, TASKS)
    return TASKS[name]()
