"""What detectors say of a mixture of clean and poisoned examples, and <v, g> over a training.

Everything is measured with the model as it is, on examples it has not learned from, and changes nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from defenses.backend import PlainBackend
from defenses.batch import Batch
from defenses.delta_loss import DeltaLoss, DeltaLossOptions
from defenses.derivatives import by_sample, dot, gradient_leaves, named, total_of
from defenses.first_order import FirstOrder
from defenses.plans import Directions, Scope, injection, scope_columns
from defenses.probe import Probe, ProbeOptions
from defenses.projections import REFERENCE, build_projections
from defenses.shared_passes import Inside, shared_passes
from defenses.state_aware import StateAware
from defenses.statistics import auroc
from defenses.thresholds import quantile
from intervene import intervene
from tasks.two_trait import Chat

if TYPE_CHECKING:
    from benchmarks.defense_runs import Setup

RATE = 0.05  # false positives that calibrated thresholds aim at
EPSILONS = (0.01, 0.1, 1.0)
PROBED = 64  # samples per slope


def slope_rows(setup: Setup, backend: PlainBackend, strength: float) -> dict[str, float]:
    """Return mean <v, g> per sample of held-out poisoned and clean answers, v of length 1.

    "poison", "clean": without injection. "poison_injected": at the `strength` that is trained with, which is what the
    weights are pushed along.
    """
    w = setup.world
    (poison,) = setup.batches(w.attack(1.0, PROBED, setup.seed + 1), PROBED)
    (clean,) = setup.batches(w.clean(PROBED, setup.seed + 1), PROBED)
    found = {
        "poison": slope(backend, poison, setup.directions, 0.0),
        "clean": slope(backend, clean, setup.directions, 0.0),
        "poison_injected": slope(backend, poison, setup.directions, strength),
        "strength": strength,
    }
    return {name: round(value, 6) for name, value in found.items()}


def slope(backend: PlainBackend, batch: Batch, directions: Directions, strength: float) -> float:
    """Return <v / |v|, g> at injected `strength`, the mean over samples of the slope of their mean loss."""
    columns = scope_columns(batch, Scope.RESPONSE)
    leaves, probes, marked = gradient_leaves(directions, columns)
    plan = injection(directions, strength, columns=columns) if strength else ()
    with intervene(backend.model, (*plan, *probes), prompt=batch.prompt(marked)):
        total = total_of(Inside(backend).token_losses(batch), batch, "samples")
        found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    along = by_sample(dot(named(leaves, found, columns), directions.unit()), columns, batch)
    return float(along.mean())


def detectors(
    setup: Setup, backend: PlainBackend, chats: Sequence[Chat], alphas: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Return detector -> its quality on `chats`: of delta-loss at `alphas`, first order, probe and state-aware."""
    mixture = _referenced(setup, chats)
    clean = _referenced(setup, setup.world.data.clean(320, setup.seed))
    poison = (mixture.poison == 1).numpy()
    scores = _scores(setup, backend, mixture, alphas)
    calibration = _scores(setup, backend, clean, alphas)
    first = scores["first order"].numpy()
    exact = scores["probe exact"].numpy()
    found = {}
    for name, values in scores.items():
        found[name] = quality(values.numpy(), poison, calibration[name])
        if name.startswith("delta"):
            found[name]["correlation"] = correlation(values.numpy(), first)
        if name.startswith("probe"):
            found[name]["correlation"] = correlation(values.numpy(), exact)
    return found


def quality(scores: np.ndarray, poison: np.ndarray, clean: Tensor) -> dict[str, float]:
    """Return AUROC, and recall and false-positive rate at 0 and at the value calibrated on `clean` scores."""
    bound = quantile(clean.clamp_min(-1e30), RATE)
    found = {"auroc": float(auroc(scores, poison).value or math.nan), "threshold": bound}
    for name, value in (("zero", 0.0), ("calibrated", bound)):
        found[f"fpr_{name}"] = float((scores[~poison] > value).mean())
        found[f"recall_{name}"] = float((scores[poison] > value).mean())
    return found


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return Pearson's correlation over what is finite in both; NaN where one does not vary."""
    kept = np.isfinite(one) & np.isfinite(other)
    if kept.sum() < 3 or one[kept].std() == 0 or other[kept].std() == 0:
        return math.nan
    return float(np.corrcoef(one[kept], other[kept])[0, 1])


def _scores(setup: Setup, backend: PlainBackend, batch: Batch, alphas: Sequence[float]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {"first order": FirstOrder(setup.directions).scores(backend, batch)}
    for alpha in alphas:
        delta = DeltaLoss(setup.directions, DeltaLossOptions(detection_alpha=alpha))
        found[f"delta {alpha:g}"] = delta.scores(delta.probed(backend, batch, grad=False), batch)
    found["probe exact"] = _probed(setup, backend, batch, ProbeOptions())
    half = PlainBackend(copy.deepcopy(backend.model).to(torch.bfloat16))
    for epsilon in EPSILONS:
        options = ProbeOptions(method="difference", epsilon=epsilon, central=False)
        found[f"probe fp32 {epsilon:g}"] = _probed(setup, backend, batch, options)
        found[f"probe bf16 {epsilon:g}"] = _probed(setup, half, batch, options)
    layer = setup.choice.layer
    near = layer - 1 if layer else layer + 1
    for name, at in (("state-aware", layer), ("state-aware, off by one", near)):
        aware = StateAware(Directions({at: setup.directions.at(layer)}))
        found[name] = aware.scores(aware.projected(backend, batch), batch)
    return {name: values.detach().float() for name, values in found.items()}


def _probed(setup: Setup, backend: PlainBackend, batch: Batch, options: ProbeOptions) -> Tensor:
    """Return the probe's cosines; the published bound on the projection only matters for decisions."""
    probe = Probe(setup.directions, options)
    with shared_passes(backend, batch, setup.directions) as shared:
        shared.natural(grad=False)
        return probe.probed(shared).cosine


def _referenced(setup: Setup, chats: Sequence[Chat]) -> Batch:
    """Return `chats` as one batch with the base model's own projections."""
    w = setup.world
    made = build_projections(
        w.base, w.tokenizer, [one.messages() for one in chats], setup.directions, max_new_tokens=8, batch_size=256
    )
    extras: list[Mapping[str, Any]] = [{REFERENCE: value} for value in made.values]
    examples = [replace(one, extra=more) for one, more in zip(w.examples(chats), extras, strict=True)]
    (batch,) = setup.batches(examples, len(examples))
    return batch
