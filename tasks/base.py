"""The values that every text task is made of: `Example`, `Pair`, `PairSet` (list-like) and the interface `Task`.

    task = task_named("ioi")
    pairs = task.pairs("train", variable="position", n=1000, seed=0)
    pairs[0].base.prompt, pairs[0].source.prompt, pairs[0].label

A task owns a causal model and, per split, lists of entities that no other split uses. Subclasses say how one example
is rendered and how one pair is drawn; this file sees to distinctness, seeds and labels.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from tasks.causal_model import CausalModel
from tasks.errors import NotEnough, TaskError, require_known
from tasks.tokens import Tokenizer

SPLITS = ("train", "select", "test")
# Draws that may repeat an earlier pair, in a row, before the lists count as used up.
_PATIENCE = 1000
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Example:
    """One prompt with its right answer.

    `answer` continues the prompt, leading space included. `setting` is the causal model's input. `spans` maps a name
    (such as "subject2" or "last") to the characters [begin, end) of the prompt.
    """

    prompt: str
    answer: str
    setting: Mapping[str, Any]
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """One interchange: `label` is the answer of `base` when `variable` takes the value it has on `source`."""

    base: Example
    source: Example
    variable: str
    label: str


@dataclass(frozen=True)
class PairSet(Sequence[Pair]):
    """An immutable list of pairs that knows where it came from; a slice is a `PairSet` again."""

    items: tuple[Pair, ...]
    task: str
    split: str
    variable: str
    seed: int | None = None

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Pair: ...

    @overload
    def __getitem__(self, index: slice) -> PairSet: ...

    def __getitem__(self, index: int | slice) -> Pair | PairSet:
        """Return one pair, or a `PairSet` of a slice."""
        if isinstance(index, slice):
            return PairSet(self.items[index], self.task, self.split, self.variable, self.seed)
        return self.items[index]


class Task(ABC):
    """A causal model with prompts: pairs are drawn per split and labelled by running the model.

    Attributes:
        name: the name in `TASKS`.
        causal_model: what writes the labels; its variable `answer` is the text that continues the prompt.
        variables: the variables a search may look for.
        kinds: the strata of pairs. Pair i is of kind i modulo their number, so a set whose size is a multiple of it
            holds exactly equal shares.
    """

    name: str
    causal_model: CausalModel
    variables: tuple[str, ...]
    kinds: tuple[str, ...]
    splits: tuple[str, ...] = SPLITS

    @abstractmethod
    def entities(self, split: str) -> Mapping[str, frozenset[str]]:
        """Return kind of entity -> what `split` may use. Splits share none of them."""

    @abstractmethod
    def entities_in(self, example: Example) -> Mapping[str, frozenset[str]]:
        """Return kind of entity -> what `example` uses."""

    @abstractmethod
    def render(self, setting: Mapping[str, Any]) -> Example:
        """Return the example of one causal-model input: prompt, spans, and the answer the model gives."""

    @abstractmethod
    def kind(self, pair: Pair) -> str:
        """Return which of `kinds` the pair is."""

    @abstractmethod
    def for_tokenizer(self, tokenizer: Tokenizer) -> Task:
        """Return this task with only the entities whose answers one next token of `tokenizer` tells apart."""

    @abstractmethod
    def draw_setting(self, rng: random.Random, split: str) -> dict[str, Any]:
        """Return one random causal-model input of `split`."""

    @abstractmethod
    def draw_settings(
        self, rng: random.Random, split: str, variable: str, kind: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the inputs of a random base and source that make a pair of `kind`."""

    def trivial_answers(self, pair: Pair) -> dict[str, str]:
        """Return the answers that need no causal variable. Subclasses add what is trivial for them."""
        return {"copy_base": pair.base.answer, "copy_source": pair.source.answer}

    def label(self, variable: str, base: Mapping[str, Any], source: Mapping[str, Any]) -> str:
        """Return the counterfactual answer, by running the causal model.

        Raises:
            UnknownName: `variable` is none of the causal model's.
        """
        return str(self.causal_model.interchange(base, {variable: source})["answer"])

    def pair(self, variable: str, base: Mapping[str, Any], source: Mapping[str, Any]) -> Pair:
        """Return the rendered and labelled pair of two causal-model inputs."""
        return Pair(self.render(base), self.render(source), variable, self.label(variable, base, source))

    def pairs(self, split: str, *, variable: str, n: int, seed: int = 0, kind: str | None = None) -> PairSet:
        """Return `n` distinct pairs; the same arguments give the same pairs, and a larger `n` only adds to them.

        `kind` restricts the set to one stratum; None takes all in turn.

        Raises:
            UnknownName: no such split, variable or kind.
            NotEnough: the lists of this split do not hold `n` distinct pairs.
        """
        require_known(f"{self.name} split", split, self.splits)
        require_known(f"{self.name} variable", variable, self.variables)
        if kind is not None:
            require_known(f"{self.name} kind", kind, self.kinds)
        _require_positive(n)
        kinds = self.kinds if kind is None else (kind,)
        rng = random.Random(f"{self.name}/{split}/{variable}/{seed}")
        seen: set[tuple[str, str]] = set()
        items: list[Pair] = []
        for index in range(n):
            for _ in range(_PATIENCE):
                base, source = self.draw_settings(rng, split, variable, kinds[index % len(kinds)])
                drawn = self.pair(variable, base, source)
                key = (drawn.base.prompt, drawn.source.prompt)
                if key not in seen:
                    break
            else:
                raise self._not_enough(split, n, index, "pairs")
            seen.add(key)
            items.append(drawn)
        return PairSet(tuple(items), self.name, split, variable, seed)

    def examples(self, split: str, *, n: int, seed: int = 0) -> tuple[Example, ...]:
        """Return `n` examples with distinct prompts, for measuring whether a model can do the task at all.

        Raises:
            UnknownName: no such split.
            NotEnough: the lists of this split do not hold `n` distinct prompts.
        """
        require_known(f"{self.name} split", split, self.splits)
        _require_positive(n)
        rng = random.Random(f"{self.name}/{split}/examples/{seed}")
        found: dict[str, Example] = {}
        repeats = 0
        while len(found) < n:
            example = self.render(self.draw_setting(rng, split))
            repeats = repeats + 1 if example.prompt in found else 0
            found.setdefault(example.prompt, example)
            if repeats == _PATIENCE:
                raise self._not_enough(split, n, len(found), "prompts")
        return tuple(found.values())

    def _not_enough(self, split: str, n: int, found: int, what: str) -> NotEnough:
        return NotEnough(
            f"{self.name}, {split}: {n} distinct {what} were asked for, and after {found} only repeats came. "
            f"Ask for at most {found}."
        )


def _require_positive(n: int) -> None:
    if n < 1:
        raise TaskError(f"n={n}: at least one is needed. Give a positive number.")


def split_in_order(items: Sequence[str], shares: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Return split -> its part of `items`, dealt round and round in proportion to `shares`.

    Dealing, rather than cutting, gives each split the same mix when the list is sorted by how common its items are.
    """
    round_of = [split for split, share in shares.items() for _ in range(share)]
    parts: dict[str, list[str]] = {split: [] for split in shares}
    for index, item in enumerate(items):
        parts[round_of[index % len(round_of)]].append(item)
    return {split: tuple(part) for split, part in parts.items()}


def fill(template: str, values: Mapping[str, Any]) -> tuple[str, dict[str, tuple[int, int]]]:
    """Return `template` with each {field} replaced, and field -> its characters [begin, end) in the result."""
    text, spans, done = "", {}, 0
    for match in _FIELD.finditer(template):
        text += template[done : match.start()]
        value = str(values[match[1]])
        spans[match[1]] = (len(text), len(text) + len(value))
        text += value
        done = match.end()
    return text + template[done:], spans
