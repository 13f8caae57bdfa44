"""The closed loop: its strength by formula, from slopes and curvatures that the loss itself confirms."""

from __future__ import annotations

import math

import pytest
import torch

from defenses.closed_loop import ClosedLoop, ClosedLoopOptions, wanted_strength
from defenses.injection import Injection, InjectionOptions
from defenses.plans import Directions
from defenses.schedules import Strength
from records.config_files import ConfigError
from tests.defenses.cases import (
    adding,
    backend,
    counted,
    directions,
    each_token_loss,
    gradients,
    rows,
    same_gradients,
    step_of,
    without_response,
)


def loss_at(model, batch, chosen, alpha):
    changes = {layer: adding(vector, alpha, batch) for layer, vector in chosen.vectors.items()}
    with torch.no_grad():
        return float(each_token_loss(model, batch, changes).sum())


def test_the_strength_by_formula():
    options = ClosedLoopOptions(kappa=1.5, low=0.1, high=4.0)
    assert wanted_strength(-2.0, 3.0, options) == pytest.approx(1.0)
    assert wanted_strength(2.0, 3.0, options) == 0.1  # the sample moves away from v
    assert wanted_strength(-2.0, 0.01, options) == 4.0
    assert wanted_strength(-2.0, -1.0, options) == 4.0  # no turning point
    assert wanted_strength(-2.0, math.nan, options) == 0.1
    assert wanted_strength(math.nan, 1.0, options) == 0.1


@pytest.mark.parametrize("method", ["exact", "difference"])
@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_slope_and_curvature_are_those_of_the_loss(layers, method):
    one, batch, chosen = backend(), rows(4), directions(*layers)
    slope, curvature = ClosedLoop(chosen, ClosedLoopOptions(method=method, epsilon=0.003)).measure(one, batch).tolist()
    one.model.double()  # its norms stay in fp32: a smaller step would measure rounding
    h = 5e-3
    up, middle, down = (loss_at(one.model, batch, chosen, alpha) for alpha in (h, 0.0, -h))
    assert slope == pytest.approx((up - down) / (2 * h), rel=5e-3)
    assert curvature == pytest.approx((up - 2 * middle + down) / h**2, rel=2e-2)


@pytest.mark.parametrize("layer", [0, 2])
def test_at_the_strength_it_asks_for_the_loss_no_longer_falls_along_v(layer):
    """Of a model that has learned its data, where the loss is curved upwards; at random weights it often is not."""
    one, batch = backend(), rows(8, seed=1)
    optimiser = torch.optim.Adam(one.model.parameters(), 3e-3)
    for _ in range(20):
        each_token_loss(one.model, batch).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    chosen = directions(layer, seed=0, scale=0.05)
    slope, curvature = ClosedLoop(chosen).measure(one, batch).tolist()
    if slope > 0:
        slope, chosen = -slope, Directions({layer: -chosen.at(layer)})
    assert curvature > 0
    alpha = wanted_strength(slope, curvature, ClosedLoopOptions(kappa=1.0))
    h = 0.05
    there = (loss_at(one.model, batch, chosen, alpha + h) - loss_at(one.model, batch, chosen, alpha - h)) / (2 * h)
    assert slope < -1e-3
    assert abs(there) < 0.05 * abs(slope)


def test_it_measures_whole_steps_every_few_and_averages():
    one, batches, chosen = backend(), [rows(4), rows(3, seed=5)], directions(1)
    loop = ClosedLoop(chosen, ClosedLoopOptions(every=2, decay=0.75, high=50.0))
    wanted = wanted_strength(*sum(loop.measure(one, batch) for batch in batches).tolist(), loop.options)
    loop.start(one, 10)
    strengths = []
    for number in range(4):
        for micro, batch in enumerate(batches):
            with counted(one.model) as blocks:
                told = loop.accumulate(one, batch, step_of(batch, number=number, micro=micro, micros=2))
            # natural pass, upper block, and the pass that is learned from
            assert blocks == ([1, 1, 1] if number % 2 else [2, 2, 3])
        strengths.append(float(told["strength_sum"] / told["tokens"]))
        if number == 1:
            loop.alpha = 0.0  # as if it had been there
        loop.after_step(one, step_of(batch, number=number, micro=1, micros=2))
    assert wanted > 0
    assert strengths == pytest.approx([0.0, wanted, 0.0, 0.25 * wanted], rel=1e-4)
    resumed = ClosedLoop(chosen, loop.options)
    resumed.load_state_dict(loop.state_dict())
    assert (resumed.alpha, resumed.begun) == (loop.alpha, True)


def test_it_learns_as_injection_of_its_strength_does():
    one, batch = backend(), rows(4)
    chosen = directions(1)
    loop = ClosedLoop(chosen, ClosedLoopOptions(low=0.7, high=0.7))
    told = loop.accumulate(one, batch, step_of(batch))
    found = gradients(one)
    plain = Injection(chosen, InjectionOptions(Strength(0.7))).accumulate(one, batch, step_of(batch))
    same_gradients(found, gradients(one))
    assert told.keys() == plain.keys()


def test_a_batch_without_response_tokens_asks_for_nothing():
    one, batch = backend(), without_response()
    loop = ClosedLoop(directions(1))
    told = loop.accumulate(one, batch, step_of(batch))
    loop.after_step(one, step_of(batch))
    assert loop.alpha == 0
    assert float(told["loss_sum"]) == 0
    assert loop.measure(one, batch).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("fields", [{"kappa": 0}, {"every": 0}, {"decay": 1.0}, {"low": 2, "high": 1}, {"epsilon": 0}])
def test_what_is_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields)) if "high" not in fields else "bounds"):
        ClosedLoopOptions(**fields)
