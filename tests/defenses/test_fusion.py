"""Fusion of directions, against its formulas."""

from __future__ import annotations

import pytest
import torch

from defenses.errors import VectorError
from defenses.fusion import fuse
from defenses.plans import Directions


def at(*vectors, **fields):
    """One Directions per vector, all at layer 3."""
    return [Directions({3: torch.tensor(vector)}, **fields) for vector in vectors]


def test_modes_by_hand():
    traits = at([3.0, 0.0], [0.0, 4.0])
    (mean,) = fuse(traits, "mean")
    torch.testing.assert_close(mean.at(3), torch.tensor([1.5, 2.0]))
    (aligned,) = fuse(traits, "norm_aligned")
    torch.testing.assert_close(aligned.at(3), torch.tensor([1.5, 2.0]) / 2.5 * 3.5)


def test_orthogonal_directions_are_kept_as_they_are():
    one, other = fuse(at([3.0, 0.0, 0.0], [0.0, 4.0, 0.0]), "subspace")
    torch.testing.assert_close(one.at(3), torch.tensor([3.0, 0.0, 0.0]))
    torch.testing.assert_close(other.at(3), torch.tensor([0.0, 4.0, 0.0]))


def test_a_subspace_is_orthogonal_keeps_norms_and_favours_no_trait():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(16, generator=generator)
    vectors = [shared + torch.randn(16, generator=generator) for _ in range(3)]
    traits = [Directions({0: vector, 5: 2 * vector}) for vector in vectors]
    fused = fuse(traits, "subspace")
    for layer in (0, 5):
        every = torch.stack([one.at(layer) for one in fused])
        norms = torch.stack([trait.at(layer) for trait in traits]).norm(dim=1)
        torch.testing.assert_close(every @ every.T, torch.diag(norms**2), rtol=1e-5, atol=1e-4)
        span = torch.linalg.svd(torch.cat([every, torch.stack(vectors)]).double())[1]
        assert span[3] < 1e-5  # the same three dimensions
    backwards = fuse(traits[::-1], "subspace")[::-1]
    for one, other in zip(fused, backwards, strict=True):
        torch.testing.assert_close(one.at(0), other.at(0))


def test_two_unit_vectors_move_by_the_same_angle():
    angle = torch.tensor(0.3)
    one, other = fuse(at([1.0, 0.0], [float(angle.cos()), float(angle.sin())]), "subspace")
    turn = (torch.pi / 2 - angle) / 2
    torch.testing.assert_close(one.at(3), torch.stack([turn.cos(), -turn.sin()]))
    torch.testing.assert_close(other.at(3), torch.stack([(angle + turn).cos(), (angle + turn).sin()]))
    assert one.facts["cosine"]["3"] == pytest.approx(float(turn.cos()), rel=1e-5)


@pytest.mark.parametrize("mode", ["norm_aligned", "mean", "subspace"])
def test_one_direction_is_unchanged(mode):
    (only,) = at([1.0, 2.0])
    assert fuse([only], mode) == (only,)


@pytest.mark.parametrize("mode", ["norm_aligned", "mean"])
def test_opposing_directions_are_refused_with_numbers(mode):
    with pytest.raises(VectorError, match=r"layer 3: opposing.*number 1 and 2 is -1\.00 \(bound -0\.5\).*is 0\.00 of"):
        fuse(at([1.0, 0.0], [-1.0, 0.0]), mode)
    star = at(*([float(torch.tensor(a).cos()), float(torch.tensor(a).sin())] for a in (0.0, 2.0944, 4.18879)))
    with pytest.raises(VectorError, match="opposing"):  # no two oppose, the three cancel
        fuse(star, mode)


def test_directions_that_cannot_be_kept_apart():
    with pytest.raises(VectorError, match=r"layer 3: 2 directions that cannot be kept apart.*0\.0\d\d \(bound 0\.1\)"):
        fuse(at([1.0, 0.0], [1.0, 0.01]), "subspace")
    with pytest.raises(VectorError, match="3 directions that cannot be kept apart"):
        fuse(at([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]), "subspace")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "Fusion of no directions"),
        ([Directions({1: torch.ones(2)}), Directions({2: torch.ones(2)})], r"layers are \(1,\), \(2,\)"),
        ([Directions({1: torch.ones(2)}), Directions({1: torch.ones(3)})], "width are 2, 3"),
        ([Directions({1: torch.ones(2)}), Directions({1: torch.ones(2)}, component="mlp_output")], "component are"),
        (at([1.0, 0.0], fingerprint="aa", model="m") + at([0.0, 1.0], fingerprint="bb", model="n"), r"m \(aa\), n"),
    ],
)
def test_what_cannot_be_fused(others, message):
    with pytest.raises(VectorError, match=message):
        fuse(others)


def test_an_unknown_mode():
    with pytest.raises(VectorError, match=r"Fusion 'sum': there is none\. Use one of norm_aligned, mean, subspace"):
        fuse(at([1.0]), "sum")


def test_the_known_model_is_kept():
    known, unknown = at([1.0, 0.0], fingerprint="aa", model="m"), at([0.0, 1.0])
    assert fuse([*unknown, *known], "mean")[0].fingerprint == "aa"
