"""Attention of fused blocks and its gradient: torch's flash kernel, or written out where that costs less."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SHORT = 1024  # queries times keys up to which attention is written out
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACK = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Attended(NamedTuple):
    """Attention `out` (B, H, Q, d), and what its gradient needs: q alike, k and v (B, G, T, d), sums or shares."""

    out: Tensor
    held: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Attended:
    """Return attention of q (B, H, Q, d) on k and v (B, G, T, d), grouped queries next to one another.

    `mask` (B or 1, 1, Q, T) is added to the scores; None: the queries are those of the last Q keys, and causal.
    """
    Q, T = q.shape[2], k.shape[2]
    if mask is None and 1 < Q < T:
        mask = q.new_full((1, 1, Q, T), -torch.inf).triu_(T - Q + 1)
    attend = _attend_short if Q * T <= _SHORT else _attend_long
    return Attended(*attend(q, k, v, mask, scale), q, k, v, mask)


def attended_back(grad: Tensor, kept: Attended, scale: float, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients to q, and to the `new` last keys and values, from `grad` (B, H, Q, d)."""
    back = _attend_short_back if kept.q.shape[2] * kept.k.shape[2] <= _SHORT else _attend_long_back
    return back(grad, kept, scale, new)


def _attend_long(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return attention (B, H, Q, d) of q on k and v (B, G, T, d), and what its gradient needs besides them."""
    causal = mask is None and q.shape[2] > 1
    out, sums = _FLASH(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return out, sums


def _attend_long_back(grad: Tensor, kept: Attended, scale: float, new: int) -> tuple[Tensor, Tensor, Tensor]:
    out, sums, q, k, v, mask = kept
    causal = mask is None and q.shape[2] > 1
    to_q, to_k, to_v = _FLASH_BACK(grad, q, k, v, out, sums, 0.0, causal, attn_mask=mask, scale=scale)
    return to_q, to_k[:, :, -new:], to_v[:, :, -new:]


def _attend_short(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`_attend_long` for few queries and keys, for which its kernel costs more than writing their scores does.

    Scores lie with keys before queries: a softmax over a short last dimension is ten times slower.
    """
    (B, H, Q, d), (_, G, T, _) = q.shape, k.shape
    scores = torch.bmm(k.reshape(B * G, T, d), q.reshape(B * G, -1, d).transpose(1, 2)).mul_(scale)
    if mask is None and Q > 1:
        mask = q.new_full((1, 1, Q, T), -torch.inf).triu_(T - Q + 1)
    if mask is not None:
        scores.view(B, G, T, H // G, Q).add_(mask.transpose(2, 3)[:, :, :, None])
    shares = scores.softmax(1)
    return torch.bmm(shares.transpose(1, 2), v.reshape(B * G, T, d)).view(B, H, Q, d), shares


def _attend_short_back(grad: Tensor, kept: Attended, scale: float, new: int) -> tuple[Tensor, Tensor, Tensor]:
    _, shares, q, k, v, _ = kept
    (B, H, Q, _), (_, G, _, d) = q.shape, k.shape
    grad, q, k, v = (part.reshape(B * G, -1, d) for part in (grad, q, k, v))
    to_scores = torch.ops.aten._softmax_backward_data(torch.bmm(v, grad.transpose(1, 2)), shares, 1, shares.dtype)
    to_scores.mul_(scale)
    to_k, to_v = torch.bmm(to_scores[:, -new:], q), torch.bmm(shares[:, -new:], grad)
    return torch.bmm(to_scores.transpose(1, 2), k).view(B, H, Q, d), to_k.view(B, G, new, d), to_v.view(B, G, new, d)
