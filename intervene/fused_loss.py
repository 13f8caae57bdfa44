"""The cross-entropy of a frozen unembedding without its logits: each part of the weights is read once and used twice.

A training step at one scored token multiplies a few rows with the whole vocabulary, writes the logits, reads them for
the softmax, and multiplies with the same weights again for the gradient. With few rows it waits for the weights. Here
a part of them that fits the processor's cache gives its logits and, at once, its share of the gradient: an online
softmax (Milakov & Gimelshein 2018, arXiv 1805.02867), whose running maximum is only kept where it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from intervene.fused import watched
from intervene.model_state import all_hooks
from intervene.precision import multiplies_fast, rounded

WORDS, WORDS_FAST = 512, 4096  # of the vocabulary at a time: a megabyte of weights; in bf16, what products do best with


def plain_head(hf: nn.Module) -> nn.Linear | None:
    """Return the unembedding of `hf` if it is a frozen, unwatched fp32 product on the CPU; None: it is not."""
    if watched(hf) or "forward" in hf.__dict__ or all_hooks() or torch.is_autocast_enabled("cpu"):
        return None  # somebody may read the logits, or change them
    find = getattr(hf, "get_output_embeddings", None)
    head = find() if find is not None else None
    if type(head) is not nn.Linear or head.bias is not None or "forward" in head.__dict__ or watched(head):
        return None
    weight = head.weight
    known = weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.is_inference()
    return head if known and not weight.requires_grad else None


def unembedded_losses(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return (B,): cross-entropy in nats of the answers h W^T; h (B, D), weight (V, D) frozen, labels (B,) int64."""
    made: Tensor = _Losses.apply(h, weight, labels)  # type: ignore[no-untyped-call]
    return made


def _swept(x: Tensor, parts: Sequence[Tensor], *, moving: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return a reference m (B, 1), sum of exp(l - m) over the vocabulary, and the rows of W weighted by exp(l - m).

    m is each row's largest logit if `moving`; else that of the first part, which is cheaper and right unless a later
    one is so much larger (by 88) that fp32 overflows.
    """
    highest: Tensor | None = None
    total, expected = x.new_zeros(len(x), 1, dtype=torch.float32), x.new_zeros(x.shape, dtype=torch.float32)
    for part in parts:
        logits = torch.mm(x, part.t()).float()
        if highest is None:
            highest = logits.amax(1, keepdim=True)
        elif moving:
            above = torch.maximum(highest, logits.amax(1, keepdim=True))
            shrink = (highest - above).exp_()
            highest, total, expected = above, total.mul_(shrink), expected.mul_(shrink)
        shares = logits.sub_(highest).exp_()
        total.add_(shares.sum(1, keepdim=True))
        if part.dtype == shares.dtype:
            expected.addmm_(shares, part)
        else:
            expected.add_(torch.mm(shares.to(part.dtype), part))
    assert highest is not None  # a vocabulary has words
    return highest, total, expected


class _Losses(torch.autograd.Function):
    """log sum exp(h W^T) - h w_label, and its gradient to h: the expected row of W less the label's."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        fast = multiplies_fast(h)
        parts = torch.split(rounded(weight) if fast else weight, WORDS_FAST if fast else WORDS)
        x = h.bfloat16() if fast else h
        highest, total, expected = _swept(x, parts, moving=False)
        if not bool(torch.isfinite(total).all() and torch.isfinite(expected).all()):
            highest, total, expected = _swept(x, parts, moving=True)
        answers = weight[labels]
        ctx.save_for_backward(expected.div_(total).sub_(answers))
        return (highest + total.log())[:, 0] - (h * answers).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (towards,) = ctx.saved_tensors
        return grad[:, None] * towards, None, None
