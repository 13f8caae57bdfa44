"""What leaves a search besides the report: rows as CSV, figures as files, and a summary for the terminal.

    write_csv(record.finished(), "rows.csv")
    write_figures(record.finished(), "figures", formats=("svg",))      # drawn here: no browser, no plotting library
    print(text_summary(record.finished()))

Figures show one split: test where the search scored whole maps there, otherwise select.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from alignments.curves import RankCurve, rank_curves
from alignments.metrics import NoVerdict, SeedMean, Verdict, mean_over_seeds, method_text, verdict
from alignments.report_figures import CURVES, colour_at, ink_on, kind_of_site, starred
from alignments.rows import Cell, Row
from alignments.statistics import Tested, fdr
from records.drawing import SOFT, Box, Dot, Drawing, Line, Text, require_pillow

FORMATS = ("svg", "png")
CELL_WIDTH, CELL_HEIGHT = 58, 28
_CHARACTER = 6.8  # width of a digit or letter at size 12, generously


def csv_text(rows: Iterable[Row]) -> str:
    """Return the rows as CSV: the fields of a row, then a column for every extra baseline, kind of pair and fact.

    Columns are the union over all rows; what a row does not have is empty. Names are those of the
    flat row: "extra.<baseline>", "iia.<kind>", "fact.<name>".
    """
    flat = [row.to_json() for row in rows]
    names = dict.fromkeys(name for values in flat for name in values)
    plain = [name for name in names if "." not in name]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [*plain, *(name for name in names if "." in name)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return stream.getvalue()


def write_csv(rows: Iterable[Row], path: str | Path) -> Path:
    """Write `csv_text(rows)` and return the path.

    Raises:
        ValueError: there are no rows.
    """
    rows, path = list(rows), Path(path)
    if not rows:
        raise ValueError(f"CSV {path}: there are no rows to write. Finish at least one cell first.")
    path.write_text(csv_text(rows), encoding="utf-8")
    return path


def write_figures(rows: Iterable[Row], folder: str | Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write each heatmap and each variable's rank curves to `folder`, once per format, and return the paths.

    Names say what is drawn: "position-heatmap-das-rank-8-block-output.svg", "position-rank-curves.svg".

    Raises:
        ValueError: there are no rows, or a format other than svg and png.
        MissingPillow: png without Pillow; nothing is written then.
    """
    rows, folder = list(rows), Path(folder)
    unknown = [one for one in formats if one not in FORMATS]
    if not rows or not formats or unknown:
        found = f"formats {', '.join(formats) or 'none'}, {len(rows)} rows"
        raise ValueError(f"Figures in {folder}: {found}. Give rows, and formats among {', '.join(FORMATS)}.")
    if "png" in formats:
        require_pillow()
    folder.mkdir(parents=True, exist_ok=True)
    return [drawing.save(folder / f"{name}.{kind}") for name, drawing in drawings(rows).items() for kind in formats]


def drawings(rows: Sequence[Row]) -> dict[str, Drawing]:
    """Return every figure of `rows` by its file name without ending."""
    found: dict[str, Drawing] = {}
    for own in _searches(rows).values():
        variable = _slug(own[0].variable)
        means = mean_over_seeds(own)
        split = max(("test", "select", "train"), key=lambda name: sum(mean.split == name for mean in means))
        shown = [mean for mean in means if mean.split == split]
        candidates = {row.cell for row in own if row.is_candidate}
        tested = {one.mean.cell: one for one in fdr(mean for mean in shown if mean.cell in candidates)}
        maps: dict[tuple[str, int | None, str], list[SeedMean]] = {}
        for mean in shown:
            maps.setdefault((mean.cell.method, mean.cell.rank, kind_of_site(mean)), []).append(mean)
        for (method, rank, kind), group in maps.items():
            if len(group) > 1:
                found[_free(f"{variable}-heatmap-{_slug(f'{method_text(method, rank)} {kind}')}", found)] = (
                    heatmap_drawing(group, tested)
                )
        curves = rank_curves(own)
        if curves:
            found[_free(f"{variable}-rank-curves", found)] = curve_drawing(curves)
    return found


def _searches(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.task, row.model, row.variable), []).append(row)
    return groups


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"


def _free(name: str, taken: Mapping[str, Drawing]) -> str:
    """Return the name, numbered if a search of another task or model has taken it."""
    number = 2
    while name in taken:
        name, number = f"{re.sub(r'-[0-9]+$', '', name) if number > 2 else name}-{number}", number + 1
    return name


def heatmap_drawing(means: Sequence[SeedMean], tested: Mapping[Cell, Tested]) -> Drawing:
    """Return IIA by layer (bottom up) x position of one method, with stars as in the report."""
    columns = list(dict.fromkeys((mean.cell.positions, mean.position_label) for mean in means))
    layers = sorted({mean.layer for mean in means}, key=lambda layer: -1 if layer is None else layer)
    names = ["no layer" if layer is None else f"L{layer}" for layer in layers]
    left = 24 + max(len(name) for name in names) * _CHARACTER
    width = max(CELL_WIDTH, *(len(label) * _CHARACTER + 10 for _, label in columns))
    top, first = 44, means[0]
    bottom = top + len(layers) * CELL_HEIGHT
    title = f"IIA of {first.method_text}, {kind_of_site(first)}, {first.split} split, {first.cell.variable}"
    drawing = Drawing(max(left + len(columns) * width + 24, len(title) * _CHARACTER + 48), bottom + 58, title)
    drawing.add(Text(left, 22, title, size=13))
    for row, name in enumerate(names):
        drawing.add(Text(left - 8, bottom - (row + 0.5) * CELL_HEIGHT, name, "end"))
    for column, (_, label) in enumerate(columns):
        drawing.add(Text(left + (column + 0.5) * width, bottom + 14, label, "middle"))
    for mean in means:
        column = columns.index((mean.cell.positions, mean.position_label))
        x, y = left + column * width, bottom - (layers.index(mean.layer) + 1) * CELL_HEIGHT
        red, green, blue = (round(255 * one) for one in colour_at(mean.iia))
        drawing.add(Box(x + 1, y + 1, width - 2, CELL_HEIGHT - 2, fill=f"#{red:02x}{green:02x}{blue:02x}"))
        number = f"{mean.iia:.2f}{'*' if starred(mean, tested) else ''}"
        drawing.add(Text(x + width / 2, y + CELL_HEIGHT / 2, number, "middle", colour=ink_on(mean.iia)))
    if any(starred(mean, tested) for mean in means):
        note = "* above the best trivial baseline, FDR 5 %"
        drawing.add(Text(left, bottom + 40, note, size=11, colour=SOFT))
        drawing.width = max(drawing.width, left + len(note) * _CHARACTER + 24)
    return drawing


def curve_drawing(curves: Sequence[RankCurve]) -> Drawing:
    """Return IIA by rank (logarithmic) with intervals; a ring marks each smallest sufficient rank."""
    left, top, width, height = 60.0, 44.0, 560.0, 280.0
    ranks = sorted({point.rank for curve in curves for point in curve.points})
    low, span = math.log(ranks[0]), math.log(ranks[-1]) - math.log(ranks[0]) or 1.0

    def across(rank: int) -> float:
        return left + 20 + (width - 40) * (math.log(rank) - low) / span

    def up(share: float) -> float:
        return top + height * (1 - share)

    title = f"IIA by rank, {curves[0].variable}"
    total = max(left + width + 24, max(len(curve.name) for curve in curves) * _CHARACTER + left + 40)
    drawing = Drawing(total, top + height + 62 + 20 * len(curves), title)
    drawing.add(Text(left, 22, title, size=13))
    for step in range(0, 11, 2):
        drawing.add(Line(((left, up(step / 10)), (left + width, up(step / 10))), "#d9d9e0"))
        drawing.add(Text(left - 8, up(step / 10), f"{step / 10:.1f}", "end"))
    for rank in ranks:
        drawing.add(Text(across(rank), top + height + 14, str(rank), "middle"))
    drawing.add(Text(left + width / 2, top + height + 34, "rank (dimensions swapped)", "middle", colour=SOFT))
    for number, curve in enumerate(curves):
        colour = CURVES[number % len(CURVES)][0]
        points = [(point.rank, point.shown) for point in curve.points if point.shown is not None]
        drawing.add(Line(tuple((across(rank), up(mean.iia)) for rank, mean in points), colour, 2))
        for rank, mean in points:
            drawing.add(Line(((across(rank), up(mean.low)), (across(rank), up(mean.high))), colour, 1.5))
            drawing.add(Dot(across(rank), up(mean.iia), 4, colour))
        if curve.smallest is not None and curve.smallest.shown is not None and not curve.is_control:
            drawing.add(Dot(across(curve.smallest.rank), up(curve.smallest.shown.iia), 9, SOFT, ring=True))
        y = top + height + 58 + 20 * number
        drawing.add(Line(((left, y), (left + 20, y)), colour, 2), Text(left + 28, y, curve.name))
    return drawing


def text_summary(rows: Iterable[Row]) -> str:
    """Return what a terminal should show of `rows`: per variable the verdict, its place, controls, best rank curves.

    Raises:
        ValueError: there are no rows.
    """
    groups = _searches(rows)
    if not groups:
        raise ValueError("Summary: there are no rows. Finish at least one cell first.")
    return "\n\n".join("\n".join(_summary(key, own)) for key, own in groups.items())


def _summary(key: tuple[str, str, str], rows: Sequence[Row]) -> list[str]:
    lines = [" / ".join(key)]
    try:
        best = verdict(rows)
    except NoVerdict as error:
        return [*lines, f"  {error}"]
    lines += [f"  {best.line}", f"  {_where(best)}"]
    if best.trivial:
        lines.append(f"  trivially solved by {', '.join(best.trivial)}: no score here can locate it")
    methods, places = dict.fromkeys(row.method for row in rows if not row.is_control), {_spot(best)}
    for method in methods if len(methods) > 1 else ():
        try:
            own = verdict([row for row in rows if row.method == method])
        except NoVerdict:
            continue
        places.add(_spot(own))
        if own.reported.cell != best.reported.cell:
            lines.append(f"  {own.reported.method_text}: {own.line}")
    lines += [f"  {one.method_text}: {one.iia:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in best.controls]
    curves = [curve for curve in rank_curves(rows) if (curve.method, curve.site, curve.positions) in places]
    return lines + [f"  {curve.sentence}" for curve in curves]


def _spot(best: Verdict) -> tuple[str, str, str]:
    cell = best.reported.cell
    return cell.method, cell.site, cell.positions


def _where(best: Verdict) -> str:
    score = best.reported
    return (
        f"{score.method_text} at {score.cell.site} @ {score.position_label}, chosen among {best.candidates} cells on "
        f"select, reported on test, n={score.n}: {'above' if best.above else 'NOT above'} the best trivial baseline "
        f"({best.baseline.name})"
    )
