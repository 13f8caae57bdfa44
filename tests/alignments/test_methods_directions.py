"""Directions computed from activations: each finds what it is made to find, and its known blind spot."""

from __future__ import annotations

import pytest
import torch

from alignments import VectorPairs, evaluate
from alignments.methods import METHODS, Setup
from intervene import AllTokens, InterveneError
from tests.alignments.fitting import fitted
from tests.alignments.planted_methods import SITE, noise, orthonormal, pairs_of, sign_reader

WIDTH = 8


def frame_of(plan) -> torch.Tensor:
    lens = plan[0].featurizer
    return lens.components if hasattr(lens, "components") else lens.frame()


def labelled(x: torch.Tensor, source: torch.Tensor, values, source_values) -> VectorPairs:
    direction = torch.eye(WIDTH)[0]
    model = sign_reader(direction)
    return VectorPairs(model, x, source, model(source).argmax(-1), values=(values.tolist(), source_values.tolist()))


@pytest.mark.parametrize(("name", "cosine"), [("mean_difference", 0.99), ("lda", 0.99), ("probe", 0.995)])
def test_directions_of_the_value_are_the_planted_one(name, cosine):
    direction = orthonormal(WIDTH, 1, 0)
    pairs = pairs_of(sign_reader(direction[:, 0]), 800, 1, direction)
    plan, told = fitted(name, pairs)
    assert abs(float(frame_of(plan)[:, 0] @ direction[:, 0])) > cosine
    assert METHODS[name].facts(plan) == {"directions": 1} and told.losses == ()
    assert evaluate(plan, pairs).iia > 0.93


def test_pca_finds_the_direction_of_the_greatest_variance_whether_it_means_anything_or_not():
    direction = orthonormal(WIDTH, 1, 0)[:, 0]
    model = sign_reader(direction)
    base, source = (noise(400, WIDTH, seed) + 3 * noise(400, 1, seed + 9) * direction for seed in (0, 1))
    pairs = VectorPairs(model, base, source, model(source).argmax(-1))
    plan, _ = fitted("pca", pairs, rank=1)
    assert abs(float(frame_of(plan)[:, 0] @ direction)) > 0.99 and evaluate(plan, pairs).iia > 0.95
    elsewhere = torch.linalg.svd(direction[None]).Vh[1]
    base, source = (noise(400, WIDTH, seed) + 3 * noise(400, 1, seed + 9) * elsewhere for seed in (0, 1))
    pairs = VectorPairs(model, base, source, model(source).argmax(-1))
    plan, _ = fitted("pca", pairs, rank=1)
    copies = float((model(base).argmax(-1) == pairs.labels).float().mean())
    assert evaluate(plan, pairs).iia == pytest.approx(copies, abs=0.05)


def test_lda_and_probe_look_past_noise_that_the_classes_share_and_means_do_not():
    # x_0 = value + n + noise, x_1 = n + noise: the means differ in x_0 alone, the value is best read off both
    values = torch.arange(2000) % 2
    drawn = 0.5 * noise(2000, WIDTH, 0)
    shared = noise(2000, 1, 1)[:, 0]
    drawn[:, 0] += (2.0 * values - 1) + shared
    drawn[:, 1] += shared
    pairs = labelled(drawn, drawn.roll(1, 0), values, values.roll(1, 0))
    # S_w = [[1.25, 1], [1, 1.25]], so S_w^-1 (1, 0) is along (1.25, -1)
    wanted = torch.zeros(WIDTH)
    wanted[0], wanted[1] = 1.25 / (1.25**2 + 1) ** 0.5, -1 / (1.25**2 + 1) ** 0.5
    cosines = {name: abs(float(frame_of(fitted(name, pairs)[0])[:, 0] @ wanted)) for name in ("lda", "probe")}
    assert min(cosines.values()) > 0.98
    means = frame_of(fitted("mean_difference", pairs)[0])[:, 0]
    # by hand: the difference of the class means, normalised
    expected = drawn[values == 1].mean(0) - drawn[values == 0].mean(0)
    torch.testing.assert_close(means.abs(), (expected / expected.norm()).abs(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["mean_difference", "lda", "probe"])
def test_three_values_span_the_plane_of_their_means(name):
    corners = torch.zeros(3, WIDTH)
    corners[0, 0], corners[1, 3], corners[2, 0], corners[2, 3] = 2.0, 2.0, -2.0, -2.0
    values = torch.arange(1500) % 3
    drawn = corners[values] + noise(1500, WIDTH, 0)
    pairs = labelled(drawn, drawn.roll(1, 0), values, values.roll(1, 0))
    plan, _ = fitted(name, pairs)
    frame = frame_of(plan)
    assert frame.shape == (WIDTH, 2) and METHODS[name].facts(plan) == {"directions": 2}
    assert float(torch.linalg.svdvals(frame[[0, 3]]).min()) > 0.95  # of 1: the plane of coordinates 0 and 3


def test_values_that_come_once_are_left_out():
    values = torch.arange(100) % 2
    drawn = noise(100, WIDTH, 0) + 3 * values[:, None]
    pairs = labelled(drawn, drawn.clone(), values, values)
    before = frame_of(fitted("mean_difference", pairs)[0])
    pairs.values[0][0] = "once"
    drawn[0, 0] += 1000.0  # would be seen from anywhere
    after = frame_of(fitted("mean_difference", labelled(drawn, pairs.sources[0], values, values))[0])
    assert abs(float(before[:, 0] @ after[:, 0])) < 0.9
    again = VectorPairs(pairs.model, drawn, pairs.sources[0], pairs.labels, values=pairs.values)
    kept = frame_of(fitted("mean_difference", again)[0])
    assert kept.shape == (WIDTH, 1) and abs(float(before[:, 0] @ kept[:, 0])) > 0.999


@pytest.mark.parametrize("name", ["mean_difference", "lda", "probe"])
def test_missing_values_one_value_and_missing_pairs_are_refused(name):
    direction = orthonormal(WIDTH, 1, 0)
    pairs = pairs_of(sign_reader(direction[:, 0]), 20, 1, direction, values=False)
    make = METHODS[name].make
    with pytest.raises(InterveneError, match=f"Method {name}: the pairs do not say the variable's values"):
        make(Setup(SITE, AllTokens(), WIDTH, train=pairs))
    pairs.values = (["yes"] * 20, ["yes"] * 20)
    with pytest.raises(InterveneError, match=r"fewer than two of them come at least twice \(yes\)"):
        make(Setup(SITE, AllTokens(), WIDTH, train=pairs))
    with pytest.raises(InterveneError, match=f"Method {name}: it reads activations of training pairs"):
        make(Setup(SITE, AllTokens(), WIDTH))
    pairs.values = ([0] * 10 + [1] * 10, [1] * 20)
    same = torch.zeros(20, WIDTH)
    flat = VectorPairs(pairs.model, same, same, pairs.labels, values=pairs.values)
    if name == "mean_difference":
        with pytest.raises(InterveneError, match="the classes' activations do not differ there"):
            make(Setup(SITE, AllTokens(), WIDTH, train=flat))
