"""`fit` learns a plan's own parameters on a frozen model; `predict` and `evaluate` score a plan with its gates hard.

`fit_together` and `evaluate_together` do it for several plans of one shape in each forward pass, which is how the
seeds and ranks of a cell share its cost: the batch is repeated, and each part goes through its own plan.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alignments.metrics import wilson
from alignments.pairs import PairData
from alignments.parallel import Group
from intervene import Intervention, Plan, frozen, trainable_parameters
from intervene.errors import ShapeMismatch
from intervene.interventions import modules_of
from intervene.parts import Parts
from intervene.precision import fast_products

Penalty = Callable[[Plan], Tensor]
Anneal = Callable[[Plan, float], None]


@dataclass(frozen=True)
class Budget:
    """How long each fit learns, and how.

    Attributes:
        steps: optimiser steps. batch_size: pairs per pass. accumulate: passes per step, all of which count.
        lr: of AdamW without weight decay. warmup: share of the steps in which it rises; then it falls to zero.
        validate_every: steps between validations, when validation pairs are given. patience: validations without a
            better one after which the fit ends; None: never (learning often stands still before it jumps).
        fast: let the steps' matrix products multiply in bf16 where the processor can (`fast_products`); scores never
            do.
    """

    steps: int = 100
    batch_size: int = 32
    lr: float = 1e-2
    warmup: float = 0.1
    accumulate: int = 1
    validate_every: int = 0
    patience: int | None = None
    fast: bool = False

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.accumulate) < 1:
            raise ShapeMismatch(
                f"Fit of {self.steps} steps with {self.accumulate} x {self.batch_size} pairs each: "
                "all must be at least 1."
            )
        if not 0 <= self.warmup <= 1:
            raise ShapeMismatch(f"Fit with warm-up {self.warmup}: it is a share of the steps. Use 0 to 1.")


@dataclass(frozen=True)
class FitResult:
    """What one fit went through.

    `losses` has one value per optimiser step (mean cross-entropy of the counterfactual answer, in nats, penalties
    included); `validation` (step, IIA) pairs; `best_step` the step whose parameters were kept (the last, unless
    validated).
    """

    losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...] = ()
    best_step: int = 0


@dataclass(frozen=True)
class Score:
    """Interchange-intervention accuracy of a plan on some pairs, its Wilson 95 % interval, and IIA by kind of pair."""

    n: int
    iia: float
    low: float
    high: float
    kinds: dict[str, float] = field(default_factory=dict)


def fit(
    model: nn.Module,
    plan: Plan,
    pairs: PairData,
    *,
    steps: int = 100,
    batch_size: int = 32,
    lr: float = 1e-2,
    warmup: float = 0.1,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
    **more: Any,
) -> FitResult:
    """Learn the parameters of `plan`, in place: `fit_together` for one plan, the budget given as keywords."""
    known = {key: more.pop(key) for key in list(more) if key in Budget.__dataclass_fields__}
    budget = Budget(steps, batch_size, lr, warmup, **known)
    return fit_together(model, [plan], pairs, budget, seeds=[seed], progress=progress, **more)[0]


def fit_together(
    model: nn.Module,
    plans: Sequence[Plan],
    pairs: PairData,
    budget: Budget,
    *,
    seeds: Sequence[int],
    penalties: Sequence[Penalty | None] = (),
    anneal: Anneal | None = None,
    rates: Mapping[str, float] | None = None,
    validation: PairData | None = None,
    progress: Callable[[int, float], None] | None = None,
    group: Group | None = None,
) -> list[FitResult]:
    """Learn the parameters of each plan, in place, so that each pair's logits give its counterfactual label.

    Minimises cross-entropy plus the plan's penalty with AdamW (no weight decay), a linear warm-up and a linear decay to
    zero, both counted in optimiser steps. Batches of each seed are drawn without replacement, reshuffled each epoch.
    The plans are learned as if alone, in common forward passes; plans with an edit that draws at random are run one by
    one. The model is frozen for the duration and its flags are restored; plans are left in eval mode, gates hard. A
    plan with nothing to learn is left as it is.

    Args:
        plans: of one shape: the same sites and positions in the same order. seeds: of the batches, one per plan.
        penalties: plan -> 0-d tensor that is added to its loss, one per plan. anneal: called as anneal(plan, progress)
            before each step. rates: end of a parameter's name ("fraction") -> factor on the learning rate.
        validation: pairs on which every `budget.validate_every` steps the plans are scored with hard gates; each plan
            ends with the parameters that did best there, of equals the first.
        group: processes that fit together, each on its share of every batch; all call this with the same arguments,
            and all end with the same parameters. None: this process alone.

    Source: Geiger et al. 2023 (arXiv 2303.02536). We differ: a thin QR frame instead of a full rotation, and
        accumulated gradients use every batch (the original trainer dropped all but the last of each step).
    """
    if not any(trainable_parameters(plan) for plan in plans):
        return [FitResult(()) for _ in plans]
    if len(plans) > 1 and any(item.edit.draws for plan in plans for item in plan):
        results = []
        for index, plan in enumerate(plans):
            own = penalties[index : index + 1]
            results += fit_together(
                model, [plan], pairs, budget, seeds=[seeds[index]], penalties=own, anneal=anneal, rates=rates,
                validation=validation, progress=progress, group=group,
            )  # fmt: skip
        return results
    return _Fit(model, plans, pairs, budget, seeds, penalties, anneal, rates or {}, validation, group).run(progress)


class _Fit:
    """One run of `fit_together`: what its steps share."""

    def __init__(
        self,
        model: nn.Module,
        plans: Sequence[Plan],
        pairs: PairData,
        budget: Budget,
        seeds: Sequence[int],
        penalties: Sequence[Penalty | None],
        anneal: Anneal | None,
        rates: Mapping[str, float],
        validation: PairData | None,
        group: Group | None,
    ) -> None:
        self.model, self.plans, self.pairs, self.budget = model, plans, pairs, budget
        self.group = group
        self.parameters = list(dict.fromkeys(one for plan in plans for one in trainable_parameters(plan)))
        if group is not None:
            group.require_alike("Fit", (len(pairs), len(plans), budget, tuple(seeds)))
            group.spread(self.parameters)
        self.penalties = list(penalties) or [None] * len(plans)
        self.anneal, self.validation = anneal, validation
        self.joined = together(plans)
        self.optimiser = torch.optim.AdamW(_groups(plans, budget.lr, rates), weight_decay=0.0)
        rising, steps = max(1, round(budget.warmup * budget.steps)), budget.steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: min((step + 1) / rising, max(0.0, (steps - step) / max(1, steps - rising)))
        )
        size, passes = min(budget.batch_size, len(pairs)), budget.steps * budget.accumulate
        orders = [_batches(len(pairs), size, passes, seed) for seed in seeds]
        self.rows = [torch.cat(parts) for parts in zip(*orders, strict=True)]
        self.losses: list[Tensor] = []
        self.validated: list[tuple[int, list[float]]] = []
        self.best = [(-math.inf, 0, _state(plan)) for plan in plans]

    def run(self, progress: Callable[[int, float], None] | None) -> list[FitResult]:
        """Run the steps; return one result per plan."""
        for module in modules_of(self.joined):
            module.train()
        try:
            with frozen(self.model):
                for step in range(self.budget.steps):
                    self._step(step)
                    if progress is not None:
                        progress(step + 1, float(self.losses[-1].mean()))
                    if self._validate(step + 1):
                        break
        finally:
            for module in modules_of(self.joined):
                module.eval()  # a plan is used as it is scored: with hard gates
        losses = torch.stack(self.losses).T.tolist()  # (R, steps)
        results = []
        for index, plan in enumerate(self.plans):
            history = tuple((step, scores[index]) for step, scores in self.validated)
            if history:
                _restore(plan, self.best[index][2])
            best = self.best[index][1] if history else len(self.losses)
            results.append(FitResult(tuple(losses[index]), history, best))
        return results

    def _step(self, step: int) -> None:
        budget = self.budget
        if self.anneal is not None:
            for plan in self.plans:
                self.anneal(plan, step / max(1, budget.steps - 1))
        self.optimiser.zero_grad()
        told = torch.zeros(len(self.plans), device=self.pairs.labels.device)
        for number in range(budget.accumulate):
            rows = self.rows[step * budget.accumulate + number]
            # Backwards too: the products of the gradients are made where backward() is called.
            with fast_products() if budget.fast else nullcontext():
                losses = self._losses(rows)
                if number == 0:
                    losses = losses + budget.accumulate * self._penalty(losses)
                (losses.sum() / budget.accumulate).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            told += losses.detach().to(told.device) / budget.accumulate
        if self.group is not None:
            self.group.add_gradients(self.parameters, told)
        self.optimiser.step()
        self.schedule.step()
        self.losses.append(told)

    def _losses(self, rows: Tensor) -> Tensor:
        """Return (R,): each plan's mean cross-entropy over `rows`; in a group, what this rank adds to it."""
        mine, weight = (rows, 1.0) if self.group is None else self.group.share(rows, len(self.plans))
        logits = self.pairs.logits(self.joined, mine).float()
        labels = self.pairs.labels[mine].to(logits.device)
        each = nn.functional.cross_entropy(logits, labels, reduction="none")
        return weight * each.view(len(self.plans), -1).mean(1)

    def _penalty(self, losses: Tensor) -> Tensor:
        """Return (R,): the penalty of each plan, 0 where it has none; in a group, this rank's equal part of it."""
        made = [
            losses.new_zeros(()) if one is None else one(plan)
            for one, plan in zip(self.penalties, self.plans, strict=True)
        ]
        return torch.stack([value.to(losses) for value in made]) / (1 if self.group is None else self.group.size)

    def _validate(self, step: int) -> bool:
        """Score the plans where it is due, keeping the best parameters; return whether patience is at its end."""
        every, last = self.budget.validate_every, step == self.budget.steps
        if self.validation is None or not every or (step % every and not last):
            return False
        scores = [score.iia for score in evaluate_together(self.plans, self.validation, group=self.group)]
        self.validated.append((step, scores))
        for index, (score, plan) in enumerate(zip(scores, self.plans, strict=True)):
            if score > self.best[index][0]:
                self.best[index] = score, step, _state(plan)
        waited = len(self.validated) - 1 - max(self._rank(best[1]) for best in self.best)
        return self.budget.patience is not None and waited >= self.budget.patience

    def _rank(self, step: int) -> int:
        return next(index for index, (one, _) in enumerate(self.validated) if one == step)


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


def _groups(plans: Sequence[Plan], lr: float, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return AdamW's groups: parameters whose name ends as a key of `rates` says learn that many times faster."""
    by_rate: dict[float, dict[int, nn.Parameter]] = {}
    for plan in plans:
        for module in modules_of(plan):
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    factor = next((rate for end, rate in rates.items() if name.endswith(end)), 1.0)
                    by_rate.setdefault(factor, {})[id(parameter)] = parameter
    return [{"params": list(found.values()), "lr": lr * factor} for factor, found in by_rate.items()]


def _state(plan: Plan) -> list[dict[str, Any]]:
    return [copy.deepcopy(module.state_dict()) for module in modules_of(plan)]


def _restore(plan: Plan, state: list[dict[str, Any]]) -> None:
    for module, held in zip(modules_of(plan), state, strict=True):
        module.load_state_dict(held)


def _batches(n: int, size: int, count: int, seed: int) -> list[Tensor]:
    """Return `count` batches of row numbers; each epoch uses every row at most once."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    while len(made) < count:
        made += [rows for rows in torch.split(torch.randperm(n, generator=generator), size) if len(rows) == size]
    return made[:count]


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
