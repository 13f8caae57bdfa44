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

from intervene.errors import BadVector, InterveneError, ShapeMismatch, SiteOutOfRange
from intervene.precision import compute_dtype, contiguous, full_precision

ORTHONORMAL_TOLERANCE = 1e-4  # beyond it a given frame is refused
AS_GIVEN_TOLERANCE = 1e-5  # within it a weight that does not learn is its own frame, bit for bit


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


class _Frame(Featurizer):
    """A subspace whose frame is already evaluated: what `Subspace.lens` returns."""

    def __init__(self, frame: Tensor) -> None:
        super().__init__()
        self.evaluated = frame

    def read(self, h: Tensor) -> Tensor:
        dtype = compute_dtype(h)
        with full_precision(h):
            return h.to(dtype) @ self.evaluated.to(dtype)  # (B, P, K)

    def write(self, h: Tensor, z: Tensor) -> Tensor:
        # h + (z - read(h)) Q^T, not h - read(h) Q^T + z Q^T: what lies outside the subspace is never recomputed.
        dtype = compute_dtype(h)
        frame = self.evaluated.to(dtype)
        wide = h.to(dtype)
        with full_precision(h):
            return (wide + (z.to(dtype) - wide @ frame) @ frame.mT).to(h.dtype)


def orthonormal(weight: Tensor) -> Tensor:
    """Return the (D, K) frame Q of the thin QR of `weight`, in at least fp32, with R's diagonal positive.

    The sign rule makes Q a continuous function of `weight`, and Q == weight where that is orthonormal already.
    """
    wide = weight.to(compute_dtype(weight))
    q, r = torch.linalg.qr(wide)
    frame: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return frame


def orthonormal_error(frame: Tensor) -> float:
    """Return the largest entry of |Q^T Q - 1| of `frame` (D, K), NaN if it holds NaN; reads from the device."""
    with torch.no_grad(), full_precision(frame):
        wide = frame.double()
        gram = wide.mT @ wide
        return float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())


def _checked_frame(frame: Tensor) -> Tensor:
    if frame.dim() != 2 or not 1 <= frame.shape[1] <= frame.shape[0]:
        raise ShapeMismatch(f"Frame of shape {tuple(frame.shape)}: need (D, K) with 1 <= K <= D. Transpose it?")
    error = orthonormal_error(frame)
    if not error <= ORTHONORMAL_TOLERANCE:
        raise BadVector(
            f"Frame: its columns are off orthonormal by {error:.1e}. "
            "Pass torch.linalg.qr(frame).Q if only the span matters."
        )
    return frame


class Subspace(Featurizer):
    """K orthonormal directions Q of a D-wide activation: reads hQ, writes h + (z - hQ)Q^T.

    The frame is the thin QR factor of a free (D, K) weight, so any optimiser step stays orthonormal; it is kept in fp32
    (or fp64, if given so) and applied in at least fp32 whatever the model's dtype.

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
        self._hold(orthonormal(weight), trainable)

    def _hold(self, weight: Tensor, trainable: bool) -> None:
        self.weight = nn.Parameter(contiguous(weight), requires_grad=trainable)
        self._fixed: tuple[tuple[int, int, bool], Tensor] | None = None  # the frame of a weight that does not learn

    @classmethod
    def from_weight(cls, weight: Tensor, *, trainable: bool = True) -> Subspace:
        """Return the subspace spanned by the columns of any `weight` (D, K) of full rank, kept as it is."""
        if weight.dim() != 2 or not 1 <= weight.shape[1] <= weight.shape[0]:
            raise ShapeMismatch(f"Weight of shape {tuple(weight.shape)}: need (D, K) with 1 <= K <= D. Transpose it?")
        made = cls.__new__(cls)  # not cls(D, K): a random D x D frame takes seconds
        nn.Module.__init__(made)
        made._hold(weight.detach().to(compute_dtype(weight), copy=True), trainable)
        return made

    @classmethod
    def from_frame(cls, frame: Tensor, *, trainable: bool = False) -> Subspace:
        """Return the subspace spanned by the orthonormal columns of `frame` (D, K), on the device of `frame`.

        Raises:
            ShapeMismatch: `frame` is not a (D, K) matrix with 1 <= K <= D.
            BadVector: its columns are not orthonormal to 1e-4, or not finite.
        """
        return cls.from_weight(_checked_frame(frame), trainable=trainable)

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
        """Return the orthonormal (D, K) frame, differentiable in the weight.

        A weight that does not learn and is orthonormal to 1e-5 is returned itself, so that given frames are used bit
        for bit; one that once learned and was then frozen still goes through QR.
        """
        if self.weight.requires_grad:
            return orthonormal(self.weight)
        # Looking at the weight reads from the device, so it is done once per value of the weight. An inference tensor
        # has no version, and a frame made in inference mode must not be handed to a pass with gradients.
        version = 0 if self.weight.is_inference() else self.weight._version
        key = (version, self.weight.data_ptr(), torch.is_inference_mode_enabled())
        if self._fixed is None or self._fixed[0] != key:
            as_given = orthonormal_error(self.weight) <= AS_GIVEN_TOLERANCE
            self._fixed = key, self.weight if as_given else orthonormal(self.weight)
        return self._fixed[1]

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
        width = _checked_frame(components).shape[0]
        if mean.shape != (width,):
            raise ShapeMismatch(f"PCA mean of shape {tuple(mean.shape)}: the components are {width} wide.")
        _finite(mean, "PCA mean")
        self.register_buffer("mean", contiguous(mean.detach().float().clone()))
        self.register_buffer("components", contiguous(components.detach().float().clone()))

    @classmethod
    def fit(cls, activations: Tensor, rank: int) -> PCA:
        """Return the PCA of `activations` (N, D), centred and not standardised, by exact SVD in fp64.

        Each direction's sign is fixed so that its largest entry is positive.

        Raises:
            ShapeMismatch: not (N, D), or rank above min(N - 1, D). BadVector: NaN or infinite activations.
        """
        if activations.dim() != 2 or not 1 <= rank <= min(activations.shape[0] - 1, activations.shape[1]):
            raise ShapeMismatch(
                f"PCA of rank {rank} from activations {tuple(activations.shape)}: need (N, D) with N - 1 and D at "
                "least the rank. Collect more tokens or lower the rank."
            )
        wide = _finite(activations.detach(), "PCA activations").double()
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
        with full_precision(h):
            return (h.to(dtype) - self.mean.to(dtype)) @ self.components.to(dtype)

    def write(self, h: Tensor, z: Tensor) -> Tensor:
        dtype = compute_dtype(h)
        with full_precision(h):
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
        ShapeMismatch: the shapes do not agree. BadVector: NaN or infinite weights. InterveneError: an activation that
        is neither, "jumprelu" without a threshold, or a threshold that "relu" would ignore.
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
        self._check_activation(activation, threshold)
        if encoder.dim() != 2:
            raise ShapeMismatch(f"SAE encoder of shape {tuple(encoder.shape)}: need (D, K).")
        width, count = encoder.shape
        shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            "encoder": (encoder, (width, count)),
            "decoder": (decoder, (count, width)),
            "encoder_bias": (encoder_bias, (count,)),
            "decoder_bias": (decoder_bias, (width,)),
            "threshold": (threshold, (count,)),
        }
        for name, (tensor, shape) in shapes.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ShapeMismatch(f"SAE {name} of shape {tuple(tensor.shape)}: encoder {width}x{count} asks {shape}.")
            if tensor is not None:
                _finite(tensor, f"SAE {name}")
        self.activation: str = activation
        self.centred = centred
        self.encoder = _fixed(encoder)
        self.decoder = _fixed(decoder)
        self.encoder_bias = _fixed(encoder.new_zeros(count) if encoder_bias is None else encoder_bias)
        self.decoder_bias = _fixed(encoder.new_zeros(width) if decoder_bias is None else decoder_bias)
        self.threshold = _fixed(encoder.new_zeros(count) if threshold is None else threshold)

    @staticmethod
    def _check_activation(activation: str, threshold: Tensor | None) -> None:
        if activation not in ("relu", "jumprelu"):
            raise InterveneError(f"SAE with activation {activation!r}: there is none. Use 'relu' or 'jumprelu'.")
        if activation == "jumprelu" and threshold is None:
            raise InterveneError("SAE with activation 'jumprelu': no threshold was given. Pass threshold (K,).")
        if activation == "relu" and threshold is not None:
            raise InterveneError(
                "SAE with activation 'relu': a threshold was given, which it has no use for. "
                "Pass activation='jumprelu', or leave the threshold out."
            )

    @property
    def width(self) -> int:
        return self.encoder.shape[0]

    def features(self, width: int) -> int:
        return self.encoder.shape[1]

    def read(self, h: Tensor) -> Tensor:
        wide = h.to(compute_dtype(h))
        if self.centred:
            wide = wide - self.decoder_bias
        with full_precision(h):
            before = wide @ self.encoder.to(wide.dtype) + self.encoder_bias
        if self.activation == "jumprelu":
            return torch.where(before > self.threshold, before, torch.zeros_like(before)).relu()
        return before.relu()

    def decode(self, z: Tensor) -> Tensor:
        """Return the reconstruction (B, P, D) of latents `z` (B, P, K)."""
        wide = z.to(compute_dtype(z))
        with full_precision(z):
            return wide @ self.decoder.to(wide.dtype) + self.decoder_bias

    def write(self, h: Tensor, z: Tensor) -> Tensor:
        dtype = compute_dtype(h)
        with full_precision(h):  # biases cancel; equal codes change nothing
            change = (z.to(dtype) - self.read(h)) @ self.decoder.to(dtype)
        return (h.to(dtype) + change).to(h.dtype)


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(contiguous(tensor.detach().float().clone()), requires_grad=False)


def _finite(tensor: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise BadVector(f"{name}: it has NaN or infinite entries. Check where it was made.")
    return tensor


FEATURIZERS: dict[str, type[Any]] = {cls.__name__: cls for cls in (Identity, Coordinates, Subspace, PCA, SAE)}
