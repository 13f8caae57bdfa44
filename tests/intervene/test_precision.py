"""`fast_products` changes only linear layers, by as much as bf16 products may, and nothing after it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from intervene import Subspace
from intervene.precision import fast_products


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_layer_up_to_bf16(bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48, bias=bias), torch.randn(5, 7, 64, requires_grad=True)
    found = []
    for fast in (False, True):
        if fast:
            with fast_products():
                y = layer(x)
                y.square().sum().backward()
        else:
            y = layer(x)
            y.square().sum().backward()
        found.append([y.detach(), x.grad.clone(), *(p.grad.clone() for p in layer.parameters())])
        x.grad = None
        layer.zero_grad()
    for plain, fast in zip(*found, strict=True):
        assert plain.shape == fast.shape and fast.dtype == torch.float32
        assert (plain - fast).norm() <= 0.01 * plain.norm()  # bf16 has 8 bits; fp32 processors give 0


def test_the_setting_is_as_before_also_after_an_error_and_inside_other_operations():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError, match="on purpose"), fast_products():
        assert torch.get_float32_matmul_precision() == before  # only within a linear layer is it another
        nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3))
        raise RuntimeError("on purpose")
    assert torch.get_float32_matmul_precision() == before


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
