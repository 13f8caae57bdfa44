"""`ClosedLoop`: preventative steering whose strength follows what the data asks for.

Injected at strength a, the slope of the loss along v is <v, g> + a v' H v to first order: it turns around, and with it
what training does to the trait, at a = -<v, g> / v' H v. So

    a* = kappa max(0, -<v, g>) / v' H v,    kappa > 1 pushes back a little,    a <- decay a + (1 - decay) a*

measured every few steps, without injection, on all samples of that step, and in force from the next one on: it depends
neither on the number of ranks nor on that of micro-batches. A rising schedule is this without the measurement.

At weights that have not learned anything alike, the loss is often not curved upwards along v, and then there is no such
a; the upper bound is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from defenses.backend import Backend
from defenses.batch import Batch
from defenses.defense import Defense, Step
from defenses.derivatives import difference_second, exact_second
from defenses.injection import learn_injected
from defenses.plans import Directions, Scope, injection, scope_columns
from defenses.shared_passes import require_whole, shared_passes
from intervene.errors import asked_found_do
from records.config_files import ConfigError


@dataclass(frozen=True)
class ClosedLoopOptions:
    """How the strength follows the measurement.

    Attributes:
        kappa: how far beyond the turning point. every: optimiser steps between measurements. decay: weight of the
            strength before, 0 up to 1; the first measurement is taken as it is.
        low, high: bounds, in multiples of the direction; the first step is learned at the lower one.
        method, epsilon: of v' H v, as in the gradient probe.
    """

    kappa: float = 1.5
    every: int = 10
    decay: float = 0.9
    low: float = 0.0
    high: float = 4.0
    scope: Scope = Scope.RESPONSE
    method: Literal["exact", "difference"] = "exact"
    epsilon: float = 0.003

    def __post_init__(self) -> None:
        sound = {
            "kappa above 0": 0 < self.kappa < math.inf,
            "every at least 1": self.every >= 1,
            "decay from 0 up to, not including, 1": 0 <= self.decay < 1,
            "bounds 0 <= low <= high": 0 <= self.low <= self.high < math.inf,
            "epsilon above 0": 0 < self.epsilon < math.inf,
        }
        for rule, holds in sound.items():
            if not holds:
                raise ConfigError(asked_found_do("Closed loop", f"found {self}.", f"Give {rule}."))


class ClosedLoop(Defense):
    """Every sample is injected, as strongly as it takes to turn the slope along the direction around."""

    evidence: ClassVar[str] = (
        "Of our own making, from the expansion of the loss to second order; not published. In our small world it "
        "went to its upper bound and cost most of the skill."
    )

    def __init__(self, directions: Directions, options: ClosedLoopOptions | None = None) -> None:
        """Inject `directions`; several layers are measured and injected together."""
        self.directions = directions
        self.options = options or ClosedLoopOptions()
        self.alpha = self.options.low
        self.begun = False  # whether anything was measured
        self._found = torch.zeros(2, dtype=torch.float64)  # slope and curvature of this step so far, on this rank

    def start(self, backend: Backend, total: int) -> None:
        """Move the directions to the model's device.

        Raises:
            BackendError: method "exact" and parameters that are cut over ranks.
        """
        if self.options.method == "exact":
            require_whole(backend.model, "Closed loop by the exact curvature")
        self.directions = self.directions.to(backend.device)

    def accumulate(self, backend: Backend, batch: Batch, step: Step) -> dict[str, Tensor]:
        if step.number % self.options.every == 0:
            self._found = self._found + self.measure(backend, batch)
        columns = scope_columns(batch, self.options.scope)
        plan = injection(self.directions, self.alpha, columns=columns) if self.alpha else ()
        return learn_injected(backend, batch, step, plan, columns, self.alpha)

    def measure(self, backend: Backend, batch: Batch) -> Tensor:
        """Return (2,) fp64 on the CPU: slope and curvature of the summed loss of this batch."""
        columns = scope_columns(batch, self.options.scope)
        with shared_passes(backend, batch, self.directions) as shared:
            shared.natural(grad=False)
            if self.options.method == "exact":
                found = exact_second(shared, self.directions, columns, of="tokens")
            else:
                found = difference_second(shared, self.directions, columns, epsilon=self.options.epsilon, of="tokens")
        return torch.stack([found.slope.sum(), found.curvature.sum()]).double().cpu()

    def after_step(self, backend: Backend, step: Step) -> None:
        if step.number % self.options.every:
            return
        slope, curvature = backend.sum(self._found).tolist()
        self._found = torch.zeros_like(self._found)
        wanted = wanted_strength(slope, curvature, self.options)
        decay = self.options.decay if self.begun else 0.0
        self.alpha, self.begun = decay * self.alpha + (1 - decay) * wanted, True

    def state_dict(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.alpha, self.begun = float(state["alpha"]), bool(state["begun"])


def wanted_strength(slope: float, curvature: float, options: ClosedLoopOptions) -> float:
    """Return a* within its bounds.

    Where the loss is not curved upwards along v it has no turning point: the upper bound if the sample moves along v,
    as infinitely far would be.
    """
    if not (math.isfinite(slope) and math.isfinite(curvature)) or slope >= 0:
        return options.low  # not finite: the loop refuses the step for its loss
    if curvature <= 0:
        return options.high
    return min(max(options.kappa * -slope / curvature, options.low), options.high)
