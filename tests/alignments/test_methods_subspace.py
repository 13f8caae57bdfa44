"""DAS with several variables, MDAS against DAS, LoReFT, and the pull towards natural activations."""

from __future__ import annotations

import pytest
import torch

from alignments import evaluate
from alignments.methods import METHODS, Setup
from alignments.natural import natural_penalty
from alignments.vector_pairs import VectorPairs
from intervene import AllTokens, Identity, InterveneError, Intervention, Swap
from tests.alignments.fitting import fitted
from tests.alignments.planted_methods import (
    OWN,
    SITE,
    B,
    equality_reader,
    orthonormal,
    pairs_of,
    question_pairs,
    sign_reader,
    two_variable_pairs,
)


def test_two_variables_under_an_equality_are_found_in_blocks_of_their_own():
    directions = orthonormal(8, 2, 3)
    model = equality_reader(*directions.T)
    plan, _ = fitted("das", two_variable_pairs(model, 768, 1, *directions.T), rank=1, variables=2, steps=200)
    assert evaluate(plan, two_variable_pairs(model, 600, 2, *directions.T)).iia > 0.95
    cosines = (plan[0].featurizer.subspace.frame().detach().T @ directions).abs()
    torch.testing.assert_close(cosines, torch.eye(2), atol=0.03, rtol=0)


def test_das_breaks_what_it_should_leave_alone_and_mdas_does_not():
    train, test = question_pairs(400, 0), question_pairs(500, 1)
    plan, _ = fitted("das", train, rank=1, steps=120)
    das = evaluate(plan, test)
    # from some starts the cause and isolate losses balance at a saddle: the training loss says which fit to keep
    fits = [fitted("mdas", train, rank=1, seed=seed, steps=120) for seed in range(3)]
    plan, _ = min(fits, key=lambda one: one[1].losses[-1])
    mdas = evaluate(plan, test)
    assert das.kinds["cause"] > 0.98 and das.kinds["isolate"] < 0.8
    assert mdas.kinds["cause"] > 0.98 and mdas.kinds["isolate"] > 0.98
    found = plan[0].featurizer.frame().detach()[:, 0]
    assert abs(float(found @ B)) < 0.2 and abs(float(found @ OWN)) > 0.9  # what tells A from B, not A itself


def test_isolate_pairs_of_no_weight_make_mdas_das():
    train = question_pairs(400, 0)
    # the same pairs in the same order, so the same batches
    das, mdas = fitted("das", train, rank=1, steps=10), fitted("mdas", train, rank=1, steps=10, isolate_weight=0)
    assert das[1].losses == mdas[1].losses


def test_loreft_learns_an_answer_without_a_source_and_no_variable():
    direction = orthonormal(6, 1, 0)
    model = sign_reader(direction[:, 0])
    pairs = pairs_of(model, 256, 0, direction)
    always = VectorPairs(model, pairs.base, pairs.sources[0], torch.ones(256, dtype=torch.int64))
    plan, _ = fitted("loreft", always, rank=1)
    assert evaluate(plan, always).iia == 1.0
    assert not any(item.edit.needs_source for item in plan)
    plan, _ = fitted("loreft", pairs, rank=1)
    assert evaluate(plan, pairs_of(model, 500, 1, direction)).iia < 0.65  # the source's answer is not in the base


def test_the_divergence_penalty_is_its_formula():
    direction = orthonormal(6, 1, 0)
    pairs = pairs_of(sign_reader(direction[:, 0]), 20, 0, direction)  # fewer than are drawn: all count
    setup = Setup(SITE, AllTokens(), 6, 1, 0, pairs, 1, {"divergence": 0.5})
    plan = METHODS["das"].make(setup)
    (base, source), q = pairs.activations(SITE, AllTokens()), plan[0].featurizer.frame()
    base, source = base[:, 0], source[:, 0]
    natural, values = torch.cat([base, source]), torch.tensor([*pairs.values[0], *pairs.values[1]])
    target = torch.stack([natural[values == wanted].mean(0) for wanted in pairs.values[1]])
    patched = base + (source - base) @ q @ q.T
    cosine = (patched * target).sum(1) / patched.norm(dim=1) / target.norm(dim=1)
    expected = 0.5 * (((patched - target) ** 2).sum(1) / 2 - cosine / 2).mean()
    found = natural_penalty(plan, setup)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert float(plan[0].featurizer.weight.grad.norm()) > 0
    assert natural_penalty(plan, Setup(SITE, AllTokens(), 6, 1, 0, pairs)) == 0


def test_the_divergence_option_keeps_patched_activations_nearer_to_natural_means():
    train = question_pairs(400, 0, cause=1.0)
    far = []
    for weight in (0.0, 0.1):
        plan, _ = fitted("das", train, rank=1, seed=2, divergence=weight)
        assert evaluate(plan, train).iia > 0.95
        setup = Setup(SITE, AllTokens(), 6, 1, 0, train, 1, {"divergence": 1.0})
        far.append(float(natural_penalty(plan, setup).detach()))
    assert far[1] + 0.5 < 0.5 * (far[0] + 0.5)  # -1/2 is the least there is


def test_the_divergence_option_is_refused_where_it_cannot_be_computed():
    direction = orthonormal(6, 1, 0)
    pairs = pairs_of(sign_reader(direction[:, 0]), 20, 0, direction, values=False)
    for name in ("das", "mdas", "boundless", "boundless_faithful"):
        with pytest.raises(InterveneError, match=f"Method {name} with option divergence: the pairs do not say"):
            METHODS[name].make(Setup(SITE, AllTokens(), 6, 1, 0, pairs, 1, {"divergence": 0.5}))
    with pytest.raises(InterveneError, match="2 variables were asked"):
        METHODS["das"].make(Setup(SITE, AllTokens(), 6, 1, 0, pairs, 2, {"divergence": 0.5}))


def test_the_whole_activation_carries_every_variable():
    directions = orthonormal(6, 1, 0)
    pairs = pairs_of(sign_reader(directions[:, 0]), 100, 0, directions)
    plan, told = fitted("full_vector", pairs)
    assert evaluate(plan, pairs).iia == 1.0 and told.losses == ()
    assert isinstance(plan[0], Intervention) and isinstance(plan[0].edit, Swap)
    assert isinstance(plan[0].featurizer, Identity)
