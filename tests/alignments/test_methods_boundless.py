"""Boundless DAS, corrected and as published, on networks whose dimension is known."""

from __future__ import annotations

import pytest
import torch

from alignments import evaluate
from alignments.methods import METHODS, Setup
from alignments.methods_boundless import softly
from alignments.schedules import geometric, linear
from intervene import AllTokens, InterveneError, ShapeMismatch
from tests.alignments.fitting import fitted
from tests.alignments.planted_methods import (
    SITE,
    equality_reader,
    orthonormal,
    pairs_of,
    signs_reader,
    two_variable_pairs,
)


def planted(width: int, dimensions: int):
    directions = orthonormal(width, dimensions, 0)
    model = signs_reader(directions)
    return pairs_of(model, 512, 1, directions), pairs_of(model, 600, 2, directions), directions


def plan_of(name: str, width: int, variables: int = 1, **options):
    return METHODS[name].make(Setup(SITE, AllTokens(), width, None, 0, None, variables, options))


@pytest.mark.parametrize("start", [0.25, 1.0])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_the_hard_rank_goes_to_the_planted_dimension_from_below_and_above(dimensions, start):
    train, test, directions = planted(8, dimensions)
    plan, _ = fitted("boundless", train, steps=200, penalty=0.5, init_fraction=start)
    facts = METHODS["boundless"].facts(plan)
    assert facts["hard_rank"] == dimensions and facts["initial_rank"] == 8 * start
    assert evaluate(plan, test).iia > 0.93
    swapped = plan[0].featurizer.frame().detach()[:, :dimensions]  # (D, K): spans what was planted
    assert float(torch.linalg.svdvals(swapped.T @ directions).min()) > 0.98


def test_two_variables_learn_a_boundary_each():
    directions = orthonormal(8, 2, 3)
    model = equality_reader(*directions.T)
    plan, _ = fitted("boundless", two_variable_pairs(model, 768, 1, *directions.T), variables=2, steps=200, penalty=0.5)
    facts = METHODS["boundless"].facts(plan)
    assert (facts["hard_rank_1"], facts["hard_rank_2"]) == (1, 1)
    assert evaluate(plan, two_variable_pairs(model, 600, 2, *directions.T)).iia > 0.93


def test_temperature_penalty_and_start_of_the_corrected_form():
    method, plan = METHODS["boundless"], plan_of("boundless", 20, k_max=10, init_fraction=0.4)
    edit, setup = plan[0].edit, Setup(SITE, AllTokens(), 20, options={"penalty": 0.3})
    assert plan[0].featurizer.rank == edit.count == 10 and float(edit.boundary().detach()) == pytest.approx(4)
    # in columns: from 0.1 K to 0.1, in equal factors
    for progress, columns in ((0.0, 1.0), (0.5, 0.1**0.5), (1.0, 0.1)):
        method.anneal(plan, progress)
        assert edit.temperature * 10 == pytest.approx(columns)
    assert float(method.penalty(plan, setup).detach()) == pytest.approx(0.3 * 0.4)
    assert float(method.penalty(plan, Setup(SITE, AllTokens(), 20)).detach()) == pytest.approx(0.1 * 0.4)
    assert plan_of("boundless", 100)[0].edit.count == 64 and plan_of("boundless", 20)[0].edit.count == 20


def test_temperature_penalty_start_and_rates_of_the_published_form():
    method, plan = METHODS["boundless_faithful"], plan_of("boundless_faithful", 20)
    edit = plan[0].edit
    assert plan[0].featurizer.rank == 20 and float(edit.boundary().detach()) == pytest.approx(10)
    for progress, columns in ((0.0, 50), (0.5, 25.05), (1.0, 0.1)):
        method.anneal(plan, progress)
        assert edit.temperature == pytest.approx(columns)
    assert float(method.penalty(plan, Setup(SITE, AllTokens(), 20)).detach()) == pytest.approx(1.0 * 0.5)
    assert method.rates == {"fraction": 10.0}
    two = plan_of("boundless_faithful", 20, variables=2)
    assert [float(torch.as_tensor(edge).detach()) for edge in two[0].edit.edges()] == [0, 10]
    assert [float(torch.as_tensor(edge).detach()) for edge in two[1].edit.edges()] == [10, 20]


def test_soft_and_hard_scores_of_the_published_form_are_told_apart():
    train, test, _ = planted(8, 2)
    plan, _ = fitted("boundless_faithful", train, steps=100, penalty=0.0)
    soft, _ = fitted("boundless_faithful", train, steps=100, penalty=0.0, soft_eval=True)
    assert evaluate(softly(plan), test) == evaluate(soft, test) != evaluate(plan, test)
    assert METHODS["boundless_faithful"].facts(plan)["soft_rank"] == pytest.approx(7.5, abs=0.3)  # gate 0 is one half
    assert plan[0].edit.hard_eval  # the plan itself stays hard
    with pytest.raises(InterveneError, match="no FaithfulBoundarySwap"):
        softly(plan_of("boundless", 8))


def test_at_small_widths_the_published_penalty_leaves_nothing_and_the_corrected_form_finds_the_variable():
    # A temperature of 50 columns makes 8 gates one number near 1/4, so that only the penalty moves the boundary; below
    # the clamp it gets no gradient back.
    train, test, _ = planted(8, 2)
    facts, scores = {}, {}
    for name in ("boundless", "boundless_faithful"):
        plan, _ = fitted(name, train, steps=100, penalty=1.0)
        facts[name], scores[name] = METHODS[name].facts(plan), evaluate(plan, test).iia
    assert facts["boundless_faithful"]["hard_rank"] == 0 and scores["boundless_faithful"] < 0.4
    assert 2 <= facts["boundless"]["hard_rank"] <= 4 and scores["boundless"] > 0.9


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ShapeMismatch, match="Boundless of k_max 9 for 1 variables in width 8"):
        plan_of("boundless", 8, k_max=9)
    with pytest.raises(ShapeMismatch, match="Boundless of k_max 1 for 2 variables"):
        plan_of("boundless", 8, variables=2, k_max=1)
    with pytest.raises(InterveneError, match="3 variables were asked, it was published for 1 and 2"):
        plan_of("boundless_faithful", 8, variables=3)


def test_schedules_at_their_ends_middle_and_beyond():
    assert [linear(p, 4, 2) for p in (-1, 0, 0.5, 1, 2)] == [4, 4, 3, 2, 2]
    assert [geometric(p, 4, 1) for p in (-1, 0, 0.5, 1, 2)] == pytest.approx([4, 4, 2, 1, 1])
