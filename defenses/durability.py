"""How long a defense lasts: the trait after further attack steps, and against the step at which the defense stops.

    rows = list(durability_curve(attack_further, measure, [0, 50, 100, 200]))
    area(rows, "trait_rate"), steps_to(rows, "trait_rate", 0.5)

Functions over callables: how a model is trained and measured is the caller's. Rows come one at a time, so that the
finished ones can be written before the next training begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from defenses.errors import TrainingError
from defenses.statistics import Estimate

Model = TypeVar("Model")
Measured = Mapping[str, Estimate | Mapping[str, Any]]  # metric -> Estimate, or its row, as `evaluate` returns


def durability_curve(
    train_more: Callable[[int], Model], measure: Callable[[Model], Measured], steps: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yield one row per number of further attack steps and metric: {"steps", "metric", value, low, high, n, excluded}.

    Args:
        train_more: k -> the defended model after k attack steps in all. Called with k rising, so it may go on from
            where it was; k = 0 is the defended model itself. measure: model -> metrics.

    Raises:
        TrainingError: no steps, or some that are negative, repeated or not rising.
    """
    yield from _curve(train_more, measure, steps, "steps", "Durability curve")


def withdrawal_curve(
    train: Callable[[int], Model], measure: Callable[[Model], Measured], stops: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yield one row per step at which the defense stops and metric: {"stop", "metric", value, low, high, n, excluded}.

    Args:
        train: t -> the model after the whole training, of which the first t steps were defended. measure: as above.

    Raises:
        TrainingError: as `durability_curve`.
    """
    yield from _curve(train, measure, stops, "stop", "Withdrawal curve")


def _curve(
    make: Callable[[int], Model], measure: Callable[[Model], Measured], places: Sequence[int], name: str, asked: str
) -> Iterator[dict[str, Any]]:
    if not places or places[0] < 0 or any(a >= b for a, b in pairwise(places)):
        raise TrainingError(f"{asked} at {name} {list(places)}: they must rise from 0 or above. Give e.g. 0, 50, 100.")
    for place in places:
        for metric, found in measure(make(place)).items():
            row = found.row() if isinstance(found, Estimate) else dict(found)
            yield {name: place, "metric": metric, **row}


def area(rows: Iterable[Mapping[str, Any]], metric: str, *, axis: str = "steps") -> float:
    """Return the mean of `metric` over the steps measured: the trapezoid area divided by the range of steps.

    Of one point, its value.

    Raises:
        TrainingError: no such rows, or a point without a value (no answer counted there).
    """
    points = _points(rows, metric, axis)
    if len(points) == 1:
        return points[0][1]
    total = sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in pairwise(points))
    return total / (points[-1][0] - points[0][0])


def steps_to(rows: Iterable[Mapping[str, Any]], metric: str, level: float, *, axis: str = "steps") -> float | None:
    """Return the steps at which `metric` first reaches `level`, between two points by a straight line; None if never.

    Raises:
        TrainingError: as `area`.
    """
    points = _points(rows, metric, axis)
    if points[0][1] >= level:
        return points[0][0]
    for (x1, y1), (x2, y2) in pairwise(points):
        if y2 >= level:
            return x1 + (x2 - x1) * (level - y1) / (y2 - y1)
    return None


def _points(rows: Iterable[Mapping[str, Any]], metric: str, axis: str) -> list[tuple[float, float]]:
    """(step, value), by rising step."""
    found = sorted(((row[axis], row["value"]) for row in rows if row["metric"] == metric), key=lambda one: one[0])
    if not found:
        raise TrainingError(f"Curve of {metric!r}: there are no rows of it. Measure it, or name another metric.")
    if empty := [step for step, value in found if value is None]:
        raise TrainingError(f"Curve of {metric!r}: no answer counted at {axis} {empty[0]}. Leave that point out.")
    return [(float(step), float(value)) for step, value in found]
