"""The smallest sufficient rank is chosen on select whatever test says; learned ranks stand by initial rank."""

from __future__ import annotations

from typing import Any

import pytest

from alignments.curves import init_sensitivity, rank_curves
from alignments.metrics import wilson
from alignments.rows import Row


def row(hits: int, rank: int | None, split: str = "test", *, seed: int = 0, method: str = "das", **facts: float) -> Row:
    low, high = wilson(hits, 200)
    values: dict[str, Any] = {
        "task": "ioi",
        "model": "tiny",
        "variable": "position",
        "site": "L14.block_output",
        "layer": 14,
        "component": "block_output",
        "positions": "last",
        "position_label": "last",
        "method": method,
        "rank": rank,
        "seed": seed,
        "split": split,
        "n": 200,
        "iia": hits / 200,
        "low": low,
        "high": high,
        "copy_base": 0.5,
        "copy_source": 0.25,
        "majority": 0.125,
        "task_accuracy": None,
        "seconds": 0.0,
    }
    return Row(**values, facts=facts)


def sweep() -> list[Row]:
    """Select: 120 at 1, 176 at 4, 178 at 8, 180 at 64. Test would choose rank 1."""
    select = {64: 180, 1: 120, 8: 178, 4: 176}
    test = {64: 150, 1: 200, 8: 160, 4: 170}
    return [
        row(hits, rank, split) for split, told in (("select", select), ("test", test)) for rank, hits in told.items()
    ]


def test_the_smallest_rank_is_chosen_on_select_and_reported_on_test() -> None:
    (curve,) = rank_curves(sweep())
    assert [point.rank for point in curve.points] == [1, 4, 8, 64]
    assert curve.best is not None and curve.best.rank == 64
    assert curve.smallest is not None and curve.smallest.rank == 4  # 0.88, exactly 0.02 below 0.90
    low, high = wilson(170, 200)
    assert curve.sentence == (
        "DAS at L14.block_output @ last: rank 4 is the smallest within 0.02 of the best on select (rank 64, 0.90); "
        f"on test it has IIA 0.85 [{low:.2f}, {high:.2f}], n=200."
    )


@pytest.mark.parametrize(("tolerance", "rank"), [(0.0, 64), (0.01, 8), (0.3, 1)])
def test_the_tolerance_is_a_share_of_iia(tolerance: float, rank: int) -> None:
    (curve,) = rank_curves(sweep(), tolerance)
    assert curve.smallest is not None and curve.smallest.rank == rank


def test_points_are_means_over_seeds() -> None:
    rows = [*sweep(), row(160, 4, "select", seed=1)]
    (curve,) = rank_curves(rows)
    point = curve.points[1]
    assert point.select is not None and point.select.iia == pytest.approx(0.84)
    assert curve.smallest is not None and curve.smallest.rank == 8


def test_methods_have_their_own_curves_and_one_rank_is_none() -> None:
    rows = [*sweep(), row(100, 8, method="pca"), row(100, None, method="full_vector"), row(90, 4, method="pca")]
    assert [curve.method for curve in rank_curves(rows)] == ["das", "pca"]
    assert rank_curves([row(100, 8), row(100, 8, "select")]) == ()


def test_a_curve_that_was_not_scored_on_select_chooses_nothing() -> None:
    (curve,) = rank_curves([one for one in sweep() if one.split == "test"])
    assert curve.smallest is None and curve.best is None
    assert curve.sentence.endswith("no rank was scored on select, so none is chosen.")
    assert curve.points[0].shown is curve.points[0].test


def test_a_rank_chosen_but_not_tested_says_so() -> None:
    (curve,) = rank_curves([one for one in sweep() if one.split == "select"])
    assert curve.sentence.endswith("(rank 64, 0.90); it was not scored on test.")


def test_a_negative_tolerance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tolerance -0\.1"):
        rank_curves(sweep(), -0.1)


def test_learned_ranks_stand_by_the_rank_they_started_from() -> None:
    rows = [
        row(150, 32, seed=0, method="boundless", hard_rank=13, initial_rank=16),
        row(160, 64, seed=1, method="boundless", hard_rank=40, initial_rank=64),
        row(160, 64, seed=0, method="boundless", hard_rank=30, initial_rank=64),
        row(100, 64, "select", method="boundless", hard_rank=99, initial_rank=64),
        row(100, 8),
    ]
    lines = init_sensitivity(rows)
    assert [(line.initial_rank, line.learned, line.mean, line.sd) for line in lines] == [
        (16, (13,), 13, None),
        (64, (30, 40), 35, pytest.approx(50**0.5)),
    ]
    assert lines[1].score.iia == pytest.approx(0.8)


def test_without_an_initial_rank_the_row_s_rank_is_it() -> None:
    (line,) = init_sensitivity([row(150, 32, hard_rank=13)])
    assert line.initial_rank == 32
    assert init_sensitivity([row(150, 32)]) == ()
