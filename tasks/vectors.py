"""Tasks on vectors instead of prompts: `EqualityTask`, its `VectorExamples` and its `VectorPairs`.

    task = HierarchicalEquality()                   # or DistributiveLaw()
    train = task.examples("train", n=100_000)       # train.inputs (N, objects * width) float32, train.labels (N,)
    one = task.pairs("train", variables=["left_equal"], n=6400)
    mixed = task.mixed_pairs("train", variables=["left_equal", "right_equal"], n=19200)

An input is some vectors ("objects") side by side, two of which make one equality: the first with the second, the third
with the fourth, and so on. Equal objects are the same vector, different ones are drawn apart, and every call, split and
seed draws fresh ones: nothing can be memorised. Which equalities hold is dealt in equal shares over base and sources
together. The causal model runs on whole batches: each label is the outcome of an interchange.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.base import SPLITS
from tasks.causal_model import CausalModel
from tasks.checks import baselines
from tasks.errors import TaskError, require_known

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def same(a: Floats, b: Floats) -> Bools:
    """Return whether two objects are equal in every number: (..., width) twice -> (...)."""
    return np.asarray((a == b).all(axis=-1))


@dataclass(frozen=True)
class VectorExamples:
    """N inputs with their right answers: `inputs` (N, objects * width) float32, `labels` (N,) int64, 1 for True."""

    inputs: Floats
    labels: Labels

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)


@dataclass(frozen=True)
class VectorPairs:
    """N interchanges on arrays.

    Attributes:
        base: (N, objects * width) float32.
        sources: variable -> its source inputs (N, objects * width), in the order in which the variables were asked for.
            Where a row does not interchange a variable, its source there is the row's own base.
        labels: (N,) int64, the answer with all variables that the row interchanges at once.
        base_labels: (N,) int64, the base's own answer.
        source_labels: variable -> its source's own answer (N,) int64.
        interchanged: (N, number of variables) bool, which variables a row interchanges, in the order of `sources`.
    """

    base: Floats
    sources: Mapping[str, Floats]
    labels: Labels
    base_labels: Labels
    source_labels: Mapping[str, Labels]
    interchanged: Bools

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables that are interchanged."""
        return tuple(self.sources)

    def __getitem__(self, rows: slice | Bools) -> VectorPairs:
        """Return the pairs of a slice, or those where a mask (N,) is True."""
        return VectorPairs(
            base=self.base[rows],
            sources={name: inputs[rows] for name, inputs in self.sources.items()},
            labels=self.labels[rows],
            base_labels=self.base_labels[rows],
            source_labels={name: labels[rows] for name, labels in self.source_labels.items()},
            interchanged=self.interchanged[rows],
        )

    def baselines(self) -> dict[str, float]:
        """Return copy_base, copy_source (with two sources, one for each) and majority, as shares of these pairs."""
        several = len(self.source_labels) > 1
        answers = {"copy_base": self.base_labels.tolist()}
        for name, labels in self.source_labels.items():
            answers[f"copy_source[{name}]" if several else "copy_source"] = labels.tolist()
        return baselines(self.labels.tolist(), answers)


class EqualityTask:
    """What tasks of equal and different vectors share: drawing, dealing and labelling. A subclass is a causal model.

    Attributes:
        name: the task's name.
        causal_model: its inputs are `objects`; its variable `answer` is a bool.
        variables: the variables a search may look for.
        objects: the names of the vectors in an input; each two in a row make one equality.
        width: numbers in one vector.
    """

    name: str
    causal_model: CausalModel
    variables: tuple[str, ...]
    objects: tuple[str, ...]
    width: int
    splits: tuple[str, ...] = SPLITS

    @property
    def equalities(self) -> int:
        """How many equalities one input has."""
        return len(self.objects) // 2

    def examples(self, split: str, *, n: int, seed: int = 0) -> VectorExamples:
        """Return `n` inputs, the patterns of equality in equal shares (up to the remainder), in random order.

        Raises:
            UnknownName: no such split.
        """
        rng = self._rng(split, "examples", n, seed)
        cells = rng.permutation(np.arange(n) % 2**self.equalities)  # (N,)
        inputs = self._draw(rng, self._patterns(cells, 1)[:, 0])
        return VectorExamples(inputs, self._answer(self.causal_model.run(self.setting(inputs))))

    def pairs(self, split: str, *, variables: Sequence[str], n: int, seed: int = 0) -> VectorPairs:
        """Return `n` interchanges of one or more variables at once, each with a source of its own, in random order.

        Raises:
            UnknownName: no such split or variable.
            TaskError: no variable, or one twice.
        """
        self._require_variables(variables)
        rng = self._rng(split, "+".join(variables), n, seed)
        cells = rng.permutation(np.arange(n) % 2 ** (self.equalities * (1 + len(variables))))  # (N,)
        return self._interchanges(rng, variables, cells, np.ones((n, len(variables)), dtype=np.bool_))

    def mixed_pairs(self, split: str, *, variables: Sequence[str], n: int, seed: int = 0) -> VectorPairs:
        """Return `n` interchanges, each of a non-empty part of `variables`: of two, a third each of one, other, both.

        Every part comes equally often, and within a part every joint pattern of equalities. `interchanged` says which
        part a row has; the source of a variable outside it is the row's own base, and the label is what the causal
        model answers when the variables of the part, and no others, take their sources' values.

        Raises:
            UnknownName: no such split or variable.
            TaskError: no variable, or one twice.
        """
        self._require_variables(variables)
        rng = self._rng(split, f"mixed:{'+'.join(variables)}", n, seed)
        parts = np.array([part for part in product((True, False), repeat=len(variables)) if any(part)])
        rows = rng.permutation(n)  # (N,)
        cells = (rows // len(parts)) % 2 ** (self.equalities * (1 + len(variables)))  # (N,)
        return self._interchanges(rng, variables, cells, parts[rows % len(parts)])

    def setting(self, inputs: Floats) -> dict[str, Floats]:
        """Return the causal model's input for `inputs` (..., objects * width): object -> (..., width)."""
        return {name: inputs[..., i * self.width : (i + 1) * self.width] for i, name in enumerate(self.objects)}

    def relabel(self, pairs: VectorPairs) -> Labels:
        """Return the labels of `pairs` derived anew from their inputs: (N,) int64."""
        return self._labels(pairs.base, pairs.sources, pairs.interchanged)

    def _interchanges(
        self, rng: np.random.Generator, variables: Sequence[str], cells: npt.NDArray[np.int64], interchanged: Bools
    ) -> VectorPairs:
        patterns = self._patterns(cells, 1 + len(variables))  # (N, 1 + number of variables, equalities)
        base = self._draw(rng, patterns[:, 0])
        drawn = {name: self._draw(rng, patterns[:, 1 + i]) for i, name in enumerate(variables)}
        sources = {name: np.where(interchanged[:, [i]], drawn[name], base) for i, name in enumerate(variables)}
        return VectorPairs(
            base=base,
            sources=sources,
            labels=self._labels(base, sources, interchanged),
            base_labels=self._answer(self.causal_model.run(self.setting(base))),
            source_labels={
                name: self._answer(self.causal_model.run(self.setting(inputs))) for name, inputs in sources.items()
            },
            interchanged=interchanged,
        )

    def _labels(self, base: Floats, sources: Mapping[str, Floats], interchanged: Bools) -> Labels:
        """Return the answers, (N,) int64, with in each row only its own interchanged variables held.

        Holding a variable at its base's value is not the same as leaving it alone: it would cut off another
        interchanged variable upstream of it. So rows run by the part they interchange.
        """
        labels = np.zeros(len(base), dtype=np.int64)
        for part in np.unique(interchanged, axis=0):
            rows = (interchanged == part).all(axis=1)  # (N,)
            held = [name for name, wanted in zip(sources, part, strict=True) if wanted]
            settings = {name: self.setting(sources[name][rows]) for name in held}
            labels[rows] = self._answer(self.causal_model.interchange(self.setting(base[rows]), settings))
        return labels

    def _answer(self, setting: Mapping[str, Any]) -> Labels:
        return np.asarray(setting["answer"]).astype(np.int64)

    def _patterns(self, cells: npt.NDArray[np.int64], inputs: int) -> Bools:
        """Return (N, inputs, equalities): the bits of `cells` (N,), for each input which of its equalities hold."""
        bits = self.equalities * inputs
        return ((cells[:, None] >> np.arange(bits)) & 1).astype(np.bool_).reshape(len(cells), inputs, self.equalities)

    def _draw(self, rng: np.random.Generator, patterns: Bools) -> Floats:
        """Return fresh inputs of the given patterns: (N, equalities) -> (N, objects * width)."""
        shape = (len(patterns), len(self.objects), self.width)
        objects = rng.uniform(-1.0, 1.0, size=shape).astype(np.float32)  # (N, objects, width)
        for side in range(self.equalities):
            equal = patterns[:, side]
            objects[equal, 2 * side + 1] = objects[equal, 2 * side]
        return objects.reshape(len(patterns), -1)  # (N, objects * width)

    def _require_variables(self, variables: Sequence[str]) -> None:
        for name in variables:
            require_known(f"{self.name} variable", name, self.variables)
        if not variables or len(set(variables)) != len(variables):
            raise TaskError(f"Variables {list(variables)}: each may stand once, and one is needed. Name them anew.")

    def _rng(self, split: str, what: str, n: int, seed: int) -> np.random.Generator:
        require_known(f"{self.name} split", split, self.splits)
        if n < 1:
            raise TaskError(f"n={n}: at least one is needed. Give a positive number.")
        return np.random.default_rng([seed, self.splits.index(split), *what.encode()])
