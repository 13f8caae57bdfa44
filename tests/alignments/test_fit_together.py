"""Plans that are fitted in common passes end where they would alone; every batch of a step counts; the best is kept."""

from __future__ import annotations

import pytest
import torch

from alignments import METHODS, Budget, Setup, VectorPairs, evaluate, fit, fit_together
from alignments.answers import evaluate_together, together
from intervene import AllTokens, Intervention, ShapeMismatch, Site, Swap
from tests.alignments.planted import WIDTH, planted_mlp, planted_pairs

SITE = Site("block_output", 0)


def das(seed, rank=1, site=SITE):
    return METHODS["das"].make(Setup(site, AllTokens(), WIDTH, rank, seed))


def frames(plans):
    return [plan[0].featurizer.frame().detach() for plan in plans]


def test_three_seeds_and_two_ranks_end_where_they_would_alone():
    model = planted_mlp()
    pairs, budget = planted_pairs(model, 256, 0), Budget(steps=40, batch_size=32, lr=0.05)
    shapes = [(0, 1), (1, 1), (2, 1), (0, 2)]
    joined, alone = [das(*shape) for shape in shapes], [das(*shape) for shape in shapes]
    results = fit_together(model, joined, pairs, budget, seeds=[seed for seed, _ in shapes])
    for plan, (seed, _), result in zip(alone, shapes, results, strict=True):
        single = fit(model, plan, pairs, steps=40, batch_size=32, lr=0.05, seed=seed)
        torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(single.losses), atol=1e-4, rtol=1e-4)
    for one, other in zip(frames(joined), frames(alone), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    scores = evaluate_together(joined, pairs)
    assert [score.iia for score in scores] == [evaluate(plan, pairs).iia for plan in joined]


def test_accumulation_uses_every_batch():
    model, pairs = planted_mlp(), planted_pairs(planted_mlp(), 64, 0)
    once, split = das(0), das(0)
    fit_together(model, [once], pairs, Budget(steps=1, batch_size=64, lr=0.05, warmup=0.0), seeds=[0])
    budget = Budget(steps=1, batch_size=16, lr=0.05, warmup=0.0, accumulate=4)
    result = fit_together(model, [split], pairs, budget, seeds=[0])[0]
    torch.testing.assert_close(*frames([once, split]), atol=1e-5, rtol=1e-5)
    assert len(result.losses) == 1


def test_the_parameters_that_did_best_on_validation_are_kept():
    model = planted_mlp()
    pairs, held = planted_pairs(model, 256, 0), planted_pairs(model, 200, 1)
    plan = das(0)
    budget = Budget(steps=60, batch_size=64, lr=0.05, validate_every=5)
    result = fit_together(model, [plan], pairs, budget, seeds=[0], validation=held)[0]
    assert [step for step, _ in result.validation] == list(range(5, 61, 5))
    best = max(score for _, score in result.validation)
    assert evaluate(plan, held).iia == best
    assert result.best_step == next(step for step, score in result.validation if score == best)


def test_patience_ends_a_fit_that_no_longer_improves():
    model = planted_mlp()
    pairs, held = planted_pairs(model, 256, 0), planted_pairs(model, 200, 1)
    budget = Budget(steps=400, batch_size=64, lr=0.05, validate_every=10, patience=3)
    result = fit_together(model, [das(0)], pairs, budget, seeds=[0], validation=held)[0]
    assert len(result.losses) < 400
    last, best = result.validation[-1][0], result.best_step
    assert last - best == 30


def test_warm_up_is_counted_in_optimiser_steps_whatever_is_accumulated():
    model, pairs = planted_mlp(), planted_pairs(planted_mlp(), 64, 0)
    plan = das(0)
    before = frames([plan])[0]
    budget = Budget(steps=10, batch_size=8, accumulate=4, lr=0.1, warmup=0.5)
    fit_together(model, [plan], pairs, Budget(steps=1, batch_size=8, accumulate=4, lr=0.0), seeds=[0])
    assert torch.equal(frames([plan])[0], before)  # a rate of zero moves nothing
    rates = []
    fit_together(model, [plan], pairs, budget, seeds=[0], anneal=lambda _, done: rates.append(done))
    assert rates == [step / 9 for step in range(10)]


def test_plans_at_different_places_are_refused():
    with pytest.raises(ShapeMismatch, match=r"not at one place\. Fit them one by one"):
        together([das(0), das(0, site=Site("block_output", 1))])
    two = [Intervention(SITE, Swap()), Intervention(SITE, Swap())]
    with pytest.raises(ShapeMismatch, match=r"Plans of \[1, 2\] interventions"):
        together([das(0), two])


def test_impossible_budgets_are_refused():
    with pytest.raises(ShapeMismatch, match="Fit of 0 steps with 1 x 8 pairs each: all must be at least 1"):
        Budget(steps=0, batch_size=8)
    with pytest.raises(ShapeMismatch, match=r"warm-up 1\.5: it is a share of the steps"):
        Budget(warmup=1.5)


def test_a_fit_with_patience_ends_as_it_would_alone():
    model = planted_mlp()
    pairs, held = planted_pairs(model, 256, 0), planted_pairs(model, 200, 1)
    budget = Budget(steps=120, batch_size=32, lr=0.05, validate_every=5, patience=2)
    joined, alone = [das(seed) for seed in range(3)], [das(seed) for seed in range(3)]
    results = fit_together(model, joined, pairs, budget, seeds=[0, 1, 2], validation=held)
    assert len({len(result.losses) for result in results}) > 1  # they end at different steps
    for seed, plan in enumerate(alone):
        single = fit_together(model, [plan], pairs, budget, seeds=[seed], validation=held)[0]
        assert (single.best_step, single.validation) == (results[seed].best_step, results[seed].validation)
        assert len(single.losses) == len(results[seed].losses)
    for one, other in zip(frames(joined), frames(alone), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_best_parameters_come_back_with_the_temperature_they_were_scored_at():
    model = planted_mlp()
    pairs, held = planted_pairs(model, 256, 0), planted_pairs(model, 200, 1)
    method = METHODS["boundless_faithful"]
    plan = method.make(Setup(SITE, AllTokens(), WIDTH, None, 0, pairs, options={"soft_eval": True}))
    edit = plan[0].edit

    def softer(_plan, done):
        edit.temperature = 0.1 + 50 * done  # backwards, so that an early step is the best

    budget = Budget(steps=60, batch_size=64, lr=0.05, validate_every=5)
    result = fit_together(model, [plan], pairs, budget, seeds=[0], validation=held, anneal=softer)[0]
    assert result.best_step < 60 and edit.temperature < 50
    assert evaluate(plan, held).iia == max(score for _, score in result.validation)


def test_overlapping_gates_of_two_variables_do_not_undo_one_another():
    model = planted_mlp()
    base, source = torch.randn(40, WIDTH), torch.randn(40, WIDTH)
    which = torch.arange(40) % 2 == 0  # the even pairs interchange the first variable, the others the second
    sources = [torch.where(which[:, None], source, base), torch.where(which[:, None], base, source)]
    pairs = VectorPairs(model, base, sources, torch.zeros(40, dtype=torch.long))
    both = [Intervention(SITE, Swap()), Intervention(SITE, Swap())]  # whole width each: they overlap everywhere
    torch.testing.assert_close(pairs.logits(both, torch.arange(40)), model(source))
