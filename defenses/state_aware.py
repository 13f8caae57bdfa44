"""State-aware training: an answer that lies farther along the trait than the model's own would is not learned.

    score = p - ref        p: mean activation of the answer, projected on v, in the very pass that is learned from
                           ref: the same of the base model's own answer, from `build_projections`

This is the projection difference of persona vectors with a live first term: late in training it mixes what the data
are with what the model has become, which a `Quantile` threshold calibrated anew follows and a fixed one does not.

p goes over all assistant turns that are learned, ref over an answer to the last turn alone. For conversations of
several turns read the data with `learn="last_assistant"`, or the two are means of different things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from defenses.actions import Action, Mask, learn_weighted, without_injection
from defenses.backend import Backend
from defenses.batch import Batch
from defenses.defense import Defense, Step
from defenses.errors import DataError
from defenses.objectives import n_tokens, sample_sums, token_losses
from defenses.plans import ABSENT, Directions, Scope, scope_columns
from defenses.projections import REFERENCE, one_layer
from defenses.sample_log import SampleLog, decision_sums
from defenses.thresholds import NEVER, Fixed, Rule, Threshold
from intervene import capture
from intervene.errors import asked_found_do


@dataclass(frozen=True)
class StateAwareOptions:
    """What is compared, and what follows.

    Attributes:
        layer: 0-based, of the direction; None where there is only one. threshold: on the score, in units of <h, v>;
            published: 0, at which the share of benign data that is blocked is anyone's guess. action: on what lies
            above it. column: of the data, with the reference.
    """

    layer: int | None = None
    threshold: Rule = Fixed(0.0)  # noqa: RUF009 (frozen)
    action: Action = field(default_factory=Mask)
    column: str = REFERENCE

    def __post_init__(self) -> None:
        without_injection(self.action, "State-aware")


class StateAware(Defense):
    """Samples whose answer lies beyond the base model's own along the direction are blocked or reweighted.

    One forward and one backward pass per micro-batch, as in plain training. A sample without answer text has score
    -inf and is never blocked.

    Source: the "state-aware" mode of Guan et al., EMNLP 2026 Findings, who without the column train plainly and say
        nothing; here that is an error. Projection difference: Chen et al. 2025 (arXiv 2507.21509).
    """

    evidence: ClassVar[str] = (
        "The difference of whole data sets foretells the trait (r .88-.95, 2507.21509); that a threshold on single "
        "samples keeps it out is not shown."
    )

    def __init__(
        self, directions: Directions, options: StateAwareOptions | None = None, holdout: Sequence[Batch] = ()
    ) -> None:
        """Compare along `directions`, those the references were built with; `holdout`: clean batches, for a quantile.

        Raises:
            VectorError: no such layer, or several and none named. CalibrationError: a quantile without holdout.
        """
        self.options = options or StateAwareOptions()
        self.layer = one_layer(directions, self.options.layer)
        self.directions = directions.only([self.layer])
        self.site = directions.site(self.layer)
        self.threshold = Threshold(self.options.threshold, holdout)
        self._log = SampleLog()

    def start(self, backend: Backend, total: int) -> None:
        self.directions = self.directions.to(backend.device)

    def accumulate(self, backend: Backend, batch: Batch, step: Step) -> dict[str, Tensor]:
        self.threshold.refresh(backend, step, lambda clean: self.scores(self.projected(backend, clean), clean))
        with capture(backend.model, [self.site]) as acts:
            losses = token_losses(backend, batch)
            projection = self._along(acts[self.site], batch)
            scores = self.scores(projection, batch)
            suspicious = self.threshold.above(scores)
            weights = self.options.action.weights(scores, suspicious, self.threshold.value)
            # inside: a checkpointed block is run again, and only an open capture knows that it is
            taught = learn_weighted(backend, losses, weights, batch, step, self.options.action.denominator)
        self._log.add(batch, scores, suspicious, projection=projection, reference=batch.extra[self.options.column])
        return {
            "loss_sum": losses.detach().sum(),
            "trained_sum": taught,
            "tokens": n_tokens(batch),
            **decision_sums(batch, suspicious),
        }

    def projected(self, backend: Backend, batch: Batch) -> Tensor:
        """Return (N,): the projection of each sample's answer, -inf where it has no text; a pass without gradient."""
        with capture(backend.model, [self.site]) as acts:
            token_losses(backend, batch, grad=False)
        return self._along(acts[self.site], batch)

    def _along(self, stream: Tensor, batch: Batch) -> Tensor:
        along = stream.detach().float() @ self.directions.at(self.layer)  # (B, S)
        columns = scope_columns(batch, Scope.RESPONSE)
        mask = torch.zeros_like(along)
        rows, slots = (columns != ABSENT).nonzero(as_tuple=True)
        mask[rows, columns[rows, slots]] = 1.0
        counts = sample_sums(mask, batch)  # (N,)
        means = sample_sums(along * mask, batch) / counts.clamp_min(1)
        return means.masked_fill(counts == 0, NEVER)

    def scores(self, projection: Tensor, batch: Batch) -> Tensor:
        """Return (N,): how far beyond its reference each sample's answer lies.

        Raises:
            DataError: the data have no references, or one that is not finite.
        """
        reference = batch.extra.get(self.options.column)
        if reference is None or not bool(torch.isfinite(reference).all()):
            found = "the data have no such column." if reference is None else "some are NaN or infinite."
            do = "Build them: train_defense.py build_projections."
            raise DataError(asked_found_do(f"Reference {self.options.column!r} of each example", found, do))
        return projection - reference

    def told(self) -> list[dict[str, Any]]:
        return self._log.take()

    def state_dict(self) -> dict[str, Any]:
        return {"threshold": self.threshold.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.threshold.load_state_dict(state["threshold"])
