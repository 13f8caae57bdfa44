"""Schedules against their formulas, and points in time that mean nothing."""

from __future__ import annotations

import pytest

from defenses.schedules import Rate, Strength, at_step
from records.config_files import ConfigError


def test_a_rise_begins_at_its_onset_and_ends_at_its_multiple():
    rise = Strength(20.0, "rise", onset=4, end=2.0)
    assert [rise.at(step, 8) for step in range(8)] == [20, 20, 20, 20, 25, 30, 35, 40]
    assert rise.mean(8) == pytest.approx(26.25)


def test_a_decline_ends_at_nothing_and_a_late_one_begins_at_all():
    assert [Strength(4.0, "decline").at(step, 4) for step in range(4)] == [3, 2, 1, 0]
    assert [Strength(4.0, "late", onset=0.5).at(step, 4) for step in range(4)] == [0, 0, 4, 4]


def test_a_withdrawal_is_nothing_from_its_step_on():
    assert [Strength(3.0, stop=0.5).at(step, 4) for step in range(4)] == [3, 3, 0, 0]


def test_an_onset_needs_a_schedule_that_sets_in():
    with pytest.raises(ConfigError, match=r"Strength with onset 0\.5: it is constant\. Give a schedule"):
        Strength(1.0, onset=0.5)


@pytest.mark.parametrize("shape", ["constant", "decline", "late"])
def test_an_end_needs_a_rise(shape):
    with pytest.raises(ConfigError, match=rf"Strength with end 5: its schedule is {shape}, .* Use the schedule rise"):
        Strength(1.0, shape, end=5)
    assert Strength(1.0, "rise", end=5).end == 5


def test_an_onset_after_the_end_is_refused():
    with pytest.raises(ConfigError, match=r"Strength with onset 4: the training has 4 steps\."):
        Strength(1.0, "rise", onset=4).at(0, 4)


@pytest.mark.parametrize("when", [-1, 1.5, float("nan")])
def test_what_is_no_point_in_time_is_refused(when):
    with pytest.raises(ConfigError, match="neither a share nor a step"):
        at_step(when, 10)


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    rate = Rate(1.0, warmup=2)
    assert [rate.at(step, 6) for step in (0, 1, 2, 4)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    assert Rate(1.0, "linear", warmup=0).at(3, 4) == pytest.approx(0.25)
    assert Rate(1.0, "constant", warmup=0).at(3, 4) == 1.0
