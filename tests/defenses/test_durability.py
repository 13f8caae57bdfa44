"""Curves over a counter for a model; areas and crossings by hand."""

from __future__ import annotations

import pytest

from defenses.durability import area, durability_curve, steps_to, withdrawal_curve
from defenses.errors import TrainingError
from defenses.statistics import wilson


def measure(steps):
    """The trait shows in min(10, steps / 10) of 10 answers."""
    return {"trait_rate": wilson(min(10, steps // 10), 10), "skill_accuracy": {"value": 1.0, "n": 10}}


def test_rows_come_one_at_a_time_in_order():
    asked = []

    def train_more(steps):
        asked.append(steps)
        return steps

    curve = durability_curve(train_more, measure, [0, 20, 50])
    first = next(curve)
    assert asked == [0]  # nothing is trained before the row before is out
    assert first == {"steps": 0, "metric": "trait_rate", **wilson(0, 10).row()}
    rows = [first, *curve]
    assert asked == [0, 20, 50]
    assert [(row["steps"], row["metric"]) for row in rows[:3]] == [
        *((0, "trait_rate"), (0, "skill_accuracy"), (20, "trait_rate"))
    ]


def test_area_and_crossing_by_hand():
    rows = list(durability_curve(lambda k: k, measure, [0, 50, 100, 200]))
    # trapezoids: 50 x .25 + 50 x .75 + 100 x 1 = 150 over 200
    assert area(rows, "trait_rate") == pytest.approx(0.75)
    assert area(rows, "skill_accuracy") == 1.0
    assert steps_to(rows, "trait_rate", 0.75) == pytest.approx(75)
    assert steps_to(rows, "trait_rate", 0.0) == 0
    assert steps_to(list(durability_curve(lambda k: k, measure, [0, 50])), "trait_rate", 0.9) is None
    assert area(list(durability_curve(lambda k: k, measure, [30])), "trait_rate") == 0.3


def test_withdrawal_is_against_the_step_at_which_the_defense_stops():
    rows = list(withdrawal_curve(lambda stop: 100 - stop, measure, [0, 50, 100]))
    values = [row["value"] for row in rows if row["metric"] == "trait_rate"]
    assert values == [1.0, 0.5, 0.0]
    assert area(rows, "trait_rate", axis="stop") == pytest.approx(0.5)


def test_what_is_no_curve_is_refused():
    for steps in ([], [-1, 3], [0, 5, 5], [5, 0]):
        with pytest.raises(TrainingError, match="they must rise from 0"):
            list(durability_curve(lambda k: k, measure, steps))
    rows = list(durability_curve(lambda k: k, lambda k: {"trait_rate": wilson(0, 0)}, [0, 5]))
    with pytest.raises(TrainingError, match="no answer counted at steps 0"):
        area(rows, "trait_rate")
    with pytest.raises(TrainingError, match="there are no rows of it"):
        area(rows, "kl")
