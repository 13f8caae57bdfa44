"""Randomised SVD against torch.linalg.svd, and what a protected subspace projects."""

from __future__ import annotations

import pytest
import torch

from defenses.errors import DefenseError
from defenses.subspaces import ProtectedSubspace, flat_subspace, randomised_svd, seed_of, svd_subspace


def spectrum(values, rows=60, columns=90, seed=0):
    """A matrix (rows, columns) with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=generator))[0]
    return left @ torch.diag(torch.tensor(values)) @ right.T


SLOW = [1.0 / (1 + 0.1 * i) for i in range(60)]
FAST = [0.9**i for i in range(60)]


@pytest.mark.parametrize("values", [SLOW, FAST], ids=["slow decay", "fast decay"])
@pytest.mark.parametrize("transposed", [False, True])
def test_two_power_iterations_capture_the_energy_of_the_exact_svd_to_a_hundredth(values, transposed):
    matrix = spectrum(values).T.contiguous() if transposed else spectrum(values)
    exact = torch.linalg.svdvals(matrix)[:8].square().sum()
    captured = [float((randomised_svd(matrix, 8, seed=seed)[0].T @ matrix).square().sum() / exact) for seed in range(5)]
    assert min(captured) > 0.99
    assert max(captured) <= 1 + 1e-5


def test_power_iterations_and_oversampling_are_what_it_takes():
    matrix = spectrum(SLOW)
    exact = torch.linalg.svdvals(matrix)[:8].square().sum()
    bare = randomised_svd(matrix, 8, seed=0, oversample=0, power_iterations=0)[0]
    assert float((bare.T @ matrix).square().sum() / exact) < 0.9


def test_singular_values_and_vectors_are_the_exact_ones_where_the_spectrum_has_gaps():
    matrix = spectrum([8.0, 4.0, 2.0, 0.01, 0.005])
    left, values, right = randomised_svd(matrix, 3, seed=1)
    exact_left, exact_values, exact_right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(values, exact_values[:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((left.T @ exact_left[:, :3]).abs(), torch.eye(3), rtol=0, atol=1e-4)
    torch.testing.assert_close((right @ exact_right[:3].T).abs(), torch.eye(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(left @ torch.diag(values) @ right, matrix, rtol=0, atol=0.02)


def test_the_rank_is_cut_to_what_the_matrix_has():
    left, values, right = randomised_svd(torch.randn(5, 3), 8, seed=0)
    assert (left.shape, values.shape, right.shape) == ((5, 3), (3,), (3, 3))


def test_the_seed_comes_from_the_name_and_gives_the_same_space_everywhere():
    # sha256("a") begins ca978112
    assert seed_of("a") == 0xCA978112
    delta = torch.randn(6, 7)
    first, second = (svd_subspace(delta, 2, name="layer.weight", side="output") for _ in range(2))
    assert torch.equal(first.frame, second.frame)


@pytest.mark.parametrize("side", ["output", "input", "flat"])
def test_what_is_projected_out_leaves_nothing_in_the_space(side):
    delta, other = torch.randn(6, 9), torch.randn(6, 9)
    space = flat_subspace(delta) if side == "flat" else svd_subspace(delta, 3, name="x", side=side)
    rest = other - space.projected(other)
    torch.testing.assert_close(space.coefficients(rest), torch.zeros_like(space.coefficients(rest)), rtol=0, atol=1e-5)
    torch.testing.assert_close(space.projected(space.projected(other)), space.projected(other), rtol=1e-4, atol=1e-5)
    if side == "flat":  # Gram-Schmidt, written out
        by_hand = other - delta * (other * delta).sum() / (delta * delta).sum()
        torch.testing.assert_close(rest, by_hand, rtol=1e-4, atol=1e-5)
    else:
        vectors = torch.linalg.svd(delta)[0][:, :3] if side == "output" else torch.linalg.svd(delta)[2][:3].T
        projector = vectors @ vectors.T
        torch.testing.assert_close(
            space.projected(other), projector @ other if side == "output" else other @ projector, rtol=1e-3, atol=1e-3
        )


def test_the_energy_is_the_share_of_the_delta_in_the_space():
    delta = spectrum([3.0, 4.0], rows=10, columns=12)
    assert svd_subspace(delta, 1, name="x", side="output").energy == pytest.approx(16 / 25, abs=1e-5)


def test_states_come_back():
    space = svd_subspace(torch.randn(6, 9), 2, name="x", side="input")
    again = ProtectedSubspace.from_state(space.state_dict())
    assert (again.side, again.energy) == (space.side, space.energy)
    assert torch.equal(again.frame, space.frame)


@pytest.mark.parametrize("bad", [torch.zeros(3, 4), torch.full((3, 4), float("nan"))])
def test_a_change_that_is_none_has_no_subspace(bad):
    with pytest.raises(DefenseError, match="must be finite and not"):
        flat_subspace(bad)
    with pytest.raises(DefenseError, match="must be finite and not"):
        svd_subspace(bad, 2, name="x", side="output")


def test_a_rank_of_none_is_refused():
    with pytest.raises(DefenseError, match="rank >= 1"):
        randomised_svd(torch.randn(3, 4), 0, seed=0)
