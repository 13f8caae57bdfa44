"""What plans answer: `predict` and `evaluate` score a plan with its gates hard, several plans in each forward pass.

`together` joins plans of one shape: the batch is repeated, and each part goes through its own plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignments.metrics import wilson
from alignments.pairs import PairData
from alignments.parallel import Group
from intervene import Intervention, Plan
from intervene.errors import ShapeMismatch
from intervene.interventions import modules_of
from intervene.parts import Parts


@dataclass(frozen=True)
class Score:
    """Interchange-intervention accuracy of a plan on some pairs, its Wilson 95 % interval, and IIA by kind of pair."""

    n: int
    iia: float
    low: float
    high: float
    kinds: dict[str, float] = field(default_factory=dict)


def together(plans: Sequence[Plan]) -> Plan:
    """Return one plan that applies plan r to the r-th equal part of the batch; a single plan is returned itself.

    Raises:
        ShapeMismatch: the plans differ in a site, a position or their number of interventions.
    """
    if len(plans) == 1:
        return plans[0]
    joined = []
    if len({len(plan) for plan in plans}) > 1:
        raise ShapeMismatch(f"Plans of {[len(plan) for plan in plans]} interventions: fit them one by one.")
    for items in zip(*plans, strict=True):
        places = {(item.site, repr(item.positions), repr(item.source_positions), item.phase) for item in items}
        if len(places) > 1 or any(item.when is not None for item in items):
            raise ShapeMismatch(f"{items[0]} and {items[-1]}: not at one place. Fit them one by one.")
        edit = Parts([(item.featurizer, item.edit) for item in items])
        first = items[0]
        joined.append(
            Intervention(first.site, edit, first.positions, phase=first.phase, source_positions=first.source_positions)
        )
    return tuple(joined)


@contextmanager
def _set(plans: Sequence[Plan], *, training: bool) -> Iterator[None]:
    """Put every module of `plans` into train or eval mode, until the block ends."""
    modules = [module for plan in plans for module in modules_of(plan)]
    before = [module.training for module in modules]
    for module in modules:
        module.train(training)
    try:
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.train(was)


@torch.no_grad()
def predict(plan: Plan, pairs: PairData, *, batch_size: int = 64) -> Tensor:
    """Return (N,) the top answer of each pair under `plan`, over the whole vocabulary, with gates hard."""
    return predict_together([plan], pairs, batch_size=batch_size)[0]


@torch.no_grad()
def predict_together(
    plans: Sequence[Plan], pairs: PairData, *, batch_size: int = 96, hard: bool = True, group: Group | None = None
) -> Tensor:
    """Return (R, N): `predict` for each of R plans of one shape, `batch_size` rows in all per forward pass.

    `hard` False leaves learned gates as soft as the fit left them: to be told beside a score, never as it.

    With `group`, each rank answers its share of the pairs, and all return the same.
    """
    if any(item.edit.draws for plan in plans for item in plan) and len(plans) > 1:
        return torch.stack(
            [predict_together([plan], pairs, batch_size=batch_size, hard=hard, group=group)[0] for plan in plans]
        )
    joined = together(plans)
    mine = torch.arange(len(pairs)) if group is None else group.share(torch.arange(len(pairs)))[0]
    with _set(plans, training=not hard), _set([joined], training=not hard):
        found = [
            pairs.logits(joined, rows.repeat(len(plans))).argmax(-1).view(len(plans), -1)
            for rows in torch.split(mine, max(1, batch_size // len(plans)))
        ]
    answers = torch.cat(found, 1).to(pairs.labels.device)
    return answers if group is None else group.gathered(answers, len(pairs))


def evaluate(plan: Plan, pairs: PairData, *, batch_size: int = 64) -> Score:
    """Return the share of pairs whose top answer under `plan` is their counterfactual label."""
    return evaluate_together([plan], pairs, batch_size=batch_size)[0]


def evaluate_together(
    plans: Sequence[Plan], pairs: PairData, *, batch_size: int = 96, group: Group | None = None
) -> list[Score]:
    """Return `evaluate` for each of several plans of one shape; with `group`, each rank runs its share of the pairs."""
    return [score(row, pairs) for row in predict_together(plans, pairs, batch_size=batch_size, group=group)]


def score(answers: Tensor, pairs: PairData, rows: Tensor | None = None) -> Score:
    """Return the score of `answers` (N,) to `pairs`; with `rows`, only of those pairs."""
    right = answers == pairs.labels
    chosen = range(len(right)) if rows is None else rows.tolist()
    hits = [bool(right[index]) for index in chosen]
    low, high = wilson(sum(hits), len(hits))
    by_kind: dict[str, list[bool]] = {}
    for index, hit in zip(chosen, hits, strict=True):
        if pairs.kinds:
            by_kind.setdefault(pairs.kinds[index], []).append(hit)
    kinds = {kind: sum(found) / len(found) for kind, found in sorted(by_kind.items())}
    return Score(len(hits), sum(hits) / len(hits), low, high, kinds)
