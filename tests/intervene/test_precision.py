"""`fast_products` changes only linear layers, by as much as bf16 products may, and nothing after it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from intervene import Subspace
from intervene.precision import fast_products


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_layer_up_to_bf16(bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48, bias=bias).requires_grad_(False), torch.randn(5, 7, 64, requires_grad=True)
    found = []
    for fast in (nullcontext, fast_products):
        with fast():
            y = layer(x)
            y.square().sum().backward()
        found.append([y.detach(), x.grad.clone()])
        x.grad = None
    for plain, fast in zip(*found, strict=True):
        assert plain.shape == fast.shape and fast.dtype == torch.float32
        assert (plain - fast).norm() <= 0.01 * plain.norm()  # bf16 has 8 bits; other processors give 0


def test_a_weight_that_changes_is_rounded_anew_and_one_that_learns_not_at_all():
    layer, x = nn.Linear(8, 8, bias=False).requires_grad_(False), torch.randn(3, 8)
    with fast_products():
        layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), x @ layer.weight.T, atol=0.1, rtol=0.05)
        layer.requires_grad_(True)
        layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(8, 8))  # exact: it went its usual way


def test_frames_are_exact_inside():
    lens, h = Subspace(64, 8), torch.randn(3, 2, 64)
    with fast_products():
        inside = lens.write(h, lens.read(h) + 1)
    assert torch.equal(inside, lens.write(h, lens.read(h) + 1))


def test_other_dtypes_and_keywords_go_their_usual_way():
    x, weight = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    with fast_products():
        assert torch.equal(nn.functional.linear(x, weight), x @ weight.T)
        assert torch.allclose(nn.functional.linear(x.float(), weight=weight.float()), (x @ weight.T).float(), atol=0.1)
