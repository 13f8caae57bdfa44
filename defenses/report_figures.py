"""Figures of a training's report, as what Plotly draws: lines over steps, trait against skill, scores of a detector.

Names are escaped, because Plotly reads a little HTML in labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Figure = dict[str, Any]
Points = Mapping[str, Sequence[tuple[float, float | None]]]  # name -> (x, y), y None: a gap

# Told apart with any colour vision, on light and dark grounds (Okabe and Ito's set without black and yellow).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#8c564b")
HEIGHT = 360
FEW = 12  # points of a line, up to which each is marked
BINS = 40
AROUND = (
    "top center",
    "bottom center",
    "middle right",
    "middle left",
    "bottom right",
    "top left",
    "top right",
    "bottom left",
)


def lines(series: Points, *, y: str, x: str = "optimiser step", places: Mapping[str, int] | None = None) -> Figure:
    """Return lines over steps, one per name, with markers where there are few.

    Args:
        places: name -> number of its colour, where several figures show the same names.
    """
    numbers = places or {name: number for number, name in enumerate(series)}
    data = [
        {
            "type": "scatter",
            "mode": "lines" if len(points) > FEW else "lines+markers",
            "name": escape(name),
            "x": [point[0] for point in points],
            "y": [point[1] for point in points],
            "line": {"color": COLOURS[numbers[name] % len(COLOURS)], "width": 1.6},
            "hovertemplate": f"{escape(name)}<br>{x} %{{x}}<br>{y} %{{y:.4g}}<extra></extra>",
        }
        for name, points in series.items()
    ]
    layout = _layout(x, y)
    layout["showlegend"] = len(series) > 1 or y not in series  # a line that the axis does not name
    return {"data": data, "layout": layout}


def pareto(comparison: Mapping[str, Any]) -> Figure:
    """Return the means of trait against skill, one point per variant with its interval both ways.

    Over prompts where there are such, else over seeds: Student's intervals of two seeds would fill the page.
    """
    found = comparison["pareto"]
    ends = {(row["variant"], row["metric"]): with_interval(row, comparison) for row in comparison["rows"]}
    data = []
    for number, point in enumerate(found["points"]):
        name, colour = escape(point["variant"]), COLOURS[number % len(COLOURS)]
        across, up = (ends[point["variant"], found[one]] for one in ("trait", "skill"))
        data.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "name": name,
                "text": [name],
                "textposition": AROUND[number % len(AROUND)],
                "cliponaxis": False,
                "x": [point["trait"]],
                "y": [point["skill"]],
                "error_x": _error(across),
                "error_y": _error(up),
                "marker": {
                    "color": colour,
                    "size": 11,
                    "symbol": "circle" if point["front"] else "circle-open",
                },
                "customdata": [["on the front" if point["front"] else "dominated"]],
                "hovertemplate": f"{name}<br>{found['trait']} {told(across)}<br>{found['skill']} {told(up)}"
                "<br>%{customdata[0]}<extra></extra>",
            }
        )
    layout = _layout(
        *(f"{found[one]} ({end} is good)" for one, end in zip(("trait", "skill"), _ends(found), strict=True))
    )
    layout["showlegend"] = False
    layout["height"] = 440
    return {"data": data, "layout": layout}


def _ends(found: Mapping[str, Any]) -> Sequence[str]:
    """Return which ends of trait and skill are good."""
    ends: Sequence[str] = found.get("good", ("low", "high"))
    return ends


def histogram(scores: Mapping[str, Sequence[float]], thresholds: Sequence[float] = ()) -> Figure:
    """Return the scores of a detector by kind of sample, in the same bins, the thresholds as lines."""
    every = [value for values in scores.values() for value in values]
    low, high = (min(every), max(every)) if every else (0.0, 1.0)
    size = (high - low) / BINS or 1.0
    data = [
        {
            "type": "histogram",
            "name": f"{name} (n {len(values)})",
            "x": list(values),
            "histnorm": "probability",
            "opacity": 0.6,
            "xbins": {"start": low, "end": high + size, "size": size},
            "marker": {"color": COLOURS[number % len(COLOURS)]},
        }
        for number, (name, values) in enumerate(scores.items())
    ]
    layout = _layout("score, higher is more suspicious", "share")
    layout["barmode"] = "overlay"
    layout["shapes"] = [
        {"type": "line", "x0": one, "x1": one, "yref": "paper", "y0": 0, "y1": 1, "line": {"dash": "dot", "width": 1}}
        for one in thresholds
    ]
    return {"data": data, "layout": layout}


def with_interval(row: Mapping[str, Any], comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a comparison with its interval over prompts in place of that over seeds, where there is one."""
    over = comparison.get("prompts", {}).get(row["metric"], {}).get(row["variant"], {}).get("mean")
    return {**row, "low": over["low"], "high": over["high"]} if over else dict(row)


def told(row: Mapping[str, Any]) -> str:
    """Return a mean with its interval, as text."""
    if row.get("low") is None or row.get("high") is None:
        return f"{row['mean']:.3f} (n {row['n']}: no interval)"
    return f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _error(row: Mapping[str, Any]) -> dict[str, Any]:
    if row.get("low") is None or row.get("high") is None:
        return {"visible": False}
    return {
        "type": "data",
        "symmetric": False,
        "array": [row["high"] - row["mean"]],
        "arrayminus": [row["mean"] - row["low"]],
        "thickness": 1,
        "width": 4,
    }


def _layout(x: str, y: str) -> dict[str, Any]:
    return {
        "height": HEIGHT,
        "margin": {"l": 60, "r": 16, "t": 16, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": {"title": {"text": x}, "zeroline": False},
        "yaxis": {"title": {"text": y}, "zeroline": False},
        "legend": {"orientation": "h", "y": 1.12},
        "hovermode": "closest",
    }
