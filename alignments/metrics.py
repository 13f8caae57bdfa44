"""What a search's numbers mean: accuracy, its interval, the mean over seeds, and a verdict in one sentence.

Everything here is arithmetic on rows; nothing needs a model. The verdict keeps the two promises that make a best cell
believable: it is *chosen* on the select split and *reported* on the test split, and it is held against the best
trivial baseline on the same pairs, interval against interval.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np

from alignments.rows import CONTROL_PREFIX, Cell, Row, preference

Interval = tuple[float, float]

# A method reads as its words; these are written otherwise.
_WORDS = {word.lower(): word for word in ("DAS", "MDAS", "DBM", "MDBM", "PCA", "SVD", "SAE", "LDA", "LoReFT")}
_WORDS["boundless"] = "Boundless DAS"
RANDOM_MODEL = CONTROL_PREFIX + "random_model"
_CERTAIN = 1 - 1e-9  # a baseline that is right on every pair


class NoVerdict(Exception):
    """The rows do not allow one: none on a split, more than one variable, or seeds that are not all there yet."""


class Unfinished(NoVerdict):
    """The cell selected lacks seeds on test."""


def wilson(k: float, n: int, level: float = 0.95) -> Interval:
    """Return the Wilson score interval of `k` hits in `n` trials.

    With p = k/n and z the normal quantile of (1 + level) / 2:
    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). It never leaves 0..1 and keeps its width at p = 0 and 1.
    `k` may be a fraction: the mean hits of several seeds on the same `n` pairs.

    Raises:
        ValueError: n < 1, k outside 0..n, or a level outside 0..1 (ends excluded).
    Source: Wilson 1927, JASA 22:209-212; no continuity correction.
    """
    if n < 1 or not 0 <= k <= n or not 0 < level < 1:
        raise ValueError(
            f"Wilson interval of {k} hits in {n} trials at level {level}: needs n >= 1, 0 <= k <= n and a level "
            "between 0 and 1. Pass counts, not rates."
        )
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, weight = k / n, z * z / n
    centre = share + weight / 2
    half = z * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    # The formula holds the share exactly; the clamps only take back rounding at 0 and 1.
    low, high = (centre - half) / (1 + weight), (centre + half) / (1 + weight)
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def iia(predicted: Sequence[Any] | np.ndarray, labels: Sequence[Any] | np.ndarray) -> float:
    """Return the share of pairs whose patched answer is the one the causal model gives.

    Shapes: (B,) answers, or (B, T) answers of T tokens, of which all must agree.

    Raises:
        ValueError: no pairs, unequal shapes, or texts against numbers (which would score a silent 0).
    """
    found, wanted = np.asarray(predicted), np.asarray(labels)
    if found.shape != wanted.shape or found.ndim == 0 or len(found) == 0:
        raise ValueError(
            f"IIA: {found.shape} predictions against {wanted.shape} labels. Give one answer per label, at least one."
        )
    if (found.dtype.kind in "US") != (wanted.dtype.kind in "US"):
        raise ValueError(
            f"IIA: predictions are {found.dtype}, labels {wanted.dtype}. Compare token ids with ids, texts with texts."
        )
    hits = (found == wanted).reshape(len(found), -1).all(axis=1)  # (B,)
    return float(hits.mean())


def non_overlapping(a: Interval, b: Interval) -> bool:
    """Return whether two intervals share no point; intervals that touch do overlap."""
    return a[1] < b[0] or b[1] < a[0]


@dataclass(frozen=True)
class Baseline:
    """A score that needs no model, with the Wilson interval of the same `n` pairs."""

    name: str
    value: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether it is right on every pair."""
        return self.value >= _CERTAIN

    def __str__(self) -> str:
        return f"{self.name} {self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class SeedMean:
    """One cell on one split, averaged over its seeds.

    `low`..`high` is the Wilson interval of the mean at `n` pairs. Seeds see the same pairs, so they do not add to n;
    what they differ by is told apart, in `values` (one IIA per seed, in the order of `seeds`).
    """

    cell: Cell
    layer: int | None
    component: str
    position_label: str
    split: str
    n: int
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    iia: float
    low: float
    high: float
    baselines: tuple[Baseline, ...]
    task_accuracy: float | None
    seconds: float
    kinds: tuple[tuple[str, float], ...] = ()  # kind of pairs -> IIA on them, mean over seeds
    facts: tuple[tuple[str, float], ...] = ()  # numbers the method learned or measured, mean over seeds

    @property
    def is_control(self) -> bool:
        """Whether the method is a control, which is shown but never selected."""
        return self.cell.method.startswith(CONTROL_PREFIX)

    @property
    def interval(self) -> Interval:
        """Return (low, high)."""
        return self.low, self.high

    @property
    def spread(self) -> float | None:
        """Return the standard deviation over seeds (n - 1 in the denominator), None for a single seed."""
        return stdev(self.values) if len(self.values) > 1 else None

    def fact(self, name: str) -> float | None:
        """Return one of `facts` by its name, None if it was not told for every seed."""
        return dict(self.facts).get(name)

    @property
    def rank_text(self) -> str:
        """Return "rank 8/576": dimensions swapped (`hard_rank`, if learned) of `width`; "whole width" if all.

        A mask's `mask_size` is told as "13 features", for its features need not be dimensions.
        """
        width, learned, features = self.fact("width"), self.fact("hard_rank"), self.fact("mask_size")
        if features is not None:
            return f"{f'{features:.1f}'.removesuffix('.0')} features"
        rank = self.cell.rank if learned is None else learned
        of = "" if width is None else f"/{width:.0f}"
        return "whole width" if rank is None else f"rank {f'{rank:.1f}'.removesuffix('.0')}{of}"

    @property
    def best_baseline(self) -> Baseline:
        """Return the highest trivial baseline; of equals, the first in the order copy-base, copy-source, majority."""
        return max(self.baselines, key=lambda baseline: baseline.value)

    @property
    def above_baselines(self) -> bool:
        """Whether the whole interval lies above that of the best trivial baseline."""
        best = self.best_baseline
        return self.low > best.high and non_overlapping(self.interval, (best.low, best.high))

    @property
    def method_text(self) -> str:
        """Return the method as a sentence names it: "DAS rank 8"."""
        return method_text(self.cell.method, self.cell.rank)

    def __str__(self) -> str:
        spread = ""
        if len(self.values) > 1:
            spread = f", mean of {len(self.values)} seeds ({min(self.values):.2f} to {max(self.values):.2f})"
        kinds = f" ({', '.join(f'{name} {value:.2f}' for name, value in self.kinds)})" if self.kinds else ""
        return (
            f"{self.method_text} at {self.cell.site} @ {self.position_label}: "
            f"IIA {self.iia:.2f} [{self.low:.2f}, {self.high:.2f}]{kinds}, n={self.n}{spread}"
        )


def method_text(method: str, rank: int | None) -> str:
    """Return "DAS rank 8" for ("das", 8), "full vector" for ("full_vector", None), "control rival output"."""
    plain = method.removeprefix(CONTROL_PREFIX)
    name = " ".join(_WORDS.get(word, word) for word in re.split("[_:]", plain))
    rank_part = "" if rank is None else f" rank {rank}"
    return f"{'control ' if method.startswith(CONTROL_PREFIX) else ''}{name}{rank_part}"


def mean_over_seeds(rows: Iterable[Row]) -> tuple[SeedMean, ...]:
    """Return one mean per cell and split, in the order in which the cells first appear.

    Seeds of unequal n (a task may drop pairs) are averaged unweighted and given the smallest n: the interval is then
    too wide rather than too narrow.
    """
    groups: dict[tuple[Cell, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.cell, row.split), []).append(row)
    return tuple(_mean(group) for group in groups.values())


def _mean(rows: Sequence[Row]) -> SeedMean:
    rows = sorted(rows, key=lambda row: row.seed)
    first, n = rows[0], min(row.n for row in rows)
    score = fmean(row.iia for row in rows)
    low, high = wilson(min(max(score, 0.0), 1.0) * n, n)
    names = [name for name in first.baselines if all(name in row.baselines for row in rows)]
    accuracies = [row.task_accuracy for row in rows if row.task_accuracy is not None]
    return SeedMean(
        cell=first.cell,
        layer=first.layer,
        component=first.component,
        position_label=first.position_label,
        split=first.split,
        n=n,
        seeds=tuple(row.seed for row in rows),
        values=tuple(row.iia for row in rows),
        iia=score,
        low=low,
        high=high,
        baselines=tuple(_baseline(name, [row.baselines[name] for row in rows], n) for name in names),
        task_accuracy=fmean(accuracies) if accuracies else None,
        seconds=sum(row.seconds for row in rows),
        kinds=_shared_means([row.kinds for row in rows]),
        facts=_shared_means([row.facts for row in rows]),
    )


def _shared_means(told: Sequence[Mapping[str, float]]) -> tuple[tuple[str, float], ...]:
    """Return the mean of each name that every mapping has, in the order of the first."""
    shared = [name for name in told[0] if all(name in one for one in told)]
    return tuple((name, fmean(one[name] for one in told)) for name in shared)


def _baseline(name: str, values: Sequence[float], n: int) -> Baseline:
    value = min(max(fmean(values), 0.0), 1.0)
    return Baseline(name, value, *wilson(value * n, n))


@dataclass(frozen=True)
class Verdict:
    """The best cell of one variable: chosen on the select split, reported on the test split.

    `chosen` is its mean on select, `reported` on test; `candidates` is how many cells it was chosen from. `above` is
    the claim itself: the whole interval lies above the best trivial baseline's.
    """

    variable: str
    chosen: SeedMean
    reported: SeedMean
    baseline: Baseline
    above: bool
    candidates: int
    controls: tuple[SeedMean, ...] = ()  # on test, each at the reported place if it was run there

    @property
    def trivial(self) -> tuple[str, ...]:
        """Return the baselines that are right on every pair: the variable is then solved without any alignment."""
        return tuple(baseline.name for baseline in self.reported.baselines if baseline.certain)

    @property
    def sentence(self) -> str:
        """Return the verdict as plain prose, one sentence, and a second one if the variable is trivial here."""
        where = "above it" if self.above else "NOT above it"
        text = f"{self.reported}, best trivial baseline {self.baseline}: {where}."
        text = text[0].upper() + text[1:]
        return " ".join([text, *(_trivial_text(self.variable, name) for name in self.trivial)])

    @property
    def line(self) -> str:
        """Return the verdict on one line, of what there is.

        "IIA .91 [.88,.93], best trivial .65, random-init .52, rank 8/576, sd .01 over 3 seeds"
        """
        score = self.reported
        parts = [f"IIA {short(score.iia)} [{short(score.low)},{short(score.high)}]"]
        parts.append(f"best trivial {short(self.baseline.value)}")
        same = [one for one in self.controls if _same(one.cell, score.cell) == (True, True)]  # else not its control
        parts += [f"random-init {short(one.iia)}" for one in same if one.cell.method == RANDOM_MODEL]
        parts.append(score.rank_text)
        if score.spread is not None:
            parts.append(f"sd {short(score.spread)} over {len(score.values)} seeds")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return what `result.json` keeps: numbers with n, interval and split, and the sentence."""
        cell, score = self.reported.cell, self.reported
        return {
            "task": cell.task,
            "model": cell.model,
            "variable": self.variable,
            "site": cell.site,
            "positions": cell.positions,
            "method": cell.method,
            "rank": cell.rank,
            "selected_on": self.chosen.split,
            "select_iia": self.chosen.iia,
            "candidates": self.candidates,
            "split": score.split,
            "n": score.n,
            "iia": score.iia,
            "low": score.low,
            "high": score.high,
            "kinds": dict(score.kinds),
            "seeds": dict(zip(map(str, score.seeds), score.values, strict=True)),
            "baselines": {one.name: [one.value, one.low, one.high] for one in score.baselines},
            "best_baseline": self.baseline.name,
            "above_best_baseline": self.above,
            "trivially_solved_by": list(self.trivial),
            "task_accuracy": score.task_accuracy,
            "facts": dict(score.facts),
            "sd": score.spread,
            "controls": {one.cell.method: [one.iia, one.low, one.high] for one in self.controls},
            "line": self.line,
            "sentence": self.sentence,
        }


def short(share: float) -> str:
    """Return a share as ".91", and as "1.00" where it rounds to one."""
    return f"{share:.2f}".removeprefix("0")


def _trivial_text(variable: str, name: str) -> str:
    verb, _, what = name.partition("-")
    how = f"copying the {what}" if verb == "copy" and what else f"the {name} answer"
    return f"On these pairs {variable} is trivially solved by {how} (1.00): no score here can locate it."


def verdict(rows: Iterable[Row]) -> Verdict:
    """Return the verdict on one variable's rows; pass one method's rows for a verdict on that method.

    The cell with the highest mean on the select split wins; of equals the one of smaller rank (whole width counts as
    the largest), then the one searched first. Controls never win, nor what is no interchange. Test scores play no part.

    Raises:
        NoVerdict: rows of several tasks, models or variables; no candidate on select. Unfinished: the chosen cell
            lacks, on test, a seed it has on select.
    """
    rows = list(rows)
    candidates = [row for row in rows if row.is_candidate]
    others = {row.method for row in rows if not row.is_control}
    if others and not candidates:
        named = ", ".join(method_text(name, None) for name in sorted(others))
        raise NoVerdict(f"Verdict: {named} is no interchange, so that its scores cannot locate a variable. Add das.")
    about = {(row.task, row.model, row.variable) for row in candidates}
    if len(about) > 1:
        named = "; ".join(" / ".join(one) for one in sorted(about))
        raise NoVerdict(f"Verdict: rows of {len(about)} searches ({named}). Pass the rows of one variable at a time.")
    means = mean_over_seeds(candidates)
    on_select = [mean for mean in means if mean.split == "select"]
    if not on_select:
        raise NoVerdict(
            f"Verdict: none of {len(candidates)} rows is on the select split, so nothing was selected fairly. "
            "Score the cells on select, and only the reported one on test."
        )
    chosen = max(on_select, key=lambda mean: preference(mean.iia, mean.cell.rank))
    reported = next((mean for mean in means if mean.split == "test" and mean.cell == chosen.cell), None)
    lacking = sorted(set(chosen.seeds) - set(() if reported is None else reported.seeds))
    if reported is None or lacking:
        raise Unfinished(
            f"Verdict: the cell selected is {chosen.method_text} at {chosen.cell.site} @ {chosen.position_label}, and "
            f"its test rows lack seed {', '.join(map(str, lacking))}. Let the search finish (--resume)."
        )
    return Verdict(
        variable=chosen.cell.variable,
        chosen=chosen,
        reported=reported,
        baseline=reported.best_baseline,
        above=reported.above_baselines,
        candidates=len(on_select),
        controls=_controls(mean_over_seeds(row for row in rows if row.is_control), reported),
    )


def _controls(means: Iterable[SeedMean], reported: SeedMean) -> tuple[SeedMean, ...]:
    """Return each control on test, once: of its ranks and places the reported one, or else where it scores highest."""
    own = [one for one in means if one.split == "test" and one.cell[:3] == reported.cell[:3]]
    found: dict[str, SeedMean] = {}
    for mean in sorted(own, key=lambda one: (*_same(one.cell, reported.cell), one.iia)):
        found[mean.cell.method] = mean
    return tuple(found.values())


def _same(control: Cell, reported: Cell) -> tuple[bool, bool]:
    place = (control.site, control.positions) == (reported.site, reported.positions)
    return place, place and control.rank == reported.rank
