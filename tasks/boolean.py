"""The distributive law: one Boolean function, two causal models that compute it, and interchanges that tell them apart.

    task = DistributiveLaw("and_or_and")            # (p and q) or (p and r)
    rival = DistributiveLaw("and_or")               # p and (q or r): the same answers, other variables on the way
    train = task.examples("train", n=100_000)       # inputs (N, 24); both models give the same labels
    pairs = task.pairs("train", variables=["left_and"], n=6400)
    pairs = rival.pairs("train", variables=["either"], n=6400)

p, q and r are equalities of two objects each: six vectors of `width` numbers, uniform in [-1, 1], side by side (see
`tasks/vectors.py`). No input can say which of the two models a network computes, for their answers are the same on all
of them; what the network does when half of a computation is exchanged can.

and_or_and: left_and = p and q, right_and = p and r, answer = left_and or right_and.
and_or:     either = q or r, answer = p and either.
`first_equal` (p) is a variable of both.

Patterns of equality are dealt in equal shares, so 3 of 8 examples are True and always answering False is right on 5 of
8. On pairs, trivial answers do better than half; `baselines()` says how much.

Source: Sutter et al. 2025, "The non-linear representation dilemma" (arXiv 2507.08802), the distributive law task: six
objects, width 24. We differ: patterns are dealt, not drawn, and examples are not balanced by their label.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tasks.causal_model import CausalModel
from tasks.errors import require_known
from tasks.vectors import EqualityTask, same

OBJECTS = ("a", "b", "c", "d", "e", "f")
_EQUALITIES = {"first_equal": ("a", "b"), "second_equal": ("c", "d"), "third_equal": ("e", "f")}
_SAME = dict.fromkeys(_EQUALITIES, same)

MODELS: dict[str, CausalModel] = {
    "and_or_and": CausalModel(
        variables=(*OBJECTS, *_EQUALITIES, "left_and", "right_and", "answer"),
        parents={
            **_EQUALITIES,
            "left_and": ("first_equal", "second_equal"),
            "right_and": ("first_equal", "third_equal"),
            "answer": ("left_and", "right_and"),
        },
        mechanisms={**_SAME, "left_and": np.logical_and, "right_and": np.logical_and, "answer": np.logical_or},
    ),
    "and_or": CausalModel(
        variables=(*OBJECTS, *_EQUALITIES, "either", "answer"),
        parents={**_EQUALITIES, "either": ("second_equal", "third_equal"), "answer": ("first_equal", "either")},
        mechanisms={**_SAME, "either": np.logical_or, "answer": np.logical_and},
    ),
}
_VARIABLES = {
    "and_or_and": ("left_and", "right_and", "first_equal"),
    "and_or": ("either", "first_equal"),
}


@dataclass(frozen=True)
class DistributiveLaw(EqualityTask):
    """The task under one of its two causal models, `model`; inputs are 6 * width wide.

    Raises:
        UnknownName: `model` is neither "and_or_and" nor "and_or".
    """

    model: str = "and_or_and"
    width: int = 4
    causal_model: CausalModel = field(init=False, compare=False, repr=False)
    variables: tuple[str, ...] = field(init=False)

    name = "distributive_law"
    objects = OBJECTS

    def __post_init__(self) -> None:
        """Take up the model of that name."""
        require_known(f"{self.name} model", self.model, MODELS)
        object.__setattr__(self, "causal_model", MODELS[self.model])
        object.__setattr__(self, "variables", _VARIABLES[self.model])

    def rival(self) -> DistributiveLaw:
        """Return the task under the other model of the same function."""
        (other,) = set(MODELS) - {self.model}
        return DistributiveLaw(other, self.width)
