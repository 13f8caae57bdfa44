"""The edits that learn, GatedSwap, BoundarySwap and Affine, against their formulas."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from intervene import Affine, BoundarySwap, GatedSwap
from tests.intervene.values import learned, randn

B, P, K = 2, 3, 6


# gates


def test_the_soft_gate_is_the_sigmoid_of_the_logits():
    edit = GatedSwap(3, temperature=0.5)
    edit.logits.data = torch.tensor([0.0, 1.0, -2.0])
    gate = 1 / (1 + np.exp(-np.array([0.0, 2.0, -4.0])))
    z, source = np.array([1.0, 1.0, 1.0]), np.array([3.0, -1.0, 5.0])
    result = edit(torch.tensor(z).view(1, 1, 3), torch.tensor(source).view(1, 1, 3))
    np.testing.assert_allclose(result.detach().numpy()[0, 0], (1 - gate) * z + gate * source, rtol=1e-6)


def test_a_fresh_gate_is_a_half_and_hard_off():
    edit = GatedSwap(3)
    assert edit.gate().tolist() == [0.5, 0.5, 0.5] and edit.eval().gate().tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_gates_copy_bit_for_bit(dtype):
    edit = GatedSwap(3).eval()
    edit.logits.data = torch.tensor([1e-6, -1e-6, 50.0])
    z, source = randn(B, P, 3, dtype=dtype), 1e4 * randn(B, P, 3, seed=2, dtype=dtype)
    result = edit(z, source)
    assert torch.equal(result[..., [0, 2]], source[..., [0, 2]]) and torch.equal(result[..., 1], z[..., 1])


@pytest.mark.parametrize("make", [lambda: learned(GatedSwap(K)), lambda: BoundarySwap(K, fraction=0.4)])
def test_cold_gates_become_the_hard_ones(make):
    edit, z, source = make(), randn(B, P, K), randn(B, P, K, seed=2)
    hard = copy.deepcopy(edit).eval()(z, source)
    assert not torch.allclose(edit(z, source), hard, atol=1e-3)
    for temperature in (1e-6, 0.0, -1.0):  # zero and below count as 1e-8
        edit.temperature = temperature
        assert edit.temperature > 0
        torch.testing.assert_close(edit(z, source), hard, atol=1e-6, rtol=1e-6)
    edit.temperature = 1e9
    torch.testing.assert_close(edit(z, source), (z + source) / 2, atol=1e-6, rtol=1e-6)


def test_a_tied_gate_moves_all_features_together():
    edit = GatedSwap(K, tied=True)
    assert edit.logits.shape == (1,) and edit.features == K
    edit.logits.data.fill_(2.0)
    z, source = randn(B, P, K), randn(B, P, K, seed=2)
    torch.testing.assert_close(edit(z, source), z + torch.sigmoid(torch.tensor(2.0)) * (source - z))
    assert torch.equal(edit.eval()(z, source), source)


@pytest.mark.parametrize("fraction, temperature, count", [(0.5, 0.05, 4), (0.3, 0.2, 10), (1.0, 0.1, 3), (0.0, 0.1, 3)])
def test_the_boundary_gate_is_its_formula(fraction, temperature, count):
    edit = BoundarySwap(count, fraction=fraction, temperature=temperature)
    i = np.arange(count)
    wanted = 1 / (1 + np.exp(-(fraction * count - (i + 0.5)) / (temperature * count)))
    np.testing.assert_allclose(edit.gate().detach().numpy(), wanted, rtol=1e-5)
    assert edit.eval().gate().tolist() == [float(n < round(fraction * count)) for n in range(count)]


def test_the_boundary_gate_at_given_numbers():
    edit = BoundarySwap(4, fraction=0.5, temperature=0.25)  # b = 2, one feature wide
    wanted = [1 / (1 + math.exp(-x)) for x in (1.5, 0.5, -0.5, -1.5)]
    assert edit.gate().tolist() == pytest.approx(wanted, rel=1e-6)
    assert float(edit.rank()) == 2.0


def test_beyond_its_ends_the_boundary_stays():
    z, source = randn(1, 1, K), randn(1, 1, K, seed=2)
    assert torch.equal(BoundarySwap(K, fraction=1.7).eval()(z, source), source)
    assert torch.equal(BoundarySwap(K, fraction=-0.3).eval()(z, source), z)


@pytest.mark.parametrize("start, target, wanted", [(1.3, "z", 0.0), (-0.3, "source", 1.0)])
def test_a_boundary_that_overshot_can_come_back(start, target, wanted):
    z, source = randn(1, 64, K), randn(1, 64, K, seed=2)
    edit = BoundarySwap(K, fraction=start, temperature=0.2)
    optimiser = torch.optim.SGD(edit.parameters(), lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        (edit(z, source) - {"z": z, "source": source}[target]).square().mean().backward()
        optimiser.step()
    assert abs(edit.fraction.item() - wanted) < 0.1
    outward = BoundarySwap(K, fraction=1.3, temperature=0.2)
    (outward(z, source) - source).square().mean().backward()
    assert float(outward.fraction.grad) == 0.0, "nor is it pushed further out"


def test_the_gradient_of_the_boundary_is_that_of_finite_differences():
    edit, z, source = BoundarySwap(K, fraction=0.4).double(), randn(1, 2, K).double(), randn(1, 2, K, seed=2).double()
    assert torch.autograd.gradcheck(lambda _: edit(z, source), (edit.fraction,))


# Affine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_affine_starts_as_the_identity(dtype):
    z = randn(B, P, K, dtype=dtype)
    assert torch.equal(Affine(K)(z, None), z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Affine(K)(z, None), z)


def test_affine_is_its_formula():
    edit, z = learned(Affine(K)), randn(B, P, K)
    wanted = np.einsum("bpi,ij->bpj", z.numpy(), edit.weight.detach().numpy()) + edit.bias.detach().numpy()
    np.testing.assert_allclose(edit(z, None).detach().numpy(), wanted, atol=1e-5)


def test_a_small_step_from_the_identity_shows_in_bf16():
    edit, z = Affine(K), torch.full((1, 1, K), 200.0, dtype=torch.bfloat16)
    with torch.no_grad():
        edit.weight += 0.003 * torch.ones(K, K)  # below bf16's last digit beside one
    wanted = (z.float() @ edit.weight).bfloat16()
    assert torch.equal(edit(z, None), wanted) and not torch.equal(wanted, z)
