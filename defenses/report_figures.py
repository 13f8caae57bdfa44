"""Figures of a training's report, as what Plotly draws: lines over steps, trait against skill, scores of a detector.

Names are escaped, because Plotly reads a little HTML in labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Figure = dict[str, Any]
Points = Mapping[str, Sequence[tuple[float, float]]]  # name -> (x, y)

# Told apart with any colour vision, on light and dark grounds (Okabe and Ito's set without black and yellow).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#8c564b")
HEIGHT = 360


def lines(series: Points, *, y: str, x: str = "optimiser step") -> Figure:
    """Return lines over steps, one per name."""
    data = [
        {
            "type": "scatter",
            "mode": "lines" if len(points) > 1 else "markers",
            "name": escape(name),
            "x": [point[0] for point in points],
            "y": [point[1] for point in points],
            "line": {"color": COLOURS[number % len(COLOURS)], "width": 1.6},
            "hovertemplate": f"{escape(name)}<br>{x} %{{x}}<br>{y} %{{y:.4g}}<extra></extra>",
        }
        for number, (name, points) in enumerate(series.items())
    ]
    return {"data": data, "layout": _layout(x, y)}


def pareto(comparison: Mapping[str, Any]) -> Figure:
    """Return the means of trait against skill, one point per variant with its interval over seeds both ways."""
    found = comparison["pareto"]
    ends = {(row["variant"], row["metric"]): row for row in comparison["rows"]}
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
                "textposition": "top center",
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
    layout = _layout(f"{found['trait']} (lower is better)", found["skill"])
    layout["showlegend"] = False
    layout["height"] = 440
    return {"data": data, "layout": layout}


def histogram(scores: Mapping[str, Sequence[float]], thresholds: Sequence[float] = ()) -> Figure:
    """Return the scores of a detector by kind of sample, the thresholds as lines."""
    data = [
        {
            "type": "histogram",
            "name": f"{name} (n {len(values)})",
            "x": list(values),
            "histnorm": "probability",
            "opacity": 0.6,
            "nbinsx": 40,
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
