"""Mixture-of-experts sites: contributions add up, one expert can be removed, and the router decides."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from intervene import Add, AllTokens, At, Intervention, LastToken, Scale, Zero, capture, intervene
from intervene.families import resolve
from tests.intervene.by_hand import close
from tests.tiny import tiny_batch, tiny_model

pytestmark = pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
EXPERTS = 4


@contextmanager
def weights_masked(model, expert, tokens):
    """Zero the routing weight of one expert at `tokens` (B*S,) in block 1, by a hook on what its experts are given."""

    def hook(_module, args):
        hidden, index, weights = args
        return hidden, index, torch.where((index == expert) & tokens[:, None], 0.0, weights)

    handle = resolve(model, "L1.expert_output[0]").module.register_forward_pre_hook(hook)
    yield
    handle.remove()


@torch.no_grad()
def test_contributions_of_all_experts_add_up_to_the_mlp_output(family):
    model = tiny_model(family)
    batch = tiny_batch(model, "left")
    sites = ["L1.expert_output", "L1.expert_output[2]", "L1.mlp_output"]
    with capture(model, sites[1:]) as acts:
        model(**batch)
    with capture(model, "L1.expert_output") as every:
        model(**batch)
    each = every["L1.expert_output"].unflatten(-1, (EXPERTS, 32))
    close(each.sum(-2), acts["L1.mlp_output"])
    close(each[..., 2, :], acts["L1.expert_output[2]"])
    used = (each.abs().sum(-1) > 0).sum(-1)
    assert (used == 2).all()  # two experts of each token


@pytest.mark.parametrize("where", ["all", "last"])
@torch.no_grad()
def test_removing_an_expert_is_zeroing_its_routing_weight(family, where):
    model = tiny_model(family)
    batch = tiny_batch(model)
    tokens = torch.ones(2, 7, dtype=torch.bool)
    positions = AllTokens()
    if where == "last":
        tokens[:, :-1], positions = False, LastToken()
    changed = 0
    plain = model(**batch).logits
    for expert in range(EXPERTS):
        with intervene(model, [Intervention(f"L1.expert_output[{expert}]", Zero(), positions)]):
            found = model(**batch).logits
        with weights_masked(model, expert, tokens.flatten()):
            close(found, model(**batch).logits)
        changed += not torch.allclose(found, plain)
    assert changed


@torch.no_grad()
def test_two_experts_at_once(family):
    model = tiny_model(family)
    batch = tiny_batch(model)
    with intervene(model, [Intervention("L1.expert_output[0,3]", Zero())]):
        found = model(**batch).logits
    tokens = torch.ones(14, dtype=torch.bool)
    with weights_masked(model, 0, tokens), weights_masked(model, 3, tokens):
        close(found, model(**batch).logits)


@torch.no_grad()
def test_an_edit_of_an_expert_changes_the_mlp_output_by_as_much(family):
    model = tiny_model(family)
    batch = tiny_batch(model)
    with capture(model, ["L1.mlp_output", "L1.expert_output[1]"]) as plain:
        model(**batch)
    with (
        intervene(model, [Intervention("L1.expert_output[1]", Scale(3.0), At(2, 4))]),
        capture(model, "L1.mlp_output") as acts,
    ):
        model(**batch)
    expected = torch.zeros(2, 7, 32)
    expected[:, [2, 4]] = 2 * plain["L1.expert_output[1]"][:, [2, 4]]
    close(acts["L1.mlp_output"] - plain["L1.mlp_output"], expected)


@torch.no_grad()
def test_the_router_is_captured_and_its_edit_takes_effect(family):
    model = tiny_model(family)
    batch = tiny_batch(model)
    with capture(model, ["L1.router_output", "L1.mlp_input"]) as acts:
        model(**batch)
    router = resolve(model, "L1.router_output").module
    logits = acts["L1.mlp_input"] @ router.weight.T + getattr(router, "bias", torch.zeros(EXPERTS))
    close(acts["L1.router_output"], logits)
    push = torch.tensor([0.0, 100.0, 0.0, 0.0])  # expert 1 alone: it takes all of the softmax
    with (
        intervene(model, [Intervention("L1.router_output", Add(push), LastToken())]),
        capture(model, "L1.expert_output") as each,
    ):
        model(**batch)
    parts = each["L1.expert_output"].unflatten(-1, (EXPERTS, 32)).abs().sum(-1)
    assert (parts[:, -1, 1] > 0).all() and float(parts[:, -1, [0, 2, 3]].max()) < 1e-6
    with capture(model, "L1.expert_output") as plain:
        model(**batch)
    close(each["L1.expert_output"][:, :-1], plain["L1.expert_output"][:, :-1])


@torch.no_grad()
def test_a_router_left_as_it_is_changes_nothing(family):
    model = tiny_model(family)
    batch = tiny_batch(model)
    with intervene(model, [Intervention("L1.router_output", Scale(1.0))]):
        found = model(**batch).logits
    close(found, model(**batch).logits)
