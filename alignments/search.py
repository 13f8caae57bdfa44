"""`Search`: sites x positions x methods x ranks x seeds -> flat rows, chosen on one split and reported on another.

Every cell is fitted with the first seed (with all, if asked) and scored. Then each learned method's cell that is best
on *select* gets the remaining seeds, again until the best cell has them all, so that what is reported is a mean over
seeds; and its controls are run. Test scores play no part in any choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Literal, Protocol

from alignments.methods import METHODS
from alignments.pool import JobsFailed, reason
from alignments.rows import Row, RowKey, preference
from alignments.scoring import Cell, Job, Scorer, applies, control_cell
from intervene import Plan, Site
from intervene.errors import InterveneError

Strategy = Literal["grid", "full"]


class Executor(Protocol):
    """Carries out jobs: yields each job with its rows, and at last raises JobsFailed if some could not be done."""

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, list[Row]]]:
        """Yield (job, rows) as they are finished, in any order."""
        ...


class Local:
    """Carries out jobs one after another in this process."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, list[Row]]]:
        """Yield (job, rows) in the order of `jobs`.

        Raises:
            JobsFailed: after all others: jobs that were refused.
        """
        failed: list[tuple[Job, str]] = []
        for job in jobs:
            try:
                rows = self.scorer.rows(job)
            except InterveneError as error:
                failed.append((job, reason(error)))
                continue
            yield job, rows
        if failed:
            raise JobsFailed(failed, len(jobs))


def cells_of(
    sites: Iterable[Site], positions: Sequence[str], methods: Sequence[str], rank: int | Sequence[int]
) -> list[Cell]:
    """Return the grid, cheap methods first, so that a search that is cut short has whole maps of them."""
    grid = [(site, where) for where in positions for site in sites]
    ranks = [rank] if isinstance(rank, int) else list(rank)
    return [
        Cell(site, where, method, one)
        for method in sorted(methods, key=lambda name: METHODS[name].learned)
        for one in (ranks if METHODS[method].ranked else [None])
        for site, where in grid
    ]


class Search:
    """One search over prepared pairs. `run()` yields rows as they are finished.

    A cell of which a job fails is out of the search, and `failed` says why; the others go on.

    Args:
        scorer: fits and scores here: the plans asked for afterwards, and the jobs if there is no other executor.
        seeds: "grid" gives every cell the first and the best cells all; "full" gives every cell all.
        finished: rows of an earlier run of the same search; their cells are not run again.
        controls: those to run in each learned method's best cell: built-in ones and those of `scorer.others`.
        grid_splits: the splits on which every cell is scored; the best cells are always scored on select and test.
        progress: is told what begins.
    """

    def __init__(
        self,
        scorer: Scorer,
        cells: Sequence[Cell],
        *,
        seeds: Sequence[int] = (0, 1, 2),
        strategy: Strategy = "grid",
        finished: Iterable[Row] = (),
        controls: Sequence[str] = ("random_subspace",),
        grid_splits: Sequence[str] = ("select", "test"),
        executor: Executor | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        if not cells or not seeds:
            raise InterveneError(f"Search of {len(cells)} cells and {len(seeds)} seeds: give at least one of each.")
        self.scorer = scorer
        self.cells = list(cells)
        self.seeds = tuple(seeds)
        self.strategy = strategy
        self.rows = list(finished)
        self.controls = tuple(controls)
        self.grid_splits = tuple(grid_splits)
        self.executor = executor or Local(scorer)
        self.progress = progress
        self.failed: dict[Cell, str] = {}
        self._jobs_failed: list[tuple[Job, str]] = []

    def run(self) -> Iterator[Row]:
        """Yield each row once it is known: the grid, the remaining seeds of each method's best cell, its controls.

        Raises:
            JobsFailed: no cell at all could be scored.
        """
        yield from self.do(self.grid())
        self.require_scored()
        yield from self.reported()
        for method in dict.fromkeys(cell.method for cell in self.cells if METHODS[cell.method].learned):
            best = self.best_or_none(method)
            while best is not None and any(map(self._missing, self.complete(best))):
                yield from self.do(self.complete(best))
                best = self.best_or_none(method)
            if best is None:
                continue
            used = [name for name in self.controls if applies(name, METHODS[method], self.scorer.variables)]
            yield from self.do([Job(control_cell(best, name), self.seeds) for name in used])
        self.require_scored()

    def reported(self) -> Iterator[Row]:
        """Yield what the best cells of methods without learning lack: test rows, if the grid had select alone."""
        for method in dict.fromkeys(cell.method for cell in self.cells if not METHODS[cell.method].learned):
            best = self.best_or_none(method)
            while best is not None and any(map(self._missing, self.complete(best)[:1])):
                yield from self.do(self.complete(best)[:1])
                best = self.best_or_none(method)

    def grid(self) -> list[Job]:
        """Return one job per cell of the grid."""
        return [Job(cell, self._first(cell), self.grid_splits) for cell in self.cells]

    def complete(self, cell: Cell) -> list[Job]:
        """Return the jobs that give `cell` all seeds on select, test and, where it learns, train: its memorising."""
        first = self._first(cell)
        rest = tuple(seed for seed in self.seeds if seed not in first and METHODS[cell.method].seeded)
        splits = ("select", "test", "train") if METHODS[cell.method].learned else ("select", "test")
        return [Job(cell, seeds, splits) for seeds in (first, rest) if seeds]

    def do(self, jobs: Iterable[Job]) -> Iterator[Row]:
        """Carry out what is missing of `jobs`, yielding each new row; note in `failed` what cannot be done."""
        todo = [job for job in map(self._missing, jobs) if job is not None]
        if self.progress is not None and todo:
            self.progress(str(todo[0]))
        known = {row.key for row in self.rows}
        try:
            for _, rows in self.executor.run(todo):
                for row in rows:
                    if row.key not in known:
                        known.add(row.key)
                        self.rows.append(row)
                        yield row
        except JobsFailed as error:
            for job, why in error.failed:
                self.note_failed(job, why)

    def note_failed(self, job: Job, why: str) -> None:
        """Take the cell of `job` out of the search."""
        self._jobs_failed.append((job, why))
        self.failed.setdefault(job.cell, why)

    def require_scored(self) -> None:
        """Raise JobsFailed if jobs failed and no cell is left with rows."""
        left = any(not row.is_control and _cell(row) not in self.failed for row in self.rows)
        if self._jobs_failed and not left:
            raise JobsFailed(self._jobs_failed, len(self._jobs_failed))

    def best_cell(self, method: str) -> Cell:
        """Return the cell of `method` that is best on select so far, by `preference`; of equals the first of the grid.

        Raises:
            InterveneError: none is scored.
        """
        best = self.best_or_none(method)
        if best is None:
            raise InterveneError(f"Search: no cell of {method} is scored on select. Run the search first.")
        return best

    def best_or_none(self, method: str) -> Cell | None:
        """Return `best_cell`, None if no cell of `method` is scored, or all that are have failed since."""
        scores = {cell: self.select_iia(cell) for cell in self.cells if cell.method == method}
        known = [(cell, score) for cell, score in scores.items() if score is not None and cell not in self.failed]
        return max(known, key=lambda one: preference(one[1], one[0].rank), default=(None, 0.0))[0]

    def best_kept(self) -> Cell | None:
        """Return the best cell of all learned methods that are interchanges, by the same order."""
        methods = dict.fromkeys(cell.method for cell in self.cells)
        used = [name for name in methods if METHODS[name].learned and METHODS[name].interchange]
        best = [cell for cell in map(self.best_or_none, used) if cell is not None]
        return max(best, key=lambda cell: preference(self.select_iia(cell) or 0.0, cell.rank), default=None)

    def select_iia(self, cell: Cell) -> float | None:
        """Return the mean over seeds on select so far, None if there is none."""
        scores = [row.iia for row in self.rows if row.split == "select" and _cell(row) == cell]
        return fmean(scores) if scores else None

    def done(self) -> list[Cell]:
        """Return the cells of the grid that are scored with at least the first seed."""
        known = {row.key for row in self.rows}
        first = {cell: self._keys(Job(cell, self.seeds[:1], self.grid_splits)) for cell in self.cells}
        return [cell for cell, keys in first.items() if keys <= known]

    def plan(self, cell: Cell, seed: int) -> Plan:
        """Return the plan of a cell as it was fitted, fitting it here if this process has not."""
        return self.scorer.fitted(Job(cell, (seed,)))[0]

    def _first(self, cell: Cell) -> tuple[int, ...]:
        return self.seeds if self.strategy == "full" and METHODS[cell.method].seeded else self.seeds[:1]

    def _missing(self, job: Job) -> Job | None:
        """Return `job` with the splits that it has no rows for; None: nothing is missing.

        Its seeds stay together: what is fitted in common passes is fitted so again, which makes a resumption exact.
        """
        known = {row.key for row in self.rows}
        lacking = [split for split in job.splits if not self._keys(replace(job, splits=(split,))) <= known]
        return replace(job, splits=tuple(lacking)) if lacking else None

    def _keys(self, job: Job) -> set[RowKey]:
        return {self.scorer.key(job.cell, seed, split) for seed in job.seeds for split in job.splits}


def _cell(row: Row) -> Cell:
    """Return the cell of a row, as jobs name it."""
    return Cell(Site.parse(row.site), row.positions, row.method, row.rank)
