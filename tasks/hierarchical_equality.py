"""Hierarchical equality: four objects w, x, y, z, and the answer whether (w = x) equals (y = z).

    task = HierarchicalEquality()
    train = task.examples("train", n=100_000)                      # train.inputs (N, 16) float32, train.labels (N,)
    one = task.pairs("train", variables=["left_equal"], n=6400)     # one.base, one.sources["left_equal"], one.labels
    both = task.pairs("test", variables=["left_equal", "right_equal"], n=6400)      # a source for each

An object is a vector of `width` numbers, uniform in [-1, 1]; an input is the four vectors side by side. Equal objects
are the same vector, different ones are drawn apart, and every call, split and seed draws fresh ones: nothing can be
memorised. The causal model runs on whole batches: each label is the outcome of an interchange.

Patterns (is w = x? is y = z?) are dealt in equal shares over base and sources together. So where the size is a multiple
of 16 (one variable) or 64 (two), copying the base, copying a source and naming either label are each right on exactly
half of the pairs, for each of `left_equal` and `right_equal` and for both at once.

`first_object` is a control: the identity of w. Its counterfactual is well defined, but a network that computes the two
equalities need not hold w anywhere by itself.

Source: Geiger et al. 2023, "Finding alignments between interpretable causal variables and distributed neural
representations" (arXiv 2303.02536). We differ: patterns are dealt, not drawn; numbers are not rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.base import SPLITS
from tasks.causal_model import CausalModel
from tasks.checks import baselines
from tasks.errors import TaskError, require_known

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
OBJECTS = ("w", "x", "y", "z")


def _same(a: Floats, b: Floats) -> npt.NDArray[np.bool_]:
    """Return whether two objects are equal in every number: (..., width) twice -> (...)."""
    return np.asarray((a == b).all(axis=-1))


CAUSAL_MODEL = CausalModel(
    variables=(*OBJECTS, "first_object", "left_equal", "right_equal", "answer"),
    parents={
        "first_object": ("w",),
        "left_equal": ("first_object", "x"),
        "right_equal": ("y", "z"),
        "answer": ("left_equal", "right_equal"),
    },
    mechanisms={
        "first_object": lambda w: w,
        "left_equal": _same,
        "right_equal": _same,
        "answer": lambda left, right: left == right,
    },
)


@dataclass(frozen=True)
class VectorExamples:
    """N inputs with their right answers: `inputs` (N, 4 * width) float32, `labels` (N,) int64, 1 for "equal"."""

    inputs: Floats
    labels: Labels

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)


@dataclass(frozen=True)
class VectorPairs:
    """N interchanges on arrays.

    Attributes:
        base: (N, 4 * width) float32.
        sources: variable -> its source inputs (N, 4 * width), in the order in which the variables were asked for.
        labels: (N,) int64, the answer with all variables interchanged at once.
        base_labels: (N,) int64, the base's own answer.
        source_labels: variable -> its source's own answer (N,) int64.
    """

    base: Floats
    sources: Mapping[str, Floats]
    labels: Labels
    base_labels: Labels
    source_labels: Mapping[str, Labels]

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables that are interchanged."""
        return tuple(self.sources)

    def __getitem__(self, rows: slice) -> VectorPairs:
        """Return the pairs of a slice."""
        return VectorPairs(
            base=self.base[rows],
            sources={name: inputs[rows] for name, inputs in self.sources.items()},
            labels=self.labels[rows],
            base_labels=self.base_labels[rows],
            source_labels={name: labels[rows] for name, labels in self.source_labels.items()},
        )

    def baselines(self) -> dict[str, float]:
        """Return copy_base, copy_source (with two sources, one for each) and majority, as shares of these pairs."""
        several = len(self.source_labels) > 1
        answers = {"copy_base": self.base_labels.tolist()}
        for name, labels in self.source_labels.items():
            answers[f"copy_source[{name}]" if several else "copy_source"] = labels.tolist()
        return baselines(self.labels.tolist(), answers)


@dataclass(frozen=True)
class HierarchicalEquality:
    """The task for objects of `width` numbers; inputs are 4 * width wide."""

    width: int = 4

    name = "hierarchical_equality"
    causal_model = CAUSAL_MODEL
    variables = ("left_equal", "right_equal", "first_object")
    splits = SPLITS

    def examples(self, split: str, *, n: int, seed: int = 0) -> VectorExamples:
        """Return `n` inputs, the four patterns in equal shares (up to the remainder), in random order.

        Raises:
            UnknownName: no such split.
        """
        rng = self._rng(split, "examples", n, seed)
        patterns = _deal(rng, n, 1)
        inputs = self._draw(rng, patterns[:, 0])
        return VectorExamples(inputs, self._answer(self.causal_model.run(self.setting(inputs))))

    def pairs(self, split: str, *, variables: Sequence[str], n: int, seed: int = 0) -> VectorPairs:
        """Return `n` interchanges of one or more variables at once, each with a source of its own, in random order.

        Raises:
            UnknownName: no such split or variable.
            TaskError: no variable, or one twice.
        """
        for name in variables:
            require_known(f"{self.name} variable", name, self.variables)
        if not variables or len(set(variables)) != len(variables):
            raise TaskError(f"Variables {list(variables)}: each may stand once, and one is needed. Name them anew.")
        rng = self._rng(split, "+".join(variables), n, seed)
        patterns = _deal(rng, n, 1 + len(variables))  # (N, 1 + number of variables, 2)
        base = self._draw(rng, patterns[:, 0])
        sources = {name: self._draw(rng, patterns[:, 1 + i]) for i, name in enumerate(variables)}
        base_setting = self.causal_model.run(self.setting(base))
        settings = {name: self.causal_model.run(self.setting(inputs)) for name, inputs in sources.items()}
        return VectorPairs(
            base=base,
            sources=sources,
            labels=self._answer(self.causal_model.interchange(base_setting, settings)),
            base_labels=self._answer(base_setting),
            source_labels={name: self._answer(setting) for name, setting in settings.items()},
        )

    def setting(self, inputs: Floats) -> dict[str, Floats]:
        """Return the causal model's input for `inputs` (..., 4 * width): object -> (..., width)."""
        return {name: inputs[..., i * self.width : (i + 1) * self.width] for i, name in enumerate(OBJECTS)}

    def relabel(self, pairs: VectorPairs) -> Labels:
        """Return the labels of `pairs` derived anew from their inputs: (N,) int64."""
        sources = {name: self.setting(inputs) for name, inputs in pairs.sources.items()}
        return self._answer(self.causal_model.interchange(self.setting(pairs.base), sources))

    def _answer(self, setting: Mapping[str, Any]) -> Labels:
        return np.asarray(setting["answer"]).astype(np.int64)

    def _draw(self, rng: np.random.Generator, patterns: npt.NDArray[np.bool_]) -> Floats:
        """Return fresh inputs of the given patterns: (N, 2) -> (N, 4 * width)."""
        objects = rng.uniform(-1.0, 1.0, size=(len(patterns), 4, self.width)).astype(np.float32)  # (N, 4, width)
        for side in range(2):
            equal = patterns[:, side]
            objects[equal, 2 * side + 1] = objects[equal, 2 * side]
        return objects.reshape(len(patterns), 4 * self.width)  # (N, 4 * width)

    def _rng(self, split: str, what: str, n: int, seed: int) -> np.random.Generator:
        require_known(f"{self.name} split", split, self.splits)
        if n < 1:
            raise TaskError(f"n={n}: at least one is needed. Give a positive number.")
        return np.random.default_rng([seed, self.splits.index(split), *what.encode()])


def _deal(rng: np.random.Generator, n: int, inputs: int) -> npt.NDArray[np.bool_]:
    """Return (N, inputs, 2): for each input whether w = x and y = z, every joint pattern equally often, shuffled."""
    bits = 2 * inputs
    cells = rng.permutation(np.arange(n) % 2**bits)  # (N,)
    return ((cells[:, None] >> np.arange(bits)) & 1).astype(np.bool_).reshape(n, inputs, 2)
