"""`fit` finds a planted variable, leaves the model as it was, and can be repeated."""

from __future__ import annotations

import pytest
import torch

from alignments import METHODS, Setup, evaluate, fit, predict, wilson
from alignments.fit import _batches
from intervene import AllTokens, GatedSwap, Identity, Intervention, ShapeMismatch, Site, Subspace, Swap
from tests.alignments.planted import DIRECTION, WIDTH, planted_mlp, planted_pairs

SITE = Site("block_output", 0)


def das(rank=1, seed=0):
    return METHODS["das"].make(Setup(SITE, AllTokens(), WIDTH, rank, seed))


def test_das_finds_the_planted_direction():
    model = planted_mlp()
    plan = das()
    fit(model, plan, planted_pairs(model, 512, 0), steps=250, batch_size=64, lr=0.05)
    found = plan[0].featurizer.frame()[:, 0].detach()
    assert abs(float(found @ DIRECTION)) > 0.995
    score = evaluate(plan, planted_pairs(model, 1000, 1))
    assert score.iia > 0.95 and (score.low, score.high) == wilson(round(score.iia * 1000), 1000)


def test_the_given_direction_is_right_on_every_pair_and_an_orthogonal_one_copies_the_base():
    model = planted_mlp()
    pairs = planted_pairs(model, 400, 2)
    right = [Intervention(SITE, Swap(), AllTokens(), Subspace.from_frame(DIRECTION[:, None]))]
    assert evaluate(right, pairs).iia == 1.0
    elsewhere = torch.eye(WIDTH)[:, 3:4]
    wrong = [Intervention(SITE, Swap(), AllTokens(), Subspace.from_frame(elsewhere))]
    assert torch.equal(predict(wrong, pairs), model(pairs.base).argmax(-1))


def test_full_vector_copies_the_source():
    model = planted_mlp()
    pairs = planted_pairs(model, 100, 3)
    plan = METHODS["full_vector"].make(Setup(SITE, AllTokens(), WIDTH))
    assert fit(model, plan, pairs).losses == ()
    assert torch.equal(predict(plan, pairs), model(pairs.sources[0]).argmax(-1))


def test_the_model_and_its_flags_are_untouched():
    model = planted_mlp()
    model.head.weight.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    fit(model, das(), planted_pairs(model, 64, 0), steps=5, batch_size=16)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert not model.training


def test_seeds_repeat_and_differ():
    model = planted_mlp()
    pairs = planted_pairs(model, 64, 0)
    runs = [fit(model, das(seed=seed), pairs, steps=10, batch_size=16, seed=seed).losses for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_batches_use_every_pair_once_an_epoch():
    batches = _batches(10, 5, 6, seed=0)
    assert [len(rows) for rows in batches] == [5] * 6
    for epoch in range(3):
        assert sorted(torch.cat(batches[2 * epoch : 2 * epoch + 2]).tolist()) == list(range(10))


def test_gates_are_scored_hard_and_left_as_they_were():
    model = planted_mlp()
    pairs = planted_pairs(model, 50, 4)
    edit = GatedSwap(WIDTH)
    edit.logits.data.fill_(-0.1)  # soft: nearly one half of everything; hard: nothing
    plan = [Intervention(SITE, edit, AllTokens(), Identity())]
    assert edit.training
    assert torch.equal(predict(plan, pairs), model(pairs.base).argmax(-1))
    assert edit.training


def test_pairs_of_unequal_numbers_are_refused():
    model = planted_mlp()
    from alignments import VectorPairs

    with pytest.raises(ShapeMismatch, match=r"3 bases, 2 sources, 3 labels\. Give as many of each"):
        VectorPairs(model, torch.zeros(3, WIDTH), torch.zeros(2, WIDTH), torch.zeros(3))


def test_scores_are_told_apart_by_kind():
    model = planted_mlp()
    pairs = planted_pairs(model, 60, 5)
    copies = model(pairs.base).argmax(-1) == pairs.labels
    pairs.kinds = tuple("same" if same else "different" for same in copies.tolist())
    nothing = [Intervention(SITE, Swap(), AllTokens(), Subspace.from_frame(torch.eye(WIDTH)[:, 3:4]))]
    score = evaluate(nothing, pairs)  # an edit without effect: right exactly where the base's answer is
    assert score.kinds == {"different": 0.0, "same": 1.0}
    assert score.iia == pytest.approx(float(copies.float().mean()))


def test_a_fitted_plan_is_left_as_it_is_scored():
    model = planted_mlp()
    edit = GatedSwap(WIDTH)
    plan = [Intervention(SITE, edit, AllTokens(), Identity())]
    fit(model, plan, planted_pairs(model, 64, 0), steps=3, batch_size=16)
    assert not edit.training  # else intervene() would apply soft gates where evaluate() scored hard ones


def test_no_steps_and_no_batch_are_refused():
    model = planted_mlp()
    with pytest.raises(ShapeMismatch, match=r"Fit of 0 steps with 1 x 16 pairs each: all must be at least 1"):
        fit(model, das(), planted_pairs(model, 64, 0), steps=0, batch_size=16)
