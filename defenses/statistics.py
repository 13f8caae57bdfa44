"""Intervals, differences over seeds, detector quality and Pareto fronts. Needs no model, and no scipy.

    wilson(7, 40)                                    # a rate: Estimate(value=0.175, low=0.087, high=0.320, n=40)
    paired_bootstrap(sft_by_seed, rising_by_seed)    # a difference of two methods, the seed as unit
    auroc(scores, poisoned)                          # HIGHER score = more suspicious

Everything is exact or seeded. A seed is one observation: its many test prompts make its rate precise, they do not make
more seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, stdev
from typing import Literal

import numpy as np

Scores = Sequence[float] | np.ndarray
Truth = Sequence[bool] | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A number with its interval: `n` units counted, `excluded` ones left out. `value` is None if nothing counted."""

    value: float | None
    low: float
    high: float
    n: int
    excluded: int = 0

    def row(self) -> dict[str, float | int | None]:
        """Return the five numbers by name, as a record stores them."""
        return asdict(self)

    def __str__(self) -> str:
        left_out = f", {self.excluded} excluded" if self.excluded else ""
        value = "none" if self.value is None else f"{self.value:.3f}"
        return f"{value} [{self.low:.3f}, {self.high:.3f}] (n {self.n}{left_out})"


def wilson(hits: float, n: int, *, level: float = 0.95, excluded: int = 0) -> Estimate:
    """Return the rate of `hits` in `n` trials with the Wilson score interval.

    With p = hits/n and z the normal quantile of (1 + level)/2 its ends solve |p - q| = z sqrt(q (1 - q) / n) for q, so
    it stays in 0..1 and is not empty at p = 0 or 1. Of no trials nothing is known: value None, interval 0 to 1.

    Raises:
        ValueError: hits outside 0..n, n < 0, or a level that is no share.
    Source: Wilson 1927, JASA 22:209-212; no continuity correction.
    """
    if n < 0 or not 0 <= hits <= n:
        raise ValueError(
            f"Wilson interval of {hits} hits in {n} trials: hits must lie in 0..n. Pass counts, not rates."
        )
    z = _z(level)
    if n == 0:
        return Estimate(None, 0.0, 1.0, 0, excluded)
    p, weight = hits / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + weight / (4 * n))
    low, high = ((p + weight / 2 + sign * half) / (1 + weight) for sign in (-1, 1))
    return Estimate(p, max(0.0, min(low, p)), min(1.0, max(high, p)), n, excluded)


def t_interval(values: Sequence[float], *, level: float = 0.95) -> Estimate:
    """Return the mean over seeds with Student's interval, mean -+ t sd / sqrt(n); of one seed it is unbounded.

    Raises:
        ValueError: no values, one that is not finite, or a level that is no share.
    """
    _z(level)
    if not len(values) or not all(math.isfinite(one) for one in values):
        raise ValueError(f"Mean over seeds of {list(values)}: needs at least one value, all finite.")
    n, mean = len(values), fmean(values)
    if n == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    half = t_quantile((1 + level) / 2, n - 1) * stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def bootstrap_ratio(
    sums: Scores, weights: Scores | None = None, *, level: float = 0.95, n_boot: int = 2000, seed: int = 0
) -> Estimate:
    """Return sum(sums) / sum(weights) with the percentile interval over resampled units; weights 1 give the mean.

    For a mean per token over texts, `sums` (N,) are per text and `weights` (N,) its numbers of tokens: texts are drawn,
    not tokens, because those of one text depend on each other.

    Raises:
        ValueError: no units, unequal lengths, weights not above 0, or fewer than 1 replicates.
    """
    _z(level)
    total = np.asarray(sums, dtype=float)
    weight = np.ones_like(total) if weights is None else np.asarray(weights, dtype=float)
    if total.ndim != 1 or not len(total) or total.shape != weight.shape or not (weight > 0).all() or n_boot < 1:
        found = f"{total.shape} sums, {weight.shape} weights, {n_boot} replicates"
        raise ValueError(f"Bootstrap of {found}: give one positive weight per sum, and n_boot >= 1.")
    rng = np.random.default_rng(seed)
    drawn = np.array([_ratio(total, weight, rng.integers(len(total), size=len(total))) for _ in range(n_boot)])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(total.sum() / weight.sum()), float(low), float(high), len(total))


def _ratio(sums: np.ndarray, weights: np.ndarray, rows: np.ndarray) -> float:
    return float(sums[rows].sum() / weights[rows].sum())


@dataclass(frozen=True)
class Difference:
    """Mean of `first - second` over `n` shared seeds, percentile interval, and the exact two-sided sign test's `p`."""

    value: float
    low: float
    high: float
    n: int
    p: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    first: Mapping[Hashable, float],
    second: Mapping[Hashable, float],
    *,
    level: float = 0.95,
    n_boot: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Return the difference of two methods by resampling seeds, both methods' results of a seed staying together.

    With S seeds there are only C(2S - 1, S) different resamples (126 of 5), and the percentile interval is too narrow
    by about sqrt((S - 1)/S) z/t: below 10 seeds show `t_interval` of the differences beside it.

    Args:
        first: seed -> result. second: the same seeds.

    Raises:
        ValueError: seeds that only one method has, or none, or results that are not finite.
    Source: Efron 1979; Davison & Hinkley 1997, section 5.3.1 (percentile limits).
    """
    differences = paired_differences(first, second)
    spread = bootstrap_ratio(differences, level=level, n_boot=n_boot, seed=seed)
    return Difference(fmean(differences), spread.low, spread.high, len(differences), sign_test(differences))


def paired_differences(first: Mapping[Hashable, float], second: Mapping[Hashable, float]) -> list[float]:
    """Return first - second per seed, in the order of `first`.

    Raises:
        ValueError: seeds that only one method has, or none, or results that are not finite.
    """
    alone = sorted(map(str, set(first) ^ set(second)))
    if alone or not first:
        found = f"seeds {', '.join(alone)} belong to only one of the two" if alone else "there are no seeds"
        raise ValueError(f"Paired difference of two methods: {found}. Finish the same seeds of both.")
    differences = [first[name] - second[name] for name in first]
    if not all(math.isfinite(one) for one in differences):
        raise ValueError(f"Paired difference of two methods: found {differences}. All results must be finite.")
    return differences


def sign_test(differences: Sequence[float]) -> float:
    """Return the exact two-sided sign test's p that positive and negative differences are equally likely; ties dropped.

    Its least value is 2 / 2^n: with 5 seeds 0.0625, so 5 seeds that all agree cannot be "significant at 0.05".
    """
    positive = sum(one > 0 for one in differences)
    n = positive + sum(one < 0 for one in differences)
    if n == 0:
        return 1.0
    tail: float = sum(math.comb(n, k) for k in range(max(positive, n - positive), n + 1)) / 2**n
    return min(1.0, 2 * tail)


def minimum_detectable_effect(sd: float, n: int, *, level: float = 0.95, power: float = 0.8) -> float:
    """Return the paired difference that `n` seeds would find with probability `power`.

    (t_{(1+level)/2, n-1} + t_{power, n-1}) sd / sqrt(n), `sd` that of the differences over seeds. A null result means
    nothing about effects smaller than this.

    Raises:
        ValueError: fewer than 2 seeds, a negative sd, or a level or power that is no share.
    """
    if n < 2 or sd < 0 or not 0 < power < 1:
        raise ValueError(f"Minimum detectable effect of {n} seeds, sd {sd}, power {power}: needs n >= 2 and sd >= 0.")
    _z(level)
    return (t_quantile((1 + level) / 2, n - 1) + t_quantile(power, n - 1)) * sd / math.sqrt(n)


def auroc(scores: Scores, positive: Truth, *, level: float = 0.95, excluded: int = 0) -> Estimate:
    """Return P(score of a positive > score of a negative), ties counting half, with an interval that is never empty.

    The ends solve |A - a| = z sqrt(V(a)) for a, V(a) = a(1-a) [1 + M (1-a)/(2-a) + M a/(1+a)] / (m k) of m positives
    and k negatives, M = (m + k)/2 - 1: the score-type limits, which at A = 1 still say how little 3 positives prove.
    value is None where one class is missing. Scores that are infinite rank as such; NaN is refused.

    Raises:
        ValueError: unequal lengths, or a score that is NaN.
    Source: Hanley & McNeil 1982 (variance); Newcombe 2006, Statistics in Medicine 25:559-573, method 5.
    """
    score, truth = _checked(scores, positive)
    z = _z(level)
    m, k = int(truth.sum()), int((~truth).sum())
    if m == 0 or k == 0:
        return Estimate(None, 0.0, 1.0, m + k, excluded)
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[inverse]  # (N,) midranks, 1-based
    value = float((ranks[truth].sum() - m * (m + 1) / 2) / (m * k))
    extra = (m + k) / 2 - 1

    def distance(a: float) -> float:  # above 0 where `a` lies outside of the interval
        variance = a * (1 - a) * (1 + extra * (1 - a) / (2 - a) + extra * a / (1 + a)) / (m * k)
        return abs(value - a) - z * math.sqrt(max(variance, 0.0))

    low = 0.0 if value == 0 else _root(distance, 0.0, value)
    high = 1.0 if value == 1 else _root(distance, 1.0, value)
    return Estimate(value, low, high, m + k, excluded)


@dataclass(frozen=True)
class Decisions:
    """What a threshold does to known labels: the four counts, and rates with Wilson intervals."""

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int

    @property
    def precision(self) -> Estimate:
        """Share of the flagged that are positive; value None where nothing is flagged."""
        return wilson(self.true_positive, self.true_positive + self.false_positive)

    @property
    def recall(self) -> Estimate:
        """Share of the positives that are flagged."""
        return wilson(self.true_positive, self.true_positive + self.false_negative)

    @property
    def false_positive_rate(self) -> Estimate:
        """Share of the negatives that are flagged."""
        return wilson(self.false_positive, self.false_positive + self.true_negative)


def at_threshold(scores: Scores, positive: Truth, threshold: float) -> Decisions:
    """Return the decisions score > threshold against the labels.

    Raises:
        ValueError: unequal lengths, or a score or threshold that is NaN.
    """
    score, truth = _checked(scores, positive)
    if math.isnan(threshold):
        raise ValueError("Decisions at a threshold of NaN: every comparison would be false. Calibrate it first.")
    flagged = score > threshold
    counts = (flagged & truth, flagged & ~truth, ~flagged & truth, ~flagged & ~truth)
    return Decisions(*(int(one.sum()) for one in counts))


def pareto_front(points: Sequence[Sequence[float]], better: Sequence[Literal["low", "high"]]) -> tuple[int, ...]:
    """Return the indices of the points that no other is at least as good as on every axis and better on one.

    Args:
        points: (N, A), one value per axis. better: per axis, which end is good: ("low", "high") of (trait, skill).

    Raises:
        ValueError: a point with another number of axes, or with NaN.
    """
    if not len(points):
        return ()
    values = np.array([list(point) for point in points], dtype=float)
    if values.shape[1] != len(better) or np.isnan(values).any():
        raise ValueError(f"Pareto front of {values.shape} points on {len(better)} axes: one number per axis, no NaN.")
    if unknown := [one for one in better if one not in ("low", "high")]:
        raise ValueError(f"Pareto front: an axis is better {unknown[0]!r}. Say 'low' or 'high'.")
    cost = values * np.array([1.0 if one == "low" else -1.0 for one in better])
    beaten = [bool(((cost <= own).all(1) & (cost < own).any(1)).any()) for own in cost]
    return tuple(index for index, out in enumerate(beaten) if not out)


def t_quantile(p: float, degrees: int) -> float:
    """Return the `p` quantile of Student's t with `degrees` of freedom, to 1e-9.

    Raises:
        ValueError: p outside 0..1 (ends excluded), or fewer than 1 degree.
    """
    if not 0 < p < 1 or degrees < 1:
        raise ValueError(
            f"Quantile {p} of Student's t with {degrees} degrees of freedom: needs 0 < p < 1, degrees >= 1."
        )
    if p < 0.5:
        return -t_quantile(1 - p, degrees)
    high = 1.0
    while _t_tail(high, degrees) > 1 - p:
        high *= 2
    return _root(lambda t: _t_tail(t, degrees) - (1 - p), 0.0, high)


def _t_tail(t: float, degrees: int) -> float:
    """P(T > t) for t >= 0, by the finite sums that hold for whole degrees (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for step in range(1 + odd, degrees, 2):  # step = 1, 3, ... of even degrees; 2, 4, ... of odd ones
        total += term
        term *= cosine * cosine * step / (step + 1)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 - inside) / 2


def _root(function: Callable[[float], float], outside: float, inside: float) -> float:
    """Where `function` falls from above 0 at `outside` to at most 0 at `inside`, by halving."""
    for _ in range(200):
        middle = (outside + inside) / 2
        if middle in (outside, inside):
            break
        outside, inside = (middle, inside) if function(middle) > 0 else (outside, middle)
    return inside


def _checked(scores: Scores, positive: Truth) -> tuple[np.ndarray, np.ndarray]:
    score, truth = np.asarray(scores, dtype=float), np.asarray(positive)
    if score.shape != truth.shape or score.ndim != 1 or np.isnan(score).any() or not np.isin(truth, (0, 1)).all():
        raise ValueError(
            f"Detector quality: {score.shape} scores, {truth.shape} labels. Give one label, True or False, per score, "
            "and no score of NaN: leave unknown ones out of both."
        )
    return score, truth.astype(bool)


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"Interval at level {level}: give a share between 0 and 1, such as 0.95.")
    return NormalDist().inv_cdf((1 + level) / 2)
