"""Whether a difference is more than luck: exact tests, false discovery rate, clustered bootstrap, normalised IIA.

    tested = fdr([mean for mean in mean_over_seeds(rows) if mean.split == "test"])      # one per heatmap cell
    mcnemar(das_right, pca_right).p                                                     # two methods, the same pairs
    bootstrap(right, clusters=[pair["base"] for pair in pairs], seed=0)                 # pairs that share a base

Counts are of pairs. Everything is exact or seeded, and nothing here needs a model.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from alignments.metrics import Baseline, Interval, SeedMean, mean_over_seeds
from alignments.rows import Cell, Row

Outcomes = Sequence[bool] | np.ndarray  # right or wrong, one per pair


def binomial_tail(hits: int, n: int, p: float) -> float:
    """Return P(X >= hits) for X of Binomial(n, p): the one-sided p-value of `hits` against the rate `p`.

    Raises:
        ValueError: n < 1, hits outside 0..n, or p outside 0..1.
    """
    if n < 1 or not 0 <= hits <= n or not 0 <= p <= 1:
        raise ValueError(f"Binomial tail of {hits} of {n} at rate {p}: needs n >= 1, 0 <= hits <= n, 0 <= p <= 1.")
    if hits == 0 or p == 1:
        return 1.0
    if p == 0:
        return 0.0
    rest = math.log1p(-p)
    terms = (math.exp(_log_choose(n, k) + k * math.log(p) + (n - k) * rest) for k in range(hits, n + 1))
    return min(1.0, math.fsum(terms))


def fisher_less(hits: int, n: int, other_hits: int, other_n: int) -> float:
    """Return the one-sided p-value of Fisher's exact test that `hits` of `n` is a lower rate than the others'.

    With the margins fixed, X is hypergeometric; p = P(X <= hits).

    Raises:
        ValueError: a count is negative or above its total.
    """
    if not 0 <= hits <= n or not 0 <= other_hits <= other_n:
        raise ValueError(f"Fisher's test of {hits} of {n} against {other_hits} of {other_n}: hits lie in 0..n.")
    total, all_hits = n + other_n, hits + other_hits
    whole = _log_choose(total, n)
    lowest = max(0, n - (total - all_hits))
    terms = (
        math.exp(_log_choose(all_hits, k) + _log_choose(total - all_hits, n - k) - whole)
        for k in range(lowest, hits + 1)
    )
    return min(1.0, math.fsum(terms))


def adjusted(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return the Benjamini-Hochberg adjusted p-values, in the order given.

    Of m sorted values, the i-th becomes min over j >= i of p_j m / j. Calling those at most q discoveries keeps the
    expected share of false ones below q for tests that are independent or depend positively, as neighbouring heatmap
    cells scored on the same pairs do.

    Raises:
        ValueError: a value outside 0..1.
    Source: Benjamini & Hochberg 1995, JRSS B 57:289-300; dependence: Benjamini & Yekutieli 2001.
    """
    if any(not 0 <= p <= 1 for p in p_values):
        raise ValueError("Benjamini-Hochberg: every p-value must lie in 0..1.")
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    found, lowest = [0.0] * len(p_values), 1.0
    for place in range(len(order), 0, -1):
        lowest = min(lowest, p_values[order[place - 1]] * len(order) / place)
        found[order[place - 1]] = lowest
    return tuple(found)


@dataclass(frozen=True)
class Tested:
    """One cell against its best trivial baseline: `p` one-sided and exact, `adjusted` for all cells of the family."""

    mean: SeedMean
    baseline: Baseline
    p: float
    adjusted: float
    level: float
    test: str  # "binomial" or "McNemar"

    @property
    def significant(self) -> bool:
        """Whether the cell is a discovery at the family's false discovery rate."""
        return self.adjusted <= self.level

    def __str__(self) -> str:
        return f"adjusted p {p_text(self.adjusted)} ({self.test}, p {p_text(self.p)}) against {self.baseline.name}"


def p_text(p: float) -> str:
    """Return a p-value as people read it: "0.013", "< 0.001"."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def fdr(
    cells: Iterable[Row | SeedMean],
    level: float = 0.05,
    *,
    paired: Mapping[Cell, tuple[Outcomes, Outcomes]] | None = None,
) -> tuple[Tested, ...]:
    """Return every cell tested against its best trivial baseline, adjusted over all that are passed.

    The family is what is passed: give one split of one variable. Rows are averaged over seeds first; of the mean hits
    the whole part counts, so that seeds do not add pairs. The baseline is taken as a known rate on the same pairs.
    Where `paired` holds (cell right, baseline right) per pair, the exact one-sided McNemar test is used instead, which
    also knows *which* pairs.

    Raises:
        ValueError: the level lies outside 0..1, a cell has several splits, or paired outcomes of unequal length.
    """
    given = list(cells)
    means = [one for one in given if isinstance(one, SeedMean)]
    means += mean_over_seeds([one for one in given if isinstance(one, Row)])
    if not 0 < level < 1:
        raise ValueError(f"False discovery rate {level}: give a share between 0 and 1, such as 0.05.")
    if len({mean.cell for mean in means}) < len(means):
        raise ValueError("False discovery rate: a cell comes twice. Pass the rows of one split only.")
    tests = [_against_baseline(mean, (paired or {}).get(mean.cell)) for mean in means]
    corrected = adjusted([p for _, p in tests])
    return tuple(
        Tested(mean, mean.best_baseline, p, q, level, name)
        for mean, (name, p), q in zip(means, tests, corrected, strict=True)
    )


def _against_baseline(mean: SeedMean, outcomes: tuple[Outcomes, Outcomes] | None) -> tuple[str, float]:
    if outcomes is not None:
        return "McNemar", mcnemar(*outcomes, mid_p=False, alternative="greater").p
    hits = min(mean.n, math.floor(mean.iia * mean.n + 1e-6))
    return "binomial", binomial_tail(hits, mean.n, min(1.0, max(0.0, mean.best_baseline.value)))


@dataclass(frozen=True)
class Paired:
    """McNemar's test of two methods on the same `n` pairs: who alone was right how often, and the p-value."""

    n: int
    only_first: int
    only_second: int
    p: float

    def __str__(self) -> str:
        return f"{self.only_first} pairs only the first, {self.only_second} only the second, p {p_text(self.p)}"


def mcnemar(first: Outcomes, second: Outcomes, *, mid_p: bool = True, alternative: str = "two-sided") -> Paired:
    """Return the exact McNemar test of two methods' outcomes on the same pairs.

    Only the pairs on which they differ count: under the null, who is right there is a fair coin. `mid_p` takes half of
    the observed count's own probability off each tail, which makes the test less conservative.

    Raises:
        ValueError: unequal or no outcomes, or an alternative other than "two-sided", "greater".
    Source: McNemar 1947; mid-p: Fagerland, Lydersen & Laake 2013, BMC Med. Res. Methodol. 13:91.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"McNemar: outcomes {a.shape} against {b.shape}. Give one per pair, of the same pairs.")
    if alternative not in ("two-sided", "greater"):
        raise ValueError(f"McNemar: alternative {alternative!r}. Use 'two-sided' or 'greater' (the first is better).")
    one, two = int((a & ~b).sum()), int((b & ~a).sum())
    differ = one + two
    if differ == 0:
        return Paired(len(a), 0, 0, 1.0)
    count = one if alternative == "greater" else max(one, two)
    tail = binomial_tail(count, differ, 0.5)
    if mid_p:
        tail -= 0.5 * math.exp(_log_choose(differ, count) - differ * math.log(2))
    return Paired(len(a), one, two, min(1.0, tail if alternative == "greater" else 2 * tail))


def bootstrap(
    hits: Outcomes | Sequence[float],
    clusters: Sequence[Hashable],
    seed: int = 0,
    n: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Return the percentile bootstrap interval of the mean, resampling whole clusters.

    Pairs of one base stand or fall together, so `clusters` names each pair's base; with all different it is the plain
    bootstrap. Each of the `n` replicates draws as many clusters as there are and weighs every pair in them equally.

    Raises:
        ValueError: no hits, a cluster missing or too many, fewer than 1 replicates, or a level outside 0..1.
    Source: Efron 1979; clusters: Davison & Hinkley 1997, section 3.8.
    """
    values = np.asarray(hits, dtype=float)
    if values.ndim != 1 or not len(values) or len(clusters) != len(values) or n < 1 or not 0 < level < 1:
        raise ValueError(
            f"Bootstrap of {values.shape} hits in {len(clusters)} clusters, {n} replicates, level {level}: give one "
            "cluster per hit, n >= 1 and a level between 0 and 1."
        )
    names = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    member = np.array([names[name] for name in clusters])
    sums = np.bincount(member, weights=values)  # (C,)
    sizes = np.bincount(member)  # (C,)
    rng = np.random.default_rng(seed)
    means = np.empty(n)
    for index in range(n):  # one replicate at a time: n x C draws at once may not fit
        drawn = rng.integers(len(names), size=len(names))
        means[index] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def normalised_iia(iia: float, trivial: float, ceiling: float) -> float:
    """Return (iia - trivial) / (ceiling - trivial): 0 for what needs no model, 1 for what the model itself can do.

    `ceiling` is the task accuracy on the same pairs. It may leave 0..1: below the baseline it is negative.

    Raises:
        ValueError: the ceiling is not above the trivial baseline, so that nothing lies between them.
    """
    if ceiling <= trivial:
        raise ValueError(
            f"Normalised IIA: the ceiling {ceiling:.3f} is not above the best trivial baseline {trivial:.3f}. "
            "These pairs cannot tell an alignment from a trivial answer; draw others."
        )
    return (iia - trivial) / (ceiling - trivial)


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and standard deviation (n - 1) over seeds; None as the deviation of a single one.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("Mean over seeds: there are none. Finish at least one.")
    return fmean(values), stdev(values) if len(values) > 1 else None


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
