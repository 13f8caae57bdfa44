"""A small artificial task whose circuit is known: "go x03 a2p x11 b3q c10p x05 =" -> " y21".

    pairs = Planted().pairs("train", variable="key", n=1000)
    model, tokenizer = alignments.planted.planted_model()       # computes exactly this, at places that it tells

Words carry values in their digits: a2p and b3q are `first` = 2 and `second` = 3, c10p is `content` = 1 and `mark` = 0,
y21 is the answer of `digit` 2 and `mark` 1; x words say nothing. The letters are synonyms, and no two splits share one.

    key = (first + second) mod 4        digit = (key + content) mod 4        answer = digit and mark

Three variables are offered. Half of the pairs agree in the variable searched for and half differ, so copying the base
is right on half of an even number of pairs; copying the source never is, because something else always differs too:

`key`: base and source differ in content. Its two inputs say nothing of it one by one.
`mark`: base and source differ in content and in digit. Wherever mark lives, content or digit lives too: swapping whole
    vectors copies too much and is right on *no* pair there, and so scores below doing nothing.
`content`: base and source differ in mark.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.base import Example, Pair, Task, fill, split_in_order
from tasks.causal_model import CausalModel
from tasks.errors import NotEnough
from tasks.tokens import Tokenizer, single_tokens

VALUES = 4  # of first, second, key, content and digit
MARKS = 3
TEMPLATE = "go {noise1} {first_word} {noise2} {second_word} {third_word} {noise3} ="
LETTERS = {"train": "pq", "select": "r", "test": "st"}
NOISE = split_in_order([f"x{number:02}" for number in range(20)], {"train": 2, "select": 1, "test": 2})
_NOISES = ("noise1", "noise2", "noise3")
_KINDS = ("same", "different")


def first_words(letters: str, value: int | None = None) -> tuple[str, ...]:
    """Return the words of `first` with these letters; of one value or of all."""
    return tuple(f"a{one}{letter}" for one in _values(value, VALUES) for letter in letters)


def second_words(letters: str, value: int | None = None) -> tuple[str, ...]:
    """Return the words of `second` with these letters; of one value or of all."""
    return tuple(f"b{one}{letter}" for one in _values(value, VALUES) for letter in letters)


def third_words(letters: str, content: int | None = None, mark: int | None = None) -> tuple[str, ...]:
    """Return the words that carry `content` and `mark`, with these letters; of one value each or of all."""
    marks = _values(mark, MARKS)
    return tuple(f"c{one}{two}{letter}" for one in _values(content, VALUES) for two in marks for letter in letters)


def answer_words() -> tuple[str, ...]:
    """Return the answers, without their leading space: digit by digit, all marks of each."""
    return tuple(f"y{digit}{mark}" for digit in range(VALUES) for mark in range(MARKS))


def vocabulary() -> tuple[str, ...]:
    """Return every word of prompts and answers, once."""
    letters = "".join(LETTERS.values())
    noise = tuple(sorted(word for words in NOISE.values() for word in words))
    return (
        "go", "=", *noise, *first_words(letters), *second_words(letters), *third_words(letters), *answer_words(),
    )  # fmt: skip


def _values(value: int | None, count: int) -> range:
    return range(count) if value is None else range(value, value + 1)


CAUSAL_MODEL = CausalModel(
    variables=(
        *_NOISES,
        "first_word",
        "second_word",
        "third_word",
        "first",
        "second",
        "key",
        "content",
        "mark",
        "digit",
        "answer",
    ),
    parents={
        "first": ("first_word",),
        "second": ("second_word",),
        "content": ("third_word",),
        "mark": ("third_word",),
        "key": ("first", "second"),
        "digit": ("key", "content"),
        "answer": ("digit", "mark"),
    },
    mechanisms={
        "first": lambda word: int(word[1]),
        "second": lambda word: int(word[1]),
        "content": lambda word: int(word[1]),
        "mark": lambda word: int(word[2]),
        "key": lambda first, second: (first + second) % VALUES,
        "digit": lambda key, content: (key + content) % VALUES,
        "answer": lambda digit, mark: f" y{digit}{mark}",
    },
    domains={**dict.fromkeys(("first", "second", "key", "content", "digit"), range(VALUES)), "mark": range(MARKS)},
)


@dataclass(frozen=True)
class Planted(Task):
    """The task of the planted circuit; see the head of this file."""

    name = "planted"
    causal_model = CAUSAL_MODEL
    variables = ("key", "mark", "content")
    kinds = _KINDS

    def entities(self, split: str) -> Mapping[str, frozenset[str]]:
        """Return the words of `split`."""
        letters = LETTERS[split]
        return {
            "first": frozenset(first_words(letters)),
            "second": frozenset(second_words(letters)),
            "third": frozenset(third_words(letters)),
            "noise": frozenset(NOISE[split]),
        }

    def entities_in(self, example: Example) -> Mapping[str, frozenset[str]]:
        """Return the words of `example`."""
        said = {kind: frozenset({str(example.setting[f"{kind}_word"])}) for kind in ("first", "second", "third")}
        return {**said, "noise": frozenset(str(example.setting[name]) for name in _NOISES)}

    def render(self, setting: Mapping[str, Any]) -> Example:
        """Return the prompt with a span for each of its eight words: start, noise1, first, ..., last."""
        prompt, found = fill(TEMPLATE, setting)
        named = {name.removesuffix("_word"): span for name, span in found.items()}
        spans = {"start": (0, 2), **named, "last": (len(prompt) - 1, len(prompt))}
        return Example(prompt, self.causal_model.run(setting)["answer"], dict(setting), spans)

    def kind(self, pair: Pair) -> str:
        """Return "same" or "different": whether base and source agree in the pair's variable."""
        base, source = (self.causal_model.run(example.setting) for example in (pair.base, pair.source))
        return _KINDS[int(base[pair.variable] != source[pair.variable])]

    def for_tokenizer(self, tokenizer: Tokenizer) -> Planted:
        """Return this task, if every word is one token.

        Raises:
            NotEnough: some are not: the words are those of `alignments.planted.planted_model` alone.
        """
        known = single_tokens(tokenizer, vocabulary())
        if len(known) < len(vocabulary()):
            raise NotEnough(
                f"planted: {len(vocabulary()) - len(known)} of its {len(vocabulary())} words are no single token for "
                "this tokenizer. Use the model and tokenizer that belong to it: model planted."
            )
        return self

    def draw_setting(self, rng: random.Random, split: str) -> dict[str, Any]:
        """Return one random input of `split`."""
        letters = LETTERS[split]
        return {
            **dict(zip(_NOISES, rng.sample(NOISE[split], 3), strict=True)),
            "first_word": rng.choice(first_words(letters)),
            "second_word": rng.choice(second_words(letters)),
            "third_word": rng.choice(third_words(letters)),
        }

    def draw_settings(
        self, rng: random.Random, split: str, variable: str, kind: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the inputs of a base and a source that agree in `variable` or not, and always differ in another."""
        base = self.draw_setting(rng, split)
        own = self.causal_model.run(base)
        apart = {"key": ("content",), "mark": ("content", "digit"), "content": ("mark",)}[variable]
        while True:
            source = self.draw_setting(rng, split)
            other = self.causal_model.run(source)
            agrees = own[variable] == other[variable]
            if agrees == (kind == "same") and all(own[name] != other[name] for name in apart):
                return base, source
