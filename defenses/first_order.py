"""`FirstOrder`: the directional derivative <v, g> of each sample's loss, read off the training backward for nothing.

    score = -<v, g>,    g = d(mean loss of the sample)/d(stream), summed over its tokens in scope

A positive score means that a step on the sample moves the stream along v: it wants the trait. It is what delta-loss
estimates with a second pass, without that pass and without a detection strength.

* "monitor": scores are told, nothing is changed. The passes of plain training.
* "next_epoch": a sample is blocked by the score it had when it was last learned; new samples are learned. The passes of
  plain training, and two small sums over ranks per step. A sample that is blocked has no gradient and keeps its score.
* "decide_then_learn": scored first, by a forward and a backward pass through the blocks above the lowest direction
  only, without gradients of parameters; then the training pass's backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from defenses.actions import Action, LogOnly, learn_weighted, without_injection
from defenses.backend import Backend
from defenses.batch import Batch
from defenses.defense import Defense, Step
from defenses.derivatives import Fields, by_sample, dot, gradient_leaves, named, slopes
from defenses.objectives import learned, n_tokens, sample_counts, spread, token_losses
from defenses.plans import Directions, Scope, scope_columns
from defenses.sample_log import SampleLog, decision_sums
from defenses.shared_passes import shared_passes
from defenses.thresholds import NEVER, Fixed, Rule, Threshold, gathered
from intervene import intervene
from intervene.errors import asked_found_do
from records.config_files import ConfigError


@dataclass(frozen=True)
class FirstOrderOptions:
    """When the score is used, and for what.

    Attributes:
        when: see the module. threshold: on -<v, g>, in nats per multiple of v; 0: every sample that moves along v.
        action: mask, reweight or log_only; a monitor only logs.
    """

    when: Literal["monitor", "next_epoch", "decide_then_learn"] = "monitor"
    threshold: Rule = field(default_factory=lambda: Fixed(0.0))
    action: Action = field(default_factory=LogOnly)
    scope: Scope = Scope.RESPONSE

    def __post_init__(self) -> None:
        without_injection(self.action, "the first-order detector")
        if self.when == "monitor" and not isinstance(self.action, LogOnly):
            found = f"the action is {self.action.kind}, and a monitor changes nothing."
            do = "Use when next_epoch or decide_then_learn, or the action log_only."
            raise ConfigError(asked_found_do("First-order detector as monitor", found, do))


class FirstOrder(Defense):
    """Samples whose gradient points along the direction are told, or blocked."""

    evidence: ClassVar[str] = "Follows from the delta-loss rule to first order; of our own making, not published."

    def __init__(
        self, directions: Directions, options: FirstOrderOptions | None = None, holdout: Sequence[Batch] = ()
    ) -> None:
        """Score along `directions`; `holdout` are the clean batches that a quantile is calibrated on.

        Raises:
            CalibrationError: a quantile without them.
        """
        self.options = options or FirstOrderOptions()
        self.directions = directions
        self.threshold = Threshold(self.options.threshold, holdout)
        self.memory = ScoreMemory()
        self._log = SampleLog()

    def start(self, backend: Backend, total: int) -> None:
        self.directions = self.directions.to(backend.device)

    def accumulate(self, backend: Backend, batch: Batch, step: Step) -> dict[str, Tensor]:
        self.threshold.refresh(backend, step, lambda clean: self.scores(backend, clean))
        if self.options.when == "decide_then_learn":
            losses, taught, scores, suspicious = self._scored_first(backend, batch, step)
        else:
            losses, taught, scores, suspicious = self._scored_by_learning(backend, batch, step)
        return {
            "loss_sum": losses.detach().sum(),
            "trained_sum": taught,
            "score_total": scores.masked_fill(scores == NEVER, 0.0).sum(),
            "tokens": n_tokens(batch),
            **decision_sums(batch, suspicious),
        }

    def scores(self, backend: Backend, batch: Batch) -> Tensor:
        """Return (N,) scores without a training pass; -inf where a sample has nothing to learn."""
        with shared_passes(backend, batch, self.directions) as shared:
            shared.natural(grad=False)
            found = slopes(shared, self.directions, scope_columns(batch, self.options.scope))
        return _scores(found, batch)

    def _scored_first(self, backend: Backend, batch: Batch, step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with shared_passes(backend, batch, self.directions) as shared:
            losses = shared.natural(grad=True)
            scores = _scores(slopes(shared, self.directions, scope_columns(batch, self.options.scope)), batch)
        suspicious = self.threshold.above(scores)
        weights = self.options.action.weights(scores, suspicious, self.threshold.value)
        taught = learn_weighted(backend, losses, weights, batch, step, self.options.action.denominator)
        self._log.add(batch, scores, suspicious)
        return losses, taught, scores, suspicious

    def _scored_by_learning(self, backend: Backend, batch: Batch, step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        monitors = self.options.when == "monitor"
        before = self.memory.look(batch.indices)  # (N,)
        suspicious = self.threshold.above(before)
        weights = self.options.action.weights(before, suspicious, self.threshold.value)
        columns = scope_columns(batch, self.options.scope)
        leaves, plan, marked = gradient_leaves(self.directions, columns)
        # A shift of each sample's losses by 0: its gradient is what the sample's mean loss is multiplied with in this
        # backward, the denominator, the weight and whatever the backend does to undo an average.
        factor = torch.zeros(len(batch), device=columns.device, requires_grad=True)
        with intervene(backend.model, plan, prompt=batch.prompt(marked)):
            losses = token_losses(backend, batch) + spread(factor, batch) * learned(batch)
            taught = learn_weighted(backend, losses, weights, batch, step, self.options.action.denominator)
        scores = self._read(leaves, factor, columns, batch)
        if monitors:
            suspicious = self.threshold.above(scores)
            self._log.add(batch, scores, suspicious)
        else:
            self.memory.note(batch.indices, scores)
            self._log.add(batch, scores, suspicious, decided_on=before)
        return losses, taught, scores, suspicious

    def _read(self, leaves: Fields, factor: Tensor, columns: Tensor, batch: Batch) -> Tensor:
        gradients = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
        assert factor.grad is not None and len(gradients) == len(leaves), "a backward pass without our leaves"
        along = by_sample(dot(named(leaves, gradients, columns), self.directions), columns, batch)
        return torch.where(factor.grad > 0, -along / factor.grad, NEVER)

    def after_step(self, backend: Backend, step: Step) -> None:
        if self.options.when == "next_epoch":
            self.memory.share(backend)

    def told(self) -> list[dict[str, Any]]:
        return self._log.take()

    def state_dict(self) -> dict[str, Any]:
        return {"threshold": self.threshold.state_dict(), "memory": self.memory.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.threshold.load_state_dict(state["threshold"])
        self.memory.load_state_dict(state["memory"])


def _scores(found: Tensor, batch: Batch) -> Tensor:
    return (-found).masked_fill(sample_counts(batch) == 0, NEVER)


class ScoreMemory:
    """The latest score of every example, the same on all ranks: in the next epoch another rank may get the example."""

    def __init__(self) -> None:
        """Know nothing."""
        self.known: dict[int, float] = {}
        self._fresh: list[Tensor] = []

    def look(self, indices: Tensor) -> Tensor:
        """Return (N,) fp32 scores of examples `indices` (N,); -inf where there is none."""
        found = [self.known.get(index, NEVER) for index in indices.tolist()]
        return torch.tensor(found, dtype=torch.float32, device=indices.device)

    def note(self, indices: Tensor, scores: Tensor) -> None:
        """Keep the finite ones of `scores` (N,) until `share`."""
        pairs = torch.stack([indices.double(), scores.double()], 1)
        self._fresh.append(pairs[torch.isfinite(scores)])

    def share(self, backend: Backend) -> None:
        """Make what was noted on any rank known on all; collective."""
        own = torch.cat(self._fresh) if self._fresh else torch.zeros(0, 2, dtype=torch.float64, device=backend.device)
        self._fresh = []
        for index, score in gathered(backend, own).tolist():
            self.known[int(index)] = score

    def state_dict(self) -> dict[str, Any]:
        """Return indices and scores, as tensors."""
        scores = torch.tensor(list(self.known.values()), dtype=torch.float64)
        return {"indices": torch.tensor(list(self.known), dtype=torch.int64), "scores": scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` left off."""
        self.known = dict(zip(state["indices"].tolist(), state["scores"].tolist(), strict=True))
        self._fresh = []
