"""What a run says on the terminal: progress, the table of scores, the losses of fits.

Up to `FEW` places are one table with intervals, or a line per cell where there are many methods; more are one map per
method, layers down and positions across.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from alignments.metrics import NoVerdict, SeedMean, mean_over_seeds, short, verdict, wilson
from alignments.problem import Problem, Report
from alignments.rows import Cell, Row
from alignments.scoring import Cell as Searched

FEW = 24  # places
LINES = 40
MARK = "*"  # beside the cell that was chosen on select

console = Console(width=None if sys.stdout.isatty() else 120)


def say(text: str) -> None:
    """Print a line as it is: no wrapping, no colours for numbers, no square brackets read as markup."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def progress_bars() -> Iterator[Report]:
    """Yield report(text, done, total), shown as one bar per phase on a terminal and as lines elsewhere."""
    if not sys.stdout.isatty():
        shown_at: dict[str, float] = {}

        def line(text: str, done: int, total: int) -> None:
            phase = text.split(" (")[0]
            if 0 < total <= done or time.monotonic() - shown_at.get(phase, -1e9) > 10:
                shown_at[phase] = time.monotonic()
                say(f"{text}: {done}" + (f"/{total}" if total else ""))

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def bar(text: str, done: int, total: int) -> None:
            phase = text.split(" (")[0]
            if phase not in tasks:
                tasks[phase] = bars.add_task(text, total=total or None)
            bars.update(tasks[phase], completed=done, total=total or None, description=text)

        yield bar


def losses_told(every: int) -> Callable[[Searched, Sequence[int], int, float], None] | None:
    """Return what prints the loss of a fit every so many steps, for `Scorer.told`; None: it is never printed."""
    if not every:
        return None

    def told(cell: Searched, seeds: Sequence[int], step: int, loss: float) -> None:
        if step % every == 0 or step == 1:
            named = f"{cell.method} {cell.site} @ {cell.positions}, seed {', '.join(map(str, seeds))}"
            say(f"{named}: step {step}, loss {loss:.4f}")

    return told


def accuracy_of(problem: Problem) -> dict[str, dict[str, float]]:
    """Return split -> share of pairs whose base and source the unedited model answers rightly: n, value, low, high."""
    found: dict[str, dict[str, float]] = {}
    for split, value in problem.facts.accuracy.items():
        if value is not None:
            n = len(problem.splits[split])
            low, high = wilson(value * n, n)
            found[split] = {"n": n, "value": value, "low": low, "high": high}
    return found


def print_accuracy(problem: Problem) -> None:
    """Print what the model can do before anything is aligned, with Wilson's 95 % interval."""
    told = [
        f"{split} {one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}] (n={one['n']})"
        for split, one in accuracy_of(problem).items()
    ]
    if told:
        say("task accuracy of the unedited model, base and source both right: " + ", ".join(told))


def print_table(rows: Sequence[Row]) -> None:
    """Print IIA by cell, `MARK` beside the chosen cell of each method, and the baselines on the same pairs."""
    means = [mean for mean in mean_over_seeds(rows) if not mean.is_control and mean.split != "train"]
    if not means:
        return
    split = _split_of(means)
    shown = [mean for mean in means if mean.split == split]
    chosen = _chosen(rows)
    places = {(mean.cell.site, mean.position_label) for mean in shown}
    methods = {mean.method_text for mean in shown}
    if len(places) <= FEW and len(methods) <= 4:
        console.print(_list(shown, split, chosen))
    elif len(places) <= FEW and len(shown) <= LINES:
        console.print(_lines(shown, split, chosen))
    else:
        for name in dict.fromkeys(mean.method_text for mean in shown):
            for table in _maps([mean for mean in shown if mean.method_text == name], split, chosen):
                console.print(table)
    marked = f"{MARK} chosen on select; " if any(mean.cell in chosen for mean in shown) else ""
    say(f"{marked}baselines on the same pairs: " + ", ".join(map(str, shown[0].baselines)))


def _split_of(means: Sequence[SeedMean]) -> str:
    """Return test where every cell was scored there, else select."""
    on = {split: {mean.cell for mean in means if mean.split == split} for split in ("select", "test")}
    return "test" if on["test"] >= on["select"] else "select"


def _chosen(rows: Sequence[Row]) -> set[Cell]:
    """Return each method's cell that its verdict is about."""
    found = set()
    for method in dict.fromkeys(row.method for row in rows if not row.is_control):
        try:
            found.add(verdict([row for row in rows if row.method == method]).reported.cell)
        except NoVerdict:
            continue
    return found


def _list(means: Sequence[SeedMean], split: str, chosen: set[Cell]) -> Table:
    """Return one line per place, one column per method and rank, with intervals."""
    methods = list(dict.fromkeys(mean.method_text for mean in means))
    table = Table(title=f"IIA on {split}, with 95 % interval (mean over seeds)")
    for heading in ("site", "position", *methods):
        table.add_column(heading, justify="left" if heading in ("site", "position") else "right")
    by_place = {(mean.cell.site, mean.position_label, mean.method_text): mean for mean in means}
    for site, label in dict.fromkeys((mean.cell.site, mean.position_label) for mean in means):
        cells = [by_place.get((site, label, method)) for method in methods]
        table.add_row(site, label, *(_with_interval(mean, chosen) for mean in cells))
    return table


def _lines(means: Sequence[SeedMean], split: str, chosen: set[Cell]) -> Table:
    """Return one line per cell, with its interval."""
    table = Table(title=f"IIA on {split}, with 95 % interval (mean over seeds)")
    for heading in ("site", "position", "method", "IIA"):
        table.add_column(heading, justify="right" if heading == "IIA" else "left")
    for mean in sorted(means, key=lambda one: (one.layer or 0, one.cell.site, one.position_label)):
        table.add_row(mean.cell.site, mean.position_label, mean.method_text, _with_interval(mean, chosen))
    return table


def _with_interval(mean: SeedMean | None, chosen: set[Cell]) -> str:
    if mean is None:
        return "-"
    mark = MARK if mean.cell in chosen else " "
    return f"{mean.iia:.3f}{mark}[{mean.low:.3f}, {mean.high:.3f}]"


def _maps(means: Sequence[SeedMean], split: str, chosen: set[Cell]) -> Iterator[Table]:
    """Yield the map of one method, sites down and positions across, in parts that fit into the terminal."""
    labels = list(dict.fromkeys(mean.position_label for mean in means))
    sites = sorted({(-1 if mean.layer is None else mean.layer, mean.cell.site) for mean in means})
    by_place = {(mean.cell.site, mean.position_label): mean for mean in means}
    wide = max(5, *map(len, labels)) + 3
    fitting = max(1, (console.width - max(len(site) for _, site in sites) - 4) // wide)
    for start in range(0, len(labels), fitting):
        table = Table(title=f"IIA of {means[0].method_text} on {split}" + (" (continued)" if start else ""))
        table.add_column("site")
        part = labels[start : start + fitting]
        for label in part:
            table.add_column(label, justify="right", no_wrap=True)
        for _, site in sites:
            cells = [by_place.get((site, label)) for label in part]
            table.add_row(site, *(_short(mean, chosen) for mean in cells))
        yield table


def _short(mean: SeedMean | None, chosen: set[Cell]) -> str:
    return "- " if mean is None else f"{short(mean.iia)}{MARK if mean.cell in chosen else ' '}"
