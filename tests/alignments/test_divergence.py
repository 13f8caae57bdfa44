"""Distances between sets of vectors against scipy, closed forms and small cases done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from alignments.divergence import (
    counterfactual_means,
    counterfactual_targets,
    divergence_facts,
    divergence_penalty,
    energy_distance,
    mahalanobis_ratio,
    natural_baseline,
    sliced_wasserstein,
)


def normal(n: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize(("n", "m"), [(30, 30), (40, 17), (1, 5)])
def test_in_one_dimension_the_distances_are_scipys(n: int, m: int) -> None:
    a, b = normal(n, 1, 0).double(), normal(m, 1, 1, 0.5).double()
    expected = stats.energy_distance(a[:, 0].numpy(), b[:, 0].numpy()) ** 2
    assert energy_distance(a, b, unbiased=False) == pytest.approx(expected, rel=1e-9)
    assert sliced_wasserstein(a, b, projections=3) == pytest.approx(
        stats.wasserstein_distance(a[:, 0].numpy(), b[:, 0].numpy()), rel=1e-9
    )


def test_energy_distance_by_hand() -> None:
    a, b = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    # across: 0, 1, 5, sqrt(18), mean (6 + sqrt 18) / 4; within: 5 and 1 (10/4 and 2/4 biased).
    across = (6 + 18**0.5) / 4
    assert energy_distance(a, b) == pytest.approx(2 * across - 5 - 1)
    assert energy_distance(a, b, unbiased=False) == pytest.approx(2 * across - 2.5 - 0.5)
    assert energy_distance(a, b, chunk=1) == pytest.approx(energy_distance(a, b), rel=1e-12)
    assert energy_distance(a.numpy(), b.numpy()) == energy_distance(a, b)


def test_the_unbiased_energy_distance_of_one_distribution_is_zero_on_average() -> None:
    found = [energy_distance(normal(20, 3, seed), normal(20, 3, 100 + seed)) for seed in range(60)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 60**0.5
    assert min(found) < 0 < energy_distance(normal(20, 3, 0), normal(20, 3, 1), unbiased=False)


def test_energy_distance_of_point_masses_is_twice_their_distance() -> None:
    a, b = torch.zeros(4, 3), torch.tensor([[2.0, 3.0, 6.0]] * 5)
    assert energy_distance(a, b) == pytest.approx(14)


def test_sliced_wasserstein_of_a_shift_is_the_mean_projected_shift() -> None:
    a = normal(50, 8, 0).double()
    shift = torch.zeros(8, dtype=torch.float64)
    shift[2] = 5.0
    # W_2 along u of a shift is |u . shift|; the mean of its square over the sphere is |shift|^2 / D.
    found = sliced_wasserstein(a, a + shift, projections=20_000, order=2)
    assert found == pytest.approx(5 / 8**0.5, rel=0.02)
    assert sliced_wasserstein(a, a[torch.randperm(50)]) == pytest.approx(0, abs=1e-12)
    assert sliced_wasserstein(a, a + shift, seed=3) == sliced_wasserstein(a, a + shift, seed=3)


def test_sets_of_unequal_size_by_hand() -> None:
    # Quantiles of {0, 6} and {0, 3, 6}: they differ by 0, 3 (from 1/3 to 1/2), 3 (from 1/2 to 2/3), 0.
    a, b = torch.tensor([[0.0], [6.0]]), torch.tensor([[0.0], [3.0], [6.0]])
    assert sliced_wasserstein(a, b) == pytest.approx(1.0)


def test_the_mahalanobis_ratio_is_one_in_distribution_and_the_square_of_a_scale() -> None:
    natural = normal(4000, 4, 0) * torch.tensor([1.0, 10.0, 0.1, 1.0])
    fresh = normal(4000, 4, 1) * torch.tensor([1.0, 10.0, 0.1, 1.0])
    assert mahalanobis_ratio(natural, fresh, shrinkage=1e-6) == pytest.approx(1, abs=0.1)
    assert mahalanobis_ratio(natural, 3 * fresh, shrinkage=1e-6) == pytest.approx(9, rel=0.1)


def test_the_mahalanobis_ratio_sees_a_step_off_the_natural_directions() -> None:
    natural = normal(400, 8, 0)
    natural[:, 0] *= 0.01  # a direction that is not used
    off, along = natural.clone(), natural.clone()
    off[:, 0] += 1.0
    along[:, 1] += 1.0
    assert mahalanobis_ratio(natural, off) > 1.5 > mahalanobis_ratio(natural, along)


def test_fewer_vectors_than_dimensions_still_have_a_ratio_near_one() -> None:
    assert mahalanobis_ratio(normal(60, 200, 0), normal(60, 200, 1)) == pytest.approx(1, abs=0.1)


def test_patched_vectors_are_not_held_against_those_they_were_made_of() -> None:
    natural = normal(100, 200, 0)  # fewer than dimensions: the fitted half lies very near to its own covariance
    found = divergence_facts(natural, natural.clone())
    assert found["divergence_mahalanobis"] == pytest.approx(1)
    assert found["divergence"] == pytest.approx(found["divergence_natural"])
    assert found["divergence_sliced"] == pytest.approx(found["divergence_sliced_natural"], rel=0.2)


def test_facts_tell_a_shift_from_its_yardstick() -> None:
    natural = normal(200, 6, 0)
    same = divergence_facts(natural, normal(200, 6, 1))
    moved = divergence_facts(natural, normal(200, 6, 1, shift=1.0))
    assert abs(same["divergence"]) < 0.1 and abs(same["divergence_natural"]) < 0.1
    assert moved["divergence"] > 10 * abs(moved["divergence_natural"])
    assert moved["divergence_natural"] == same["divergence_natural"] == natural_baseline(natural)
    assert same["divergence_sliced"] < 2 * same["divergence_sliced_natural"] < moved["divergence_sliced"]
    assert moved["divergence_mahalanobis"] > 1.5 > same["divergence_mahalanobis"]
    assert divergence_facts(natural, natural) == divergence_facts(natural, natural)


def test_vectors_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="same width"):
        energy_distance(normal(5, 3, 0), normal(5, 4, 0))
    with pytest.raises(ValueError, match="at least 2 vectors"):
        energy_distance(normal(5, 3, 0), normal(1, 3, 0))
    with pytest.raises(ValueError, match="finite vectors"):
        sliced_wasserstein(torch.tensor([[float("nan")]]), normal(1, 1, 0))
    with pytest.raises(ValueError, match="two halves"):
        natural_baseline(normal(3, 2, 0))
    with pytest.raises(ValueError, match="at least 4"):
        divergence_facts(normal(3, 2, 0), normal(3, 2, 0))
    with pytest.raises(ValueError, match="all alike"):
        mahalanobis_ratio(torch.ones(8, 2), torch.ones(8, 2))
    with pytest.raises(ValueError, match="projections"):
        sliced_wasserstein(normal(3, 2, 0), normal(3, 2, 0), projections=0)
    with pytest.raises(ValueError, match="shrinkage 0"):
        mahalanobis_ratio(normal(9, 2, 0), normal(9, 2, 0), shrinkage=0)


def test_counterfactual_means_by_hand() -> None:
    acts = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]])
    means = counterfactual_means(acts, ["yes", "yes", "no"])
    assert {name: mean.tolist() for name, mean in means.items()} == {"yes": [2.0, 1.0], "no": [5.0, 5.0]}
    assert counterfactual_targets(means, ["no", "yes", "no"]).tolist() == [[5, 5], [2, 1], [5, 5]]
    with pytest.raises(ValueError, match="no natural activation has maybe; there are yes, no"):
        counterfactual_targets(means, ["maybe"])
    with pytest.raises(ValueError, match="3, 2\\) activations, 2 values"):
        counterfactual_means(acts, ["yes", "no"])


def test_the_penalty_by_hand_and_its_least_value() -> None:
    patched = torch.tensor([[3.0, 4.0], [1.0, 0.0]], requires_grad=True)
    target = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    # (1/2 * 16 - 1/2 * 3/5 + 0 - 1/2) / 2
    found = divergence_penalty(patched, target)
    assert found.shape == () and found.item() == pytest.approx((8 - 0.3 - 0.5) / 2)
    assert divergence_penalty(target, target).item() == pytest.approx(-0.5)
    found.backward()
    # d/dh' of 1/2 |h' - h|^2 is h' - h; of -1/2 cos: -1/2 (h/(|h||h'|) - cos h'/|h'|^2) = (-.064, .048); mean over 2.
    assert patched.grad is not None
    assert patched.grad[0].tolist() == pytest.approx([-0.064 / 2, (4 + 0.048) / 2])
    assert patched.grad[1].tolist() == pytest.approx([0, 0], abs=1e-7)
    with pytest.raises(ValueError, match=r"Give \(B, D\) twice"):
        divergence_penalty(patched, target[0])
