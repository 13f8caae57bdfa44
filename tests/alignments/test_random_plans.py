"""A random plan swaps as much as the plan it is drawn like, and finds nothing."""

from __future__ import annotations

import pytest
import torch

from alignments import evaluate
from alignments.methods import METHODS
from alignments.random_plans import random_plan
from intervene import InterveneError
from tests.alignments.fitting import fitted
from tests.alignments.planted_methods import (
    equality_reader,
    orthonormal,
    pairs_of,
    sign_reader,
    signs_reader,
    two_variable_pairs,
)

WIDTH = 16


def test_a_boundary_is_kept_and_its_frame_is_drawn():
    directions = orthonormal(WIDTH, 1, 0)
    pairs = pairs_of(sign_reader(directions[:, 0]), 300, 0, directions)
    plan, _ = fitted("boundless", pairs, steps=150, penalty=0.5)
    drawn = random_plan(plan, 0)
    facts = METHODS["boundless"].facts
    assert facts(drawn)["hard_rank"] == facts(plan)["hard_rank"] <= 2
    assert evaluate(plan, pairs).iia > 0.9 and evaluate(drawn, pairs).iia < 0.75
    assert not any(parameter.requires_grad for parameter in drawn[0].featurizer.parameters())


def test_a_mask_keeps_its_size_and_basis_and_is_dealt_anew():
    directions = torch.eye(WIDTH)[:, [2, 5, 11]]
    pairs = pairs_of(signs_reader(directions), 300, 0, directions)
    plan, _ = fitted("mask_neurons", pairs, steps=60)
    before = plan[0].edit.logits.detach().clone()
    drawn = [random_plan(plan, seed)[0].edit for seed in (0, 1, 0)]
    assert [edit.size() for edit in drawn] == [3, 3, 3] and torch.equal(plan[0].edit.logits, before)
    assert torch.equal(drawn[0].hard(), drawn[2].hard()) and not torch.equal(drawn[0].hard(), drawn[1].hard())
    assert not torch.equal(drawn[0].hard(), plan[0].edit.hard())


def test_blocks_of_one_frame_stay_blocks_of_one():
    directions = orthonormal(8, 2, 3)
    pairs = two_variable_pairs(equality_reader(*directions.T), 60, 1, *directions.T)
    plan, _ = fitted("das", pairs, rank=2, variables=2, steps=1)
    drawn = random_plan(plan, 5)
    assert drawn[0].featurizer.subspace is drawn[1].featurizer.subspace is not plan[0].featurizer.subspace
    assert [(item.featurizer.start, item.featurizer.stop) for item in drawn] == [(0, 2), (2, 4)]


@pytest.mark.parametrize("name", ["pca", "mean_difference"])
def test_computed_directions_become_as_many_random_ones(name):
    direction = orthonormal(8, 1, 0)
    pairs = pairs_of(sign_reader(direction[:, 0]), 300, 0, direction)
    plan, _ = fitted(name, pairs, rank=2)
    drawn = random_plan(plan, 1)[0].featurizer
    assert drawn.frame().shape == (8, plan[0].featurizer.features(8))


def test_plans_without_a_size_have_no_random_plan():
    direction = orthonormal(8, 1, 0)
    pairs = pairs_of(sign_reader(direction[:, 0]), 30, 0, direction)
    for name in ("full_vector", "loreft"):
        plan, _ = fitted(name, pairs, rank=1, steps=1)
        with pytest.raises(InterveneError, match="it swaps no part of the activation"):
            random_plan(plan, 0)
