"""Against scipy, scikit-learn and statsmodels where they know the answer, else against the definition."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from defenses.statistics import (
    at_threshold,
    auroc,
    bootstrap_ratio,
    minimum_detectable_effect,
    paired_bootstrap,
    pareto_front,
    sign_test,
    t_interval,
    t_quantile,
    wilson,
)

stats = pytest.importorskip("scipy.stats")
metrics = pytest.importorskip("sklearn.metrics")


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (17, 200)])
def test_wilson_is_scipys(hits, n):
    found = wilson(hits, n, level=0.9)
    wanted = stats.binomtest(hits, n).proportion_ci(0.9, method="wilson")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert found.value == hits / n


def test_of_no_trials_nothing_is_known():
    found = wilson(0, 0, excluded=4)
    assert found.row() == {"value": None, "low": 0.0, "high": 1.0, "n": 0, "excluded": 4}
    assert str(found) == "none [0.000, 1.000] (n 0, 4 excluded)"


def test_wilson_refuses_rates():
    with pytest.raises(ValueError, match=r"hits must lie in 0\.\.n\. Pass counts"):
        wilson(12, 10)
    with pytest.raises(ValueError, match="level 95"):
        wilson(1, 10, level=95)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 101])
@pytest.mark.parametrize("p", [0.01, 0.5, 0.8, 0.975, 0.9995])
def test_t_quantile_is_scipys(p, degrees):
    assert t_quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), abs=1e-8, rel=1e-9)


def test_t_interval_is_scipys_and_unbounded_for_one_seed():
    values = [0.1, 0.4, 0.35, 0.2, 0.22]
    found = t_interval(values)
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert (t_interval([0.3]).low, t_interval([0.3]).high) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="all finite"):
        t_interval([0.1, math.nan])


def test_the_bootstrap_of_two_seeds_is_the_law_of_its_four_resamples():
    # the resampled mean of differences 0 and 1 is 0, 0.5, 0.5 or 1, so the quartiles are 0..1 at the ends
    found = paired_bootstrap({0: 1.0, 1: 3.0}, {1: 2.0, 0: 1.0}, level=0.6, n_boot=4000)
    assert (found.value, found.low, found.high, found.n) == (0.5, 0.0, 1.0, 2)
    assert not found.clear


def test_the_bootstrap_interval_is_that_of_all_resamples():
    a, b = [0.9, 0.7, 0.8, 0.95], [0.2, 0.3, 0.1, 0.5]
    differences = np.array(a) - np.array(b)
    every = [np.mean(differences[list(rows)]) for rows in product(range(4), repeat=4)]
    found = paired_bootstrap(dict(enumerate(a)), dict(enumerate(b)), n_boot=20_000)
    wanted = np.quantile(every, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(wanted, abs=0.02)
    assert found.clear
    assert found == paired_bootstrap(dict(enumerate(a)), dict(enumerate(b)), n_boot=20_000)  # seeded


def test_pairing_by_seed_refuses_what_is_not_shared():
    with pytest.raises(ValueError, match="seeds 2, 3 belong to only one"):
        paired_bootstrap({1: 0.0, 2: 0.0}, {1: 0.0, 3: 0.0})
    with pytest.raises(ValueError, match="there are no seeds"):
        paired_bootstrap({}, {})


def test_a_ratio_weighs_units_by_their_tokens():
    found = bootstrap_ratio([2.0, 9.0], [1.0, 9.0])
    assert found.value == 1.1
    assert 1.0 <= found.low < found.high <= 2.0
    with pytest.raises(ValueError, match="one positive weight per sum"):
        bootstrap_ratio([1.0], [0.0])


@pytest.mark.parametrize("differences", [[1, 1, 1, 1, 1], [1, -1, 2], [0, 0], [3, -1, -2, -5, -1, -9, 0]])
def test_sign_test_is_the_binomial_test(differences):
    positive, n = sum(d > 0 for d in differences), sum(d != 0 for d in differences)
    wanted = stats.binomtest(positive, n).pvalue if n else 1.0
    assert sign_test(differences) == pytest.approx(wanted)


@pytest.mark.parametrize("n", [5, 10, 40])
def test_the_detectable_effect_has_its_power(n):
    effect = minimum_detectable_effect(0.2, n)
    shift = effect / 0.2 * math.sqrt(n)
    critical = stats.t.ppf(0.975, n - 1)
    power = stats.nct.sf(critical, n - 1, shift)
    assert power == pytest.approx(0.8, abs=0.05)
    with pytest.raises(ValueError, match="n >= 2"):
        minimum_detectable_effect(0.2, 1)


def test_auroc_is_sklearns_with_ties_and_infinities():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = rng.random(40) < 0.3
        truth[:2] = [True, False]
        scores = rng.integers(0, 6, 40).astype(float)
        assert auroc(scores, truth).value == pytest.approx(metrics.roc_auc_score(truth, scores))
    assert auroc([-math.inf, 0, 1, math.inf], [False, False, True, True]).value == 1.0


def test_auroc_interval_covers_and_never_closes():
    rng = np.random.default_rng(1)
    true_area = stats.norm.cdf(1.2 / math.sqrt(2))
    truth = np.arange(60) < 20
    inside = 0
    for _ in range(300):
        found = auroc(rng.normal(size=60) + 1.2 * truth, truth)
        inside += found.low <= true_area <= found.high
    assert 0.91 <= inside / 300 <= 0.99
    perfect = auroc([0, 0, 1, 1, 1], [False, False, True, True, True])
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert perfect.low < 0.7
    nothing = auroc([0.1, 0.2], [True, True])
    assert (nothing.value, nothing.low, nothing.high) == (None, 0.0, 1.0)


def test_detectors_refuse_nan_and_unknown_labels():
    with pytest.raises(ValueError, match="no score of NaN"):
        auroc([0.1, math.nan], [True, False])
    with pytest.raises(ValueError, match="True or False"):
        auroc([0.1, 0.2], [1, -1])
    with pytest.raises(ValueError, match="Calibrate it first"):
        at_threshold([0.1], [True], math.nan)


def test_decisions_are_strictly_above_and_agree_with_sklearn():
    scores, truth = [0.1, 0.5, 0.5, 0.9, 0.8], [False, True, False, True, False]
    found = at_threshold(scores, truth, 0.5)
    flagged = [score > 0.5 for score in scores]
    assert found.precision.value == metrics.precision_score(truth, flagged)
    assert found.recall.value == metrics.recall_score(truth, flagged)
    assert found.false_positive_rate.value == pytest.approx(1 / 3)
    assert at_threshold(scores, truth, 2.0).precision.value is None


def test_pareto_front_keeps_what_nothing_beats():
    points = [(0.1, 0.5), (0.2, 0.9), (0.2, 0.8), (0.05, 0.5), (0.2, 0.9)]  # (trait, skill)
    assert pareto_front(points, ("low", "high")) == (1, 3, 4)
    assert pareto_front(points, ("high", "low")) == (0, 2)
    assert pareto_front([], ("low", "high")) == ()
    with pytest.raises(ValueError, match="one number per axis"):
        pareto_front([(1.0,)], ("low", "high"))
    with pytest.raises(ValueError, match="'low' or 'high'"):
        pareto_front([(1.0,)], ("up",))
