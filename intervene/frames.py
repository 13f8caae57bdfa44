"""Ways to write an orthonormal (D, K) frame as a function of a free weight, so that any optimiser step keeps it one.

    start = FRAMES["cayley"].start(frame)        # {"weight": ..., "base": ...}: evaluates to `frame`
    frame = FRAMES["cayley"].evaluate(**start)   # differentiable in the weight, in at least fp32

Each costs O(D K^2) but "matrix_exp", which is O(D^3) and there to be compared with. `benchmarks/frames.py` times them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from intervene.errors import BadVector, InterveneError, ShapeMismatch, close_names
from intervene.precision import compute_dtype, full_precision

ORTHONORMAL_TOLERANCE = 1e-4  # beyond it a given frame is refused
AS_GIVEN_TOLERANCE = 1e-5  # within it a weight that does not learn is its own frame, bit for bit


@dataclass(frozen=True)
class Frame:
    """One parametrisation.

    `start(frame)` returns the weight that learns, and for all but QR the `base` that does not, at which `evaluate`
    returns `frame` (D, K) up to rounding. `evaluate(weight, base)` returns an orthonormal (D, K).
    """

    name: str
    start: Callable[[Tensor], dict[str, Tensor]]
    evaluate: Callable[[Tensor, Tensor | None], Tensor]


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


def checked_frame(frame: Tensor) -> Tensor:
    """Return `frame` if it is a (D, K) matrix with orthonormal columns.

    Raises:
        ShapeMismatch: it is not (D, K) with 1 <= K <= D. BadVector: off orthonormal by more than 1e-4, or not finite.
    """
    if frame.dim() != 2 or not 1 <= frame.shape[1] <= frame.shape[0]:
        raise ShapeMismatch(f"Frame of shape {tuple(frame.shape)}: need (D, K) with 1 <= K <= D. Transpose it?")
    error = orthonormal_error(frame)
    if not error <= ORTHONORMAL_TOLERANCE:
        raise BadVector(
            f"Frame: its columns are off orthonormal by {error:.1e}. "
            "Pass torch.linalg.qr(frame).Q if only the span matters."
        )
    return frame


def frame_named(name: str) -> Frame:
    """Return the parametrisation `name`.

    Raises:
        InterveneError: there is none of that name.
    """
    if name not in FRAMES:
        raise InterveneError(f"Frame {name!r}: there is none. {close_names(str(name), FRAMES)}")
    return FRAMES[name]


def _wide(weight: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor]:
    assert base is not None, "made by `start`, which gives one"
    dtype = compute_dtype(weight)
    return weight.to(dtype), base.to(dtype)


def cayley(weight: Tensor, base: Tensor | None) -> Tensor:
    """Return Q = (1 - A/2)^-1 (1 + A/2) Q0 with A = W Q0^T - Q0 W^T, for `weight` W (D, K) and `base` Q0 (D, K).

    A is skew and has rank 2K. With C = Q0^T W and P = W - Q0 C, the part of W outside of Q0, the inverse of Woodbury's
    2K x 2K system has a closed form, and one K x K solve remains:

        M = 1 + P^T P / 4 - (C - C^T) / 2,    Q = (2 Q0 + P) M^-1 - Q0.

    The symmetric part of M is at least 1, so that it always has an inverse. A last step of Newton and Schulz,
    Q (3 - Q^T Q) / 2, removes what rounding leaves when W has grown large.

    Source: Wen and Yin 2013 (doi 10.1007/s10107-012-0584-1), section 2: the Cayley transform on the Stiefel manifold.
        They take steps with it; here the base stays where it is, and the closed form is ours.
    """
    w, q0 = _wide(weight, base)
    with full_precision(w):
        c = q0.mT @ w  # (K, K)
        p = w - q0 @ c  # (D, K)
        one = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
        inner = one + p.mT @ p / 4 - (c - c.mT) / 2
        q = torch.linalg.solve(inner, 2 * q0 + p, left=False) - q0  # (D, K)
        refined: Tensor = q @ (1.5 * one - 0.5 * (q.mT @ q))
        return refined


def householder(weight: Tensor, base: Tensor | None) -> Tensor:
    """Return the first K columns of the reflections H_1 ... H_K, H_k = 1 - 2 v_k v_k^T / |v_k|^2, times `base` (K,).

    v_k is column k of `weight` (D, K) from its k-th entry on; what lies above is not used. `base` holds signs. All K
    reflections are applied at once: H_1 ... H_K = 1 - V T^-1 V^T, with unit columns V and T the upper triangle of V^T V
    with half its diagonal.

    Source: the compact form in Joffrain et al. 2006 (doi 10.1145/1141885.1141886). torch.linalg.householder_product
        has the same value, with a gradient that takes one reflection after the other.
    """
    w, signs = _wide(weight, base)
    with full_precision(w):
        v = w.tril()
        v = v / torch.linalg.vector_norm(v, dim=0)  # (D, K)
        rank = v.shape[1]
        half = (v.mT @ v).triu(1) + 0.5 * torch.eye(rank, dtype=v.dtype, device=v.device)
        applied = torch.linalg.solve_triangular(half, v[:rank].mT, upper=True)  # (K, K)
        frame: Tensor = (torch.eye(*v.shape, dtype=v.dtype, device=v.device) - v @ applied) * signs
        return frame


def matrix_exp(weight: Tensor, base: Tensor | None) -> Tensor:
    """Return the first K columns of B exp(L - L^T), L the lower triangle of `weight` (D, K) padded to D x D by zeros.

    `base` B (D, D) is a rotation whose first K columns are the start. In time and memory O(D^2) to O(D^3).

    Source: torch.nn.utils.parametrizations.orthogonal(orthogonal_map="matrix_exp"), after Lezcano-Casado 2019 (arXiv
        1909.09501), which is how the original Boundless DAS made its rotation.
    """
    w, rotation = _wide(weight, base)
    with full_precision(w):
        width, rank = w.shape
        lower = torch.cat([w.tril(), w.new_zeros(width, width - rank)], 1)  # (D, D)
        frame: Tensor = rotation @ torch.linalg.matrix_exp(lower - lower.mT)[:, :rank]
        return frame


def _start_householder(frame: Tensor) -> dict[str, Tensor]:
    # geqrf leaves R above the diagonal and, below it, the vectors whose k-th entry is one
    vectors = torch.geqrf(frame).a.tril(-1) + torch.eye(*frame.shape, dtype=frame.dtype, device=frame.device)
    signs = torch.ones(frame.shape[1], dtype=frame.dtype, device=frame.device)
    reflected = householder(vectors, signs)
    return {"weight": vectors, "base": torch.where((reflected * frame).sum(0) < 0, -signs, signs)}


def _start_matrix_exp(frame: Tensor) -> dict[str, Tensor]:
    complete = torch.linalg.qr(frame, mode="complete").Q  # (D, D)
    return {"weight": torch.zeros_like(frame), "base": torch.cat([frame, complete[:, frame.shape[1] :]], 1)}


FRAMES: dict[str, Frame] = {
    frame.name: frame
    for frame in (
        Frame("qr", lambda frame: {"weight": frame}, lambda weight, base: orthonormal(weight)),
        Frame("cayley", lambda frame: {"weight": torch.zeros_like(frame), "base": frame}, cayley),
        Frame("householder", _start_householder, householder),
        Frame("matrix_exp", _start_matrix_exp, matrix_exp),
    )
}
