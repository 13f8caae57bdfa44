"""What happens to a suspicious sample or token: `Mask`, `Reweight`, `Inject`, or `LogOnly`.

A detector gives scores, a `Threshold` decides, an action uses the decision. Every action leaves the number of passes as
it is: what is blocked gets weight 0.

The `denominator` says what a step's loss is divided by:

* "all" (default): by all learned tokens of the step. A blocked sample contributes 0, and the others keep the rate they
  have in plain training.
* "kept", as published: by the weight that is kept in this micro-batch, over all ranks, times the number of
  micro-batches. The others then learn at a higher rate the more is blocked,
  by 1/(share kept), and what is learned depends on how the step is cut into micro-batches.

Momentum and weight decay move the weights in either case, also where everything is blocked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from defenses.batch import Batch
from defenses.objectives import learned, spread
from defenses.schedules import Strength
from intervene.errors import asked_found_do
from records.config_files import ConfigError

if TYPE_CHECKING:
    from defenses.backend import Backend
    from defenses.defense import Step

Denominator: TypeAlias = Literal["all", "kept"]


@dataclass(frozen=True)
class Mask:
    """What is suspicious is not learned: weight 0."""

    denominator: Denominator = "all"
    kind: Literal["mask"] = "mask"

    def weights(self, scores: Tensor, suspicious: Tensor, value: float) -> Tensor:
        """Return fp32, as `scores`: 0 where suspicious, else 1."""
        return (~suspicious).float()


@dataclass(frozen=True)
class Reweight:
    """What is suspicious is learned less.

    Attributes:
        factor: weight of the suspicious, 0 up to 1. temperature: instead, in units of the score, weigh everything by
            1 / (1 + exp((score - threshold) / temperature)): 1/2 at the threshold, without a jump. What has no score
            has weight 1.
    """

    factor: float = 0.1
    temperature: float | None = None
    denominator: Denominator = "all"
    kind: Literal["reweight"] = "reweight"

    def __post_init__(self) -> None:
        if not 0 <= self.factor <= 1:
            raise ConfigError(asked_found_do("Reweight", f"factor {self.factor}.", "Give a weight from 0 to 1."))
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            do = "Give a positive number in units of the score, or leave it out."
            raise ConfigError(asked_found_do("Reweight", f"temperature {self.temperature}.", do))

    def weights(self, scores: Tensor, suspicious: Tensor, value: float) -> Tensor:
        """Return fp32, as `scores`, between 0 and 1."""
        if self.temperature is None:
            return torch.where(suspicious, self.factor, 1.0)
        return torch.sigmoid((value - scores.float()) / self.temperature)


@dataclass(frozen=True)
class Inject:
    """What is suspicious is learned while the direction is injected, at a `strength` of its own schedule."""

    strength: Strength = field(default_factory=Strength)
    kind: Literal["inject"] = "inject"

    @property
    def denominator(self) -> Denominator:
        """Everything is learned, so there is one."""
        return "all"

    def weights(self, scores: Tensor, suspicious: Tensor, value: float) -> Tensor:
        """Return ones, fp32, as `scores`."""
        return torch.ones_like(scores, dtype=torch.float32)


@dataclass(frozen=True)
class LogOnly:
    """Shadow mode: training is as it is without a defense; what would have been blocked is told."""

    kind: Literal["log_only"] = "log_only"

    @property
    def denominator(self) -> Denominator:
        """Everything is learned, so there is one."""
        return "all"

    def weights(self, scores: Tensor, suspicious: Tensor, value: float) -> Tensor:
        """Return ones, fp32, as `scores`."""
        return torch.ones_like(scores, dtype=torch.float32)


Action: TypeAlias = Mask | Reweight | Inject | LogOnly


def without_injection(action: Action, method: str) -> None:
    """Refuse `Inject` for a method that decides in the very pass it learns from.

    Raises:
        ConfigError: it is `Inject`.
    """
    if isinstance(action, Inject):
        do = "Use mask, reweight or log_only, or the delta-loss method for injection."
        raise ConfigError(asked_found_do(f"Action inject of {method}", "it decides after the pass it learns from.", do))


def learn_weighted(
    backend: Backend, losses: Tensor, weights: Tensor, batch: Batch, step: Step, denominator: Denominator = "all"
) -> Tensor:
    """Add the gradient of the weighted `losses` (B, S) and return their weighted sum, 0-d, without a graph; collective.

        all:  sum_t w_t loss_t / T           T: learned tokens of the step
        kept: sum_t w_t loss_t / (K * M)     K = sum of w_t over the learned tokens of this micro-batch on all ranks,
                                             M: micro-batches of the step; 0 where K = 0

    Args:
        weights: (N,) by sample or (B, S) by token.

    Source: "kept" is the loss of the published delta-loss training, which averaged over the kept samples of each rank;
        ours averages over their tokens, and over ranks.
    """
    by_token = weights if weights.dim() == 2 else spread(weights, batch)  # (B, S)
    total = (losses * by_token).sum()
    if denominator == "all":
        backend.backward(total / step.tokens, last=step.last)
    else:
        kept = backend.sum((by_token * learned(batch)).sum())
        backend.backward(total / (torch.where(kept > 0, kept, 1.0) * step.micros), last=step.last)
    return total.detach()
