"""When: gates that decide per token or per example whether an intervention applies.

A condition reads the activation at the site itself, before the edit, and returns (B, P) bool. `per="example"` lets one
token's verdict decide for the whole example: it holds where any selected token fulfils it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from intervene.vectors import checked_vector

Scope = Literal["token", "example"]


class Condition(nn.Module):
    """A gate on activations. Subclasses are final."""

    def __init__(self, per: Scope = "token") -> None:
        super().__init__()
        self.per: Scope = per

    @abstractmethod
    def score(self, h: Tensor) -> Tensor:
        """Return (B, P), positive where the condition holds."""

    def forward(self, h: Tensor, valid: Tensor | None) -> Tensor:
        """Return (B, P) bool for activations h (B, P, D); `valid` (B, P) or None marks real positions."""
        holds = self.score(h.float()) > 0
        if valid is not None:
            holds = holds & valid
        return holds if self.per == "token" else holds.any(1, keepdim=True).expand_as(holds)


class ProjectionAbove(Condition):
    """Holds where h . v / |v| exceeds `threshold` (cosine=True: where the cosine does).

    Source: conditional activation steering, Lee et al. 2024 (arXiv 2409.05907), there for batch size one.
    """

    def __init__(self, vector: Tensor, threshold: float, *, cosine: bool = False, per: Scope = "token") -> None:
        super().__init__(per)
        checked = checked_vector(vector, name="ProjectionAbove")
        self.vector = nn.Parameter(checked.detach().clone().float(), requires_grad=False)
        self.threshold = float(threshold)
        self.cosine = cosine

    def score(self, h: Tensor) -> Tensor:
        projection = h @ (self.vector / self.vector.norm())
        if self.cosine:
            projection = projection / h.norm(dim=-1).clamp_min(1e-12)
        return projection - self.threshold


class ProbeAbove(Condition):
    """Holds where a logistic probe, sigmoid(h . w + b), exceeds `threshold`."""

    def __init__(self, weight: Tensor, bias: float, threshold: float = 0.5, *, per: Scope = "token") -> None:
        super().__init__(per)
        checked = checked_vector(weight, name="ProbeAbove")
        self.weight = nn.Parameter(checked.detach().clone().float(), requires_grad=False)
        self.bias = float(bias)
        self.threshold = float(threshold)

    def score(self, h: Tensor) -> Tensor:
        return torch.sigmoid(h @ self.weight + self.bias) - self.threshold


CONDITIONS: dict[str, type[Any]] = {cls.__name__: cls for cls in (ProjectionAbove, ProbeAbove)}
