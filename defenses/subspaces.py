"""The subspace that a change of a weight matrix lies in, and how to keep other matrices out of it.

    kept = svd_subspace(delta, rank=8, name="model.layers.3.mlp.down_proj.weight", side="output")
    coefficients = kept.coefficients(gradient)           # what of it lies in the subspace
    gradient - kept.matrix(coefficients)                 # the rest

Matrices are (out, in) as in `nn.Linear`; whoever has the transpose turns it first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from defenses.errors import DefenseError

Side = Literal["flat", "output", "input"]


@dataclass(frozen=True, eq=False)
class ProtectedSubspace:
    """A linear space of matrices (out, in), by an orthonormal frame.

    Attributes:
        side: "output": all Q C, Q (out, R). "input": all C Q^T, Q (in, R). "flat": the multiples of one matrix.
        frame: Q, or with "flat" that matrix (out, in), of norm 1.
        energy: share of the squared norm of the delta it was made from that lies in it.
    """

    side: Side
    frame: Tensor
    energy: float = 1.0

    def coefficients(self, matrix: Tensor) -> Tensor:
        """Return what of `matrix` (out, in) lies in the space: Q^T M (R, in), M Q (out, R), or <U, M> 0-d."""
        if self.side == "output":
            return self.frame.T @ matrix
        if self.side == "input":
            return matrix @ self.frame
        return (self.frame * matrix).sum()

    def matrix(self, coefficients: Tensor) -> Tensor:
        """Return the matrix (out, in) of the space that has these coefficients."""
        if self.side == "output":
            return self.frame @ coefficients
        if self.side == "input":
            return coefficients @ self.frame.T
        return coefficients * self.frame

    def projected(self, matrix: Tensor) -> Tensor:
        """Return the nearest matrix of the space."""
        return self.matrix(self.coefficients(matrix))

    def to(self, device: torch.device | str) -> ProtectedSubspace:
        """Return this space on `device`."""
        return replace(self, frame=self.frame.to(device))

    def state_dict(self) -> dict[str, Any]:
        """Return what `from_state` needs: a text, a tensor and a number."""
        return {"side": self.side, "frame": self.frame.cpu(), "energy": self.energy}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ProtectedSubspace:
        """Return the space that `state_dict` was taken of."""
        return cls(state["side"], state["frame"], state["energy"])


def flat_subspace(delta: Tensor) -> ProtectedSubspace:
    """Return the multiples of `delta` (out, in).

    Raises:
        DefenseError: it is zero or not finite.
    """
    wide = _checked(delta)
    return ProtectedSubspace("flat", wide / wide.norm())


def svd_subspace(
    delta: Tensor,
    rank: int,
    *,
    name: str,
    side: Literal["output", "input"],
    oversample: int = 8,
    power_iterations: int = 2,
) -> ProtectedSubspace:
    """Return the span of the first `rank` left ("output") or right ("input") singular vectors of `delta` (out, in).

    Args:
        rank: at most the smaller side of the matrix is used. name: of the parameter: it seeds the sketch, so that
            every rank finds the same space.

    Raises:
        DefenseError: as `randomised_svd`.
    """
    left, values, right = randomised_svd(
        delta, rank, seed=seed_of(name), oversample=oversample, power_iterations=power_iterations
    )
    energy = float(values.double().square().sum() / delta.double().square().sum())
    return ProtectedSubspace(side, left if side == "output" else right.T.contiguous(), energy)


def randomised_svd(
    matrix: Tensor, rank: int, *, seed: int, oversample: int = 8, power_iterations: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, R), S (R,) falling, V^T (R, n) of the nearest matrix of rank R to `matrix` (m, n), nearly.

    A Gaussian sketch of R + `oversample` columns, `power_iterations` rounds of multiplication by M M^T with a QR in
    between (without which the small singular values drown in rounding), then an exact SVD of the small rest. The same
    seed gives the same result on every rank and device: the sketch is drawn on the CPU.

    Raises:
        DefenseError: `rank` below 1, or a matrix that is zero, not finite, or has not two axes.

    Source: Halko, Martinsson & Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1.
    """
    wide = _checked(matrix)
    if wide.dim() != 2 or rank < 1:
        raise DefenseError(f"SVD of rank {rank} of a tensor {tuple(matrix.shape)}: give a matrix and a rank >= 1.")
    rank = min(rank, *wide.shape)
    width = min(rank + oversample, *wide.shape)
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(wide.shape[1], width, generator=generator).to(wide.device)
    frame = torch.linalg.qr(wide @ sketch)[0]  # (m, R + oversample)
    for _ in range(power_iterations):
        frame = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ frame)[0])[0]
    left, values, right = torch.linalg.svd(frame.T @ wide, full_matrices=False)
    return (frame @ left)[:, :rank], values[:rank], right[:rank]


def seed_of(name: str) -> int:
    """Return the seed that a parameter's name means: the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def _checked(matrix: Tensor) -> Tensor:
    wide = matrix.detach().float()
    if not bool(torch.isfinite(wide).all()) or not float(wide.norm()) > 0:
        raise DefenseError(
            f"Subspace of a change {tuple(matrix.shape)} of norm {float(wide.norm()):g}: it must be finite and not "
            "zero. Train longer before it is taken, or leave the matrix out."
        )
    return wide
