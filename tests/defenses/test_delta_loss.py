"""Delta-loss training: scores by hand, two shared passes against two full ones, and what each action learns."""

from __future__ import annotations

import math

import pytest
import torch

from defenses.actions import Inject, LogOnly, Mask
from defenses.delta_loss import DeltaLoss, DeltaLossOptions
from defenses.derivatives import slopes
from defenses.errors import CalibrationError
from defenses.plans import Directions, Scope, scope_columns
from defenses.schedules import Strength
from defenses.shared_passes import shared_passes
from defenses.thresholds import Fixed, Quantile
from records.config_files import ConfigError
from tests.defenses.cases import (
    adding,
    backend,
    checkpointed,
    counted,
    directions,
    each_token_loss,
    gradients,
    packed,
    rows,
    same_gradients,
    step_of,
    without_response,
)

COUNTS = torch.tensor([2.0, 3.0, 4.0, 5.0])  # learned tokens of rows(4)


def by_hand(model, batch, chosen, alpha):
    """Natural and injected token losses, each of a full pass of its own."""
    changes = {layer: adding(vector, alpha, batch) for layer, vector in chosen.vectors.items()}
    with torch.no_grad():
        return each_token_loss(model, batch), each_token_loss(model, batch, changes)


def between(values):
    """A threshold that splits `values` in half."""
    ordered = values.sort().values
    return Fixed(float((ordered[len(values) // 2 - 1] + ordered[len(values) // 2]) / 2))


def learned(defense, one, batch):
    told = defense.accumulate(one, batch, step_of(batch))
    return {name: float(value) for name, value in told.items()}, gradients(one)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("layers", [(1,), (0, 1)])
@pytest.mark.parametrize("name", ["llama"])
def test_shared_passes_give_what_two_full_passes_give(name, layers, pack):
    one, samples, chosen = backend(name), rows(4), directions(*layers)
    batch = packed(samples) if pack else samples
    defense = DeltaLoss(chosen, DeltaLossOptions(2.0))
    natural, injected = defense.probed(one, batch, grad=False)
    expected = by_hand(one.model, batch, chosen, 2.0)
    torch.testing.assert_close(natural, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(injected, expected[1], rtol=1e-5, atol=1e-5)
    one_by_one = by_hand(one.model, samples, chosen, 2.0)
    wanted = (one_by_one[0] - one_by_one[1]).sum(1) / COUNTS
    torch.testing.assert_close(defense.scores((natural, injected), batch), wanted, rtol=1e-4, atol=1e-5)


def test_other_components_share_the_block_below():
    one, batch = backend(), rows(2)
    chosen = Directions(directions(1).vectors, component="mlp_output")
    natural, injected = DeltaLoss(chosen, DeltaLossOptions(2.0)).probed(one, batch, grad=False)
    mask = (batch.labels != -100)[..., None]
    handle = one.model.model.layers[1].mlp.register_forward_hook(lambda _m, _i, out: out + 2.0 * chosen.at(1) * mask)
    with torch.no_grad():
        expected = each_token_loss(one.model, batch)
    handle.remove()
    torch.testing.assert_close(injected, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(natural, injected)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_forward_units_are_those_of_the_table(layer):
    """mask: N blocks and N - 1 - l more. inject: 2 N and N - 1 - l more. Whatever is decided."""
    one, above = backend(), [int(block > layer) for block in range(3)]
    for value in (-1e9, 0.0, 1e9):
        for batch in (rows(3), without_response()):
            with counted(one.model) as blocks:
                learned(DeltaLoss(directions(layer), DeltaLossOptions(threshold=Fixed(value))), one, batch)
            assert blocks == [1 + more for more in above]
            acting = DeltaLossOptions(threshold=Fixed(value), action=Inject(Strength(2.0)))
            with counted(one.model) as blocks:
                learned(DeltaLoss(directions(layer), acting), one, batch)
            assert blocks == [2 + more for more in above]


@pytest.mark.parametrize("pack", [False, True])
def test_a_masked_sample_is_not_learned(pack):
    one, samples, chosen = backend(), rows(4, poison=(True, False, True, None)), directions(1)
    batch = packed(samples) if pack else samples
    natural, injected = by_hand(one.model, samples, chosen, 2.0)
    scores = (natural - injected).sum(1) / COUNTS
    threshold = between(scores)
    defense = DeltaLoss(chosen, DeltaLossOptions(2.0, threshold=threshold))
    told, found = learned(defense, one, batch)
    kept = scores <= threshold.value
    assert int(kept.sum()) == 2
    (each_token_loss(one.model, samples)[kept].sum() / 14).backward()
    same_gradients(found, gradients(one))
    assert told["loss_sum"] == pytest.approx(float(natural.sum()), rel=1e-5)
    assert told["trained_sum"] == pytest.approx(float(natural[kept].sum()), rel=1e-5)
    assert told["delta_sum"] == pytest.approx(float((injected - natural).sum()), rel=1e-4)
    assert (told["samples"], told["blocked"], told["blocked_tokens"]) == (4, 2, float(COUNTS[~kept].sum()))
    assert told["true_positives"] == sum(not kept[i] for i in (0, 2))
    assert told["false_positives"] == int(not kept[1])
    said = defense.told()
    assert [row["blocked"] for row in said] == (~kept).tolist()
    assert [row["score"] for row in said] == pytest.approx(scores.tolist(), rel=1e-4, abs=1e-5)
    assert [row["poison"] for row in said] == [True, False, True, None]


def test_kept_denominator_averages_over_the_tokens_that_are_kept():
    one, batch, chosen = backend(), rows(4), directions(1)
    natural, injected = by_hand(one.model, batch, chosen, 2.0)
    scores = (natural - injected).sum(1) / COUNTS
    threshold = between(scores)
    _, found = learned(DeltaLoss(chosen, DeltaLossOptions(2.0, threshold=threshold, action=Mask("kept"))), one, batch)
    kept = scores <= threshold.value
    (each_token_loss(one.model, batch)[kept].sum() / COUNTS[kept].sum()).backward()
    same_gradients(found, gradients(one))


def test_the_least_token_decides_with_strategy_min():
    one, batch, chosen = backend(), rows(4), directions(1)
    natural, injected = by_hand(one.model, batch, chosen, 2.0)
    change = (injected - natural).masked_fill(batch.labels == -100, math.inf)
    for samples in (batch, packed(batch)):
        defense = DeltaLoss(chosen, DeltaLossOptions(2.0, strategy="min"))
        found = defense.scores(defense.probed(one, samples, grad=False), samples)
        torch.testing.assert_close(found, -change.min(1).values, rtol=1e-4, atol=1e-5)


def test_tokens_are_masked_one_by_one():
    one, batch, chosen = backend(), rows(4), directions(1)
    natural, injected = by_hand(one.model, batch, chosen, 2.0)
    valid = batch.labels != -100
    fall = natural - injected
    threshold = between(fall[fall > 1e-3])  # a response's first token comes before anything that is injected: 0
    defense = DeltaLoss(chosen, DeltaLossOptions(2.0, granularity="token", threshold=threshold))
    told, found = learned(defense, one, batch)
    kept = (fall <= threshold.value) & valid
    assert 0 < int((valid & ~kept).sum()) < 14
    (each_token_loss(one.model, batch)[kept].sum() / 14).backward()
    same_gradients(found, gradients(one))
    blocked = (valid & ~kept).sum(1)
    assert told["blocked_tokens"] == int(blocked.sum())
    assert told["blocked"] == int((blocked > 0).sum())
    said = defense.told()
    assert [row["blocked_tokens"] for row in said] == blocked.tolist()
    largest = fall.masked_fill(~valid, -math.inf).max(1).values
    assert [row["score"] for row in said] == pytest.approx(largest.tolist(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("pack", [False, True])
def test_inject_learns_suspicious_samples_injected_and_others_naturally(pack):
    one, samples, chosen = backend(), rows(4), directions(1)
    batch = packed(samples) if pack else samples
    natural, injected = by_hand(one.model, samples, chosen, 2.0)
    scores = (natural - injected).sum(1) / COUNTS
    threshold = between(scores)
    options = DeltaLossOptions(2.0, threshold=threshold, action=Inject(Strength(5.0)))
    told, found = learned(DeltaLoss(chosen, options), one, batch)
    suspicious = scores > threshold.value
    steered = each_token_loss(one.model, samples, {1: adding(chosen.at(1), 5.0, samples, only=suspicious)})
    (steered.sum() / 14).backward()
    same_gradients(found, gradients(one))
    assert told["trained_sum"] == pytest.approx(float(steered.detach().sum()), rel=1e-5)
    assert told["loss_sum"] == pytest.approx(float(natural.sum()), rel=1e-5)


@pytest.mark.parametrize("granularity", ["sample", "token"])
@pytest.mark.parametrize("denominator", ["all", "kept"])
def test_everything_blocked_gives_gradients_of_zero(granularity, denominator):
    one, batch = backend(), rows(3)
    options = DeltaLossOptions(granularity=granularity, threshold=Fixed(-1e9), action=Mask(denominator))
    told, found = learned(DeltaLoss(directions(1), options), one, batch)
    assert told["blocked"] == 3
    assert not any(bool(value.any()) for value in found.values())


@pytest.mark.parametrize("granularity", ["sample", "token"])
@pytest.mark.parametrize("action", [Mask(), Mask("kept"), LogOnly()])
def test_a_batch_without_response_tokens_is_not_suspicious_and_not_nan(granularity, action):
    one, batch = backend(), without_response()
    options = DeltaLossOptions(granularity=granularity, threshold=Fixed(-1e9), action=action)
    defense = DeltaLoss(directions(1), options)
    told, found = learned(defense, one, batch)
    assert (told["loss_sum"], told["delta_sum"], told["tokens"], told["blocked"]) == (0, 0, 0, 0)
    assert [row["score"] for row in defense.told()] == [None, None]
    assert not any(bool(value.any()) for value in found.values())


def test_shadow_mode_tells_what_would_be_blocked_and_trains_plainly():
    one, batch = backend(), rows(4)
    options = DeltaLossOptions(threshold=Fixed(-1e9), action=LogOnly())
    told, found = learned(DeltaLoss(directions(1), options), one, batch)
    assert told["blocked"] == 4
    (each_token_loss(one.model, batch).sum() / 14).backward()
    same_gradients(found, gradients(one))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of passes without gradient
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("action", [Mask(), Inject(Strength(3.0))])
def test_gradient_checkpointing_changes_nothing(reentrant, action):
    batch, found = rows(4), []
    natural, injected = by_hand(backend().model, batch, directions(1), 2.0)
    threshold = between((natural - injected).sum(1) / COUNTS)
    for checkpointing in (False, True):
        one = backend()
        if checkpointing:
            checkpointed(one.model, reentrant=reentrant)
        options = DeltaLossOptions(2.0, threshold=threshold, action=action)
        found.append(learned(DeltaLoss(directions(1), options), one, batch))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    same_gradients(found[1][1], found[0][1])


# --- dropout ----------------------------------------------------------------------------------------------------------


def with_dropout(one, p=0.3):
    for block in one.model.model.layers:
        block.self_attn.attention_dropout = p
    one.model.config._attn_implementation = "eager"
    return one


def test_with_active_dropout_both_passes_draw_the_same_masks_and_training_goes_on_from_where_it_was():
    one, batch = with_dropout(backend()), rows(4)
    tiny = Directions({1: 1e-6 * directions(1).at(1)})
    torch.manual_seed(5)
    with counted(one.model) as blocks:
        natural, injected = DeltaLoss(tiny, DeltaLossOptions(1.0)).probed(one, batch, grad=False)
    after = torch.get_rng_state()
    assert blocks == [2, 2, 2]
    torch.testing.assert_close(natural, injected, rtol=1e-5, atol=1e-5)
    torch.manual_seed(5)
    plain = DeltaLoss(tiny, DeltaLossOptions(1.0)).probed(one, batch, grad=True)[0]
    torch.testing.assert_close(plain, natural)
    torch.manual_seed(5)
    with torch.no_grad():
        one.model(**batch.inputs())
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.allclose(natural, each_token_loss(one.model, batch))  # and the masks did matter


# --- theory -----------------------------------------------------------------------------------------------------------


def test_delta_over_alpha_is_the_directional_derivative_as_alpha_falls():
    one, batch, chosen = backend(), rows(24, seed=2), directions(1)
    with shared_passes(one, batch, chosen) as shared:
        shared.natural(grad=False)
        slope = slopes(shared, chosen, scope_columns(batch, Scope.RESPONSE))
    found = {}
    for alpha in (4.0, 1.0, 0.1, 0.01):
        defense = DeltaLoss(chosen, DeltaLossOptions(alpha))
        delta = -defense.scores(defense.probed(one, batch, grad=False), batch)
        found[alpha] = float(torch.corrcoef(torch.stack([delta / alpha, slope]))[0, 1])
    assert found[0.01] > 0.9999
    assert found[0.1] > 0.99
    assert found[4.0] < found[1.0] < found[0.1]


# --- thresholds, options ----------------------------------------------------------------------------------------------


def test_a_quantile_is_calibrated_on_clean_batches_and_blocks_at_its_rate():
    one, chosen = backend(), directions(1)
    holdout = [rows(10, seed=7), rows(9, seed=8)]
    defense = DeltaLoss(chosen, DeltaLossOptions(1.0, threshold=Quantile(0.25, every=2)), holdout)
    defense.accumulate(one, rows(4), step_of(rows(4)))
    clean = []
    for batch in holdout:
        natural, injected = by_hand(one.model, batch, chosen, 1.0)
        clean.append((natural - injected).sum(1) / (batch.labels != -100).sum(1))
    ordered = torch.cat(clean).sort().values
    assert defense.threshold.value == pytest.approx(float(ordered[14]), rel=1e-4)  # ceil(20 * 0.75) = 15th
    assert defense.threshold.history[0].realised.value == pytest.approx(4 / 19)
    resumed = DeltaLoss(chosen, DeltaLossOptions(1.0, threshold=Quantile(0.25, every=2)), holdout)
    resumed.load_state_dict(defense.state_dict())
    assert resumed.threshold.value == defense.threshold.value
    assert not resumed.threshold.due(1)


def test_what_is_refused():
    for alpha in (0.0, math.nan):
        with pytest.raises(ConfigError, match="both passes would be the same"):
            DeltaLossOptions(alpha)
    with pytest.raises(ConfigError, match="the action inject is one by sample"):
        DeltaLossOptions(granularity="token", action=Inject())
    with pytest.raises(ConfigError, match="strategy min is one by sample"):
        DeltaLossOptions(granularity="token", strategy="min")
    with pytest.raises(CalibrationError, match="no clean examples"):
        DeltaLoss(directions(1), DeltaLossOptions(threshold=Quantile()))
