"""The figures of a report, as plain Plotly dicts: heatmaps of IIA, best cells against trivial baselines, rank curves.

Dicts and not `plotly.graph_objects`, so that drawing needs no import; a test lets Plotly check them. Every text that
comes from a task or a model is escaped, because Plotly reads a little HTML in labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from alignments.curves import RankCurve
from alignments.metrics import Baseline, SeedMean, Verdict
from alignments.rows import Cell
from alignments.statistics import Tested

Figure = dict[str, Any]

CLEAR = "rgba(0,0,0,0)"  # the page shows through, in either theme
# One hue per kind, mid-bright so that it reads on white and on near-black; shapes differ as well.
KINDS = {
    "method": ("#3e8fe0", "circle"),
    "control": ("#d6832b", "diamond"),
    "baseline": ("#868c96", "square"),
}
# Blue over green to yellow, never near-black nor near-white, so that both ends stand out on both pages.
SCALE = ((0.0, "#414487"), (0.25, "#2f6c8e"), (0.5, "#21918c"), (0.75, "#6ccd5a"), (1.0, "#fde725"))


def kind_of_site(mean: SeedMean) -> str:
    """Return the site without its layer: what one heatmap is about ("block_output", "head_output[2]")."""
    return mean.cell.site if mean.layer is None else mean.cell.site.partition(".")[2] or mean.cell.site


def heatmap(means: Sequence[SeedMean], chosen: SeedMean | None, tested: Mapping[Cell, Tested]) -> Figure:
    """Return IIA by layer (bottom up) x position, of one method on one kind of site; `chosen` is outlined.

    A star marks cells that `tested` calls discoveries; pointing at a cell tells its adjusted p-value.
    """
    columns = list(dict.fromkeys(mean.cell.positions for mean in means))
    labels = {mean.cell.positions: mean.position_label for mean in means}
    if len(set(labels.values())) < len(labels):  # two positions of one label would fall into one column
        labels = {positions: positions for positions in columns}
    layers = sorted({mean.layer for mean in means}, key=lambda layer: -1 if layer is None else layer)
    at = {(mean.layer, mean.cell.positions): mean for mean in means}
    grid = [[at.get((layer, column)) for column in columns] for layer in layers]
    rows = [_layer_name(layer) for layer in layers]
    trace = {
        "type": "heatmap",
        "x": [escape(labels[column]) for column in columns],
        "y": rows,
        "z": [[None if mean is None else mean.iia for mean in line] for line in grid],
        "hovertext": [[_hover(mean, tested) for mean in line] for line in grid],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "hoverongaps": False,
        "colorscale": [list(stop) for stop in SCALE],
        "zmin": 0,
        "zmax": 1,
        "xgap": 2,
        "ygap": 2,
        "colorbar": {"thickness": 10, "outlinewidth": 0, "tickvals": [0, 0.25, 0.5, 0.75, 1]},
    }
    layout = _layout(height=110 + 28 * max(len(rows), 3))
    # Ranges are given because the texts would otherwise pad them.
    layout["xaxis"] |= {"type": "category", "title": {"text": "position"}, "range": [-0.5, len(columns) - 0.5]}
    layout["yaxis"] |= {"type": "category", "title": {"text": "layer"}, "range": [-0.5, len(rows) - 0.5]}
    for axis in ("xaxis", "yaxis"):
        layout[axis]["showgrid"] = False
    if chosen is not None and (chosen.layer, chosen.cell.positions) in at:
        column, row = columns.index(chosen.cell.positions), layers.index(chosen.layer)
        box = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5}
        layout["shapes"] = [{"type": "rect", **box, "line": {"width": 3}}]
    names = {mean.cell.positions: escape(labels[mean.cell.positions]) for mean in means}
    return {"data": [trace, _cell_texts(means, names, tested)], "layout": layout}


def _cell_texts(means: Sequence[SeedMean], names: Mapping[str, str], tested: Mapping[Cell, Tested]) -> Figure:
    """Return the numbers in the cells as a trace of their own: a heatmap's texts can have only one colour."""
    return {
        "type": "scatter",
        "mode": "text",
        "x": [names[mean.cell.positions] for mean in means],
        "y": [_layer_name(mean.layer) for mean in means],
        "text": [f"{mean.iia:.2f}{'*' if starred(mean, tested) else ''}" for mean in means],
        "textfont": {"color": [ink_on(mean.iia) for mean in means]},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def starred(mean: SeedMean, tested: Mapping[Cell, Tested]) -> bool:
    """Return whether the cell is a discovery among all that were tested."""
    return mean.cell in tested and tested[mean.cell].significant


def colour_at(value: float) -> tuple[float, float, float]:
    """Return the scale's red, green and blue (0 to 1) at a value from 0 to 1, interpolated as Plotly does."""
    value = min(max(value, 0.0), 1.0)
    (left, low), (right, high) = next(pair for pair in pairwise(SCALE) if value <= pair[1][0])
    share = (value - left) / (right - left)
    a, b = ([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in (low, high))
    red, green, blue = (x + share * (y - x) for x, y in zip(a, b, strict=True))
    return red, green, blue


def luminance(colour: tuple[float, float, float]) -> float:
    """Return the relative luminance of an sRGB colour. Source: WCAG 2.2, "relative luminance"."""
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def ink_on(value: float) -> str:
    """Return black or white, whichever contrasts more with the cell: always at least 4.5 to 1."""
    return "#000000" if (luminance(colour_at(value)) + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def heatmap_summary(means: Sequence[SeedMean], tested: Mapping[Cell, Tested]) -> str:
    """Return what a heatmap shows, for those who cannot see it."""
    low, high = min(means, key=lambda mean: mean.iia), max(means, key=lambda mean: mean.iia)
    stars = sum(starred(mean, tested) for mean in means)
    return (
        f"Heatmap of IIA by layer and position, {high.method_text}, {kind_of_site(high)}, {high.split} split: "
        f"{len(means)} cells from {low.iia:.2f} ({low.cell.site} @ {low.position_label}) to {high.iia:.2f} "
        f"({high.cell.site} @ {high.position_label}); {stars} significantly above their best trivial baseline. "
        "The table of cells holds every number."
    )


def comparison(best: Verdict, per_method: Sequence[SeedMean], controls: Sequence[SeedMean]) -> Figure:
    """Return best cells, controls and trivial baselines on one axis from 0 to 1, each with its interval.

    Small dots are single seeds; the dashed line is the upper end of the best trivial baseline: what to be above.
    """
    entries = [("method", _entry_name(mean), mean.iia, mean.low, mean.high, mean.values) for mean in per_method]
    entries += [("control", _entry_name(mean), mean.iia, mean.low, mean.high, mean.values) for mean in controls]
    baselines = sorted(best.reported.baselines, key=lambda one: -one.value)
    entries += [("baseline", escape(one.name), one.value, one.low, one.high, ()) for one in baselines]
    traces: list[Figure] = []
    for kind, (colour, symbol) in KINDS.items():
        own = [entry[1:] for entry in entries if entry[0] == kind]
        if not own:
            continue
        names, values, lows, highs, seeds = zip(*own, strict=True)
        text = [f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in zip(values, lows, highs, strict=True)]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": {"method": "best cell", "control": "control", "baseline": "trivial baseline"}[kind],
                "x": list(values),
                "y": list(names),
                "text": text,
                "hovertemplate": "%{y}<br>%{text}<extra></extra>",
                "marker": {"color": colour, "symbol": symbol, "size": 11},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [high - value for value, high in zip(values, highs, strict=True)],
                    "arrayminus": [value - low for value, low in zip(values, lows, strict=True)],
                    "color": colour,
                    "thickness": 2,
                    "width": 5,
                },
            }
        )
        dots = [(one, name) for name, many in zip(names, seeds, strict=True) if len(many) > 1 for one in many]
        if dots:
            traces.append(_seed_dots(dots, colour))
    layout = _layout(height=120 + 38 * len(entries))
    layout["xaxis"] |= {"range": [-0.02, 1.02], "title": {"text": "IIA"}, "zeroline": False, "tickvals": _TICKS}
    layout["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
    layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    line = {"width": 1, "dash": "dash"}
    layout["shapes"] = [
        {"type": "line", "x0": best.baseline.high, "x1": best.baseline.high, "y0": 0, "y1": 1, "yref": "paper"}
        | {"line": line}
    ]
    layout["yaxis"]["categoryarray"] = [entry[1] for entry in entries]
    layout["yaxis"]["categoryorder"] = "array"
    return {"data": traces, "layout": layout}


_TICKS = [0, 0.2, 0.4, 0.6, 0.8, 1]


def _seed_dots(dots: Sequence[tuple[float, str]], colour: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "showlegend": False,
        "x": [value for value, _ in dots],
        "y": [name for _, name in dots],
        "hovertemplate": "one seed: %{x:.3f}<extra></extra>",
        "marker": {"color": colour, "symbol": "line-ns-open", "size": 16, "opacity": 0.7, "line": {"width": 1.5}},
    }


# Distinct in hue and lightness on white and on near-black; symbols differ as well.
CURVES = (
    ("#3e8fe0", "circle"),
    ("#d6832b", "diamond"),
    ("#3fa878", "square"),
    ("#c162b8", "triangle-up"),
    ("#868c96", "cross"),
    ("#d65a5a", "star"),
)


def rank_figure(curves: Sequence[RankCurve], baseline: Baseline | None) -> Figure:
    """Return IIA by rank, one line per curve with intervals; a ring marks each smallest sufficient rank."""
    traces: list[Figure] = []
    rings: list[tuple[int, float]] = []
    for number, curve in enumerate(curves):
        colour, symbol = CURVES[number % len(CURVES)]
        shown = [(point.rank, point.shown) for point in curve.points]
        points = [(rank, mean) for rank, mean in shown if mean is not None]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape(curve.name),
                "x": [rank for rank, _ in points],
                "y": [mean.iia for _, mean in points],
                "text": [f"{escape(str(mean))}, {mean.split} split" for _, mean in points],
                "hovertemplate": "%{text}<extra></extra>",
                "marker": {"color": colour, "symbol": symbol, "size": 9},
                "line": {"color": colour, "width": 2},
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [mean.high - mean.iia for _, mean in points],
                    "arrayminus": [mean.iia - mean.low for _, mean in points],
                    "color": colour,
                    "thickness": 1.5,
                    "width": 4,
                },
            }
        )
        if curve.smallest is not None and curve.smallest.shown is not None and not curve.is_control:
            rings.append((curve.smallest.rank, curve.smallest.shown.iia))
    traces.append(_rings(rings))
    ranks = sorted({point.rank for curve in curves for point in curve.points})
    layout = _layout(height=340 + 22 * len(curves))
    layout["xaxis"] |= {"type": "log", "title": {"text": "rank (dimensions swapped)"}, "zeroline": False}
    layout["xaxis"] |= {"tickvals": ranks, "ticktext": [str(rank) for rank in ranks], "minor": {"ticks": ""}}
    layout["yaxis"] |= {"range": [-0.02, 1.04], "title": {"text": "IIA"}, "zeroline": False, "tickvals": _TICKS}
    layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    if baseline is not None:
        across = {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": baseline.high, "y1": baseline.high}
        layout["shapes"] = [across | {"line": {"width": 1, "dash": "dash"}}]
    return {"data": traces, "layout": layout}


def _rings(rings: Sequence[tuple[int, float]]) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "smallest good enough on select",
        "x": [rank for rank, _ in rings],
        "y": [value for _, value in rings],
        "hoverinfo": "skip",
        "marker": {"color": "#868c96", "symbol": "circle-open", "size": 19, "line": {"width": 2}},
    }


def rank_summary(curves: Sequence[RankCurve]) -> str:
    """Return what the rank curves show, for those who cannot see them."""
    told = [
        f"{curve.name}: " + ", ".join(f"{point.shown.iia:.2f} at {point.rank}" for point in curve.points if point.shown)
        for curve in curves
    ]
    return f"IIA by rank. {'; '.join(told)}."


def _entry_name(mean: SeedMean) -> str:
    return f"{escape(mean.method_text)}<br>{escape(mean.cell.site)} @ {escape(mean.position_label)}"


def _layer_name(layer: int | None) -> str:
    return "no layer" if layer is None else f"L{layer}"


def _hover(mean: SeedMean | None, tested: Mapping[Cell, Tested]) -> str:
    if mean is None:
        return ""
    seeds = ", ".join(f"{value:.3f} (seed {seed})" for seed, value in zip(mean.seeds, mean.values, strict=True))
    return "<br>".join(
        [
            f"<b>{escape(mean.cell.site)} @ {escape(mean.position_label)}</b>",
            f"{escape(mean.method_text)}, {mean.split} split",
            f"IIA {mean.iia:.3f} [{mean.low:.3f}, {mean.high:.3f}], n={mean.n}",
            f"seeds: {seeds}",
            f"best trivial baseline: {escape(str(mean.best_baseline))}",
            *([escape(str(tested[mean.cell]))] if mean.cell in tested else []),
        ]
    )


def _layout(height: int) -> Figure:
    axis: Figure = {"automargin": True, "fixedrange": True, "ticks": ""}
    return {
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 14, "b": 8},
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", "size": 12},
        "hoverlabel": {"align": "left"},
        "xaxis": dict(axis),
        "yaxis": dict(axis),
    }
