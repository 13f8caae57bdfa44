"""Tests and intervals against scipy, published worked examples and counts done by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from alignments.metrics import mean_over_seeds, wilson
from alignments.rows import Row
from alignments.statistics import (
    adjusted,
    binomial_tail,
    bootstrap,
    fdr,
    fisher_less,
    mcnemar,
    mean_and_sd,
    normalised_iia,
    p_text,
)


def row(hits: int, layer: int = 0, *, n: int = 200, seed: int = 0, split: str = "test", copy_base: float = 0.5) -> Row:
    low, high = wilson(hits, n)
    return Row(
        task="ioi",
        model="tiny",
        variable="position",
        site=f"L{layer}.block_output",
        layer=layer,
        component="block_output",
        positions="last",
        position_label="last",
        method="das",
        rank=8,
        seed=seed,
        split=split,
        n=n,
        iia=hits / n,
        low=low,
        high=high,
        copy_base=copy_base,
        copy_source=0.25,
        majority=0.125,
        task_accuracy=None,
        seconds=0.0,
    )


@pytest.mark.parametrize(("n", "p"), [(1, 0.5), (20, 0.25), (300, 0.5), (3200, 0.65)])
def test_the_binomial_tail_is_scipys(n: int, p: float) -> None:
    for hits in {0, 1, n // 3, n // 2, 2 * n // 3, n}:
        expected = stats.binomtest(hits, n, p, alternative="greater").pvalue
        assert binomial_tail(hits, n, p) == pytest.approx(expected, rel=1e-8, abs=1e-300)


def test_the_binomial_tail_at_certain_rates() -> None:
    assert binomial_tail(5, 5, 1.0) == 1.0
    assert binomial_tail(1, 5, 0.0) == 0.0
    assert binomial_tail(0, 5, 0.0) == 1.0
    assert binomial_tail(3, 3, 0.5) == pytest.approx(1 / 8)
    with pytest.raises(ValueError, match="Binomial tail of 6 of 5"):
        binomial_tail(6, 5, 0.5)


@pytest.mark.parametrize(
    "table", [(1, 10, 9, 10), (0, 8, 30, 40), (12, 12, 3, 9), (5, 20, 50, 200), (40, 300, 90, 500)]
)
def test_fishers_exact_test_is_scipys(table: tuple[int, int, int, int]) -> None:
    hits, n, other, m = table
    expected = stats.fisher_exact([[hits, n - hits], [other, m - other]], alternative="less").pvalue
    assert fisher_less(*table) == pytest.approx(expected, rel=1e-8)


def test_fishers_tea_tasting() -> None:
    # Fisher 1935: 4 cups of 8; all four right has probability 1/70, so at most three right has 69/70.
    assert fisher_less(3, 4, 1, 4) == pytest.approx(69 / 70)
    with pytest.raises(ValueError, match="hits lie in"):
        fisher_less(5, 4, 1, 4)


def test_adjusted_p_values_by_hand() -> None:
    # Sorted: .01*4/1, .02*4/2, .03*4/3, .5*4/4 -> .04 .04 .04 .5, each the least of those to its right.
    assert adjusted([0.5, 0.01, 0.03, 0.02]) == pytest.approx((0.5, 0.04, 0.04, 0.04))
    assert adjusted([]) == ()
    assert adjusted([0.3]) == (0.3,)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        adjusted([1.2])


def test_adjusted_p_values_are_scipys() -> None:
    values = np.random.default_rng(0).uniform(size=91) ** 3
    assert adjusted(values.tolist()) == pytest.approx(stats.false_discovery_control(values))


def test_discoveries_of_benjamini_and_hochbergs_own_example() -> None:
    # Benjamini & Hochberg 1995, section 4.1: of 15 comparisons 4 are rejected at q = 0.05, where Bonferroni rejects 3.
    values = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528]
    values += [0.7590, 1.0000]
    assert sum(p <= 0.05 for p in adjusted(values)) == 4


def test_fdr_tests_each_cell_against_its_best_trivial_baseline() -> None:
    tested = fdr([row(118, 0), row(150, 1), row(100, 2)])
    expected = [stats.binomtest(hits, 200, 0.5, alternative="greater").pvalue for hits in (118, 150, 100)]
    assert [one.p for one in tested] == pytest.approx(expected)
    assert [one.adjusted for one in tested] == pytest.approx(stats.false_discovery_control(expected))
    assert [one.significant for one in tested] == [True, True, False]
    assert tested[0].baseline.name == "copy-base" and "binomial" in str(tested[0])


def test_many_cells_take_a_lone_lucky_one_its_star() -> None:
    lucky = row(113, 0)  # p = 0.038 alone
    assert fdr([lucky])[0].significant
    assert not fdr([lucky, *(row(100, layer) for layer in range(1, 20))])[0].significant


def test_seeds_do_not_add_pairs_to_a_test() -> None:
    seeds = [row(120, seed=seed) for seed in range(3)]
    (tested,) = fdr(seeds)
    assert tested.p == pytest.approx(binomial_tail(120, 200, 0.5))
    assert fdr(mean_over_seeds(seeds)) == (tested,)


def test_a_certain_baseline_leaves_nothing_to_discover() -> None:
    assert fdr([row(200, copy_base=1.0)])[0].p == 1.0


def test_known_outcomes_are_tested_pairwise() -> None:
    one = row(120)
    cell = np.arange(200) < 120
    baseline = np.arange(200) < 100  # never right where the cell is not
    (tested,) = fdr([one], paired={one.cell: (cell, baseline)})
    assert (tested.test, tested.p) == ("McNemar", pytest.approx(0.5**20))


def test_fdr_refuses_two_splits_and_percentages() -> None:
    with pytest.raises(ValueError, match="rows of one split only"):
        fdr([row(100), replace(row(100), split="select")])
    with pytest.raises(ValueError, match=r"such as 0\.05"):
        fdr([row(100)], level=5)


def outcomes(both: int, first: int, second: int, none: int) -> tuple[list[bool], list[bool]]:
    pairs = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second + [(False, False)] * none
    return [one for one, _ in pairs], [two for _, two in pairs]


def test_mcnemar_of_the_published_airway_data() -> None:
    # Fagerland et al. 2013, table 2 (Bentur et al. 2009): 7 against 1 discordant of 21: exact .070, mid-p .039.
    first, second = outcomes(1, 7, 1, 12)
    found = mcnemar(first, second)
    assert (found.n, found.only_first, found.only_second) == (21, 7, 1)
    assert found.p == pytest.approx(0.0391, abs=5e-5)
    assert mcnemar(first, second, mid_p=False).p == pytest.approx(0.0703, abs=5e-5)
    assert mcnemar(second, first).p == found.p


@pytest.mark.parametrize(("first", "second"), [(3, 3), (0, 0), (1, 0), (12, 5), (0, 9)])
def test_exact_mcnemar_is_the_binomial_test(first: int, second: int) -> None:
    given = outcomes(5, first, second, 5)
    if first + second:
        expected = stats.binomtest(first, first + second, 0.5).pvalue
        greater = stats.binomtest(first, first + second, 0.5, alternative="greater").pvalue
    else:
        expected = greater = 1.0
    assert mcnemar(*given, mid_p=False).p == pytest.approx(expected)
    assert mcnemar(*given, mid_p=False, alternative="greater").p == pytest.approx(greater)
    assert mcnemar(*given).p <= expected + 1e-12


def test_mcnemar_refuses_unpaired_outcomes() -> None:
    with pytest.raises(ValueError, match="of the same pairs"):
        mcnemar([True], [True, False])
    with pytest.raises(ValueError, match="alternative 'less'"):
        mcnemar([True], [True], alternative="less")


def test_the_plain_bootstrap_is_near_wilson() -> None:
    hits = np.arange(400) < 300
    low, high = bootstrap(hits, range(400), seed=1, n=4000)
    assert (low, high) == pytest.approx(wilson(300, 400), abs=0.01)
    assert bootstrap(hits, range(400), seed=1, n=4000) == (low, high)


def test_pairs_that_share_a_base_widen_the_interval_by_the_root_of_their_number() -> None:
    base = np.arange(100) < 70
    hits, clusters = np.repeat(base, 4), np.repeat(np.arange(100), 4).tolist()  # each base four times, all alike
    low, high = bootstrap(hits, clusters, seed=0, n=4000)
    naive = bootstrap(hits, range(400), seed=0, n=4000)
    assert (high - low) / (naive[1] - naive[0]) == pytest.approx(2, rel=0.1)
    assert (low, high) == pytest.approx(bootstrap(base, range(100), seed=0, n=4000))


def test_clusters_of_unequal_size_weigh_by_their_pairs() -> None:
    # Two clusters: 3 right of 3, 0 right of 1. Replicates are 1, 3/4 (twice as often) or 0.
    assert bootstrap([1, 1, 1, 0], ["a", "a", "a", "b"], n=500) == (0.0, 1.0)
    assert bootstrap([1, 1, 1, 0], ["a", "a", "a", "b"], n=500, level=0.2) == (0.75, 0.75)
    with pytest.raises(ValueError, match="one cluster per hit"):
        bootstrap([1, 0], ["a"])


def test_normalised_iia_runs_from_the_baseline_to_the_ceiling() -> None:
    assert normalised_iia(0.65, 0.65, 0.95) == 0.0
    assert normalised_iia(0.95, 0.65, 0.95) == pytest.approx(1.0)
    assert normalised_iia(0.5, 0.65, 0.95) == pytest.approx(-0.5)
    with pytest.raises(ValueError, match=r"ceiling 0\.500 is not above"):
        normalised_iia(0.9, 0.65, 0.5)


def test_mean_and_sd_over_seeds() -> None:
    assert mean_and_sd([0.8, 0.9, 1.0]) == pytest.approx((0.9, 0.1))
    assert mean_and_sd([0.8]) == (0.8, None)
    with pytest.raises(ValueError, match="there are none"):
        mean_and_sd([])


def test_small_p_values_are_not_printed_as_zero() -> None:
    assert (p_text(0.0004), p_text(0.0129)) == ("< 0.001", "0.013")
