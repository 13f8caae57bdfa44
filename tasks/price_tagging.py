"""The price-tagging game: does an amount Z lie in the bracket from X to Y? "1.25 4.75 3.05 =" -> " Yes".

    task = PriceTagging()                                   # short prompts, for a small transformer
    task = PriceTagging(form="alpaca")                      # the instruction prompt of the paper
    pairs = task.pairs("train", variable="left", n=1000)
    pairs = task.pairs("train", variable="left+right", n=1000)      # one at random per pair: pairs[0].variable

The four causal models of the paper are variables of one, each computed from the one before:

    bracket V = (X, Y)   midpoint M = (V0 + V1) / 2   left P = M - W/2 <= Z   right Q = Z <= M + W/2   answer P and Q

with W = V1 - V0. Nothing is interchanged: P is X <= Z and Q is Z <= Y. Interchanging one variable of base b from source
s gives what the paper's separate models give: left P(s) and Z_b <= Y_b; right X_b <= Z_b and Q(s); midpoint
|Z_b - M_s| <= W_b / 2; bracket X_s <= Z_b <= Y_s. Prices are whole cents, so that all of this is exact.

Half of the pairs are labelled yes and half no (the two kinds). For left and right, base and source are drawn by region
(1 below, 2 inside, 3 above the bracket), uniformly from the region pairs that have the label. For midpoint and bracket
both are drawn independently until the label fits.

Copying is not the best that can be done without an interchange. A rule that reads one side alone does better: of left
"Z <= Y of the base" (base_check) and "X <= Z of the source" (source_check), of right the mirror images. For left and
right the exact shares follow from the regions, in every form, and no function of one side has a higher one. For
midpoint and bracket they are counted on n = 20,000 pairs of the short form, with a standard error below 0.004:

    variable    copy_base   copy_source   base_check   source_check
    left        13/20       13/20         4/5          4/5
    right       13/20       13/20         4/5          4/5
    midpoint    0.698       0.498         0.771        0.511
    bracket     0.646       0.547         0.735        0.560

All four are baselines of every report: a score for left or right is evidence only above 0.80.

What is held out between splits is the *bracket*: no bracket of one split occurs in another. Prices cannot be held out,
since every comparison needs all of them. With a fixed `bracket` there is only one, and the amounts are held out.

Source: Wu et al. 2023, "Interpretability at scale: identifying causal mechanisms in Alpaca" (arXiv 2305.08809). We
differ: labels are run, not listed (`original_pairs` gives theirs), splits are disjoint, amounts are uniform in cents.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

from tasks.base import Example, Pair, PairSet, Task
from tasks.causal_model import CausalModel
from tasks.errors import BadData, NotEnough, TaskError, UnknownName, require_known
from tasks.price_prompts import (
    NARROWEST,
    WIDEST,
    Form,
    amounts_of,
    bracket_name,
    brackets_of,
    cents,
    dollars,
    form_named,
)
from tasks.tokens import Tokenizer, token_ids

YES, NO = "yes", "no"
REGIONS = (1, 2, 3)
Regions = tuple[int, int]  # of base and source

CAUSAL_MODEL = CausalModel(
    variables=(
        *("context", "yes", "no", "lower", "upper", "amount"),
        *("bracket", "midpoint", "left", "right", "answer"),
    ),
    parents={
        "bracket": ("lower", "upper"),
        "midpoint": ("bracket",),
        "left": ("bracket", "midpoint", "amount"),
        "right": ("bracket", "midpoint", "amount"),
        "answer": ("left", "right", "yes", "no"),
    },
    mechanisms={
        "bracket": lambda lower, upper: (lower, upper),
        "midpoint": lambda bracket: (bracket[0] + bracket[1]) / 2,
        "left": lambda bracket, midpoint, amount: midpoint - (bracket[1] - bracket[0]) / 2 <= amount,
        "right": lambda bracket, midpoint, amount: amount <= midpoint + (bracket[1] - bracket[0]) / 2,
        "answer": lambda left, right, yes, no: yes if left and right else no,
    },
)

# The sampler released with the paper: label -> regions of base and source. By the causal model (2, 3) of "left" and
# (2, 1) of "right" are "yes": one pair in twelve is mislabelled.
ORIGINAL_REGIONS: dict[str, dict[str, tuple[Regions, ...]]] = {
    "left": {YES: ((1, 2), (1, 3), (2, 2)), NO: ((1, 1), (2, 1), (2, 3), (3, 1), (3, 2), (3, 3))},
    "right": {YES: ((3, 2), (3, 1), (2, 2)), NO: ((1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (3, 3))},
}


def _regions() -> dict[str, dict[str, tuple[Regions, ...]]]:
    """Return variable -> label -> the region pairs that the causal model gives this label."""
    inputs = [{"yes": YES, "no": NO, "context": "", "lower": 2, "upper": 4, "amount": z} for z in (1, 3, 5)]
    found: dict[str, dict[str, tuple[Regions, ...]]] = {}
    for variable in ("left", "right"):
        label = {
            (b, s): CAUSAL_MODEL.interchange(inputs[b - 1], {variable: inputs[s - 1]})["answer"]
            for b, s in product(REGIONS, REGIONS)
        }
        found[variable] = {word: tuple(pair for pair in label if label[pair] == word) for word in (YES, NO)}
    return found


REGIONS_OF = _regions()


@dataclass(frozen=True)
class PriceTagging(Task):
    """The game in one form; see the head of this file for its variables and splits.

    Args:
        form: "short" (lower upper amount =, prices 0.05, 0.15 ... 9.95) or "alpaca" (to the cent, 82 LLaMA tokens).
        words: what is answered inside and outside the bracket. The alpaca instruction asks for them in lower case.
        context: irrelevant sentences put before the bracket.
        bracket: the one bracket of all prompts in dollars, such as (5.49, 8.49), to carry an alignment to or from.
            Midpoint and bracket never change then, and are not offered.
    """

    form: str = "short"
    words: tuple[str, str] = ("Yes", "No")
    context: str = ""
    bracket: tuple[float, float] | None = None
    name: str = field(init=False, default="price_tagging")
    variables: tuple[str, ...] = field(init=False, default=("left", "right", "midpoint", "bracket"))

    causal_model = CAUSAL_MODEL
    kinds = (YES, NO)

    def __post_init__(self) -> None:
        """Refuse words that are one, and a bracket that the form cannot write.

        Raises:
            TaskError, UnknownName.
        """
        form = form_named(self.form)
        if self.form != "short":
            object.__setattr__(self, "name", f"price_tagging_{self.form}")
        if self.words[0] == self.words[1]:
            raise TaskError(f"{self.name}: both answers are {self.words[0]!r}. Give two different words.")
        if self.bracket is not None:
            lower, upper = (cents(price, form) for price in self.bracket)
            if not form.amounts[0] < lower < upper < form.amounts[-1]:
                raise TaskError(
                    f"Bracket {self.bracket}: no amount is below, inside and above it. Give a lower and a higher price "
                    f"between {dollars(form.amounts[0])} and {dollars(form.amounts[-1])}."
                )
            object.__setattr__(self, "variables", ("left", "right"))

    def entities(self, split: str) -> Mapping[str, frozenset[str]]:
        """Return the brackets of `split`, or with a fixed bracket its amounts."""
        if self.bracket is not None:
            return {"amount": frozenset(amounts_of(self.form, split))}
        return {"bracket": _names(self.form, split)}

    def entities_in(self, example: Example) -> Mapping[str, frozenset[str]]:
        """Return the bracket of `example`, or with a fixed bracket its amount."""
        setting = example.setting
        if self.bracket is not None:
            return {"amount": frozenset({dollars(setting["amount"])})}
        return {"bracket": frozenset({bracket_name(setting["lower"], setting["upper"])})}

    def render(self, setting: Mapping[str, Any]) -> Example:
        """Return the prompt with its spans: lower, upper, amount and last; in alpaca form dollars, response, colon too.

        `last` is "=" or the final line break; `colon` is token 80 of the paper's 82.
        """
        prompt, spans = form_named(self.form).render(setting)
        return Example(prompt, str(self.causal_model.run(setting)["answer"]), dict(setting), spans)

    def kind(self, pair: Pair) -> str:
        """Return "yes" or "no": the label."""
        right = self.label(pair.variable, pair.base.setting, pair.source.setting)
        return YES if right == pair.base.setting["yes"] else NO

    def for_tokenizer(self, tokenizer: Tokenizer) -> PriceTagging:
        """Return this task, once `tokenizer` is known to tell the two answers apart by their first token.

        Raises:
            NotEnough: it does not.
        """
        yes, no = self._answers()
        if token_ids(tokenizer, yes)[:1] == token_ids(tokenizer, no)[:1]:
            raise NotEnough(
                f"{self.name}: answers {yes!r} and {no!r} begin with the same token for this tokenizer. "
                "Give PriceTagging(words=...) with words it tells apart."
            )
        return self

    def trivial_answers(self, pair: Pair) -> dict[str, str]:
        """Return copy_base, copy_source, base_check and source_check: the answer that reads one side alone.

        The other side is replaced by one typical input, the same for all pairs: the middle price, in a bracket of mean
        width about it (with a fixed bracket, its own middle). That lies inside, so that of left base_check is the
        base's Z <= Y and source_check the source's X <= Z; of right they are X <= Z and Z <= Y.
        """
        base, source, typical = pair.base.setting, pair.source.setting, self._typical()
        return {
            **super().trivial_answers(pair),
            "base_check": self.label(pair.variable, base, typical),
            "source_check": self.label(pair.variable, {**typical, "yes": base["yes"], "no": base["no"]}, source),
        }

    def draw_setting(self, rng: random.Random, split: str) -> dict[str, Any]:
        """Return one random input of `split`, the amount uniform over all prices: about half are inside."""
        form = form_named(self.form)
        lower, upper = self._bracket(rng, form, split)
        amounts = self._allowed(form.amounts, split)
        return self.setting(lower, upper, rng.choice(amounts))

    def draw_settings(
        self, rng: random.Random, split: str, variable: str, kind: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return inputs of base and source whose label is `kind`; see the head of this file."""
        if variable in REGIONS_OF:
            base, source = rng.choice(REGIONS_OF[variable][kind])
            return self.draw_in(rng, split, base), self.draw_in(rng, split, source)
        while True:
            drawn = self.draw_setting(rng, split), self.draw_setting(rng, split)
            if self.label(variable, *drawn) == self._answers()[kind == NO]:
                return drawn

    def draw_in(self, rng: random.Random, split: str, region: int) -> dict[str, Any]:
        """Return a random input of `split` whose amount is below (1), inside (2) or above (3) its bracket.

        Raises:
            NotEnough: `split` owns no such amount for the fixed bracket.
        """
        form = form_named(self.form)
        lower, upper = self._bracket(rng, form, split)
        amounts = self._allowed(form.amounts_in(region, lower, upper), split)
        if not amounts:
            raise NotEnough(
                f"{self.name}, {split}: it owns no amount in region {region} of {bracket_name(lower, upper)}. "
                "Use a bracket farther from the ends, or form='alpaca', which has more amounts."
            )
        return self.setting(lower, upper, rng.choice(amounts))

    def pairs(self, split: str, *, variable: str, n: int, seed: int = 0, kind: str | None = None) -> PairSet:
        """Return `n` pairs as `Task.pairs` does; of "left+right" each pair's variable is one of the two at random.

        Raises:
            UnknownName: no such split, variable or kind. NotEnough: the split does not hold `n` distinct pairs.
            TaskError: `n` is not positive.
        """
        parts = variable.split("+")
        if len(parts) == 1 or n < 1:  # which is refused there
            return super().pairs(split, variable=parts[0], n=n, seed=seed, kind=kind)
        kinds = self.kinds if kind is None else (kind,)
        rng = random.Random(f"{self.name}/{split}/{variable}/{seed}")
        plan = [(rng.choice(parts), kinds[index % len(kinds)]) for index in range(n)]
        waiting: dict[tuple[str, str], deque[Pair]] = {}
        for part in parts:
            most = max(1, *(plan.count((part, one)) for one in kinds))
            drawn = super().pairs(split, variable=part, n=most * len(kinds), seed=seed, kind=kind)
            waiting |= {(part, one): deque(drawn[index :: len(kinds)]) for index, one in enumerate(kinds)}
        return PairSet(tuple(waiting[key].popleft() for key in plan), self.name, split, variable, seed)

    def setting(self, lower: int, upper: int, amount: int) -> dict[str, Any]:
        """Return the causal-model input of a bracket and an amount in cents."""
        yes, no = self._answers()
        return {"context": self.context, "yes": yes, "no": no, "lower": lower, "upper": upper, "amount": amount}

    def texts(self, split: str) -> Iterator[tuple[str, str]]:
        """Yield every prompt of `split` with its answer: what a small model can be trained on without drawing.

        Raises:
            TaskError: in alpaca form, which has more than a hundred million.
        """
        if self.form != "short":
            raise TaskError(f"{self.name}: it has too many prompts to list. Use examples(), or form='short'.")
        form = form_named(self.form)
        fixed = None if self.bracket is None else [self._bracket(random.Random(0), form, split)]
        for lower, upper in brackets_of(self.form, split).values() if fixed is None else fixed:
            for amount in self._allowed(form.amounts, split):
                setting = self.setting(lower, upper, amount)
                yield form.render(setting)[0], str(self.causal_model.run(setting)["answer"])

    def _answers(self) -> tuple[str, str]:
        gap = form_named(self.form).gap
        return f"{gap}{self.words[0]}", f"{gap}{self.words[1]}"

    def _bracket(self, rng: random.Random, form: Form, split: str) -> tuple[int, int]:
        if self.bracket is None:
            return form.bracket(rng, split)
        return cents(self.bracket[0], form), cents(self.bracket[1], form)

    def _typical(self) -> dict[str, Any]:
        """Return the input that stands for a side that is not read."""
        prices = form_named(self.form).amounts
        if self.bracket is not None:
            lower, upper = (round(100 * price) for price in self.bracket)
            return self.setting(lower, upper, (lower + upper) // 2)
        middle, half = (prices[0] + prices[-1]) // 2, (NARROWEST + WIDEST) // 4
        return self.setting(middle - half, middle + half, middle)

    def _allowed(self, amounts: range, split: str) -> range | tuple[int, ...]:
        """Return the amounts that `split` may use: all, unless the bracket is fixed and they are what is held out."""
        if self.bracket is None:
            return amounts
        return tuple(amount for amount in amounts_of(self.form, split).values() if amount in amounts)


@cache
def _names(form: str, split: str) -> frozenset[str]:
    """Return the names of the brackets of `split`; a check asks for them once per pair."""
    return frozenset(brackets_of(form, split))


def original_pairs(task: PriceTagging, variable: str, *, split: str = "train", n: int, seed: int = 0) -> PairSet:
    """Return `n` pairs as the sampler released with the paper labels them: one in twelve of left and right is wrong.

    A label is drawn, then a region pair from `ORIGINAL_REGIONS`; "left+right" takes either variable for each pair.
    Midpoint and bracket are two independent draws, rightly labelled and not balanced. Pairs may repeat. For what is
    wrong see `tasks.inspect`. The brackets are those of `split`, so that nothing else is.

    Raises:
        UnknownName: the task has no such variable or split.
        BadData: `n` is not positive.
    """
    require_known(f"{task.name} split", split, task.splits)
    if n < 1:
        raise BadData(f"n={n}: at least one pair is needed. Give a positive number.")
    parts = variable.split("+")
    for part in parts:
        if part not in task.variables:
            raise UnknownName(f"{task.name} variable {part!r}: there is none. Use one of {', '.join(task.variables)}.")
    rng = random.Random(f"original/{task.name}/{split}/{variable}/{seed}")
    items = []
    for _ in range(n):
        part = rng.choice(parts)
        if part in ORIGINAL_REGIONS:
            label = rng.choice((YES, NO))
            base, source = (task.draw_in(rng, split, one) for one in rng.choice(ORIGINAL_REGIONS[part][label]))
            items.append(Pair(task.render(base), task.render(source), part, base[label]))
        else:
            items.append(task.pair(part, task.draw_setting(rng, split), task.draw_setting(rng, split)))
    return PairSet(tuple(items), task.name, split, variable, seed)
