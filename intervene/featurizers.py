"""Which directions: lenses on the last axis of an activation.

`read(h)` (B, P, D) -> (B, P, K) looks at an activation; `write(h, z)` returns a new activation whose features are z and
which is unchanged otherwise. Two laws are tested for every class here: `write(h, read(h)) == h`, and, where it claims
`lossless`, `read(write(h, z)) == z`. Frames and dictionaries are kept in fp32 and applied in fp32 (or wider), also
under bf16 models: an orthonormal frame rounded to bf16 is not orthonormal.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from intervene.errors import BadVector, ShapeMismatch, SiteOutOfRange

ORTHONORMAL_TOLERANCE = 1e-4


class Featurizer(nn.Module):
    """A lens on the last axis. Subclasses are final."""

    lossless: ClassVar[bool] = True

    @property
    def width(self) -> int | None:
        """D, the width this is made for; None fits any."""
        return None

    def features(self, width: int) -> int:
        """Return K, the number of features read from an activation of `width`."""
        return width

    @abstractmethod
    def read(self, h: Tensor) -> Tensor:
        """Return the features (B, P, K) of `h` (B, P, D)."""

    @abstractmethod
    def write(self, h: Tensor, z: Tensor) -> Tensor:
        """Return a new (B, P, D): `h` with its features set to `z` (B, P, K)."""

    def lens(self) -> Featurizer:
        """Return an equal featurizer whose parameters have been evaluated once, for one read and one write."""
        return self


class Identity(Featurizer):
    """The activation itself: K = D."""

    def read(self, h: Tensor) -> Tensor:
        return h

    def write(self, h: Tensor, z: Tensor) -> Tensor:
        return z


class Coordinates(Featurizer):
    """Chosen coordinates of the last axis: K = len(indices).

    Raises:
        SiteOutOfRange: indices are empty, repeated or negative.
    """

    indices: Tensor

    def __init__(self, indices: Sequence[int]) -> None:
        super().__init__()
        chosen = [int(i) for i in indices]
        if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 0:
            raise SiteOutOfRange(f"Coordinates({chosen}): need distinct numbers from 0. Remove repeats and negatives.")
        self.largest = max(chosen)
        self.register_buffer("indices", torch.tensor(chosen))

    def features(self, width: int) -> int:
        if self.largest >= width:
            raise SiteOutOfRange(
                f"Coordinates: index {self.largest} was asked of a site {width} wide. Use 0 to {width - 1}."
            )
        return len(self.indices)

    def read(self, h: Tensor) -> Tensor:
        return h.index_select(-1, self.indices)

    def write(self, h: Tensor, z: Tensor) -> Tensor:
        return h.index_copy(-1, self.indices, z.to(h.dtype))


def compute_dtype(h: Tensor) -> torch.dtype:
    """Return the dtype in which frames are applied to `h`: fp32, or fp64 if `h` is."""
    return torch.promote_types(h.dtype, torch.float32)


class _Frame(Featurizer):
    """A subspace whose frame is already evaluated: what `Subspace.lens` returns."""

    def __init__(self, frame: Tensor) -> None:
        super().__init__()
        self.evaluated = frame

    def read(self, h: Tensor) -> Tensor:
        dtype = compute_dtype(h)
        return h.to(dtype) @ self.evaluated.to(dtype)  # (B, P, K)

    def write(self, h: Tensor, z: Tensor) -> Tensor:
        # h + (z - read(h)) Q^T, not h - read(h) Q^T + z Q^T: what lies outside the subspace is never recomputed.
        dtype = compute_dtype(h)
        frame = self.evaluated.to(dtype)
        wide = h.to(dtype)
        return (wide + (z.to(dtype) - wide @ frame) @ frame.mT).to(h.dtype)


def orthonormal(weight: Tensor) -> Tensor:
    """Return the (D, K) frame Q of the thin QR of `weight`, in at least fp32, with R's diagonal positive.

    The sign rule makes Q a continuous function of `weight`, and Q == weight where that is orthonormal already.
    """
    wide = weight.to(compute_dtype(weight))
    q, r = torch.linalg.qr(wide)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)


class Subspace(Featurizer):
    """K orthonormal directions Q of a D-wide activation: reads hQ, writes h + (z - hQ)Q^T.

    The frame is the thin QR factor of a free (D, K) weight, so any optimiser step stays orthonormal; it is kept and
    applied in fp32 whatever the model's dtype.

    Args:
        width: D. rank: K, 1 to D. seed: of the random initial frame. trainable: whether the weight learns.

    Raises:
        ShapeMismatch: rank is not within 1 to width.

    Source: DAS, Geiger et al. 2023 (arXiv 2303.02536), where Q is a full rotation whose first K columns are used; a
        thin frame spans the same interventions at a cost linear in D (LoReFT, Wu et al. 2024, arXiv 2404.03592).
    """

    def __init__(self, width: int, rank: int, *, seed: int = 0, trainable: bool = True) -> None:
        super().__init__()
        if not 1 <= rank <= width:
            raise ShapeMismatch(f"Subspace of rank {rank} in width {width}: the rank must be 1 to {width}.")
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(width, rank, generator=generator, dtype=torch.float32)
        self.weight = nn.Parameter(orthonormal(weight), requires_grad=trainable)

    @classmethod
    def from_frame(cls, frame: Tensor, *, trainable: bool = False) -> Subspace:
        """Return the subspace spanned by the orthonormal columns of `frame` (D, K).

        Raises:
            ShapeMismatch: `frame` is not a (D, K) matrix with K <= D.
            BadVector: its columns are not orthonormal to 1e-4, or not finite.
        """
        if frame.dim() != 2 or frame.shape[1] > frame.shape[0]:
            raise ShapeMismatch(f"Frame of shape {tuple(frame.shape)}: need (D, K) with K <= D. Transpose it?")
        gram = frame.float().mT @ frame.float()
        error = float((gram - torch.eye(len(gram), device=gram.device)).abs().max())
        if not error <= ORTHONORMAL_TOLERANCE:
            raise BadVector(
                f"Frame: its columns are off orthonormal by {error:.1e}. "
                "Pass torch.linalg.qr(frame).Q if only the span matters."
            )
        made = cls(frame.shape[0], frame.shape[1], trainable=trainable)
        made.weight.data.copy_(frame)
        return made

    @property
    def width(self) -> int:
        return self.weight.shape[0]

    @property
    def rank(self) -> int:
        """K, the number of directions."""
        return self.weight.shape[1]

    def features(self, width: int) -> int:
        return self.rank

    def frame(self) -> Tensor:
        """Return the orthonormal (D, K) frame, differentiable in the weight."""
        if not self.weight.requires_grad:
            return self.weight  # given frames are used as they came, bit for bit
        return orthonormal(self.weight)

    def lens(self) -> Featurizer:
        return _Frame(self.frame())

    def read(self, h: Tensor) -> Tensor:
        return self.lens().read(h)

    def write(self, h: Tensor, z: Tensor) -> Tensor:
        return self.lens().write(h, z)


class PCA(Featurizer):
    """The top K principal directions of given activations: reads (h - mean)Q, writes h + (z - read(h))Q^T."""

    mean: Tensor
    components: Tensor

    def __init__(self, mean: Tensor, components: Tensor) -> None:
        super().__init__()
        frame = Subspace.from_frame(components)  # for its checks
        if mean.shape != (frame.width,):
            raise ShapeMismatch(f"PCA mean of shape {tuple(mean.shape)}: the components are {frame.width} wide.")
        self.register_buffer("mean", mean.detach().clone().float())
        self.register_buffer("components", components.detach().clone().float())

    @classmethod
    def fit(cls, activations: Tensor, rank: int) -> PCA:
        """Return the PCA of `activations` (N, D), centred and not standardised, by exact SVD in fp64.

        Each direction's sign is fixed so that its largest entry is positive.

        Raises:
            ShapeMismatch: not (N, D), or rank above min(N - 1, D).
        """
        if activations.dim() != 2 or not 1 <= rank <= min(activations.shape[0] - 1, activations.shape[1]):
            raise ShapeMismatch(
                f"PCA of rank {rank} from activations {tuple(activations.shape)}: need (N, D) with N - 1 and D at "
                "least the rank. Collect more tokens or lower the rank."
            )
        wide = activations.detach().double()
        mean = wide.mean(0)
        _, _, rows = torch.linalg.svd(wide - mean, full_matrices=False)
        components = rows[:rank].mT  # (D, K)
        signs = components.gather(0, components.abs().argmax(0, keepdim=True)).sign()
        return cls(mean.float(), (components * signs).float())

    @property
    def width(self) -> int:
        return self.components.shape[0]

    def features(self, width: int) -> int:
        return self.components.shape[1]

    def read(self, h: Tensor) -> Tensor:
        dtype = compute_dtype(h)
        return (h.to(dtype) - self.mean.to(dtype)) @ self.components.to(dtype)

    def write(self, h: Tensor, z: Tensor) -> Tensor:
        dtype = compute_dtype(h)
        change = (z.to(dtype) - self.read(h)) @ self.components.to(dtype).mT
        return (h.to(dtype) + change).to(h.dtype)


class SAE(Featurizer):
    """A sparse autoencoder: reads its latents, writes h + dec(z) - dec(read(h)), so its reconstruction error stays.

    Activation "relu": relu(pre). "jumprelu": pre where pre > threshold, else 0 (Rajamanoharan et al. 2024, arXiv
    2407.14435), pre = (h - b_dec * centred) W_enc + b_enc. Not lossless: two codes may decode to one activation.

    Args:
        encoder: (D, K). decoder: (K, D). encoder_bias: (K,). decoder_bias: (D,). threshold: (K,), for "jumprelu".
        centred: whether decoder_bias is subtracted before encoding (OpenAI, SAELens' apply_b_dec_to_input).

    Raises:
        ShapeMismatch: the shapes do not agree, or "jumprelu" lacks a threshold.
    """

    lossless = False

    def __init__(
        self,
        encoder: Tensor,
        decoder: Tensor,
        *,
        encoder_bias: Tensor | None = None,
        decoder_bias: Tensor | None = None,
        threshold: Tensor | None = None,
        activation: Literal["relu", "jumprelu"] = "relu",
        centred: bool = False,
    ) -> None:
        super().__init__()
        width, count = encoder.shape
        shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            "decoder": (decoder, (count, width)),
            "encoder_bias": (encoder_bias, (count,)),
            "decoder_bias": (decoder_bias, (width,)),
            "threshold": (threshold, (count,)),
        }
        for name, (tensor, shape) in shapes.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ShapeMismatch(f"SAE {name} of shape {tuple(tensor.shape)}: encoder {width}x{count} asks {shape}.")
        if activation == "jumprelu" and threshold is None:
            raise ShapeMismatch("SAE with activation 'jumprelu': no threshold was given. Pass threshold (K,).")
        self.activation: str = activation
        self.centred = centred
        self.encoder = _fixed(encoder)
        self.decoder = _fixed(decoder)
        self.encoder_bias = _fixed(torch.zeros(count) if encoder_bias is None else encoder_bias)
        self.decoder_bias = _fixed(torch.zeros(width) if decoder_bias is None else decoder_bias)
        self.threshold = _fixed(torch.zeros(count) if threshold is None else threshold)

    @property
    def width(self) -> int:
        return self.encoder.shape[0]

    def features(self, width: int) -> int:
        return self.encoder.shape[1]

    def read(self, h: Tensor) -> Tensor:
        wide = h.to(compute_dtype(h))
        if self.centred:
            wide = wide - self.decoder_bias
        before = wide @ self.encoder.to(wide.dtype) + self.encoder_bias
        if self.activation == "jumprelu":
            return torch.where(before > self.threshold, before, torch.zeros_like(before)).relu()
        return before.relu()

    def decode(self, z: Tensor) -> Tensor:
        """Return the reconstruction (B, P, D) of latents `z` (B, P, K)."""
        return z @ self.decoder.to(z.dtype) + self.decoder_bias

    def write(self, h: Tensor, z: Tensor) -> Tensor:
        dtype = compute_dtype(h)
        change = (z.to(dtype) - self.read(h)) @ self.decoder.to(dtype)  # biases cancel; equal codes change nothing
        return (h.to(dtype) + change).to(h.dtype)


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone().float(), requires_grad=False)


FEATURIZERS: dict[str, type[Any]] = {
    cls.__name__: cls for cls in (Identity, Coordinates, Subspace, PCA, SAE)
}
