"""Swaps that learn what to take, against their papers' formulas, samples, finite differences and pyvene."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from intervene import (
    BadVector,
    BoundarySwap,
    BudgetSwap,
    FaithfulBoundarySwap,
    GatedSwap,
    HardConcreteSwap,
    Identity,
    Intervention,
    LastToken,
    LowRankAffine,
    Parts,
    SecondBoundarySwap,
    ShapeMismatch,
    Subspace,
    Swap,
    collect_sources,
    intervene,
    load_plan,
    save_plan,
    trainable_parameters,
)
from intervene.boundless import boundless_temperature
from tests.intervene.values import learned, randn
from tests.tiny import tiny_batch, tiny_model

K = 6
GROUPS = torch.tensor([0, 2, 1, 2, 0, 2])


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, dtype=np.float64)))


def with_logits(edit, values):
    edit.logits.data = torch.tensor(values, dtype=edit.logits.dtype)
    return edit


# penalty, size, groups


def test_the_penalty_of_sigmoid_gates_is_their_mean_and_the_size_how_many_are_open():
    edit = with_logits(GatedSwap(4, temperature=0.5), [1.0, -1.0, 0.5, 0.0])
    assert edit.penalty().item() == pytest.approx(sigmoid([2.0, -2.0, 1.0, 0.0]).mean(), rel=1e-6)
    assert edit.size() == 2 == edit.eval().size()
    edit.penalty().backward()  # also after eval, with a gradient
    s = sigmoid([2.0, -2.0, 1.0, 0.0])
    np.testing.assert_allclose(edit.logits.grad.numpy(), s * (1 - s) / 0.5 / 4, rtol=1e-5)
    tied = with_logits(GatedSwap(4, tied=True), [0.3])
    assert tied.size() == 4 and with_logits(tied, [-0.3]).size() == 0


def test_the_penalty_of_a_boundary_is_its_fraction():
    edit = BoundarySwap(10, fraction=0.34)
    assert edit.penalty().item() == pytest.approx(0.34) and edit.size() == 3
    edit.penalty().backward()
    assert float(edit.fraction.grad) == 1.0
    below = BoundarySwap(10, fraction=-0.2)
    below.penalty().backward()
    assert below.penalty().item() == 0.0 and float(below.fraction.grad) == 0.0 and below.size() == 0


@pytest.mark.parametrize("make", [GatedSwap, HardConcreteSwap, lambda k, groups: BudgetSwap(k, 2, groups=groups)])
def test_groups_have_one_gate_each(make):
    edit = with_logits(make(K, groups=GROUPS), [1.0, -1.0, 2.0])
    assert edit.logits.shape == (3,) and edit.features == K
    gate = edit.gate().detach()
    assert gate.shape == (K,) and len(set(gate.tolist())) <= 3
    assert gate[0] == gate[4] and gate[1] == gate[3] == gate[5]
    assert edit.eval().gate().tolist() == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0] and edit.size() == 5
    z, source = randn(2, 3, K), randn(2, 3, K, seed=2)
    result = edit(z, source)
    assert torch.equal(result[..., GROUPS != 1], source[..., GROUPS != 1]) and torch.equal(result[..., 2], z[..., 2])


@pytest.mark.parametrize(
    "groups, message",
    [
        (torch.zeros(5, dtype=torch.int64), r"groups of shape \(5,\)"),
        (torch.zeros(K), r"torch\.float32\. Give 6 whole numbers"),
        (torch.tensor([0, 0, 2, 2, 2, 2]), r"groups are numbered \[0, 2\]. Number them from 0 without gaps"),
        (torch.tensor([1, 1, 1, 1, 1, 1]), r"numbered \[1\]"),
    ],
)
def test_groups_that_mean_nothing_are_refused(groups, message):
    with pytest.raises(ShapeMismatch, match=message):
        GatedSwap(K, groups=groups)
    with pytest.raises(ShapeMismatch, match="groups and tied together"):
        GatedSwap(K, tied=True, groups=GROUPS)


def test_groups_come_back_from_the_store(tmp_path):
    edit = learned(BudgetSwap(32, 2, groups=torch.arange(32) // 8))
    loaded = load_plan(save_plan([Intervention("L0.mlp_output", edit)], tmp_path / "plan"))[0].edit
    assert torch.equal(loaded.groups, edit.groups) and torch.equal(loaded.gate(), edit.gate()) and loaded.budget == 2


# hard concrete


def test_a_sampled_gate_is_the_papers_formula():
    edit = with_logits(HardConcreteSwap(4, temperature=0.5, stretch=(-0.2, 1.3)), [0.0, 1.0, -2.0, 3.0])
    u = np.array([0.1, 0.5, 0.9, 0.3])
    s = sigmoid((np.log(u) - np.log(1 - u) + edit.logits.detach().numpy()) / 0.5)
    wanted = np.clip(s * 1.5 - 0.2, 0, 1)
    noise = torch.tensor(np.log(u) - np.log(1 - u), dtype=torch.float32)
    np.testing.assert_allclose(edit.sampled(noise).detach().numpy(), wanted, atol=1e-6)
    z, source = randn(1, 1, 4), randn(1, 1, 4, seed=2)
    torch.testing.assert_close(edit(z, source, noise), z + torch.tensor(wanted).float() * (source - z))


def test_the_expected_l0_is_how_often_samples_are_not_zero():
    edit = with_logits(HardConcreteSwap(3), [0.0, -2.0, 1.5])
    samples = torch.stack([edit.sampled(edit.draw(torch.empty(0))) for _ in range(20000)])
    assert edit.penalty().item() == pytest.approx(float((samples > 0).float().mean()), abs=0.01)
    assert float((samples == 0).float().mean()) > 0.1 and float((samples == 1).float().mean()) > 0.1
    edit.penalty().backward()
    assert (edit.logits.grad > 0).all()


def test_a_hard_concrete_gate_is_hard_after_eval_and_draws_nothing_then():
    edit = with_logits(HardConcreteSwap(3), [0.1, -0.1, 2.0]).eval()
    state = edit.generator.get_state()
    z, source = randn(2, 1, 3), randn(2, 1, 3, seed=2)
    assert torch.equal(edit(z, source), torch.where(torch.tensor([True, False, True]), source, z))
    assert edit.size() == 2 and edit.draw(z).numel() == 0 and torch.equal(edit.generator.get_state(), state)
    with pytest.raises(BadVector, match=r"stretch \(0\.0, 1\.1\).*below 0"):
        HardConcreteSwap(3, stretch=(0.0, 1.1))


@pytest.mark.parametrize("parts", [False, True])
def test_one_sample_serves_a_whole_pass_also_when_checkpointing_runs_it_again(parts):
    grads = []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        edit = HardConcreteSwap(32, seed=3)
        used = Parts([(Identity(), edit), (Subspace(32, 2), Swap())]) if parts else edit
        plan = [Intervention("L0.block_output", used, LastToken())]
        with intervene(model, plan, collect_sources(model, plan, tiny_batch(model, seed=1))):
            for _ in range(2):
                model(**tiny_batch(model), use_cache=False).logits.square().sum().backward()
        grads.append(edit.logits.grad)
        # two passes have drawn two samples, no more
        fresh = HardConcreteSwap(32, seed=3)
        first, second = fresh.draw(torch.empty(0)), fresh.draw(torch.empty(0))
        assert not torch.equal(first, second) and torch.equal(edit.generator.get_state(), fresh.generator.get_state())
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-4)


# budget


@pytest.mark.parametrize("budget", [1, 3, 5, 6])
@pytest.mark.parametrize("temperature", [10.0, 1.0, 0.05, 1e-6])
def test_budget_gates_sum_to_the_budget(budget, temperature):
    edit = learned(BudgetSwap(K, budget, temperature=temperature))
    gate = edit.gate().detach()
    assert float(gate.double().sum()) == pytest.approx(budget, abs=1e-5)
    order = edit.logits.detach().argsort()
    assert (gate[order].diff() >= 0).all()
    if temperature > 0.01 and budget < K:
        x = edit.logits.detach().double().numpy() / temperature
        c = brentq(lambda c: sigmoid(x + c).sum() - budget, -200, 200, xtol=1e-12)
        np.testing.assert_allclose(gate.numpy(), sigmoid(x + c), atol=1e-5)
    assert edit.size() == budget and float(edit.eval().gate().sum()) == budget
    assert set(edit.logits[edit.gate() > 0].tolist()) == set(edit.logits.topk(budget).values.tolist())


def test_equal_logits_still_make_a_hard_budget():
    edit = BudgetSwap(K, 2)
    torch.testing.assert_close(edit.gate(), torch.full((K,), 2 / K))
    assert edit.eval().gate().tolist() == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_gradient_of_a_budget_is_that_of_finite_differences(temperature):
    edit = learned(BudgetSwap(K, 2, temperature=temperature)).double()
    probe = randn(K, seed=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda _: edit.gate(), (edit.logits,), atol=1e-7)
    (edit.gate() * probe).sum().backward()
    assert float(edit.logits.grad.sum()) == pytest.approx(0, abs=1e-12), "all logits together change nothing"
    assert edit.logits.grad.abs().max() > 1e-3


def test_a_cold_budget_has_a_finite_gradient_and_finds_the_features_that_matter():
    cold = learned(BudgetSwap(K, 2, temperature=1e-8))
    cold.gate().square().sum().backward()
    assert cold.logits.grad.isfinite().all()
    z, source = randn(64, 1, K), randn(64, 1, K, seed=2)
    target = z.clone()
    target[..., [1, 4]] = source[..., [1, 4]]
    edit = BudgetSwap(K, 2)
    optimiser = torch.optim.Adam(edit.parameters(), lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        (edit(z, source) - target).square().mean().backward()
        optimiser.step()
    assert edit.eval().gate().tolist() == [0, 1, 0, 0, 1, 0]
    with pytest.raises(ShapeMismatch, match="budget 7, there are 6 gates"):
        BudgetSwap(K, 7)


# Boundless DAS as published


@pytest.mark.parametrize("fraction, temperature", [(0.5, 50.0), (0.7, 0.1), (0.0, 3.0), (1.4, 2.0)])
def test_the_published_mask_by_its_formula(fraction, temperature):
    edit = FaithfulBoundarySwap(10, fraction=fraction, temperature=temperature)
    i, right = np.arange(10), min(max(fraction, 1e-3), 1) * 10
    wanted = sigmoid(i / temperature) * sigmoid((right - i) / temperature)
    np.testing.assert_allclose(edit.gate().detach().numpy(), wanted, rtol=1e-4, atol=1e-7)
    assert torch.equal(edit.eval().gate(), edit.train().gate()), "soft also after eval"
    assert edit.size() == round(right)


def test_two_variables_share_one_boundary():
    first = FaithfulBoundarySwap(9, variables=2, fraction=0.6, temperature=0.7)
    second = SecondBoundarySwap(first)
    i, b = np.arange(9), 0.6 * 4  # floor(9 / 2)
    one = sigmoid(i / 0.7) * sigmoid((b - i) / 0.7)
    two = sigmoid((i - b) / 0.7) * sigmoid((2 * b - i) / 0.7)
    np.testing.assert_allclose(first.gate().detach().numpy(), one, rtol=1e-4)
    np.testing.assert_allclose(second.gate().detach().numpy(), two, rtol=1e-4)
    assert (first.penalty() + second.penalty()).item() == pytest.approx(0.6)
    assert first.hard().tolist() == [n < 2 for n in range(9)]
    assert second.hard().tolist() == [2 <= n < 5 for n in range(9)] and second.size() == 3
    with pytest.raises(ShapeMismatch, match="made for one variable"):
        SecondBoundarySwap(FaithfulBoundarySwap(9))
    with pytest.raises(ShapeMismatch, match="3 variables in 9 features"):
        FaithfulBoundarySwap(9, variables=3)


def test_soft_and_hard_scores_of_the_published_form_differ():
    z, source = randn(2, 1, 8), randn(2, 1, 8, seed=2)
    edit = FaithfulBoundarySwap(8, fraction=0.5, temperature=0.5).eval()
    soft = edit(z, source)
    edit.hard_eval = True
    assert torch.equal(edit(z, source)[..., :4], source[..., :4]) and torch.equal(edit(z, source)[..., 4:], z[..., 4:])
    assert not torch.allclose(soft, edit(z, source), atol=0.05)
    second = SecondBoundarySwap(FaithfulBoundarySwap(8, variables=2, hard_eval=True, fraction=1.0).eval())
    assert torch.equal(second(z, source)[..., 4:], source[..., 4:])
    assert [boundless_temperature(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([50.0, 25.05, 0.1])


def test_the_published_penalty_is_the_raw_fraction():
    edit = FaithfulBoundarySwap(8, fraction=-0.3)
    (edit.penalty() + edit(randn(1, 1, 8), randn(1, 1, 8, seed=2)).sum()).backward()
    assert edit.penalty().item() == pytest.approx(-0.3) and float(edit.fraction.grad) == 1.0


def test_two_variables_come_back_from_the_store_on_one_boundary(tmp_path):
    first = FaithfulBoundarySwap(4, variables=2, fraction=0.7, temperature=3.0)
    lens = Subspace(32, 4)
    plan = [Intervention("L0.mlp_output", edit, None, lens) for edit in (SecondBoundarySwap(first), first)]
    loaded = load_plan(save_plan(plan, tmp_path / "plan"))
    second, again = (item.edit for item in loaded)
    assert second.first is again and torch.equal(second.gate(), plan[0].edit.gate())
    assert len(trainable_parameters(loaded)) == 2 and loaded[0].featurizer is loaded[1].featurizer
    save_plan(plan[:1], tmp_path / "alone")
    assert torch.equal(load_plan(tmp_path / "alone")[0].edit.gate(), plan[0].edit.gate())


@pytest.mark.parametrize("fraction, temperature", [(0.5, 50.0), (0.8, 1.0), (0.3, 0.1)])
def test_the_published_form_is_pyvenes(fraction, temperature):
    pyvene = pytest.importorskip("pyvene")
    module = pyvene.BoundlessRotatedSpaceIntervention(embed_dim=12)
    module.intervention_boundaries.data.fill_(fraction)
    module.set_temperature(torch.tensor(temperature))
    lens = Subspace.from_frame(module.rotate_layer.weight.detach(), trainable=True)
    edit = FaithfulBoundarySwap(12, fraction=fraction, temperature=temperature)
    h, s, probe = randn(3, 12), randn(3, 12, seed=2), randn(3, 12, seed=4)
    theirs = module(h, s)
    z, other = lens.read(h[:, None]), lens.read(s[:, None])
    ours = lens.write(h[:, None], edit(z, other))[:, 0]
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0)
    (theirs * probe).sum().backward()
    (ours * probe).sum().backward()
    torch.testing.assert_close(edit.fraction.grad, module.intervention_boundaries.grad[0], atol=1e-4, rtol=1e-4)


# LoReFT


def moved(edit):
    """Return `edit` with frame, weight and bias moved apart."""
    with torch.no_grad():
        for number, parameter in enumerate(edit.parameters()):
            parameter += 0.3 * randn(*parameter.shape, seed=30 + number)
    return edit


def test_loreft_is_its_formula_with_the_gradient_of_it():
    edit, h = moved(LowRankAffine(12, 4, seed=2)), randn(2, 3, 12).requires_grad_()
    probe = randn(2, 3, 12, seed=4)
    (edit(h, None) * probe).sum().backward()
    free = edit.subspace.weight.detach().clone().requires_grad_()
    weight, bias = edit.weight.detach().clone().requires_grad_(), edit.bias.detach().clone().requires_grad_()
    q, r = torch.linalg.qr(free)
    q = q * r.diagonal().sign()
    plain = h.detach().clone().requires_grad_()
    wanted = plain + torch.einsum("dk,bpk->bpd", q, torch.einsum("dk,bpd->bpk", weight - q, plain) + bias)
    (wanted * probe).sum().backward()
    torch.testing.assert_close(edit(h, None), wanted, atol=1e-5, rtol=0)
    for ours, theirs in ((edit.subspace.weight, free), (edit.weight, weight), (edit.bias, bias), (h, plain)):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_loreft_starts_as_the_identity_and_reads_the_whole_activation():
    edit, h = LowRankAffine(12, 4), randn(2, 3, 12)
    torch.testing.assert_close(edit(h, None), h, atol=1e-6, rtol=0)
    moved(edit)
    frame = edit.subspace.frame().detach()
    outside = h + randn(2, 3, 12, seed=3) @ (torch.eye(12) - frame @ frame.mT)
    torch.testing.assert_close(edit.subspace.read(outside), edit.subspace.read(h), atol=1e-5, rtol=0)
    change = (edit.subspace.read(edit(outside, None)) - edit.subspace.read(edit(h, None))).abs().max()
    assert change > 0.1, "what lies outside of the subspace decides what is written into it"
    assert edit(h.bfloat16(), None).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert edit(h, None).dtype == torch.float32
    torch.testing.assert_close(copy.deepcopy(edit)(h, None), edit(h, None), atol=0, rtol=0)


def test_loreft_steers_a_model_without_a_source_and_is_refused_at_another_width():
    model = tiny_model("llama")
    edit = moved(LowRankAffine(32, 2))
    batch = tiny_batch(model)
    with intervene(model, [Intervention("L0.block_output", edit, LastToken())]):
        model(**batch).logits.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in edit.parameters())
    wrong = [Intervention("L0.block_output", LowRankAffine(12, 2))]
    with pytest.raises(ShapeMismatch, match="the edit is 12 wide, but 32 features"), intervene(model, wrong):
        pass
    assert math.isfinite(float(edit.bias.grad.sum()))
