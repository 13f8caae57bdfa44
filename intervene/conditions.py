"""When: gates that decide per token or per example whether an intervention applies.

A condition reads the activation at the site itself, before the edit, and returns (B, P) bool. `per="example"` lets one
token's verdict decide for the whole example: it holds where any selected token fulfils it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from intervene.errors import InterveneError, ShapeMismatch
from intervene.precision import contiguous, full_precision
from intervene.vectors import checked_vector

Scope = Literal["token", "example"]


class Condition(nn.Module):
    """A gate on activations. Subclasses are final.

    Raises:
        InterveneError: a `per` or a threshold that means nothing. ShapeMismatch: a vector that is not (D,); in the
            forward pass, another width than the site's. BadVector: NaN, infinite or zero.
    """

    def __init__(self, per: Scope = "token") -> None:
        super().__init__()
        if per not in ("token", "example"):
            raise InterveneError(
                f"{type(self).__name__}(per={per!r}): there is no such scope. Use 'token' or 'example'."
            )
        self.per: Scope = per

    @property
    def width(self) -> int | None:
        """D, the width of the activations this reads; None fits any."""
        return None

    @abstractmethod
    def score(self, h: Tensor) -> Tensor:
        """Return (B, P), positive where the condition holds."""

    def forward(self, h: Tensor, valid: Tensor | None) -> Tensor:
        """Return (B, P) bool for activations h (B, P, D); `valid` (B, P) or None marks real positions."""
        if self.width not in (None, h.shape[-1]):
            raise ShapeMismatch(
                f"{type(self).__name__}: its vector is {self.width} wide, the site {h.shape[-1]}. "
                "Make it from activations of this site."
            )
        with torch.no_grad(), full_precision(h):
            holds = self.score(h.float()) > 0
        if valid is not None:
            holds = holds & valid
        return holds if self.per == "token" else holds.any(1, keepdim=True).expand_as(holds)


def _held(vector: Tensor, name: str) -> nn.Parameter:
    if vector.dim() != 1:
        raise ShapeMismatch(f"{name}: a vector of shape {tuple(vector.shape)}. Give (D,).")
    checked = checked_vector(vector, name=name)
    return nn.Parameter(contiguous(checked.detach().float().clone()), requires_grad=False)


class ProjectionAbove(Condition):
    """Holds where h . v / |v| exceeds `threshold` (cosine=True: where the cosine does).

    Source: conditional activation steering, Lee et al. 2024 (arXiv 2409.05907), there for batch size one.
    """

    def __init__(self, vector: Tensor, threshold: float, *, cosine: bool = False, per: Scope = "token") -> None:
        super().__init__(per)
        self.vector = _held(vector, "ProjectionAbove")
        self.threshold = float(threshold)
        self.cosine = cosine
        if not abs(self.threshold) < (1 if cosine else float("inf")):
            bounds = "between -1 and 1" if cosine else "finite"
            raise InterveneError(f"ProjectionAbove: threshold {threshold}. It must be {bounds}.")

    @property
    def width(self) -> int:
        return len(self.vector)

    def score(self, h: Tensor) -> Tensor:
        projection: Tensor = h @ (self.vector / torch.linalg.vector_norm(self.vector))
        if self.cosine:
            projection = projection / torch.linalg.vector_norm(h, dim=-1).clamp_min(1e-12)
        return projection - self.threshold


class ProbeAbove(Condition):
    """Holds where a logistic probe, sigmoid(h . w + b), exceeds `threshold`."""

    def __init__(self, weight: Tensor, bias: float, threshold: float = 0.5, *, per: Scope = "token") -> None:
        super().__init__(per)
        self.weight = _held(weight, "ProbeAbove")
        self.bias = float(bias)
        self.threshold = float(threshold)
        if not (0 < self.threshold < 1 and abs(self.bias) < float("inf")):
            raise InterveneError(
                f"ProbeAbove: threshold {threshold}, bias {bias}. "
                "The threshold is a probability between 0 and 1, the bias a finite number."
            )

    @property
    def width(self) -> int:
        return len(self.weight)

    def score(self, h: Tensor) -> Tensor:
        return torch.sigmoid(h @ self.weight + self.bias) - self.threshold


CONDITIONS: dict[str, type[Any]] = {cls.__name__: cls for cls in (ProjectionAbove, ProbeAbove)}
