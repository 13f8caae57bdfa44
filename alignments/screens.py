"""Screens: what can be known of every place before anything is learned there, at a small part of the cost of a fit.

    rows = first_rows(pairs, 32)
    exact = screen(scorer, places, rows)                   # swaps the whole vector: forward passes only
    guessed = attribute(scorer, places, rows)              # all places at once, by one gradient
    print(check(guessed, exact))                           # where both are known: do they order the places alike?

Neither is a bound on what a fit can reach. A place that holds the variable *and* something else scores nothing when its
whole vector is swapped, and all when the right subspace is. Hence three numbers: `iia` is enough for a finding, `gain`
asks only whether the answer moves from the base's towards the label, and `moved` whether anything happens at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from alignments.pairs import LanguagePairs, PairData
from alignments.scoring import Cell, Job, Scorer
from intervene import Add, Intervention, Plan, Site, frozen
from intervene.errors import InterveneError
from intervene.families import locate
from intervene.suffix import first_block

BACKWARD = 1.0  # of a forward pass: the weights are frozen, so only activations get gradients


class Place(NamedTuple):
    """A site and the name of a position: a cell of the map, whatever the method."""

    site: Site
    positions: str

    def __str__(self) -> str:
        return f"{self.site} @ {self.positions}"


@dataclass(frozen=True)
class Screened:
    """What a plan does to some pairs at one place.

    Attributes:
        n: pairs. iia: share whose top answer is the label.
        loss: mean cross-entropy of the label, in nats: what a fit minimises, and finer than a share.
        gain: rise of (label's logit - base answer's logit) over the unedited pass, mean over the pairs where the two
            answers differ, in logits.
        moved: mean over pairs of the largest change of a logit, relative to the spread of the unedited logits.
    """

    place: Place
    n: int
    iia: float
    loss: float
    gain: float
    moved: float


@dataclass(frozen=True)
class Checked:
    """How well a first-order guess orders places: Spearman's rank correlation with the exact gains of `places`."""

    places: tuple[Place, ...]
    guessed: tuple[float, ...]
    exact: tuple[float, ...]
    correlation: float | None  # None: one of the two is the same everywhere

    def __str__(self) -> str:
        told = "undefined" if self.correlation is None else f"{self.correlation:.2f}"
        return f"attribution against exact patching on {len(self.places)} places: rank correlation {told}"


def first_rows(pairs: PairData, n: int) -> Tensor:
    """Return the numbers of the first `n` pairs, or of all: kinds are dealt in turn, so each has its share.

    Raises:
        InterveneError: in none of them does the label differ from the base's answer, so that nothing could be told.
    """
    rows = torch.arange(min(n, len(pairs)), device=pairs.labels.device)
    if not bool((pairs.labels[rows] != pairs.base_answers[rows]).any()):
        raise InterveneError(
            f"Screen of {len(rows)} pairs: the label is the base's own answer in all of them. "
            "Draw pairs that differ in the variable."
        )
    return rows


def plan_at(scorer: Scorer, place: Place) -> Plan:
    """Return the plan that swaps the whole vector at `place`."""
    return scorer.fitted(Job(Cell(place.site, place.positions, "full_vector", None), (0,)))[0]


def screen(scorer: Scorer, places: Sequence[Place], rows: Tensor, split: str = "select") -> list[Screened]:
    """Return what swapping the whole vector does at each place to pairs `rows` of `split`: one pass each, exact.

    The cost is that of `screen_cost`.
    """
    pairs = scorer.here.splits[split]
    with torch.no_grad():
        own = unedited(scorer, places, rows, split)
        return [measure(place, pairs.logits(plan_at(scorer, place), rows), own, pairs, rows) for place in places]


def unedited(scorer: Scorer, places: Sequence[Place], rows: Tensor, split: str = "select") -> Tensor:
    """Return (b, V): the logits of pairs `rows` without an edit, by adding nothing at the cheapest of `places`."""
    pairs = scorer.here.splits[split]
    place = min(places, key=lambda one: share(scorer, one, split))
    with torch.no_grad():
        return pairs.logits((_nothing(scorer, place, rows, split)[0],), rows)


def measure(place: Place, logits: Tensor, own: Tensor, pairs: PairData, rows: Tensor) -> Screened:
    """Return what an edit at `place` did: its logits (b, V) against the unedited ones `own` (b, V)."""
    logits, own = logits.float(), own.float()
    labels = pairs.labels[rows]
    loss = torch.nn.functional.cross_entropy(logits, labels)
    gain = _contrast(logits, pairs, rows).mean() - _contrast(own, pairs, rows).mean()
    moved = (logits - own).abs().amax(-1).mean() / own.std().clamp_min(1e-6)
    iia = (logits.argmax(-1) == labels).float().mean()
    return Screened(place, len(rows), float(iia), float(loss), float(gain), float(moved))


def attribute(
    scorer: Scorer, places: Sequence[Place], rows: Tensor, split: str = "select", *, batch_size: int = 32
) -> dict[Place, float]:
    """Return place -> first-order guess of its `gain`, for all places by one forward and one backward per batch.

    d(label's logit - base answer's logit)/dh at the base's activation h, times (source's - base's), summed over the
    tokens and dimensions of the place and averaged over those pairs `rows` whose two answers differ. Gradients are
    those of `Add(zeros, trainable=True)`, one per place.

    Source: attribution patching, Nanda 2023 and Syed et al. 2023 (arXiv 2310.10348). We differ: the source takes a
        variable's value to a base that otherwise stays itself, and the metric is the counterfactual label's logit.
    """
    pairs = scorer.here.splits[split]
    told = rows[pairs.labels[rows] != pairs.base_answers[rows]]
    totals = dict.fromkeys(places, 0.0)
    for some in torch.split(told, batch_size):
        made = {place: _nothing(scorer, place, some, split) for place in places}
        with frozen(scorer.here.model), torch.enable_grad():
            logits = pairs.logits(tuple(item for item, _ in made.values()), some)
            _contrast(logits.float(), pairs, some).sum().backward()  # type: ignore[no-untyped-call]
        for place, (item, towards) in made.items():
            (vector,) = item.edit.parameters()
            if vector.grad is not None:
                totals[place] += float((vector.grad * towards).sum())
    return {place: total / len(told) for place, total in totals.items()}


def strongest(guessed: Mapping[Place, float], count: int) -> list[Place]:
    """Return the `count` places of the largest guessed gains in either direction: those worth an exact check."""
    return sorted(guessed, key=lambda place: -abs(guessed[place]))[:count]


def check(guessed: Mapping[Place, float], exact: Sequence[Screened]) -> Checked:
    """Return how well `guessed` gains order the places that were screened exactly."""
    known = [one for one in exact if one.place in guessed]
    guesses, gains = [guessed[one.place] for one in known], [one.gain for one in known]
    return Checked(tuple(one.place for one in known), tuple(guesses), tuple(gains), rank_correlation(guesses, gains))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Spearman's correlation: Pearson's of the ranks, ties at their mean rank; None if one is constant."""
    x, y = _ranks(a), _ranks(b)
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    dx, dy = [one - fmean(x) for one in x], [one - fmean(y) for one in y]
    product = sum(p * q for p, q in zip(dx, dy, strict=True))
    return product / math.sqrt(sum(p * p for p in dx) * sum(q * q for q in dy))


def share(scorer: Scorer, place: Place, split: str = "select") -> float:
    """Return the part of a full pass that a pass with an edit at `place` computes, in (0, 1].

    Blocks above the site on the tokens from the first edited one on, the head counted as one more block. A place in
    vectors, or on a model whose suffix is not exact, takes a full pass.
    """
    pairs = scorer.here.splits[split]
    if not isinstance(pairs, LanguagePairs) or not pairs.prefix.exact:
        return 1.0
    depth, length = locate(pairs.model).n_layers, pairs.prefix.inputs["input_ids"].shape[1]
    after = first_block(plan_at(scorer, place), depth)
    columns = scorer.where(place.positions).resolve(pairs.prefix.inputs)
    start = int(columns[columns >= 0].min())
    return float((depth - after) / (depth + 1) * (length - start) / length)


def screen_cost(scorer: Scorer, places: Sequence[Place], n: int) -> float:
    """Return the pair-passes that `screen` of `n` pairs takes."""
    return n * sum(share(scorer, place) for place in places)


def attribute_cost(scorer: Scorer, places: Sequence[Place], n: int) -> float:
    """Return the pair-passes that `attribute` of `n` pairs takes: the earliest place decides."""
    return n * (1 + BACKWARD) * max(share(scorer, place) for place in places)


def _nothing(scorer: Scorer, place: Place, rows: Tensor, split: str) -> tuple[Intervention, Tensor]:
    """Return an intervention that adds zeros at `place`, one vector per pair and token, and source - base there."""
    where = scorer.where(place.positions)
    base, source = scorer.here.splits[split].activations(place.site, where)
    towards = (source[rows] - base[rows]).float()  # (b, P, D)
    return Intervention(place.site, Add(torch.zeros_like(towards), trainable=True), where), towards


def _contrast(logits: Tensor, pairs: PairData, rows: Tensor) -> Tensor:
    """Return label's logit - base answer's logit of the pairs in `rows` whose answers differ."""
    labels, answers = pairs.labels[rows], pairs.base_answers[rows]
    each = torch.arange(len(rows), device=logits.device)
    return (logits[each, labels] - logits[each, answers])[labels != answers]


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    first = {value: order.index(value) for value in set(values)}
    return [first[value] + (values.count(value) - 1) / 2 for value in values]
