"""Attention of fused blocks equals torch's own, forwards and backwards, in both of its ways."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from intervene import fused_attention
from intervene.fused_attention import attended, attended_back

SCALE = 0.3


def drawn(Q, T, seed=0, B=3, H=4, G=2, d=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, heads, n, d, generator=generator) for heads, n in ((H, Q), (G, T), (G, T), (H, Q))]


def own(q, k, v, grad, mask):
    """torch's attention in fp64, every query seeing what `mask` allows; and its gradients."""
    leaves = [part.double().requires_grad_() for part in (q, k, v)]
    groups = q.shape[1] // k.shape[1]
    keys, values = (part.repeat_interleave(groups, 1) for part in leaves[1:])
    out = nn.functional.scaled_dot_product_attention(leaves[0], keys, values, attn_mask=mask.double(), scale=SCALE)
    out.backward(grad.double())
    return out.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("limit", [0, 10**6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("Q", "T", "new"), [(6, 6, 6), (1, 6, 1), (1, 6, 6), (3, 7, 3)])
def test_equals_torchs_attention(monkeypatch, limit, masked, Q, T, new):
    monkeypatch.setattr(fused_attention, "_SHORT", limit)
    q, k, v, grad = drawn(Q, T)
    causal = torch.zeros(3, 1, Q, T).masked_fill_(torch.ones(Q, T).triu(T - Q + 1).bool(), -torch.inf)
    mask = causal.clone()
    if masked:
        mask[1, ..., :2] = torch.finfo(torch.float32).min  # two columns of padding
    expected, slopes = own(q, k, v, grad, mask)
    kept = attended(q, k, v, mask if masked else None, SCALE)
    found = attended_back(grad, kept, SCALE, new)
    rows = slice(1, 2) if masked and Q == T else slice(None)
    seen = slice(2, None) if masked and Q == T else slice(None)  # what sees only padding is nobody's concern
    torch.testing.assert_close(kept.out[rows, :, seen].double(), expected[rows, :, seen], atol=1e-5, rtol=1e-5)
    if not (masked and Q == T):
        torch.testing.assert_close(found[0].double(), slopes[0], atol=1e-5, rtol=1e-5)
        for one, other in zip(found[1:], slopes[1:], strict=True):
            torch.testing.assert_close(one.double(), other[:, :, -new:], atol=1e-5, rtol=1e-5)
