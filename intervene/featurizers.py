"""Which directions: lenses on the last axis of an activation.

`read(h)` (B, P, D) -> (B, P, K) looks at an activation; `write(h, z)` returns a new activation whose features are z and
which is unchanged otherwise. Two laws are tested for every class here: `write(h, read(h)) == h`, and, where it claims
`lossless`, `read(write(h, z)) == z`. Frames and dictionaries are kept in fp32 and applied in fp32 (or wider), also
under bf16 models: an orthonormal frame rounded to bf16 is not orthonormal.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from intervene.errors import BadVector, ShapeMismatch, SiteOutOfRange
from intervene.frames import (
    AS_GIVEN_TOLERANCE,
    ORTHONORMAL_TOLERANCE,
    checked_frame,
    frame_named,
    orthonormal,
    orthonormal_error,
)
from intervene.precision import compute_dtype, contiguous, full_precision


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


class Subspace(Featurizer):
    """K orthonormal directions Q of a D-wide activation: reads hQ, writes h + (z - hQ)Q^T.

    The frame is a function of a free weight (see `frames`), by default the thin QR factor of a (D, K) weight, so any
    optimiser step stays orthonormal; it is kept in fp32 (or fp64, if given so) and applied in at least fp32 whatever
    the model's dtype.

    Args:
        width: D. rank: K, 1 to D. seed: of the random initial frame, which is the same in all parametrisations.
        trainable: whether the weight learns.
        frame: "qr", "cayley", "householder" or, at a cost that grows with D^3, "matrix_exp".

    Raises:
        ShapeMismatch: rank is not within 1 to width. InterveneError: no parametrisation of that name.

    Source: DAS, Geiger et al. 2023 (arXiv 2303.02536), where Q is a full rotation whose first K columns are used; a
        thin frame spans the same interventions at a cost linear in D (LoReFT, Wu et al. 2024, arXiv 2404.03592).
    """

    base: Tensor | None

    def __init__(self, width: int, rank: int, *, seed: int = 0, trainable: bool = True, frame: str = "qr") -> None:
        super().__init__()
        if not 1 <= rank <= width:
            raise ShapeMismatch(f"Subspace of rank {rank} in width {width}: the rank must be 1 to {width}.")
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(width, rank, generator=generator, dtype=torch.float32)
        self._hold(**frame_named(frame).start(orthonormal(weight)), trainable=trainable, frame=frame)

    def _hold(self, weight: Tensor, base: Tensor | None = None, *, trainable: bool, frame: str = "qr") -> None:
        self.weight = nn.Parameter(contiguous(weight), requires_grad=trainable)
        self.register_buffer("base", None if base is None else contiguous(base))
        self.parametrisation = frame  # its name in FRAMES
        self._fixed: tuple[tuple[int, int, bool], Tensor] | None = None  # the frame of a weight that does not learn

    @classmethod
    def from_weight(
        cls, weight: Tensor, *, trainable: bool = True, frame: str = "qr", base: Tensor | None = None
    ) -> Subspace:
        """Return the subspace that `weight` (D, K) means to the parametrisation `frame`, kept as it is.

        For "qr" it is what the columns of `weight` span, which must be of full rank; the others need their `base` too.
        """
        if weight.dim() != 2 or not 1 <= weight.shape[1] <= weight.shape[0]:
            raise ShapeMismatch(f"Weight of shape {tuple(weight.shape)}: need (D, K) with 1 <= K <= D. Transpose it?")
        wanted = {
            "qr": None,
            "cayley": weight.shape,
            "householder": weight.shape[1:],
            "matrix_exp": weight.shape[:1] * 2,
        }
        shape = wanted[frame_named(frame).name]
        if (None if base is None else base.shape) != shape:
            found = None if base is None else tuple(base.shape)
            raise ShapeMismatch(f"Frame {frame!r} with a base of shape {found}: need {shape and tuple(shape)}.")
        made = cls.__new__(cls)  # not cls(D, K): a random D x D frame takes seconds
        nn.Module.__init__(made)
        kept = [None if each is None else each.detach().to(compute_dtype(each), copy=True) for each in (weight, base)]
        made._hold(*kept, trainable=trainable, frame=frame)  # type: ignore[arg-type]
        return made

    @classmethod
    def from_frame(cls, frame: Tensor, *, trainable: bool = False, parametrisation: str = "qr") -> Subspace:
        """Return the subspace spanned by the orthonormal columns of `frame` (D, K), on the device of `frame`.

        Raises:
            ShapeMismatch: `frame` is not a (D, K) matrix with 1 <= K <= D.
            BadVector: its columns are not orthonormal to 1e-4, or not finite.
        """
        wide = checked_frame(frame).detach().to(compute_dtype(frame))
        start = frame_named(parametrisation).start(wide)
        return cls.from_weight(**start, trainable=trainable, frame=parametrisation)

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

        A weight of QR that does not learn and is orthonormal to 1e-5 is returned itself, so that given frames are used
        bit for bit; one that once learned and was then frozen still goes through QR.

        Raises:
            BadVector: a weight that does not learn is no frame, as a fit that diverged leaves it. While it learns that
                is not looked at, which would read from the device at every step.
        """
        if self.weight.requires_grad:
            return self._evaluated()
        # Looking at the weight reads from the device, so it is done once per value of the weight. An inference tensor
        # has no version, and a frame made in inference mode must not be handed to a pass with gradients.
        version = 0 if self.weight.is_inference() else self.weight._version
        key = (version, self.weight.data_ptr(), torch.is_inference_mode_enabled())
        if self._fixed is None or self._fixed[0] != key:
            as_given = self.parametrisation == "qr" and orthonormal_error(self.weight) <= AS_GIVEN_TOLERANCE
            frame = self.weight if as_given else self._evaluated()
            error = 0.0 if as_given else orthonormal_error(frame)
            if not error <= ORTHONORMAL_TOLERANCE:
                raise BadVector(
                    f"Subspace ({self.parametrisation}): its frame is off orthonormal by {error:.1e}. Its weight is "
                    "not finite or not of full rank: fit it again, at a lower learning rate."
                )
            self._fixed = key, frame
        return self._fixed[1]

    def _evaluated(self) -> Tensor:
        return frame_named(self.parametrisation).evaluate(self.weight, self.base)

    def lens(self) -> Featurizer:
        return _Frame(self.frame())

    def read(self, h: Tensor) -> Tensor:
        return self.lens().read(h)

    def write(self, h: Tensor, z: Tensor) -> Tensor:
        return self.lens().write(h, z)


class Block(Featurizer):
    """Columns start to stop of another subspace's frame: reads hQ', writes h + (z - hQ')Q'^T, with its parameters.

    Blocks of one subspace that share no column are orthogonal, so that edits through them commute: one for each of
    several variables in a single learned frame. Stored plans keep them on one subspace.

    Args:
        subspace: whose frame it is, shared and not copied.
        start, stop: its columns, 0 <= start < stop <= rank.

    Raises:
        ShapeMismatch: no such columns.

    Source: DAS, Geiger et al. 2023 (arXiv 2303.02536): disjoint blocks of one rotation, one per variable.
    """

    def __init__(self, subspace: Subspace, start: int, stop: int) -> None:
        super().__init__()
        if not 0 <= start < stop <= subspace.rank:
            raise ShapeMismatch(
                f"Block of columns {start} to {stop}: the subspace has {subspace.rank}. "
                f"Need 0 <= start < stop <= {subspace.rank}."
            )
        self.subspace = subspace
        self.start = start
        self.stop = stop

    @property
    def width(self) -> int:
        return self.subspace.width

    def features(self, width: int) -> int:
        return self.stop - self.start

    def frame(self) -> Tensor:
        """Return the block's orthonormal (D, stop - start), differentiable in the subspace's weight."""
        return self.subspace.frame()[:, self.start : self.stop]

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
        width = checked_frame(components).shape[0]
        if mean.shape != (width,):
            raise ShapeMismatch(f"PCA mean of shape {tuple(mean.shape)}: the components are {width} wide.")
        finite(mean, "PCA mean")
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
        wide = finite(activations.detach(), "PCA activations").double()
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


def finite(tensor: Tensor, name: str) -> Tensor:
    """Return `tensor`; BadVector if it has NaN or infinite entries."""
    if not bool(torch.isfinite(tensor).all()):
        raise BadVector(f"{name}: it has NaN or infinite entries. Check where it was made.")
    return tensor
