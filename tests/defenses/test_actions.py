"""Actions and denominators, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from defenses.actions import Inject, LogOnly, Mask, Reweight, learn_weighted
from defenses.objectives import token_losses
from records.config_files import ConfigError
from tests.defenses.cases import backend, each_token_loss, gradients, packed, rows, same_gradients, step_of

SCORES, SUSPICIOUS = torch.tensor([-1.0, 2.0, -math.inf]), torch.tensor([False, True, False])


def test_weights_by_hand():
    assert Mask().weights(SCORES, SUSPICIOUS, 1.0).tolist() == [1, 0, 1]
    assert Reweight(0.25).weights(SCORES, SUSPICIOUS, 1.0).tolist() == [1, 0.25, 1]
    smooth = Reweight(temperature=0.5).weights(SCORES, SUSPICIOUS, 1.0)
    assert smooth.tolist() == pytest.approx([1 / (1 + math.exp(-4)), 1 / (1 + math.exp(2)), 1.0])
    assert LogOnly().weights(SCORES, SUSPICIOUS, 1.0).tolist() == [1, 1, 1]
    assert Inject().weights(SCORES, SUSPICIOUS, 1.0).tolist() == [1, 1, 1]


def test_weights_that_are_none():
    with pytest.raises(ConfigError, match="factor 2"):
        Reweight(2)
    with pytest.raises(ConfigError, match="temperature 0"):
        Reweight(temperature=0)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("denominator", ["all", "kept"])
def test_denominators_by_hand(denominator, pack):
    one, padded = backend(), rows(4)
    batch = packed(padded) if pack else padded
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0])
    counts = torch.tensor([2.0, 3.0, 4.0, 5.0])  # learned tokens of the four samples
    step = step_of(batch, micro=1, micros=3, tokens=40)
    losses = token_losses(one, batch)
    told = learn_weighted(one, losses, weights, batch, step, denominator)
    found = gradients(one)

    sums = each_token_loss(one.model, padded).sum(1)  # (4,)
    wanted = (sums * weights).sum()
    divisor = 40 if denominator == "all" else float((weights * counts).sum()) * 3
    (wanted / divisor).backward()
    same_gradients(found, gradients(one))
    torch.testing.assert_close(told, wanted.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("denominator", ["all", "kept"])
def test_a_micro_batch_that_is_blocked_whole_gives_gradients_of_zero_not_none(denominator):
    one, batch = backend(), rows(3)
    learn_weighted(one, token_losses(one, batch), torch.zeros(3), batch, step_of(batch), denominator)
    found = gradients(one)
    assert found.keys() == one.parameters().keys()
    assert not any(bool(value.any()) for value in found.values())


def test_masking_all_but_one_leaves_its_rate_as_it_was_and_kept_raises_it():
    one, batch = backend(), rows(4)
    step, weights = step_of(batch), torch.tensor([1.0, 0.0, 0.0, 0.0])
    norms = {}
    for name in ("all", "kept"):
        learn_weighted(one, token_losses(one, batch), weights, batch, step, name)
        norms[name] = float(one.model.lm_head.weight.grad.norm())
        one.model.zero_grad()
    assert norms["kept"] / norms["all"] == pytest.approx(14 / 2, rel=1e-4)  # 14 tokens, of which 2 are kept


def test_weights_by_token():
    one, batch = backend(), rows(2)
    weights = torch.zeros(batch.labels.shape)
    weights[0, 4] = 1.0
    learn_weighted(one, token_losses(one, batch), weights, batch, step_of(batch, tokens=5))
    found = gradients(one)
    (each_token_loss(one.model, batch)[0, 4] / 5).backward()
    same_gradients(found, gradients(one))
