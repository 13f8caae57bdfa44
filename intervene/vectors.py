"""Directions from activations: mean difference, PCA and logistic probe, with their norm and provenance.

The functions take activations (N, D), as `intervene.run.activations` collects them, and return a `SteeringVector`: a
value that knows which model, site and tokens it came from, so that applying it anywhere else is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from intervene.errors import BadVector, InterveneError, ShapeMismatch
from intervene.sites import Site

LAYER_CONVENTION = "0-based block index; block_output of layer l is the residual stream after block l"

Pooling = Literal["mean", "last", "first", "tokens"]


def checked_vector(vector: Tensor, *, allow_zero: bool = False, name: str = "vector") -> Tensor:
    """Return `vector` if it is finite and not zero, with 1, 2 or 3 axes.

    Raises:
        BadVector: no tensor, NaN, infinite, or (unless `allow_zero`) all zero in some row.
        ShapeMismatch: more than three axes or none.
    """
    if not isinstance(vector, Tensor):
        raise BadVector(f"{name}: a {type(vector).__name__} is no tensor. Wrap it: torch.tensor(...).")
    if not 1 <= vector.dim() <= 3:
        raise ShapeMismatch(f"{name}: a vector of shape {tuple(vector.shape)}. Give (D,), (B, D) or (B, P, D).")
    if not bool(torch.isfinite(vector).all()):
        count = int((~torch.isfinite(vector)).sum())
        raise BadVector(
            f"{name}: the vector has {count} NaN or infinite entries of {vector.numel()}. "
            "Check the activations it was made from."
        )
    if not allow_zero and bool((vector == 0).all(dim=-1).any()):
        raise BadVector(
            f"{name}: the vector is all zero, which would change nothing. "
            "Check that its two sets of activations differ, or leave the intervention out."
        )
    return vector


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction (D,) and where it came from.

    Fields: `site`, `model` and `fingerprint` say what it fits; `method`, `pooling`, `n_positive`, `n_negative` how it
    was made; `stream_norm` is the mean norm of the activations it was made from, so that `norm / stream_norm` is its
    strength as a fraction of the stream.
    """

    vector: Tensor = field(repr=False)  # its hundreds of numbers would hide the rest
    site: Site
    fingerprint: str
    method: str
    model: str = ""
    pooling: str = ""
    n_positive: int = 0
    n_negative: int = 0
    stream_norm: float = float("nan")
    convention: str = LAYER_CONVENTION

    def __post_init__(self) -> None:
        checked_vector(self.vector, name=f"{self.method} vector at {self.site}")
        if self.vector.dim() != 1:
            raise ShapeMismatch(f"Steering vector of shape {tuple(self.vector.shape)}: it must be (D,).")

    @property
    def norm(self) -> float:
        """Euclidean norm of the vector."""
        return float(self.vector.norm())

    def scaled_to(self, fraction: float) -> SteeringVector:
        """Return this direction with norm `fraction` of the stream's mean norm where it was made."""
        if not self.stream_norm > 0:
            raise BadVector(f"Vector at {self.site}: its stream norm is unknown. Use Add(v, strength, relative=True).")
        return SteeringVector(
            **{
                **self.provenance(),
                "site": self.site,
                "vector": self.vector * (fraction * self.stream_norm / self.norm),
            }
        )

    def provenance(self) -> dict[str, Any]:
        """Return every field but the tensor, as plain values."""
        fields = {name: value for name, value in self.__dict__.items() if name not in ("vector", "site")}
        return {**fields, "site": str(self.site)}

    @classmethod
    def from_provenance(cls, vector: Tensor, provenance: dict[str, Any]) -> SteeringVector:
        """Return the vector that `provenance()` described."""
        return cls(vector=vector, **{**provenance, "site": Site.parse(provenance["site"])})


@dataclass(frozen=True, eq=False)
class Activations:
    """Pooled activations of one site over a set of prompts: what the direction functions read.

    `values` is (N, D): one row per prompt, or per token with pooling "tokens".
    """

    values: Tensor
    site: Site
    fingerprint: str
    model: str
    pooling: Pooling


def pool(h: Tensor, valid: Tensor, pooling: Pooling) -> Tensor:
    """Return (N, D) from activations (B, P, D): one row per example, or with "tokens" one per valid token.

    `valid` (B, P) bool says which slots hold a token. A mean is taken in at least fp32, where a count above 256 is
    still exact; everything else keeps the dtype of `h`.

    Raises:
        ShapeMismatch: an example has no valid token. InterveneError: no such pooling.
    """
    if pooling not in get_args(Pooling):
        raise InterveneError(f"Pooling {pooling!r}: there is none. Use one of {', '.join(get_args(Pooling))}.")
    if not bool(valid.any(1).all()):
        row = int((~valid.any(1)).nonzero()[0])
        raise ShapeMismatch(f"Pooling {pooling!r}: example {row} has no selected token. Choose other positions.")
    if pooling == "tokens":
        return h[valid]
    if pooling == "mean":
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        return wide.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1, keepdim=True)
    ordinal = torch.arange(h.shape[1], device=h.device)
    slots = torch.where(valid, ordinal, h.shape[1]).amin(1) if pooling == "first" else (valid * ordinal).amax(1)
    return h[torch.arange(len(h), device=h.device), slots]


def _check_contrast(positive: Activations, negative: Activations) -> None:
    for name in ("site", "fingerprint", "pooling"):
        left, right = getattr(positive, name), getattr(negative, name)
        if left != right:
            raise BadVector(f"Contrast: {name} is {left} for the positive and {right} for the negative. Collect alike.")
    for name, side in (("positive", positive), ("negative", negative)):
        bad = int((~torch.isfinite(side.values)).sum())
        if bad or not len(side.values):
            found = f"{bad} NaN or infinite entries of {side.values.numel()}" if bad else "no rows"
            raise BadVector(f"Contrast: the {name} activations have {found}. Check the batches they came from.")


def _vector(direction: Tensor, positive: Activations, negative: Activations, method: str) -> SteeringVector:
    both = torch.cat([positive.values, negative.values]).float()
    return SteeringVector(
        vector=direction.float(),
        site=positive.site,
        fingerprint=positive.fingerprint,
        method=method,
        model=positive.model,
        pooling=positive.pooling,
        n_positive=len(positive.values),
        n_negative=len(negative.values),
        stream_norm=float(both.norm(dim=-1).mean()),
    )


def mean_difference(positive: Activations, negative: Activations) -> SteeringVector:
    """Return mean(positive) - mean(negative), not normalised.

    Source: contrastive activation addition, Rimsky et al. 2023 (arXiv 2312.06681).
    """
    _check_contrast(positive, negative)
    direction = positive.values.double().mean(0) - negative.values.double().mean(0)
    return _vector(direction, positive, negative, "mean_difference")


def pca_direction(positive: Activations, negative: Activations) -> SteeringVector:
    """Return the first principal direction of the paired differences, unit norm, pointing to the positive side.

    The differences are not centred, so a shift that all pairs share is found, whatever their spread (Zou et al. 2023,
    arXiv 2310.01405, centre pairs of random sign instead; the span is the same).

    Raises:
        ShapeMismatch: the two sets are not paired row by row.
    """
    _check_contrast(positive, negative)
    if positive.values.shape != negative.values.shape:
        raise ShapeMismatch(
            f"PCA direction: {len(positive.values)} positive and {len(negative.values)} negative rows. "
            "Pair them row by row, or use mean_difference."
        )
    differences = positive.values.double() - negative.values.double()
    _, _, rows = torch.linalg.svd(differences, full_matrices=False)
    direction = rows[0] * (1.0 if float(differences.mean(0) @ rows[0]) >= 0 else -1.0)
    return _vector(direction, positive, negative, "pca")


def probe_direction(positive: Activations, negative: Activations, *, c: float = 1.0, seed: int = 0) -> SteeringVector:
    """Return the weight of a logistic probe (scikit-learn, L2 with inverse strength `c`), unit norm.

    Features are standardised for the fit and the weight is mapped back to raw activations, so its score orders
    activations exactly as the probe does.
    """
    from sklearn.linear_model import LogisticRegression  # a dependency of the commands, not of the core

    _check_contrast(positive, negative)
    both = torch.cat([positive.values, negative.values]).double()
    labels = [1] * len(positive.values) + [0] * len(negative.values)
    mean, spread = both.mean(0), both.std(0).clamp_min(1e-8)
    probe = LogisticRegression(C=c, max_iter=2000, random_state=seed)
    probe.fit(((both - mean) / spread).cpu().numpy(), labels)
    direction = torch.from_numpy(probe.coef_[0]).to(both) / spread
    return _vector(direction / direction.norm(), positive, negative, "logistic_probe")
