"""`fit` learns a plan's own parameters on a frozen model.

`fit_together` does it for several plans of one shape in each forward pass, which is how the seeds of a cell share its
cost: the batch is repeated, and each part goes through its own plan.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignments.answers import evaluate_together, together
from alignments.pairs import PairData
from alignments.parallel import Group
from intervene import Plan, frozen, trainable_parameters
from intervene.errors import ShapeMismatch
from intervene.interventions import modules_of
from intervene.locate import located_once
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
        self.ends: list[int | None] = [None] * len(plans)  # the step at which a plan's patience ran out

    def run(self, progress: Callable[[int, float], None] | None) -> list[FitResult]:
        """Run the steps; return one result per plan."""
        for module in modules_of(self.joined):
            module.train()
        try:
            with frozen(self.model), located_once():
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
            end = self.ends[index] or len(self.losses)
            history = tuple((step, scores[index]) for step, scores in self.validated if step <= end)
            if history:
                _restore(plan, self.best[index][2])
            best = self.best[index][1] if history else len(self.losses)
            results.append(FitResult(tuple(losses[index][:end]), history, best))
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
        each = self.pairs.losses(self.joined, mine, self.pairs.labels[mine])
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
            if self.ends[index] is not None:
                continue  # it ends as it would alone, though others go on
            if score > self.best[index][0]:
                self.best[index] = score, step, _state(plan)
            waited = sum(self.best[index][1] < one for one, _ in self.validated)
            if self.budget.patience is not None and waited >= self.budget.patience:
                self.ends[index] = step
        return None not in self.ends


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


_State = list[tuple[dict[str, Any], float | None]]  # parameters and temperature of each module


def _state(plan: Plan) -> _State:
    return [(copy.deepcopy(one.state_dict()), getattr(one, "temperature", None)) for one in modules_of(plan)]


def _restore(plan: Plan, state: _State) -> None:
    for module, (held, temperature) in zip(modules_of(plan), state, strict=True):
        module.load_state_dict(held)
        if temperature is not None:
            setattr(module, "temperature", temperature)  # noqa: B010 (of a gate; soft scores depend on it)


def _batches(n: int, size: int, count: int, seed: int) -> list[Tensor]:
    """Return `count` batches of row numbers; each epoch uses every row at most once."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    while len(made) < count:
        made += [rows for rows in torch.split(torch.randperm(n, generator=generator), size) if len(rows) == size]
    return made[:count]
