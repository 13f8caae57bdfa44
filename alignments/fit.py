"""`fit` learns a plan's own parameters on a frozen model; `predict` and `evaluate` score a plan with its gates hard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from alignments.metrics import wilson
from alignments.pairs import PairData
from intervene import Plan, frozen, trainable_parameters
from intervene.errors import ShapeMismatch
from intervene.interventions import modules_of


@dataclass(frozen=True)
class FitResult:
    """Losses of one fit, one per optimiser step (mean cross-entropy of the counterfactual answer, in nats)."""

    losses: tuple[float, ...]


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
) -> FitResult:
    """Learn the parameters of `plan`, in place, so that each pair's logits give its counterfactual label.

    Minimises cross-entropy with AdamW (no weight decay), a linear warm-up over the first `warmup` of the steps and a
    linear decay to zero, both counted in optimiser steps. Batches are drawn without replacement, reshuffled each epoch.
    The model is frozen for the duration and its flags are restored; the plan is left in eval mode, its gates hard. A
    plan with nothing to learn is left as it is.

    Raises:
        ShapeMismatch: steps or batch_size below 1.

    Source: Geiger et al. 2023 (arXiv 2303.02536). We differ: a thin QR frame instead of a full rotation, and the last
    step's parameters are kept (no selection among checkpoints on data that is reported later).
    """
    if steps < 1 or batch_size < 1:
        raise ShapeMismatch(f"Fit of {steps} steps with {batch_size} pairs each: both must be at least 1.")
    parameters = trainable_parameters(plan)
    if not parameters:
        return FitResult(())
    for module in modules_of(plan):
        module.train()
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    rising = max(1, round(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / rising, max(0.0, (steps - step) / max(1, steps - rising)))
    )
    order = _batches(len(pairs), min(batch_size, len(pairs)), steps, seed)
    losses = []
    with frozen(model):
        for step, rows in enumerate(order):
            loss = nn.functional.cross_entropy(pairs.logits(plan, rows).float(), pairs.labels[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if progress is not None:
                progress(step + 1, losses[-1])
    for module in modules_of(plan):
        module.eval()  # a plan is used as it is scored: with hard gates
    return FitResult(tuple(losses))


def _batches(n: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """Return `steps` batches of row numbers; each epoch uses every row at most once."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    while len(made) < steps:
        made += [rows for rows in torch.split(torch.randperm(n, generator=generator), size) if len(rows) == size]
    return made[:steps]


@torch.no_grad()
def predict(plan: Plan, pairs: PairData, *, batch_size: int = 64) -> Tensor:
    """Return (N,) the top answer of each pair under `plan`, over the whole vocabulary, with gates hard."""
    modules = list(modules_of(plan))
    training = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        found = [pairs.logits(plan, rows).argmax(-1) for rows in torch.split(torch.arange(len(pairs)), batch_size)]
    finally:
        for module, was in zip(modules, training, strict=True):
            module.train(was)
    return torch.cat(found)


def evaluate(plan: Plan, pairs: PairData, *, batch_size: int = 64) -> Score:
    """Return the share of pairs whose top answer under `plan` is their counterfactual label."""
    right = (predict(plan, pairs, batch_size=batch_size) == pairs.labels).tolist()
    low, high = wilson(sum(right), len(pairs))
    by_kind: dict[str, list[bool]] = {}
    for kind, hit in zip(pairs.kinds, right, strict=False):
        by_kind.setdefault(kind, []).append(hit)
    kinds = {kind: sum(hits) / len(hits) for kind, hits in sorted(by_kind.items())}
    return Score(len(pairs), sum(right) / len(pairs), low, high, kinds)
