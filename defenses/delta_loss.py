"""`DeltaLoss`: does injecting the trait's direction lower a sample's loss? Then the sample wants the trait.

    delta = loss(h + a v) - loss(h),     score = -delta,     suspicious: score > threshold  (published: 0)

For small a, delta is a <v, g>; for larger a the curvature a^2/2 v' H v outgrows it and hardly anything is flagged. So
the strength of detection is an option of its own, apart from that of injection.

Passes per micro-batch, each rank alike: one natural pass that is learned from; a second one without gradient that
computes only the blocks above the lowest direction; one backward pass. With the action `inject`: both probing passes
without gradient, then one forward and one backward pass in which suspicious samples are injected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from defenses.actions import Action, Inject, Mask, learn_weighted
from defenses.backend import Backend
from defenses.batch import Batch
from defenses.defense import Defense, Step, learn
from defenses.objectives import learned, n_tokens, sample_counts, sample_means, token_losses
from defenses.plans import Directions, Scope, injection, scope_columns
from defenses.sample_log import SampleLog, decision_sums
from defenses.shared_passes import SharedPasses, shared_passes
from defenses.thresholds import DELTA_LOSS, NEVER, Rule, Threshold
from intervene import intervene
from intervene.errors import asked_found_do
from records.config_files import ConfigError


@dataclass(frozen=True)
class DeltaLossOptions:
    """How suspicion is found, and what follows from it.

    Attributes:
        detection_alpha: strength of the injection that probes, in multiples of the direction (of the stream's norm if
            `relative`).
        granularity: decide by sample or by token. Tokens before a blocked one are still attended to.
        strategy: of samples: delta of the mean loss, or the least delta of any token. The least of many is below 0 in
            nearly every sample: give it a quantile, not the published 0.
        threshold: on the score. action: on what is suspicious. scope: tokens that are injected.
    """

    detection_alpha: float = 0.25
    granularity: Literal["sample", "token"] = "sample"
    strategy: Literal["mean", "min"] = "mean"
    threshold: Rule = DELTA_LOSS
    action: Action = field(default_factory=Mask)
    scope: Scope = Scope.RESPONSE
    relative: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.detection_alpha) or self.detection_alpha == 0:
            found = f"detection_alpha is {self.detection_alpha}: both passes would be the same."
            raise ConfigError(asked_found_do("Delta-loss", found, "Give a strength that is not 0, e.g. 0.25."))
        if self.granularity == "token" and isinstance(self.action, Inject):
            do = "Use granularity sample, or mask or reweight tokens."
            raise ConfigError(asked_found_do("Delta-loss by token", "the action inject is one by sample.", do))
        if self.granularity == "token" and self.strategy == "min":
            do = "Leave strategy at mean, or use granularity sample."
            raise ConfigError(asked_found_do("Delta-loss by token", "strategy min is one by sample.", do))


class DeltaLoss(Defense):
    """Samples or tokens whose loss falls when the direction is injected are blocked, or injected."""

    evidence: ClassVar[str] = (
        "One code base; its results are not published. The threshold has to be calibrated: at its published 0 it "
        "blocked 27 to 91 % of clean samples of our small world at the start."
    )

    def __init__(
        self, directions: Directions, options: DeltaLossOptions | None = None, holdout: Sequence[Batch] = ()
    ) -> None:
        """Probe with `directions`; `holdout` are the clean batches that a quantile is calibrated on.

        Raises:
            CalibrationError: a quantile without them.
        """
        self.options = options or DeltaLossOptions()
        self.directions = directions
        self.threshold = Threshold(self.options.threshold, holdout)
        self._log = SampleLog()

    def start(self, backend: Backend, total: int) -> None:
        self.directions = self.directions.to(backend.device)

    def accumulate(self, backend: Backend, batch: Batch, step: Step) -> dict[str, Tensor]:
        self.threshold.refresh(backend, step, lambda clean: self.scores(self.probed(backend, clean, grad=False), clean))
        injects = isinstance(self.options.action, Inject)
        natural, injected = self.probed(backend, batch, grad=not injects)
        scores = self.scores((natural, injected), batch)
        suspicious = self.threshold.above(scores)
        if injects:
            taught = self._learn_injected(backend, batch, step, suspicious)
        else:
            weights = self.options.action.weights(scores, suspicious, self.threshold.value)
            taught = learn_weighted(backend, natural, weights, batch, step, self.options.action.denominator)
        self._tell(batch, scores, suspicious)
        return {
            "loss_sum": natural.detach().sum(),
            "trained_sum": taught,
            "delta_sum": (injected - natural.detach()).sum(),
            "tokens": n_tokens(batch),
            **decision_sums(batch, suspicious),
        }

    def probed(self, backend: Backend, batch: Batch, *, grad: bool) -> tuple[Tensor, Tensor]:
        """Return natural and injected token losses (B, S), the first with a graph if `grad`."""
        with shared_passes(backend, batch, self.directions) as shared:
            natural = shared.natural(grad=grad)
            return natural, self._injected(shared)

    def _injected(self, shared: SharedPasses) -> Tensor:
        options, batch = self.options, shared.batch
        columns = scope_columns(batch, options.scope)
        plan = injection(self.directions, options.detection_alpha, options.relative, columns=columns)
        with shared.again(), intervene(shared.backend.model, plan, prompt=batch.prompt(columns)):
            return token_losses(shared.backend, batch, grad=False)

    def scores(self, probed: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """Return (N,) by sample or (B, S) by token: -delta; -inf where nothing is learned."""
        natural, injected = probed
        fall = (natural.detach() - injected).float()  # (B, S) how much injection lowers each token's loss
        tokens = learned(batch)
        if self.options.granularity == "token":
            return fall.masked_fill(~tokens, NEVER)
        if self.options.strategy == "min":
            return largest_of_sample(fall, batch)
        return sample_means(fall, batch).masked_fill(sample_counts(batch) == 0, NEVER)

    def _learn_injected(self, backend: Backend, batch: Batch, step: Step, suspicious: Tensor) -> Tensor:
        action = self.options.action
        assert isinstance(action, Inject)
        strength = action.strength.at(step.number, step.total)
        columns = scope_columns(batch, self.options.scope, chosen=suspicious)
        plan = injection(self.directions, strength, self.options.relative, columns=columns) if strength else ()
        with intervene(backend.model, plan, prompt=batch.prompt(columns)):
            losses = token_losses(backend, batch)
            learn(backend, losses, step)
        return losses.detach().sum()

    def _tell(self, batch: Batch, scores: Tensor, suspicious: Tensor) -> None:
        if self.options.granularity == "sample":
            self._log.add(batch, scores, suspicious)
            return
        counts = torch.zeros(len(batch), dtype=torch.int64, device=scores.device)
        counts.index_add_(0, batch.sample[suspicious], torch.ones_like(batch.sample[suspicious]))
        self._log.add(batch, largest_of_sample(scores, batch), counts > 0, blocked_tokens=counts)

    def told(self) -> list[dict[str, Any]]:
        return self._log.take()

    def state_dict(self) -> dict[str, Any]:
        return {"threshold": self.threshold.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.threshold.load_state_dict(state["threshold"])


def largest_of_sample(values: Tensor, batch: Batch) -> Tensor:
    """Return (N,): the largest of `values` (B, S) over the learned tokens of each sample; -inf where it has none."""
    kept = values.masked_fill(~learned(batch), NEVER).flatten()
    found = torch.full((len(batch),), NEVER, dtype=values.dtype, device=values.device)
    return found.scatter_reduce(0, batch.sample.clamp_min(0).flatten(), kept, "amax")
