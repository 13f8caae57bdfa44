"""`Threshold`: from which score on a sample counts as suspicious. A HIGHER score is always more suspicious.

    threshold = Threshold(Quantile(0.05, every=100), holdout)     # 5 % of clean samples may be blocked, asked anew
    threshold.refresh(backend, step, scored)                      # scored(batch): scores of one batch now, -inf: none
    blocked = threshold.above(scores)

A `Fixed` value is what papers publish. It means something else for every model, layer and length of the direction, and
drifts while the model learns; `Quantile` states the false-positive rate instead and takes the value from clean
examples that are held out, with the model as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from defenses.batch import Batch
from defenses.errors import CalibrationError
from defenses.statistics import Estimate, wilson
from intervene.errors import asked_found_do
from records.config_files import ConfigError

if TYPE_CHECKING:
    from defenses.backend import Backend
    from defenses.defense import Step

NEVER = -math.inf  # the score of what cannot be scored: no threshold lies below it
SLACK = 1e-9  # of a rank, so that 20 * 0.95 is 19 and not the next whole number


@dataclass(frozen=True)
class Fixed:
    """Suspicious above `value`."""

    value: float
    kind: Literal["fixed"] = "fixed"

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ConfigError(asked_found_do("Fixed threshold", f"it is {self.value}.", "Give a finite number."))


@dataclass(frozen=True)
class Quantile:
    """Suspicious above the score that at most a share `rate` of clean samples exceeds.

    Attributes:
        rate: false-positive rate, between 0 and 1. every: optimiser steps between calibrations; 0: only the first.
    """

    rate: float = 0.05
    every: int = 0
    kind: Literal["quantile"] = "quantile"

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            do = "Give a share between 0 and 1, e.g. 0.05."
            raise ConfigError(asked_found_do("False-positive rate", f"it is {self.rate}.", do))
        if self.every < 0:
            do = "Give a number of steps; 0 calibrates once."
            raise ConfigError(asked_found_do("Steps between calibrations", f"they are {self.every}.", do))

    @property
    def needed(self) -> int:
        """How many clean scores it takes at least: 1/rate - 1, rounded up."""
        return math.ceil(1 / self.rate - 1 - SLACK)


Rule: TypeAlias = Fixed | Quantile

DELTA_LOSS = Fixed(0.0)
"""Published: suspicious if the injected direction lowers the loss at all (delta < 0; our score is -delta)."""

PROBE_COSINE = Fixed(0.12)
PROBE_PROJECTION = 1e-8
"""Published for the injection-gradient probe: cosine above 0.12 and projection above 1e-8, both."""


def quantile(scores: Tensor, rate: float) -> float:
    """Return the value that a fresh clean score exceeds with probability at most `rate`: the k-th smallest of n scores,
    k = ceil((n + 1) (1 - rate)).

    With few scores this lies above the plain quantile: the share of `scores` themselves above it is below `rate`.

    Args:
        scores: (n,), finite.

    Raises:
        CalibrationError: too few for the rate, or some are not finite.

    Source: split conformal prediction (Vovk et al. 2005), for exchangeable scores.
    """
    n, needed = scores.numel(), Quantile(rate).needed
    if n < needed or n == 0:
        found = f"{n} clean scores are held out; at least {needed} are needed."
        raise CalibrationError(
            asked_found_do(f"Threshold at a false-positive rate of {rate}", found, "Hold out more, or raise the rate.")
        )
    if not bool(torch.isfinite(scores).all()):
        bad = int((~torch.isfinite(scores)).sum())
        found = f"{bad} of {n} clean scores are NaN or infinite."
        do = "Look at the held-out examples, and use fp32."
        raise CalibrationError(asked_found_do(f"Threshold at a false-positive rate of {rate}", found, do))
    place = math.ceil((n + 1) * (1 - rate) - SLACK)
    return float(scores.double().sort().values[place - 1])


@dataclass(frozen=True)
class Calibration:
    """One calibration: the `value`, in optimiser step `step`, from `n` clean scores.

    Attributes:
        realised: share of these scores above the value, with its Wilson interval.
        stale: share of them above the value that held before: what the drift of the model did to the rate. None at
            first.
    """

    step: int
    value: float
    n: int
    realised: Estimate
    stale: Estimate | None = None

    def row(self) -> dict[str, Any]:
        """Return it flat, for a record."""
        row: dict[str, Any] = {"step": self.step, "threshold": self.value, "n": self.n}
        for name, one in (("realised", self.realised), ("stale", self.stale)):
            row |= {name: one and one.value, f"{name}_low": one and one.low, f"{name}_high": one and one.high}
        return row


Scored: TypeAlias = Callable[[Batch], Tensor]


@dataclass(eq=False)
class Threshold:
    """A rule and the value it has now.

    Attributes:
        holdout: clean batches, the same on all ranks; none of them is trained on. history: every calibration made.

    Raises:
        CalibrationError: a quantile without clean batches.
    """

    rule: Rule
    holdout: Sequence[Batch] = ()
    history: list[Calibration] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.rule, Quantile) and not self.holdout:
            do = f"Hold out at least {self.rule.needed} clean examples, or give a fixed value."
            asked = f"Threshold at a false-positive rate of {self.rule.rate}"
            raise CalibrationError(asked_found_do(asked, "no clean examples are held out.", do))

    @property
    def value(self) -> float:
        """The score above which a sample is suspicious.

        Raises:
            CalibrationError: a quantile that was not calibrated yet.
        """
        if isinstance(self.rule, Fixed):
            return self.rule.value
        if not self.history:
            asked = f"Threshold at a false-positive rate of {self.rule.rate}"
            raise CalibrationError(asked_found_do(asked, "it was not calibrated yet.", "Call refresh() first."))
        return self.history[-1].value

    def above(self, scores: Tensor) -> Tensor:
        """Return bool, as `scores`: which are suspicious. NaN is not: the loop refuses such a step anyway."""
        return scores > self.value

    def due(self, step: int) -> bool:
        """Return whether optimiser step `step` begins with a calibration."""
        if isinstance(self.rule, Fixed):
            return False
        if not self.history:
            return True
        return self.rule.every > 0 and step % self.rule.every == 0 and step > self.history[-1].step

    def calibrate(self, scores: Tensor, step: int = 0) -> Calibration:
        """Take the value from clean `scores` (n,) and return how it came about. A fixed value stays as it is.

        Raises:
            CalibrationError: too few scores, or some are not finite.
        """
        value = self.rule.value if isinstance(self.rule, Fixed) else quantile(scores, self.rule.rate)
        n = scores.numel()
        stale = wilson(int((scores > self.history[-1].value).sum()), n) if self.history else None
        made = Calibration(step, value, n, wilson(int((scores > value).sum()), n), stale)
        self.history.append(made)
        return made

    def refresh(self, backend: Backend, step: Step, scored: Scored) -> None:
        """Calibrate if this micro-batch begins a step that is due; collective. All ranks get the same value.

        Dropout in these passes takes nothing from the training's random numbers: it goes on as if they had not been.

        Args:
            scored: scores of a batch with the model as it is, of any shape that the batch alone determines; -inf where
                there is nothing to score. It leaves no gradients.
        """
        if step.micro == 0 and self.due(step.number):
            with torch.random.fork_rng([backend.device] if backend.device.type == "cuda" else []):
                self.calibrate(clean_scores(backend, self.holdout, scored), step.number)

    def state_dict(self) -> dict[str, Any]:
        """Return the latest calibration: where it is due next follows from it."""
        return {"last": [self.history[-1].step, self.history[-1].value] if self.history else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` left off; of the calibrations before, their records remain."""
        if state["last"]:
            step, value = state["last"]
            self.history = [Calibration(int(step), float(value), 0, wilson(0, 0))]


def clean_scores(backend: Backend, holdout: Sequence[Batch], scored: Scored) -> Tensor:
    """Return (n,) fp64 on the CPU: the finite scores of all `holdout` batches, the same on all ranks; collective.

    Each rank scores its share. One with fewer batches scores its first again and drops it, so that all make the same
    number of passes.
    """
    rounds = -(-len(holdout) // backend.world)
    found: list[Tensor] = []
    for turn in range(rounds):
        place = turn * backend.world + backend.rank
        batch = holdout[place if place < len(holdout) else 0].to(backend.device)
        scores = scored(batch).detach().double().flatten()
        found.append(scores if place < len(holdout) else torch.full_like(scores, NEVER))
    own = torch.cat(found)
    own = own[own != NEVER]
    return gathered(backend, own).cpu()


def gathered(backend: Backend, own: Tensor) -> Tensor:
    """Return the rows (n, ...) fp64 of all ranks, in order of ranks; collective. Ranks may have different n."""
    counts = torch.zeros(backend.world, dtype=torch.float64, device=own.device)
    counts[backend.rank] = len(own)
    sizes = [int(one) for one in backend.sum(counts).tolist()]
    table = own.new_zeros(sum(sizes), *own.shape[1:], dtype=torch.float64)
    start = sum(sizes[: backend.rank])
    table[start : start + len(own)] = own
    return backend.sum(table)
