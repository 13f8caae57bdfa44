"""Multiple choice with the answer in the prompt: which letter stands before the colour that the prompt just named.

    task = MultipleChoice(n_choices=4).for_tokenizer(tokenizer)
    pairs = task.pairs("train", variable="pointer", n=999)

    The hat is brown. What color is the hat?
    K. red
    D. brown
    Answer:                                          -> " D"

Two variables are offered:

`pointer` (1, 2, ...): the place of the colour among the choices. The counterfactual answer is the *base's* symbol at
    the *source's* place.
`symbol`: the letter that is the answer itself. Copying the source is right on *every* pair: a high score says where the
    answer is carried, not that anything was computed. `tasks.checks.check` says so too.

Three kinds of pairs, in equal shares. Base and source never have the same object.

answerPosition: same letters in the same places, another place.    For `pointer`, copying the source is right.
randomLetter:   none of the base's letters, the same place.         For `pointer`, copying the base is right.
both:           none of the base's letters, another place.          For `pointer`, neither is.

So for `pointer` copying the base and copying the source are each right on exactly a third of a set whose size is a
multiple of three. The letters of every prompt are drawn at random: no place has a letter of its own that a variable
could be mistaken for.

Source: the copy-colours task and its counterfactuals of Mueller et al. 2025 (MIB, arXiv 2504.13151). We differ:
objects and colours are disjoint between splits; two to six choices; the base's letters are random too.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tasks.base import SPLITS, Example, Pair, Task, fill, split_in_order
from tasks.causal_model import CausalModel
from tasks.errors import BadModel, NotEnough, TaskError
from tasks.tokens import Tokenizer, token_ids

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


# Common ones first: they are dealt to the splits in this order.
COLORS = _listed(
    """red blue green yellow orange purple pink brown black white gray gold silver violet tan teal beige turquoise
    crimson navy maroon olive cyan magenta scarlet lavender indigo ivory amber coral"""
)
NOUNS = _listed(
    """hat cup box book ball car bag chair door shirt coat pen boat house wall bike lamp table flower bird cat dog fish
    horse rug bowl plate spoon towel blanket pillow curtain bottle bucket basket candle clock phone kite drum piano
    guitar violin tent truck train bus van ship sofa desk shelf ladder fence gate tile roof bench tie scarf glove sock
    boot shoe belt dress skirt jacket sweater ring button ribbon bead balloon toy doll puzzle card folder notebook
    marker crayon brush stamp envelope flag sign mailbox umbrella suitcase wallet purse"""
)
_SHARES = {"train": 2, "select": 1, "test": 2}
_KINDS = ("answerPosition", "randomLetter", "both")
_MOST = 6  # colours in the smallest split


def _causal_model(n_choices: int) -> CausalModel:
    places = range(1, n_choices + 1)
    choices = tuple(f"choice{place}" for place in places)
    symbols = tuple(f"symbol{place}" for place in places)

    def pointer(color: str, *listed: str) -> int:
        if listed.count(color) != 1:
            raise BadModel(f"Color {color!r}: it must be one of the choices {', '.join(listed)}, once. Change them.")
        return listed.index(color) + 1

    return CausalModel(
        variables=("noun", "color", *choices, *symbols, "pointer", "symbol", "answer"),
        parents={"pointer": ("color", *choices), "symbol": ("pointer", *symbols), "answer": ("symbol",)},
        mechanisms={
            "pointer": pointer,
            "symbol": lambda place, *listed: listed[place - 1],
            "answer": lambda symbol: f" {symbol}",
        },
        domains={"pointer": places},
    )


def _word_lists() -> dict[str, dict[str, tuple[str, ...]]]:
    nouns, colors = (split_in_order(words, _SHARES) for words in (NOUNS, COLORS))
    return {split: {"noun": nouns[split], "color": colors[split]} for split in SPLITS}


@dataclass(frozen=True)
class MultipleChoice(Task):
    """Copy-colours multiple choice; see the head of this file for its variables and kinds of pairs.

    `words` maps split -> "noun" | "color" -> the words it may use; `letters` are the symbols, the same in all splits.
    `prefix` stands before every prompt: worked examples for a model that needs them, best of other objects and colours.

    Raises:
        TaskError: `n_choices` is below 2 or above 6.
    """

    n_choices: int = 4
    words: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=_word_lists)
    letters: tuple[str, ...] = LETTERS
    prefix: str = ""
    causal_model: CausalModel = field(init=False, compare=False, repr=False)

    name = "multiple_choice"
    variables = ("pointer", "symbol")
    kinds = _KINDS

    def __post_init__(self) -> None:
        """Build the causal model for this number of choices."""
        if not 2 <= self.n_choices <= _MOST:
            raise TaskError(f"multiple_choice, n_choices={self.n_choices}: two to {_MOST} can be offered. Choose one.")
        object.__setattr__(self, "causal_model", _causal_model(self.n_choices))

    def entities(self, split: str) -> Mapping[str, frozenset[str]]:
        """Return the objects and colours of `split`."""
        return {kind: frozenset(words) for kind, words in self.words[split].items()}

    def entities_in(self, example: Example) -> Mapping[str, frozenset[str]]:
        """Return the object of `example`, and all the colours it offers."""
        colors = {example.setting[f"choice{place}"] for place in self._places}
        return {"noun": frozenset({example.setting["noun"]}), "color": frozenset(colors)}

    def render(self, setting: Mapping[str, Any]) -> Example:
        """Return the prompt with its spans: noun, color, correct_symbol, correct_symbol_next, correct_choice, last.

        `noun` and `color` are those of the first sentence, `correct_symbol` is the letter of the right choice,
        `correct_symbol_next` the full stop after it, `correct_choice` its colour, and `last` the last character.
        """
        values = self.causal_model.run(setting)
        stem, spans = fill("{prefix}The {noun} is {color}.", {**setting, "prefix": self.prefix})
        del spans["prefix"]
        lines = "".join(f"\n{{symbol{place}}}. {{choice{place}}}" for place in self._places)
        listed, places = fill(lines, setting)
        stem += f" What color is the {setting['noun']}?"
        begin, end = (len(stem) + offset for offset in places[f"symbol{values['pointer']}"])
        spans["correct_symbol"] = (begin, end)
        spans["correct_symbol_next"] = (end, end + 1)
        first, last = places[f"choice{values['pointer']}"]
        spans["correct_choice"] = (len(stem) + first, len(stem) + last)
        prompt = f"{stem}{listed}\nAnswer:"
        spans["last"] = (len(prompt) - 1, len(prompt))
        return Example(prompt, values["answer"], dict(setting), spans)

    def kind(self, pair: Pair) -> str:
        """Return "answerPosition", "randomLetter" or "both": what differs between base and source."""
        base, source = (self.causal_model.run(example.setting) for example in (pair.base, pair.source))
        if base["pointer"] == source["pointer"]:
            return "randomLetter"
        same_letters = all(base[f"symbol{place}"] == source[f"symbol{place}"] for place in self._places)
        return "answerPosition" if same_letters else "both"

    def trivial_answers(self, pair: Pair) -> dict[str, str]:
        """Return copy_base, copy_source and first_choice: the base's letter in the first place."""
        return {**super().trivial_answers(pair), "first_choice": f" {pair.base.setting['symbol1']}"}

    def for_tokenizer(self, tokenizer: Tokenizer) -> MultipleChoice:
        """Return this task with only the letters that are one token with a leading space, each a token of its own.

        Raises:
            NotEnough: fewer than twice `n_choices` letters are left: base and source need different ones.
        """
        owner: dict[int, str] = {}
        for letter in self.letters:
            ids = token_ids(tokenizer, f" {letter}")
            if len(ids) == 1:
                owner.setdefault(ids[0], letter)
        if len(owner) < 2 * self.n_choices:
            raise NotEnough(
                f"multiple_choice: {2 * self.n_choices} letters are needed, and {len(owner)} are one token for this "
                "tokenizer. Give MultipleChoice(n_choices=...) a smaller number, or letters=... that it knows."
            )
        return replace(self, letters=tuple(owner.values()))

    def draw_setting(self, rng: random.Random, split: str) -> dict[str, Any]:
        """Return one random input of `split`."""
        letters = rng.sample(self.letters, self.n_choices)
        return self._setting(rng, split, self._noun(rng, split), rng.choice(self._places), letters)

    def draw_settings(
        self, rng: random.Random, split: str, variable: str, kind: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return base and source inputs with different objects whose places and letters differ by `kind`.

        Raises:
            NotEnough: there are too few objects, colours or letters.
        """
        self._require("objects", split, len(self.words[split]["noun"]), 2)
        self._require("letters", split, len(self.letters), 2 * self.n_choices)
        nouns = rng.sample(self.words[split]["noun"], 2)
        letters = rng.sample(self.letters, 2 * self.n_choices)
        own, others = letters[: self.n_choices], letters[self.n_choices :]
        place = rng.choice(self._places)
        other = place if kind == "randomLetter" else rng.choice([p for p in self._places if p != place])
        base = self._setting(rng, split, nouns[0], place, own)
        return base, self._setting(rng, split, nouns[1], other, own if kind == "answerPosition" else others)

    @property
    def _places(self) -> range:
        return range(1, self.n_choices + 1)

    def _noun(self, rng: random.Random, split: str) -> str:
        self._require("objects", split, len(self.words[split]["noun"]), 1)
        return rng.choice(self.words[split]["noun"])

    def _setting(self, rng: random.Random, split: str, noun: str, place: int, letters: list[str]) -> dict[str, Any]:
        self._require("colors", split, len(self.words[split]["color"]), self.n_choices)
        colors = rng.sample(self.words[split]["color"], self.n_choices)
        return {
            "noun": noun,
            "color": colors[place - 1],
            **{f"choice{p}": colors[p - 1] for p in self._places},
            **{f"symbol{p}": letters[p - 1] for p in self._places},
        }

    def _require(self, what: str, split: str, found: int, least: int) -> None:
        if found < least:
            raise NotEnough(
                f"multiple_choice, {split}: {least} {what} are needed, and there are {found}. "
                "Give MultipleChoice more of them, or fewer choices."
            )
