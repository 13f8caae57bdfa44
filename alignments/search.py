"""`search`: sites x positions x methods x seeds -> flat rows, chosen on one split and reported on another.

Every cell is fitted with the first seed and scored on select and on test. Then each learned method's cell that is
best on *select* is fitted with the remaining seeds, again until the best cell has them all, so that what is reported
is a mean over seeds; and its controls are run. Test scores play no part in any choice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from torch import nn

from alignments.fit import Score, evaluate, fit
from alignments.methods import LEARNED, METHODS, RANKLESS
from alignments.pairs import PairData
from alignments.rows import Row, RowKey
from intervene import Plan, Positions, Site
from intervene.errors import InterveneError
from intervene.families import resolve


@dataclass(frozen=True)
class Cell:
    """One place and method: `positions` identifies the tokens, `rank` is None where the whole width is swapped."""

    site: Site
    positions: str
    method: str
    rank: int | None


@dataclass(frozen=True)
class Facts:
    """What all rows of one search share. `baselines` and `accuracy` are per split, on the very pairs that are scored.

    `baselines[split]` has copy_base, copy_source, majority, and the task's own. `labels` shows positions to people.
    """

    task: str
    model: str
    variable: str
    baselines: Mapping[str, Mapping[str, float]]
    accuracy: Mapping[str, float | None]
    labels: Mapping[str, str] = field(default_factory=dict)


Other = Callable[[Site], tuple[nn.Module, Mapping[str, PairData]]]


@dataclass(frozen=True)
class Budget:
    """How long each fit learns."""

    steps: int = 100
    batch_size: int = 32
    lr: float = 1e-2


def cells_of(sites: Iterable[Site], positions: Sequence[str], methods: Sequence[str], rank: int) -> list[Cell]:
    """Return the grid, cheap methods first, so that a search that is cut short has whole maps of them."""
    grid = [(site, where) for where in positions for site in sites]
    return [
        Cell(site, where, method, None if method in RANKLESS else rank)
        for method in sorted(methods, key=lambda name: name in LEARNED)
        for site, where in grid
    ]


class Search:
    """One search over prepared pairs. `run()` yields rows as they are finished; `plans` keeps the fitted plans.

    Args:
        splits: prepared pairs for "train", "select" and "test".
        where: position name -> the `Positions` value that finds it.
        finished: rows of an earlier run of the same search; their cells are not run again.
        controls: those to run in each learned method's best cell: "random_subspace", and names in `others`.
        others: control name -> function that makes another model (a random one, say) with its pairs prepared at a
            site, on which the best cell's method is fitted as well; called only when needed.
    """

    def __init__(
        self,
        model: nn.Module,
        splits: Mapping[str, PairData],
        where: Callable[[str], Positions],
        cells: Sequence[Cell],
        facts: Facts,
        *,
        seeds: Sequence[int] = (0, 1, 2),
        budget: Budget | None = None,
        finished: Iterable[Row] = (),
        progress: Callable[[str], None] | None = None,
        others: Mapping[str, Other] | None = None,
        controls: Sequence[str] = ("random_subspace",),
    ) -> None:
        if not cells or not seeds:
            raise InterveneError(f"Search of {len(cells)} cells and {len(seeds)} seeds: give at least one of each.")
        self.model = model
        self.splits = splits
        self.where = where
        self.cells = list(cells)
        self.facts = facts
        self.seeds = tuple(seeds)
        self.budget = budget or Budget()
        self.rows = list(finished)
        self.progress = progress
        self.others = {name: make for name, make in (others or {}).items() if name in controls}
        self.controls = tuple(controls)
        self.plans: dict[tuple[Cell, int], Plan] = {}

    def run(self) -> Iterator[Row]:
        """Yield each row once it is known: the grid, the remaining seeds of each method's best cell, its controls."""
        for cell in self.cells:
            yield from self._score(cell, self.seeds[0])
        for method in dict.fromkeys(cell.method for cell in self.cells if cell.method in LEARNED):
            best = self.best_cell(method)
            while missing := [seed for seed in self.seeds if not self._has(best, seed)]:
                for seed in missing:
                    yield from self._score(best, seed)
                best = self.best_cell(method)
            yield from self._controls(best)

    def best_cell(self, method: str) -> Cell:
        """Return the cell of `method` that is best on select so far; of equals the first searched."""
        select = [row for row in self.rows if row.split == "select" and row.method == method]
        scores = {cell: [row.iia for row in select if _cell(row) == cell] for cell in self.cells}
        return max((cell for cell in self.cells if scores[cell]), key=lambda cell: fmean(scores[cell]))

    def _controls(self, best: Cell) -> Iterator[Row]:
        """Yield the scores of a random subspace in the best cell, and of the method on the other models."""
        if "random_subspace" in self.controls:
            for seed in self.seeds:
                yield from self._score(replace(best, method="control:random_subspace"), seed)
        for name, make in self.others.items():
            control = replace(best, method=f"control:{name}")
            if all(self._has(control, seed) for seed in self.seeds):
                continue
            model, splits = make(best.site)
            for seed in self.seeds:
                yield from self._score(control, seed, self._fitted(best, seed, model, splits), splits)

    def done(self) -> list[Cell]:
        """Return the cells of the grid that are scored with at least the first seed."""
        return [cell for cell in self.cells if self._has(cell, self.seeds[0])]

    def plan(self, cell: Cell, seed: int) -> Plan:
        """Return the plan of a cell as it was fitted, fitting it if this run has not."""
        if (cell, seed) not in self.plans:
            self.plans[cell, seed] = self._fitted(cell, seed, self.model, self.splits)
        return self.plans[cell, seed]

    def _has(self, cell: Cell, seed: int) -> bool:
        return all(self._key(cell, seed, split) in {row.key for row in self.rows} for split in ("select", "test"))

    def _key(self, cell: Cell, seed: int, split: str) -> RowKey:
        return self._row(cell, seed, split, Score(1, 0.0, 0.0, 1.0), 0.0).key

    def _score(
        self, cell: Cell, seed: int, plan: Plan | None = None, splits: Mapping[str, PairData] | None = None
    ) -> Iterator[Row]:
        known = {row.key for row in self.rows}
        todo = [split for split in ("select", "test") if self._key(cell, seed, split) not in known]
        if not todo:
            return
        if self.progress is not None:
            self.progress(f"{cell.method} {cell.site} @ {cell.positions}, seed {seed}")
        begun = time.perf_counter()
        fitted = self.plan(cell, seed) if plan is None else plan
        for split in todo:
            score = evaluate(fitted, (splits or self.splits)[split])
            seconds = time.perf_counter() - begun
            row = self._row(cell, seed, split, score, seconds)
            self.rows.append(row)
            begun = time.perf_counter()
            yield row

    def _fitted(self, cell: Cell, seed: int, model: nn.Module, splits: Mapping[str, PairData]) -> Plan:
        width = resolve(model, cell.site).width
        if width is None:
            raise InterveneError(f"Site {cell.site}: its width is not known before a forward pass. Name another.")
        plan = METHODS[cell.method](cell.site, self.where(cell.positions), width, cell.rank or 0, seed)
        budget = self.budget
        fit(model, plan, splits["train"], steps=budget.steps, batch_size=budget.batch_size, lr=budget.lr, seed=seed)
        return plan

    def _row(self, cell: Cell, seed: int, split: str, score: Score, seconds: float) -> Row:
        baselines = dict(self.facts.baselines[split])
        elsewhere = cell.method.removeprefix("control:") in self.others  # the accuracy is not that model's
        return Row(
            task=self.facts.task,
            model=self.facts.model,
            variable=self.facts.variable,
            site=str(cell.site),
            layer=cell.site.layer,
            component=cell.site.component,
            positions=cell.positions,
            position_label=self.facts.labels.get(cell.positions, cell.positions),
            method=cell.method,
            rank=cell.rank,
            seed=seed,
            split=split,
            n=score.n,
            iia=score.iia,
            low=score.low,
            high=score.high,
            copy_base=baselines.pop("copy_base"),
            copy_source=baselines.pop("copy_source"),
            majority=baselines.pop("majority"),
            task_accuracy=None if elsewhere else self.facts.accuracy.get(split),
            seconds=seconds,
            extra=baselines,
            kinds=score.kinds,
        )


def _cell(row: Row) -> Cell:
    return Cell(Site.parse(row.site), row.positions, row.method, row.rank)
