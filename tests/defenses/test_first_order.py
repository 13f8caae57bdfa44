"""The first-order detector: its score is the directional derivative, however it is read, and costs nothing."""

from __future__ import annotations

import pytest
import torch

from defenses.actions import Inject, LogOnly, Mask, Reweight
from defenses.first_order import FirstOrder, FirstOrderOptions, ScoreMemory
from defenses.thresholds import Fixed, Quantile
from records.config_files import ConfigError
from tests.defenses.cases import (
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


def by_hand(model, batch, chosen):
    """(N,) -<v, g> of each row's mean loss, by autograd on the blocks' outputs."""
    held = {}
    changes = {
        layer: lambda h, layer=layer: held.setdefault(layer, h.detach().requires_grad_()) for layer in chosen.layers
    }
    if len(chosen.layers) == 1:
        losses = each_token_loss(model, batch, changes)
        mask = (batch.labels != -100).float()
        (gradient,) = torch.autograd.grad((losses.sum(1) / mask.sum(1)).sum(), list(held.values()))
        return -((gradient @ chosen.at(chosen.layers[0])) * mask).sum(1)
    return sum(by_hand(model, batch, chosen.only([layer])) for layer in chosen.layers)


def learned(defense, one, batch, **where):
    told = defense.accumulate(one, batch, step_of(batch, **where))
    defense.after_step(one, step_of(batch, **where))
    return {name: float(value) for name, value in told.items()}, gradients(one)


def said(defense):
    return [row["score"] for row in defense.told()]


class Tripled:
    """A backend that multiplies losses, as one does that undoes an average over ranks."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def backward(self, loss, *, last):
        self.inner.backward(3 * loss, last=last)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("layers", [(1,), (0, 2)])
@pytest.mark.parametrize("when", ["monitor", "decide_then_learn", "next_epoch"])
def test_scores_are_the_directional_derivative(when, layers, pack):
    one, samples, chosen = backend(), rows(4), directions(*layers)
    batch = packed(samples) if pack else samples
    expected = by_hand(one.model, samples, chosen)
    defense = FirstOrder(chosen, FirstOrderOptions(when))
    told, found = learned(defense, one, batch, micro=1, micros=2, tokens=77)
    assert said(defense) == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-5)
    (each_token_loss(one.model, samples).sum() / 77).backward()
    same_gradients(found, gradients(one))  # the leaf changes nothing
    assert told["score_total"] == pytest.approx(float(expected.sum()), rel=1e-3, abs=1e-5)
    torch.testing.assert_close(defense.scores(one, batch), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("action", [LogOnly(), Reweight(0.25), Reweight(0.25, denominator="kept")])
def test_what_the_backend_and_the_action_multiply_with_does_not_change_a_score(action):
    one, batch, chosen = backend(), rows(4), directions(1)
    defense = FirstOrder(chosen, FirstOrderOptions("next_epoch", action=action))
    defense.memory.known = {0: 1.0, 1: -1.0}
    learned(defense, Tripled(one), batch)
    assert said(defense) == pytest.approx(by_hand(one.model, batch, chosen).tolist(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("when", ["monitor", "next_epoch"])
def test_it_costs_the_passes_of_plain_training(when):
    for batch in (rows(3), without_response()):
        one, chosen = backend(), directions(1)
        with counted(one.model) as blocks:
            learned(FirstOrder(chosen, FirstOrderOptions(when)), one, batch)
        assert blocks == [1, 1, 1]


def test_deciding_first_computes_upper_blocks_once_more_whatever_is_decided():
    for value in (-1e9, 1e9):
        for batch in (rows(3), without_response()):
            one = backend()
            options = FirstOrderOptions("decide_then_learn", Fixed(value), Mask())
            with counted(one.model) as blocks:
                learned(FirstOrder(directions(1), options), one, batch)
            assert blocks == [1, 1, 2]


def test_deciding_first_masks_what_is_suspicious():
    one, batch, chosen = backend(), rows(4, poison=(True, True, False, False)), directions(1)
    scores = by_hand(one.model, batch, chosen)
    value = float(scores.sort().values[1:3].mean())
    defense = FirstOrder(chosen, FirstOrderOptions("decide_then_learn", Fixed(value), Mask()))
    told, found = learned(defense, one, batch)
    kept = scores <= value
    (each_token_loss(one.model, batch)[kept].sum() / 14).backward()
    same_gradients(found, gradients(one))
    assert told["blocked"] == 2
    assert told["true_positives"] == int((~kept)[:2].sum())


def test_next_epoch_learns_new_samples_and_blocks_those_it_has_seen():
    one, batch, chosen = backend(), rows(4), directions(1)
    scores = by_hand(one.model, batch, chosen)
    value = float(scores.sort().values[1:3].mean())
    defense = FirstOrder(chosen, FirstOrderOptions("next_epoch", Fixed(value), Mask()))
    told, first = learned(defense, one, batch)
    (each_token_loss(one.model, batch).sum() / 14).backward()
    same_gradients(first, gradients(one))
    assert told["blocked"] == 0
    defense.told()

    resumed = FirstOrder(chosen, FirstOrderOptions("next_epoch", Fixed(value), Mask()))
    resumed.load_state_dict(defense.state_dict())
    told, second = learned(resumed, one, batch)
    kept = scores <= value
    (each_token_loss(one.model, batch)[kept].sum() / 14).backward()
    same_gradients(second, gradients(one))
    assert told["blocked"] == 2
    lines = resumed.told()
    assert [line["decided_on"] for line in lines] == pytest.approx(scores.tolist(), rel=1e-3)
    assert [line["score"] is None for line in lines] == (~kept).tolist()  # without a gradient there is no new score
    assert resumed.memory.known == pytest.approx(dict(enumerate(scores.tolist())), rel=1e-3)


def test_the_memory_knows_only_what_was_shared():
    one, memory = backend(), ScoreMemory()
    memory.note(torch.tensor([7, 9]), torch.tensor([1.5, -torch.inf]))
    assert memory.look(torch.tensor([7])).tolist() == [-torch.inf]
    memory.share(one)
    memory.share(one)
    assert memory.look(torch.tensor([9, 7])).tolist() == [-torch.inf, 1.5]


@pytest.mark.parametrize("when", ["monitor", "decide_then_learn"])
def test_samples_without_a_response_have_no_score(when):
    one, batch = backend(), without_response()
    defense = FirstOrder(directions(1), FirstOrderOptions(when, Fixed(-1e9)))
    told, found = learned(defense, one, batch)
    assert said(defense) == [None, None]
    assert (told["blocked"], told["loss_sum"]) == (0, 0)
    assert not any(bool(value.any()) for value in found.values())


@pytest.mark.parametrize(("when", "reentrant"), [("monitor", False), ("monitor", True), ("decide_then_learn", False)])
def test_gradient_checkpointing_changes_nothing(when, reentrant):
    batch, chosen = rows(4), directions(1)
    one = backend()
    checkpointed(one.model, reentrant=reentrant)
    defense = FirstOrder(chosen, FirstOrderOptions(when))
    _, found = learned(defense, one, batch)
    plain = backend()
    assert said(defense) == pytest.approx(by_hand(plain.model, batch, chosen).tolist(), rel=1e-3, abs=1e-5)
    (each_token_loss(plain.model, batch).sum() / 14).backward()
    same_gradients(found, gradients(plain))


def test_a_quantile_is_calibrated_with_scores_of_clean_batches():
    one, chosen, holdout = backend(), directions(1), rows(9, seed=4)
    defense = FirstOrder(chosen, FirstOrderOptions(threshold=Quantile(0.2)), [holdout])
    learned(defense, one, rows(4))
    ordered = by_hand(one.model, holdout, chosen).sort().values
    assert defense.threshold.value == pytest.approx(float(ordered[7]), rel=1e-3)  # ceil(10 * 0.8) = 8th
    assert gradients(one) == {}


def test_what_is_refused():
    with pytest.raises(ConfigError, match="a monitor changes nothing"):
        FirstOrderOptions("monitor", action=Mask())
    with pytest.raises(ConfigError, match="Action inject of the first-order detector"):
        FirstOrderOptions("next_epoch", action=Inject())
