"""Low-rank edits of the whole activation, without a source: LoReFT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intervene.edits import Edit
from intervene.featurizers import Subspace
from intervene.precision import compute_dtype, contiguous, full_precision


class LowRankAffine(Edit):
    """h' = h + Q(Wh + b - Q^T h): sets what lies in a learned subspace to an affine function of the whole activation.

    It acts on the raw activation, so the intervention's featurizer stays `Identity`. Q (D, K) is an orthonormal frame,
    W is kept as `weight` (D, K) and b as `bias` (K,). Starts as the identity, W = Q^T and b = 0. (`Affine` through a
    `Subspace` is the special case of a W that reads only the subspace.)

    Args:
        width: D. rank: K, 1 to D. seed: of the random initial frame.

    Raises:
        ShapeMismatch: rank is not within 1 to width.

    Source: LoReFT, Wu et al. 2024 (arXiv 2404.03592), equation 2. We differ in the start: theirs draws W at random.
    """

    def __init__(self, width: int, rank: int, *, seed: int = 0) -> None:
        super().__init__()
        self.subspace = Subspace(width, rank, seed=seed)
        self.weight = nn.Parameter(contiguous(self.subspace.frame().detach()).clone())
        self.bias = nn.Parameter(torch.zeros(rank))

    @property
    def features(self) -> int | None:
        return self.subspace.width

    def forward(self, z: Tensor, source: Tensor | None) -> Tensor:
        dtype = compute_dtype(z)
        wide = z.to(dtype)
        with full_precision(z):
            wanted = wide @ self.weight.to(dtype) + self.bias.to(dtype)  # (B, P, K)
        return self.subspace.write(wide, wanted).to(z.dtype)
