"""What happens: features in, features out, always a new tensor.

`forward(z, source)`: z (B, P, K) are the features read at the site, source the same features of the source run, or for
an edit that `draws`, the random tensor drawn for this forward pass. Learned gates are soft while `training` and hard
after `.eval()`, so that what is scored is what could be deployed.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from intervene.errors import BadVector, ShapeMismatch
from intervene.precision import compute_dtype, contiguous, full_precision
from intervene.vectors import SteeringVector, checked_vector


class Edit(nn.Module):
    """A change of features. Subclasses are final.

    `needs_source`: a source activation is required. `draws`: `draw(z)` is called once per forward pass, and its result
    handed in as `source`, also when gradient checkpointing runs the pass again. An edit that both needs a source and
    draws is called as `forward(z, source, drawn)`.
    """

    needs_source: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    @property
    def features(self) -> int | None:
        """K, the number of features this is made for; None fits any."""
        return None

    @property
    def rows(self) -> int | None:
        """How many examples this is written for; None fits any batch."""
        return None

    @property
    def slots(self) -> int | None:
        """How many positions per example this is written for; None fits any."""
        return None

    @property
    def made_for(self) -> SteeringVector | None:
        """The saved vector this applies, whose model and site are checked before the first forward."""
        return None

    @abstractmethod
    def forward(self, z: Tensor, source: Tensor | None) -> Tensor:
        """Return the new features (B, P, K)."""

    def draw(self, z: Tensor) -> Any:
        """Return what is random in one forward pass, a tensor or tensors, for edits that `draws`."""
        raise AssertionError(f"{type(self).__name__} draws nothing")


class Swap(Edit):
    """Features of the source: z' = source. Full-vector interchange, and with a Subspace, DAS."""

    needs_source = True

    def forward(self, z: Tensor, source: Tensor | None) -> Tensor:
        assert source is not None
        return source.to(z.dtype).expand_as(z).clone()  # never the caller's own tensor


def _per_row(value: Tensor, z: Tensor) -> Tensor:
    """Return `value` (K,), (B, K) or (B, P, K) shaped to broadcast over z (B, P, K), rows repeated for beams."""
    if value.dim() > 1 and len(value) != len(z):
        value = value.repeat_interleave(len(z) // len(value), 0)  # intervene() has proved that rows are repeats
    return value[:, None] if value.dim() == 2 else value


class _Constant(Edit):
    """An edit with one constant tensor (K,), (B, K) or (B, P, K)."""

    def __init__(self, vector: Tensor | SteeringVector, *, trainable: bool = False, allow_zero: bool = False) -> None:
        super().__init__()
        self.origin = vector if isinstance(vector, SteeringVector) else None
        tensor = vector.vector if isinstance(vector, SteeringVector) else vector
        checked = checked_vector(tensor, allow_zero=allow_zero or trainable, name=type(self).__name__)
        self.vector = nn.Parameter(contiguous(checked.detach().clone()), requires_grad=trainable)

    @property
    def features(self) -> int | None:
        return self.vector.shape[-1]

    @property
    def rows(self) -> int | None:
        return self.vector.shape[0] if self.vector.dim() > 1 else None

    @property
    def slots(self) -> int | None:
        return self.vector.shape[1] if self.vector.dim() == 3 else None

    @property
    def made_for(self) -> SteeringVector | None:
        return self.origin


class Add(_Constant):
    """z' = z + strength * vector.

    Args:
        vector: (K,), one per example (B, K), or one per example and position (B, P, K); or a `SteeringVector`.
        strength: a number, or one per example (B,). As a fraction of the stream's own norm: `relative=True` adds
            strength * |z| * vector / |vector| at each token, so 0.5 is half of the activation's norm there.
        trainable: learn the vector (it may then start at zero).

    Raises:
        BadVector: NaN, infinite or all zero. ShapeMismatch: not 1, 2 or 3 axes, or strengths that are not (B,).

    Source: activation addition, Turner et al. 2023 (arXiv 2308.10248); relative strength as in persona-vector and SAE
        steering practice, where a dose is quoted as a fraction of the residual norm.
    """

    def __init__(
        self,
        vector: Tensor | SteeringVector,
        strength: float | Tensor = 1.0,
        *,
        relative: bool = False,
        trainable: bool = False,
    ) -> None:
        super().__init__(vector, trainable=trainable)
        self.relative = relative
        if not isinstance(strength, (int, float, Tensor)):
            raise ShapeMismatch(
                f"Add: strength {strength!r} is no number. For one per example pass torch.tensor([...])."
            )
        self.strength: float | None = None if isinstance(strength, Tensor) else float(strength)
        self.strengths: Tensor | None
        held = strength.detach().clone().to(self.vector.dtype) if isinstance(strength, Tensor) else None
        self.register_buffer("strengths", held)
        self._check_strength(torch.as_tensor(strength))
        if relative:
            checked_vector(self.vector.detach(), name="Add(relative=True)")  # of zero there is no direction

    def _check_strength(self, strength: Tensor) -> None:
        if self.strengths is not None:
            written = super().rows
            if strength.dim() != 1 or written not in (None, len(strength)):
                per = "a number or one per example" if written is None else f"a number or {written}, as the vectors are"
                raise ShapeMismatch(f"Add: strength of shape {tuple(strength.shape)}. Give {per}.")
        if not bool(torch.isfinite(strength).all()):
            raise BadVector(f"Add: strength {strength.tolist()}. It must be finite.")

    @property
    def rows(self) -> int | None:
        if self.strengths is not None:
            return len(self.strengths)
        return super().rows

    def forward(self, z: Tensor, source: Tensor | None) -> Tensor:
        if self.relative:
            wide = _per_row(self.vector.to(compute_dtype(z)), z)
            length = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=wide.dtype)  # (B, P, 1)
            vector: Tensor = (wide * (length / torch.linalg.vector_norm(wide, dim=-1, keepdim=True))).to(z.dtype)
        else:
            vector = _per_row(self.vector.to(z.dtype), z)
        if self.strengths is not None:
            strengths = _per_row(self.strengths.to(z.dtype)[:, None], z)  # (B, 1, 1)
            return z + strengths * vector
        assert self.strength is not None
        return torch.add(z, vector, alpha=self.strength)


class Set(_Constant):
    """z' = vector, whatever was there. Zero vectors are allowed (see also `Zero`)."""

    def __init__(self, vector: Tensor | SteeringVector, *, trainable: bool = False) -> None:
        super().__init__(vector, trainable=trainable, allow_zero=True)

    def forward(self, z: Tensor, source: Tensor | None) -> Tensor:
        # a copy: the model may write into what it is given, and must not write into the vector
        return _per_row(self.vector.to(z.dtype), z).expand_as(z).clone()


class Zero(Edit):
    """z' = 0. With Identity an ablation; with a Subspace, the removal of a direction."""

    def forward(self, z: Tensor, source: Tensor | None) -> Tensor:
        return torch.zeros_like(z)


class Scale(Edit):
    """z' = factor * z."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        if not -float("inf") < factor < float("inf"):
            raise BadVector(f"Scale({factor}): the factor must be finite. Pass a number.")
        self.factor = float(factor)

    def forward(self, z: Tensor, source: Tensor | None) -> Tensor:
        return z * self.factor


class Project(_Constant):
    """z' = z - (z . v) v / |v|^2: removes the component along `vector` (directional ablation).

    Source: Arditi et al. 2024 (arXiv 2406.11717).
    """

    def forward(self, z: Tensor, source: Tensor | None) -> Tensor:
        wide = z.to(compute_dtype(z))
        vector = _per_row(self.vector.to(wide.dtype), z)
        unit: Tensor = vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
        return (wide - (wide * unit).sum(-1, keepdim=True) * unit).to(z.dtype)


class Affine(Edit):
    """z' = zW + b, learned: with a trainable Subspace this is LoReFT's h + Q(Wh + b - Q^T h) with W acting on features.

    Starts as the identity. We differ from LoReFT (Wu et al. 2024, arXiv 2404.03592), whose W reads the whole
    activation: here W (K, K) reads only the features, so that the edit composes with any featurizer.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(features))
        self.bias = nn.Parameter(torch.zeros(features))

    @property
    def features(self) -> int | None:
        return self.weight.shape[0]

    def forward(self, z: Tensor, source: Tensor | None) -> Tensor:
        wide = z.to(compute_dtype(z))
        with full_precision(z):
            return (wide @ self.weight.to(wide.dtype) + self.bias).to(z.dtype)


class StopGradient(Edit):
    """z' = z, but no gradient flows back through the features where `mask` (K,) is true (None: all of them).

    Source: gradient routing, Cloud et al. 2024 (arXiv 2410.04332): detach by data point and by parameter region.
    """

    mask: Tensor | None

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("mask", None if mask is None else mask.detach().bool().clone())

    @property
    def features(self) -> int | None:
        return None if self.mask is None else self.mask.shape[-1]

    def forward(self, z: Tensor, source: Tensor | None) -> Tensor:
        if self.mask is None:
            return z.detach().clone()
        return torch.where(self.mask, z.detach(), z)


class Noise(Edit):
    """z' = z + scale * n, n ~ N(0, 1), drawn once per forward pass from a generator seeded with `seed`.

    Source: causal tracing, Meng et al. 2022 (arXiv 2202.05262), who use 3 standard deviations of the embeddings.
    """

    draws = True

    def __init__(self, scale: float, *, seed: int = 0) -> None:
        super().__init__()
        if not 0 < scale < float("inf"):
            raise BadVector(f"Noise({scale}): the scale must be positive and finite. Pass e.g. 0.1.")
        self.scale = float(scale)
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, z: Tensor) -> Tensor:
        drawn = torch.randn(z.shape, generator=self.generator, dtype=torch.float32)  # same on every device
        return drawn.to(device=z.device, dtype=z.dtype)

    def forward(self, z: Tensor, source: Tensor | None) -> Tensor:
        assert source is not None
        return z + self.scale * source
