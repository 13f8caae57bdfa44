"""IIA against rank: how many dimensions an alignment needs, and whether a learned rank depends on where it started.

    for curve in rank_curves(rows): print(curve.sentence)
    init_sensitivity(rows)           # learned rank by initial rank, over seeds

The smallest sufficient rank is chosen on the select split and its score reported on test, as the verdict's cell is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from alignments.metrics import SeedMean, mean_over_seeds, method_text
from alignments.rows import CONTROL_PREFIX, Row
from alignments.statistics import mean_and_sd

TOLERANCE = 0.02  # how far below the best rank's IIA on select a smaller rank may score


@dataclass(frozen=True)
class RankPoint:
    """One rank of a curve: its mean over seeds on select and on test, None where it was not scored."""

    rank: int
    select: SeedMean | None
    test: SeedMean | None

    @property
    def shown(self) -> SeedMean | None:
        """Return the mean on test, or on select where the test split was not scored."""
        return self.test or self.select


@dataclass(frozen=True)
class RankCurve:
    """One method at one place of one variable, at two or more ranks, smallest first."""

    variable: str
    site: str
    positions: str
    position_label: str
    method: str
    points: tuple[RankPoint, ...]
    tolerance: float = TOLERANCE

    @property
    def name(self) -> str:
        """Return "DAS at L14.block_output @ last"."""
        return f"{method_text(self.method, None)} at {self.site} @ {self.position_label}"

    @property
    def is_control(self) -> bool:
        """Whether the method is a control, of which no rank is worth choosing."""
        return self.method.startswith(CONTROL_PREFIX)

    @property
    def best(self) -> RankPoint | None:
        """Return the rank with the highest mean on select, of equals the smallest; None if none is on select."""
        scored = [(point.select.iia, -point.rank, point) for point in self.points if point.select is not None]
        return max(scored, key=lambda one: one[:2])[2] if scored else None

    @property
    def smallest(self) -> RankPoint | None:
        """Return the smallest rank whose mean on select is within `tolerance` of the best there."""
        if self.best is None or self.best.select is None:
            return None
        least = self.best.select.iia - self.tolerance - 1e-9
        return next(one for one in self.points if one.select is not None and one.select.iia >= least)

    @property
    def sentence(self) -> str:
        """Return what the curve says, chosen on select and reported on test."""
        if self.smallest is None or self.best is None:
            return f"{self.name}: no rank was scored on select, so none is chosen."
        found, best = self.smallest.test, self.best.select
        score = "it was not scored on test" if found is None else f"on test it has {_score(found)}"
        assert best is not None  # `best` is chosen among those
        head = f"{self.name}: rank {self.smallest.rank} is the smallest within {self.tolerance:g}"
        return f"{head} of the best on select (rank {self.best.rank}, {best.iia:.2f}); {score}."


def _score(mean: SeedMean) -> str:
    return f"IIA {mean.iia:.2f} [{mean.low:.2f}, {mean.high:.2f}], n={mean.n}"


def rank_curves(rows: Iterable[Row], tolerance: float = TOLERANCE) -> tuple[RankCurve, ...]:
    """Return a curve for each method, place and variable that has rows of two ranks or more.

    Seeds need not be the same at all ranks; each point is the mean over its own. Controls have curves too.

    Raises:
        ValueError: a negative tolerance.
    """
    if tolerance < 0:
        raise ValueError(f"Rank curve: tolerance {tolerance}. Give the share of IIA that may be lost, from 0.")
    groups: dict[tuple[str, ...], list[SeedMean]] = {}
    for mean in mean_over_seeds(rows):
        cell = mean.cell
        if cell.rank is not None and mean.split != "train":
            key = (cell.task, cell.model, cell.variable, cell.site, cell.positions, cell.method)
            groups.setdefault(key, []).append(mean)
    return tuple(_curve(means, tolerance) for means in groups.values() if len({mean.cell.rank for mean in means}) > 1)


def _curve(means: list[SeedMean], tolerance: float) -> RankCurve:
    by_rank: dict[int, dict[str, SeedMean]] = {}
    for mean in means:
        assert mean.cell.rank is not None  # `rank_curves` left those out
        by_rank.setdefault(mean.cell.rank, {})[mean.split] = mean
    points = tuple(RankPoint(rank, by_rank[rank].get("select"), by_rank[rank].get("test")) for rank in sorted(by_rank))
    first = means[0]
    cell = first.cell
    return RankCurve(
        cell.variable, cell.site, cell.positions, first.position_label, cell.method, points, tolerance=tolerance
    )


@dataclass(frozen=True)
class InitLine:
    """The ranks one method learned from one initial rank, over seeds, and the score they gave."""

    method: str
    site: str
    position_label: str
    initial_rank: int
    learned: tuple[float, ...]  # hard ranks, one per seed
    mean: float
    sd: float | None
    score: SeedMean


def init_sensitivity(rows: Iterable[Row], split: str = "test") -> tuple[InitLine, ...]:
    """Return learned rank by initial rank, for rows whose facts tell `hard_rank`; by method, place, then initial rank.

    The initial rank is the fact `initial_rank`, or the row's own rank. If the learned ranks follow the initial ones,
    they say how the search was started, not how wide the variable is.
    """
    groups: dict[tuple[str, ...], dict[int, list[Row]]] = {}
    for row in rows:
        facts = row.facts
        initial = facts.get("initial_rank", row.rank)
        if row.split == split and "hard_rank" in facts and initial is not None:
            place = groups.setdefault((row.variable, row.method, row.site, row.positions), {})
            place.setdefault(int(initial), []).append(row)
    return tuple(_init_line(initial, place[initial]) for place in groups.values() for initial in sorted(place))


def _init_line(initial: int, rows: list[Row]) -> InitLine:
    first = rows[0]
    # Rows that differ in rank only by where they started are one cell here, once per seed.
    score = mean_over_seeds([row for row in rows if row.cell == first.cell])[0]
    learned = tuple(row.facts["hard_rank"] for row in sorted(rows, key=lambda row: row.seed))
    return InitLine(
        first.method, first.site, first.position_label, initial, learned, *mean_and_sd(learned), score=score
    )
