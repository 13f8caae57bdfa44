"""What the price-tagging game is written with: its two prompt forms, their prices, and which brackets each split owns.

Prices are whole cents, so that every comparison is exact. `tasks.price_tagging` is the task itself.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from tasks.base import SPLITS, fill
from tasks.errors import TaskError, require_known

# Bracket widths in cents, both ends included.
NARROWEST, WIDEST = 250, 750
_DEALT = ("train", "select", "train", "test", "train")

# Each literal word that a search may want to name is a field too, because `fill` reports the span of every field.
_ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
    "{context}Please say {say_yes} only if it costs between {lower} and {upper} dollars, otherwise {say_no}.\n\n"
    "### Input:\n"
    "{amount} {dollars}\n\n"
    "### {response}{colon}{last}"
)
_ALPACA_WORDS = {"dollars": "dollars", "response": "Response", "colon": ":", "last": "\n"}
_NO_POSITION = ("context", "say_yes", "say_no")


@dataclass(frozen=True)
class Form:
    """One way to write the game: template, prices and how an answer continues the prompt.

    Attributes:
        amounts: every price in cents that an amount may have.
        lowest, highest: the extreme bounds of a bracket in cents. Both lie inside `amounts`, so that every bracket
            has amounts below and above it.
        gap: what stands between prompt and answer.
        words: field -> literal word of the template that is a named position.
    """

    name: str
    template: str
    amounts: range
    lowest: int
    highest: int
    gap: str
    words: Mapping[str, str]

    def render(self, setting: Mapping[str, Any]) -> tuple[str, dict[str, tuple[int, int]]]:
        """Return the prompt of a causal-model input and the characters of each named position."""
        context = setting["context"]
        values = {
            **self.words,
            **{name: dollars(setting[name]) for name in ("lower", "upper", "amount")},
            "context": f"{context} " if context else "",
            "say_yes": setting["yes"].strip().lower(),
            "say_no": setting["no"].strip().lower(),
        }
        prompt, spans = fill(self.template, values)
        return prompt, {name: span for name, span in spans.items() if name not in _NO_POSITION}

    def bracket(self, rng: random.Random, split: str | None) -> tuple[int, int]:
        """Return a random bracket of `split` (None: of all): the width is uniform, then the lower bound given it."""
        step = self.amounts.step
        while True:
            width = rng.randrange(NARROWEST, WIDEST + 1, step)
            lower = rng.randrange(self.lowest, self.highest - width + 1, step)
            if split is None or owner(bracket_name(lower, lower + width)) == split:
                return lower, lower + width

    def amounts_in(self, region: int, lower: int, upper: int) -> range:
        """Return the prices below (1), inside (2) or above (3) the bracket; its bounds are inside."""
        step = self.amounts.step
        below, inside = range(self.amounts.start, lower, step), range(lower, upper + 1, step)
        return (below, inside, range(upper + step, self.amounts.stop, step))[region - 1]


FORMS: dict[str, Form] = {
    "short": Form(
        name="short",
        template="{context}{lower} {upper} {amount} {last}",
        amounts=range(5, 1000, 10),
        lowest=15,
        highest=985,
        gap=" ",
        words={"last": "="},
    ),
    "alpaca": Form(
        name="alpaca",
        template=_ALPACA,
        amounts=range(1, 1000),
        lowest=5,
        highest=995,
        gap="",
        words=_ALPACA_WORDS,
    ),
}


def form_named(name: str) -> Form:
    """Return the prompt form of that name.

    Raises:
        UnknownName: there is none.
    """
    require_known("Price tagging form", name, FORMS)
    return FORMS[name]


def dollars(cents: int) -> str:
    """Return a price as it is written: "4.70"."""
    return f"{cents // 100}.{cents % 100:02d}"


def cents(price: float, form: Form) -> int:
    """Return a price in dollars as cents.

    Raises:
        TaskError: the form does not write this price.
    """
    found = round(100 * price)
    if found not in form.amounts or abs(100 * price - found) > 1e-6:
        near = min(form.amounts, key=lambda known: abs(known - 100 * price))
        raise TaskError(
            f"Price {price}: form {form.name!r} does not write it. Use {dollars(near)}, the nearest it does."
        )
    return found


def bracket_name(lower: int, upper: int) -> str:
    """Return a bracket as text, "1.25-4.75"."""
    return f"{dollars(lower)}-{dollars(upper)}"


def owner(bracket: str) -> str:
    """Return the split that owns a bracket: three fifths train, one fifth each select and test.

    A hash deals, not a list: so no split can tell a bracket of another by its width or place.
    """
    return _DEALT[zlib.crc32(bracket.encode()) % len(_DEALT)]


@cache
def brackets_of(form_name: str, split: str) -> dict[str, tuple[int, int]]:
    """Return every bracket of `split`: its text -> its bounds in cents.

    Raises:
        UnknownName: no such form or split.
    """
    require_known("Price tagging split", split, SPLITS)
    form = form_named(form_name)
    found = {}
    for width in range(NARROWEST, WIDEST + 1, form.amounts.step):
        for lower in range(form.lowest, form.highest - width + 1, form.amounts.step):
            name = bracket_name(lower, lower + width)
            if owner(name) == split:
                found[name] = (lower, lower + width)
    return found


@cache
def amounts_of(form_name: str, split: str) -> dict[str, int]:
    """Return every amount of `split`, text -> cents: what is held out where all prompts have one bracket.

    They are dealt in order, so that each split has some in every region.

    Raises:
        UnknownName: no such form or split.
    """
    require_known("Price tagging split", split, SPLITS)
    amounts = form_named(form_name).amounts
    return {dollars(one): one for index, one in enumerate(amounts) if _DEALT[index % len(_DEALT)] == split}
