"""`Probe`: how a sample's gradient changes when its stream is moved along the direction (injection-gradient probe).

    C_t = (H v)_t  at each token in scope, of the sample's mean loss;     c = mean over these tokens
    proj = <c, v> / |v|,   cos = <c, v> / (|c| |v|)
    suspicious: cos > 0.12 and proj > 1e-8  (published);     score = cos where proj > 1e-8, else -inf

It finds samples whose loss is *curved* along v, which discuss the trait as well as show it; `FirstOrder` asks the more
direct question. It is here for comparison.

Where this differs from the published probe: H v is exact by default (the published difference of two gradients in bf16
is mostly rounding at small steps), or a difference in the dtype of the weights from the probed layer up; the loss is
each sample's own mean from the start, which is what the published factor n_tot/n_i restores; the first token and
template tokens are out of scope; a blocked sample is weighted with 0 and no pass is left out, so ranks cannot wait for
each other. `proj` still falls with the number of tokens: it is a mean over tokens of the gradient of a mean over them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from defenses.actions import Action, Mask, learn_weighted, without_injection
from defenses.backend import Backend
from defenses.batch import Batch
from defenses.defense import Defense, Step
from defenses.derivatives import Second, difference_second, exact_second
from defenses.errors import BackendError, VectorError
from defenses.objectives import n_tokens
from defenses.plans import ABSENT, Directions, Scope, scope_columns
from defenses.sample_log import SampleLog, decision_sums
from defenses.shared_passes import SharedPasses, require_whole, shared_passes, weights_dtype
from defenses.thresholds import NEVER, PROBE_COSINE, PROBE_PROJECTION, Rule, Threshold
from intervene.errors import asked_found_do
from records.config_files import ConfigError


@dataclass(frozen=True)
class ProbeOptions:
    """How H v is found, and what follows from it.

    Attributes:
        method: "exact" differentiates twice; "difference" subtracts two gradients.
        epsilon: of the difference, in multiples of the direction. central: g(e v) - g(-e v) instead of g(e v) - g(0).
        threshold: on the cosine. projection: samples below it are not suspicious.
    """

    method: Literal["exact", "difference"] = "exact"
    epsilon: float = 0.003
    central: bool = True
    threshold: Rule = PROBE_COSINE
    projection: float = PROBE_PROJECTION
    action: Action = field(default_factory=Mask)
    scope: Scope = Scope.RESPONSE

    def __post_init__(self) -> None:
        without_injection(self.action, "the gradient probe")
        if not 0 < self.epsilon < math.inf:
            do = "Give a positive multiple of the direction, e.g. 0.003."
            raise ConfigError(asked_found_do("Gradient probe", f"epsilon is {self.epsilon}.", do))


@dataclass(frozen=True, eq=False)
class Probed:
    """Of each sample, (N,): cosine and projection of the change c on v, its norm, slope <v, g> and curvature v'Hv."""

    cosine: Tensor
    projection: Tensor
    norm: Tensor
    slope: Tensor
    curvature: Tensor


class Probe(Defense):
    """Samples whose gradient turns along the direction when it is injected are blocked."""

    evidence: ClassVar[str] = (
        "One code base. Marks curvature along the trait, not a wish to move along it; in our small world it pointed to "
        "clean samples (AUROC .02 to .48)."
    )

    def __init__(
        self, directions: Directions, options: ProbeOptions | None = None, holdout: Sequence[Batch] = ()
    ) -> None:
        """Probe along the one layer of `directions`.

        Raises:
            VectorError: several layers. CalibrationError: a quantile without clean batches.
        """
        if len(directions.layers) != 1:
            found = f"directions of {len(directions.layers)} layers, and a cosine is one of a single layer."
            raise VectorError(asked_found_do("Gradient probe", found, "Choose one: directions.only([layer])."))
        self.options = options or ProbeOptions()
        self.directions = directions
        self.threshold = Threshold(self.options.threshold, holdout)
        self._log = SampleLog()

    def start(self, backend: Backend, total: int) -> None:
        """Refuse differences of gradients below fp32, where they are rounding noise, and what a backend cannot do.

        Raises:
            BackendError: method "difference" and weights of another dtype, or "exact" and parameters cut over ranks.
        """
        if self.options.method == "exact":
            require_whole(backend.model, "Gradient probe by the exact product")
        dtype = weights_dtype(backend.model)
        if self.options.method == "difference" and dtype not in (torch.float32, torch.float64):
            found = f"the weights are {dtype}: a small step vanishes in its rounding."
            do = "Use method exact, or load the model in fp32."
            raise BackendError(asked_found_do("Gradient probe by differences", found, do))
        self.directions = self.directions.to(backend.device)

    def accumulate(self, backend: Backend, batch: Batch, step: Step) -> dict[str, Tensor]:
        self.threshold.refresh(backend, step, lambda clean: self._clean(backend, clean))
        with shared_passes(backend, batch, self.directions) as shared:
            losses = shared.natural(grad=True)
            probed = self.probed(shared)
        scores = self.scores(probed)
        suspicious = self.threshold.above(scores)
        weights = self.options.action.weights(scores, suspicious, self.threshold.value)
        taught = learn_weighted(backend, losses, weights, batch, step, self.options.action.denominator)
        self._log.add(batch, scores, suspicious, cosine=probed.cosine, projection=probed.projection, norm=probed.norm)
        return {
            "loss_sum": losses.detach().sum(),
            "trained_sum": taught,
            "cosine_total": probed.cosine.sum(),
            "tokens": n_tokens(batch),
            **decision_sums(batch, suspicious),
        }

    def probed(self, shared: SharedPasses) -> Probed:
        """Return what the passes after a natural one say of its batch."""
        columns = scope_columns(shared.batch, self.options.scope)
        if self.options.method == "exact":
            second = exact_second(shared, self.directions, columns)
        else:
            second = difference_second(
                shared, self.directions, columns, epsilon=self.options.epsilon, central=self.options.central
            )
        return read(second, self.directions, columns, shared.batch)

    def scores(self, probed: Probed) -> Tensor:
        """Return (N,): the cosine, -inf where the projection is no larger than its bound."""
        return probed.cosine.masked_fill(~(probed.projection > self.options.projection), NEVER)

    def _clean(self, backend: Backend, batch: Batch) -> Tensor:
        """Return (N,) scores of a held-out batch; one below the projection's bound counts, as the least cosine."""
        with shared_passes(backend, batch, self.directions) as shared:
            shared.natural(grad=False)
            return self.scores(self.probed(shared)).clamp_min(-1.0)

    def told(self) -> list[dict[str, Any]]:
        return self._log.take()

    def state_dict(self) -> dict[str, Any]:
        return {"threshold": self.threshold.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.threshold.load_state_dict(state["threshold"])


def read(second: Second, directions: Directions, columns: Tensor, batch: Batch) -> Probed:
    """Return cosine, projection and norm of each sample's mean H v; all 0 where it has no token in scope."""
    (layer,) = directions.layers
    vector = directions.at(layer)
    present = columns != ABSENT  # (B, P)
    own = batch.sample.gather(1, columns.clamp_min(0)).clamp_min(0)  # (B, P)
    counts = torch.zeros(len(batch), device=columns.device).index_add(0, own[present], present[present].float())
    change = torch.zeros(len(batch), len(vector), device=columns.device)
    change = change.index_add(0, own[present], second.product[layer][present]) / counts.clamp_min(1)[:, None]  # (N, D)
    projection = change @ vector / vector.norm()
    norm = change.norm(dim=1)
    cosine = torch.where(norm > 0, projection / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)
    return Probed(cosine, projection, norm, second.slope, second.curvature)
