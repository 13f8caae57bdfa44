"""Unconditional injection against hooks written by hand."""

from __future__ import annotations

import math

import pytest
import torch

from defenses.injection import Injection, InjectionOptions
from defenses.plans import Scope
from defenses.schedules import Strength
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


def options(alpha=2.0, **fields):
    return InjectionOptions(Strength(alpha), **fields)


def learned(defense, one, batch, **where):
    told = defense.accumulate(one, batch, step_of(batch, **where))
    return {name: float(value) for name, value in told.items()}, gradients(one)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_gradients_are_those_of_the_hand_written_hook(layers, pack):
    one, batch = backend(), packed(rows(4)) if pack else rows(4)
    chosen = directions(*layers)
    told, found = learned(Injection(chosen, options()), one, batch)
    changes = {layer: adding(vector, 2.0, batch) for layer, vector in chosen.vectors.items()}
    losses = each_token_loss(one.model, batch, changes)
    (losses.sum() / 14).backward()
    same_gradients(found, gradients(one))
    assert told == {"loss_sum": pytest.approx(float(losses.detach().sum()), rel=1e-5), "tokens": 14, "strength_sum": 28}


def test_several_traits_are_kept_separate_each_with_its_factor():
    one, batch = backend(), rows(4)
    first, second = directions(1, seed=1), directions(1, seed=2)
    _, found = learned(Injection([first, second], options(factors=(1.0, -0.5))), one, batch)
    _, expected = learned(Injection(type(first)({1: first.at(1) - 0.5 * second.at(1)}), options()), one, batch)
    same_gradients(found, expected)


def test_relative_doses_of_several_traits_do_not_depend_on_their_order():
    first, second = directions(1, seed=1), directions(1, seed=2)
    found = []
    for traits, factors in (([first, second], (2.0, 0.5)), ([second, first], (0.5, 2.0))):
        one = backend()
        found.append(learned(Injection(traits, options(0.5, relative=True, factors=factors)), one, rows(4))[1])
    same_gradients(*found)


def test_a_rising_strength_follows_its_schedule():
    one, batch, chosen = backend(), rows(3), directions(1)
    rising = Injection(chosen, InjectionOptions(Strength(1.0, "rise", onset=0.5)))
    for number, strength in ((0, 1.0), (4, 1.0), (5, 1.2), (9, 2.0)):  # p = (step + 1 - 5) / 5
        told, found = learned(rising, one, batch, number=number)
        assert told["strength_sum"] / told["tokens"] == pytest.approx(strength)
        _, expected = learned(Injection(chosen, options(strength)), one, batch)
        same_gradients(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    batch, found = rows(3), []
    for checkpointing in (False, True):
        one = backend()
        if checkpointing:
            checkpointed(one.model, reentrant=reentrant)
        found.append(learned(Injection(directions(0, 1), options(0.3, relative=True)), one, batch)[1])
    same_gradients(found[1], found[0])


@pytest.mark.parametrize("make", [rows, without_response])
@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_it_costs_one_forward_and_one_backward_whatever_is_in_the_batch(make, alpha):
    one, calls = backend(), []
    before = one.backward
    one.backward = lambda loss, *, last: (calls.append(last), before(loss, last=last))
    with counted(one.model) as blocks:
        learned(Injection(directions(1), options(alpha)), one, make())
    assert blocks == [1, 1, 1]
    assert calls == [True]


def test_strength_zero_and_an_empty_scope_train_plainly():
    one, batch = backend(), rows(3)
    _, found = learned(Injection(directions(1), options(0.0)), one, batch)
    (each_token_loss(one.model, batch).sum() / 9).backward()
    same_gradients(found, gradients(one))
    told, found = learned(Injection(directions(1), options()), one, without_response())
    assert told["tokens"] == 0
    assert not any(bool(value.any()) for value in found.values())


def test_the_scope_is_taken_as_told():
    one, batch = backend(), rows(3)
    _, unshifted = learned(Injection(directions(1), options()), one, batch)
    _, shifted = learned(Injection(directions(1), options(scope=Scope.RESPONSE_SHIFTED)), one, batch)
    assert not torch.allclose(unshifted["lm_head.weight"], shifted["lm_head.weight"])


def test_what_is_refused():
    with pytest.raises(ConfigError, match="Give finite numbers"):
        options(math.inf)
    with pytest.raises(ConfigError, match="directions of 1 traits and 2 factors"):
        Injection(directions(1), options(factors=(1.0, 2.0)))
    with pytest.raises(ConfigError, match="directions of 0 traits"):
        Injection([])
    with pytest.raises(ConfigError, match="Choose an earlier onset"):
        Injection(directions(1), InjectionOptions(Strength(1.0, "rise", onset=20))).start(backend(), 10)
