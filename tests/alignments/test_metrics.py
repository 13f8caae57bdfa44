"""Intervals against published values, the verdict against cases worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from alignments.metrics import NoVerdict, iia, mean_over_seeds, method_text, non_overlapping, verdict, wilson
from alignments.rows import Row


def row(hits: int, *, n: int = 300, split: str = "test", seed: int = 0, layer: int = 14, **changes: object) -> Row:
    low, high = wilson(hits, n)
    values: dict[str, object] = {
        "task": "ioi",
        "model": "tiny",
        "variable": "position",
        "site": f"L{layer}.block_output",
        "layer": layer,
        "component": "block_output",
        "positions": "Marked('subject2')",
        "position_label": "subject2",
        "method": "das",
        "rank": 8,
        "seed": seed,
        "split": split,
        "n": n,
        "iia": hits / n,
        "low": low,
        "high": high,
        "copy_base": 0.5,
        "copy_source": 0.25,
        "majority": 0.25,
        "task_accuracy": 0.97,
        "seconds": 1.0,
        "extra": {},
    }
    return Row.from_json({key: value for key, value in (values | changes).items() if key != "extra"})


# Newcombe 1998 (Statistics in Medicine 17:857-872), table I, method 3: score without continuity correction.
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("n", [1, 7, 300])
def test_the_ends_of_wilson_are_where_the_score_test_turns(n: int, level: float) -> None:
    from statistics import NormalDist

    z = NormalDist().inv_cdf((1 + level) / 2)
    for hits in range(n + 1):
        for end in wilson(hits, n, level):
            if 0 < end < 1:  # |p_hat - p| = z * sqrt(p (1 - p) / n) defines the interval
                assert abs(hits / n - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-9)


def test_wilson_is_symmetric_holds_its_score_and_narrows() -> None:
    for hits in range(31):
        low, high = wilson(hits, 30)
        assert 0 <= low <= hits / 30 <= high <= 1
        assert wilson(30 - hits, 30) == pytest.approx((1 - high, 1 - low))
    assert wilson(30, 30)[0] < 0.9 < wilson(3000, 3000)[0]


@pytest.mark.parametrize(("hits", "n", "level"), [(1, 0, 0.95), (4, 3, 0.95), (-1, 3, 0.95), (1, 3, 95), (1, 3, 1.0)])
def test_wilson_refuses_rates_and_percentages(hits: int, n: int, level: float) -> None:
    with pytest.raises(ValueError, match="Pass counts, not rates"):
        wilson(hits, n, level)


def test_iia_counts_pairs_and_of_several_tokens_all_must_agree() -> None:
    assert iia(["a", "b", "b", "a"], ["a", "b", "a", "a"]) == 0.75
    assert iia(np.array([[1, 2], [1, 3]]), np.array([[1, 2], [1, 2]])) == 0.5


def test_iia_refuses_what_would_score_a_silent_number() -> None:
    with pytest.raises(ValueError, match=r"\(2, 1\) predictions against \(2,\) labels"):
        iia(np.zeros((2, 1)), np.zeros(2))  # would broadcast to (2, 2)
    with pytest.raises(ValueError, match="Compare token ids with ids"):
        iia([1, 2], ["1", "2"])
    with pytest.raises(ValueError, match="at least one"):
        iia([], [])


def test_intervals_that_touch_overlap() -> None:
    assert not non_overlapping((0.2, 0.5), (0.5, 0.7))
    assert non_overlapping((0.2, 0.5), (0.51, 0.7))
    assert non_overlapping((0.8, 0.9), (0.1, 0.2))
    assert not non_overlapping((0.1, 0.9), (0.4, 0.5))


def test_seeds_do_not_add_to_n() -> None:
    (mean,) = mean_over_seeds([row(240, seed=1), row(270, seed=0), row(255, seed=2)])
    assert (mean.iia, mean.n, mean.seeds) == (pytest.approx(0.85), 300, (0, 1, 2))
    assert mean.values == (0.9, 0.8, 0.85)
    assert mean.interval == wilson(255, 300)
    assert mean.seconds == 3.0


def test_seeds_of_unequal_n_get_the_wider_interval() -> None:
    (mean,) = mean_over_seeds([row(150), row(50, n=100, seed=1)])
    assert mean.n == 100
    assert mean.interval == wilson(50, 100)


def test_the_best_cell_is_chosen_on_select_and_reported_on_test() -> None:
    rows = [
        *(row(240, split="select", layer=14, seed=seed) for seed in (0, 1)),
        *(row(243, split="test", layer=14, seed=seed) for seed in (0, 1)),
        *(row(210, split="select", layer=20, seed=seed) for seed in (0, 1)),
        *(row(290, split="test", layer=20, seed=seed) for seed in (0, 1)),  # best on test: must not be taken
    ]
    found = verdict(rows)
    assert found.reported.cell.site == "L14.block_output"
    assert (found.chosen.iia, found.reported.iia, found.candidates) == (0.8, pytest.approx(0.81), 2)
    assert found.above
    assert found.sentence == (
        "DAS rank 8 at L14.block_output @ subject2: IIA 0.81 [0.76, 0.85], n=300, "
        "mean of 2 seeds (0.81 to 0.81), best trivial baseline copy-base 0.50 [0.44, 0.56]: above it."
    )


def test_a_score_whose_interval_reaches_the_baseline_s_is_not_above_it() -> None:
    # 0.60 of 300: [0.544, 0.654] meets [0.444, 0.556] of the baseline, although 0.60 > 0.556.
    found = verdict([row(180, split="select"), row(180)])
    assert not found.above
    assert found.sentence.endswith("best trivial baseline copy-base 0.50 [0.44, 0.56]: NOT above it.")
    assert "seeds" not in found.sentence


def test_a_score_below_the_baseline_is_not_above_it_although_the_intervals_are_apart() -> None:
    assert not verdict([row(30, split="select"), row(30)]).above


def test_a_variable_solved_by_copying_the_source_is_called_trivial() -> None:
    found = verdict([row(300, split="select", copy_source=1.0), row(300, copy_source=1.0)])
    assert found.trivial == ("copy-source",)
    assert not found.above
    assert "position is trivially solved by copying the source (1.00)" in found.sentence


def test_a_task_s_own_baseline_competes() -> None:
    rows = [replace(one, extra={"flip": 0.8}) for one in (row(243, split="select"), row(243))]
    assert verdict(rows).baseline.name == "flip"
    assert not verdict(rows).above


def test_of_equals_the_smaller_subspace_wins_and_a_control_never_does() -> None:
    rows = []
    for split in ("select", "test"):
        rows.append(row(300, split=split, method="control:random_subspace"))
        rows.append(row(270, split=split, method="full_vector", rank=None))
        rows.append(row(270, split=split, rank=16))
        rows.append(row(270, split=split, rank=4))
    assert verdict(rows).reported.method_text == "DAS rank 4"
    assert verdict(rows).candidates == 3
    assert method_text("control:random_subspace", 8) == "control random subspace rank 8"


def test_rows_that_allow_no_verdict_say_why() -> None:
    with pytest.raises(NoVerdict, match="none of 1 rows is on the select split"):
        verdict([row(200)])
    with pytest.raises(NoVerdict, match="lack seed 1"):
        verdict([row(200, split="select"), row(200, split="select", seed=1), row(200)])
    with pytest.raises(NoVerdict, match=r"rows of 2 searches .*output.*position"):
        verdict([row(200, split="select"), row(200, split="select", variable="output")])


def test_the_verdict_has_one_line() -> None:
    rows = [row(hits, split=split, seed=seed) for split in ("select", "test") for seed, hits in ((0, 270), (1, 276))]
    low, high = wilson(273, 300)
    assert (
        verdict(rows).line
        == f"IIA .91 [.{low * 100:.0f},.{high * 100:.0f}], best trivial .50, rank 8, sd .01 over 2 seeds"
    )
    rows += [row(156, seed=seed, method="control:random_model") for seed in (0, 1)]
    assert ", best trivial .50, random-init .52, rank 8, " in verdict(rows).line


def test_a_perfect_score_of_one_seed_at_whole_width_has_a_line() -> None:
    rows = [row(300, split=split, method="full_vector", rank=None) for split in ("select", "test")]
    assert verdict(rows).line == "IIA 1.00 [.99,1.00], best trivial .50, whole width"


def test_the_line_tells_only_the_control_of_its_own_cell() -> None:
    rows = [row(270, split="select"), row(270), row(200, method="control:random_model", rank=4)]
    assert "random-init" not in verdict(rows).line
    assert [one.cell.rank for one in verdict(rows).controls] == [4]


def test_facts_are_means_over_seeds_and_tell_the_rank_and_the_width() -> None:
    first, second = {"hard_rank": 13, "width": 576, "own": 1}, {"hard_rank": 14, "width": 576}
    told = [replace(row(270), facts=first), replace(row(270, seed=1), facts=second)]
    (mean,) = mean_over_seeds(told)
    assert mean.facts == (("hard_rank", 13.5), ("width", 576.0))
    assert (mean.rank_text, mean.fact("own"), mean.spread) == ("rank 13.5/576", None, 0.0)
    (mask,) = mean_over_seeds([replace(row(270, method="mask_sae", rank=None), facts={"mask_size": 13, "width": 576})])
    assert mask.rank_text == "13 features"  # of a dictionary, which is not the site's width


def test_each_control_stands_once_at_the_reported_place_if_it_was_run_there() -> None:
    rows = [row(270, split="select"), row(270)]
    rows += [row(280, method="control:random_subspace", layer=3), row(150, method="control:random_subspace")]
    rows += [row(160, method="control:random_subspace", rank=4), row(90, method="control:complement", layer=3)]
    rows += [row(290, method="control:complement", layer=3, split="select")]
    found = {one.cell.method: (one.layer, one.cell.rank, one.iia) for one in verdict(rows).controls}
    assert found == {"control:random_subspace": (14, 8, 0.5), "control:complement": (3, 8, 0.3)}
    assert verdict(rows).to_json()["controls"]["control:random_subspace"] == [0.5, *wilson(150, 300)]


def test_methods_read_as_words() -> None:
    named = {
        "das": "DAS",
        "boundless_faithful": "Boundless DAS faithful",
        "mask_pca": "mask PCA",
        "control:rival:token": "control rival token",
    }
    assert {name: method_text(name, None) for name in named} == named


def test_the_verdict_is_json_with_n_interval_and_split() -> None:
    kept = verdict([row(240, split="select"), row(243)]).to_json()
    assert (kept["n"], kept["split"], kept["selected_on"]) == (300, "test", "select")
    assert (kept["low"], kept["high"]) == wilson(243, 300)
    assert kept["baselines"]["copy-base"] == [0.5, *wilson(150, 300)]


def test_what_is_no_interchange_cannot_win_the_verdict() -> None:
    from alignments.methods import METHODS
    from alignments.rows import NO_INTERCHANGE
    from tests.alignments.reported import row as made

    rows = [
        made(0, "last", method, 0, split, hits)
        for method, hits in (("das", 120), ("loreft", 190))
        for split in ("select", "test")
    ]
    assert verdict(rows).reported.cell.method == "das" and verdict(rows).candidates == 1
    with pytest.raises(NoVerdict, match=r"LoReFT is no interchange"):
        verdict(rows[2:])
    assert {name for name, method in METHODS.items() if not method.interchange} == NO_INTERCHANGE == {"loreft"}
