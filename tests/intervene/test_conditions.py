"""Conditions against their formula, and what a condition lets through in a model."""

from __future__ import annotations

import math

import pytest
import torch

from intervene import (
    Add,
    BadVector,
    InterveneError,
    Intervention,
    ProbeAbove,
    ProjectionAbove,
    ShapeMismatch,
    capture,
    intervene,
)
from tests.tiny import tiny_batch, tiny_model

D = 32


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_projection_by_hand():
    h = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [5.0, -1.0]]])
    above = ProjectionAbove(torch.tensor([0.0, 10.0]), 0.5)
    assert above.score(h).tolist() == [[3.5, 0.5, -1.5]]  # the vector's length does not count
    assert above(h, None).tolist() == [[True, True, False]]
    cosine = ProjectionAbove(torch.tensor([0.0, 10.0]), 0.9, cosine=True)
    assert cosine(h, None).tolist() == [[False, True, False]]  # 0.8, 1, negative
    assert ProjectionAbove(torch.tensor([0.0, 1.0]), 1.0)(h, None).tolist() == [[True, False, False]]  # strictly above


def test_the_cosine_with_nothing_is_zero():
    assert ProjectionAbove(torch.ones(2), -0.1, cosine=True)(torch.zeros(1, 1, 2), None).tolist() == [[True]]


def test_a_probe_by_hand():
    h = torch.tensor([[[1.0, 2.0], [-1.0, 0.0]]])
    probe = ProbeAbove(torch.tensor([1.0, 1.0]), -1.0, 0.8)
    wanted = [1 / (1 + math.exp(-2)) - 0.8, 1 / (1 + math.exp(2)) - 0.8]
    assert probe.score(h)[0].tolist() == pytest.approx(wanted)
    assert probe(h, None).tolist() == [[True, False]]


def test_one_token_decides_for_its_example():
    h = torch.tensor([[[1.0], [-1.0]], [[-1.0], [-1.0]], [[-1.0], [1.0]]])
    valid = torch.tensor([[True, True], [True, True], [True, False]])
    assert ProjectionAbove(torch.ones(1), 0.0)(h, valid).tolist() == [[True, False], [False, False], [False, False]]
    per_example = ProjectionAbove(torch.ones(1), 0.0, per="example")
    assert per_example(h, valid).tolist() == [[True, True], [False, False], [False, False]]
    assert per_example(h, None).tolist() == [[True, True], [False, False], [True, True]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_read_in_fp32(dtype):
    h, condition = randn(2, 3, D).to(dtype), ProjectionAbove(randn(D, seed=2), 0.1)
    assert torch.equal(condition(h, None), condition(h.float(), None))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(condition.score(h.float()) > 0, condition(h, None)) or dtype == torch.float64
        assert torch.equal(condition(h, None), condition(h.float(), None))


def test_a_condition_keeps_no_graph():
    h = randn(2, 3, D).requires_grad_()
    assert not ProjectionAbove(randn(D), 0.1)(h, None).requires_grad


@pytest.mark.parametrize("kind", [lambda v: ProjectionAbove(v, 0.1), lambda v: ProbeAbove(v, 0.0)])
def test_vectors_that_mean_nothing_are_refused(kind):
    with pytest.raises(BadVector, match="NaN or infinite"):
        kind(torch.tensor([1.0, torch.nan]))
    with pytest.raises(BadVector, match="all zero"):
        kind(torch.zeros(3))
    with pytest.raises(ShapeMismatch, match=r"a vector of shape \(2, 3\)\. Give \(D,\)"):
        kind(torch.ones(2, 3))
    with pytest.raises(ShapeMismatch, match="its vector is 3 wide, the site 4"):
        kind(torch.ones(3))(torch.ones(1, 1, 4), None)
    assert kind(torch.ones(3)).width == 3 and not any(p.requires_grad for p in kind(torch.ones(3)).parameters())


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(InterveneError, match=r"per='row'.*Use 'token' or 'example'"):
        ProjectionAbove(torch.ones(2), 0.0, per="row")
    for threshold in (math.nan, math.inf):
        with pytest.raises(InterveneError, match="It must be finite"):
            ProjectionAbove(torch.ones(2), threshold)
    with pytest.raises(InterveneError, match="It must be between -1 and 1"):
        ProjectionAbove(torch.ones(2), 1.5, cosine=True)
    for threshold in (0.0, 1.0, 7.0, math.nan):
        with pytest.raises(InterveneError, match="a probability between 0 and 1"):
            ProbeAbove(torch.ones(2), 0.0, threshold)
    with pytest.raises(InterveneError, match="the bias a finite number"):
        ProbeAbove(torch.ones(2), math.inf)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("per", ["token", "example"])
def test_only_the_tokens_that_fulfil_it_are_changed(per, padding):
    model = tiny_model("llama")
    batch, site = tiny_batch(model, padding), "L1.block_output"
    real, direction, vector = batch["attention_mask"].bool(), randn(D, seed=2), randn(D, seed=3)
    with torch.no_grad(), capture(model, [site]) as before:
        model(**batch)
    projections = before[site] @ direction / direction.norm()
    threshold = float(projections[0][real[0]].median())  # some tokens of the first example
    if per == "example":
        threshold = float(max(projections[0][real[0]].max(), projections[1][real[1]].max())) - 1e-3  # one example
    holds = (projections > threshold) & real
    if per == "example":
        holds = holds.any(1, keepdim=True) & real
    assert 0 < holds.sum() < real.sum()
    plan = [Intervention(site, Add(vector), when=ProjectionAbove(direction, threshold, per=per))]
    with torch.no_grad(), intervene(model, plan), capture(model, [site]) as after:
        model(**batch)
    wanted = before[site] + holds[..., None] * vector
    torch.testing.assert_close(after[site][real], wanted[real], atol=1e-6, rtol=0)
