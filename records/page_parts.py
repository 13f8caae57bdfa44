"""The pieces of HTML that report.html is made of: tables that sort, figures that can be saved, values as they are.

Every text is escaped here and nowhere else twice: callers pass plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from records.page import PAGE, SCRIPT, STYLE

ABSENT = "-"  # what a table shows where there is no value
WIDE = 7  # positions of a heatmap from which on half a page is too narrow for its numbers

Figure = dict[str, Any]  # what Plotly draws: data and layout
Entry = tuple[str, float | None, str]  # text, what to sort by if not the text, class


def interval(score: Any) -> Entry:
    """Return the entry of anything with `low` and `high`."""
    return f"[{score.low:.3f}, {score.high:.3f}]", score.low, "number"


def whole(number: int) -> Entry:
    """Return the entry of a count."""
    return str(number), number, "number"


def share(value: float | None, digits: int = 3) -> Entry:
    """Return the entry of a number that may be absent."""
    return (ABSENT if value is None else f"{value:.{digits}f}"), value, "number"


def text(value: str, css: str = "") -> Entry:
    """Return the entry of a text, sorted by itself."""
    return value, None, css


def line(entries: Sequence[Entry], css: str = "") -> str:
    """Return one line of a table."""
    cells = []
    for shown, value, kind in entries:
        sort = ("" if shown == ABSENT else shown) if value is None else repr(float(value))
        cells.append(f'<td{css_class(kind)} data-value="{escape(sort)}">{escape(shown)}</td>')
    return f"<tr{css_class(css)}>{''.join(cells)}</tr>"


def css_class(name: str) -> str:
    """Return the attribute, or nothing for no class."""
    return f' class="{name}"' if name else ""


def table(heads: Sequence[str], lines: Sequence[str], *, sortable: bool = False, narrow: bool = False) -> str:
    """Return a table; a heading that begins with # heads a column of numbers."""
    cell: Callable[[str], str] = (lambda name: f'<button type="button">{name}</button>') if sortable else str
    shown = "".join(
        f'<th scope="col"{css_class("number" if head.startswith("#") else "")}>{cell(escape(head.lstrip("#")))}</th>'
        for head in heads
    )
    body = "\n".join(lines)
    opening = f"<table{css_class('narrow' if narrow else '')}>"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table">{opening}'
        f"<thead><tr>{shown}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def figure(name: str, caption: str, summary: str, drawn: Figure) -> str:
    """Return the place where the page draws a figure, with its caption and the buttons that save it."""
    height = int(drawn["layout"]["height"])
    first = drawn["data"][0]
    wide = first["type"] != "heatmap" or len(first["x"]) > WIDE
    file_name = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-") or name
    buttons = "".join(
        f'<button type="button" data-figure="{name}" data-format="{kind}" data-name="{file_name}" '
        f'aria-label="Save this figure as {kind.upper()}">{kind.upper()}</button>'
        for kind in ("png", "svg")
    )
    place = f'<div id="{name}" role="img" aria-label="{escape(summary)}" style="height: {height}px"></div>'
    head = f'<figcaption><span>{escape(caption)}</span><span class="save">{buttons}</span></figcaption>'
    return f"<figure{css_class('wide' if wide else '')}>{head}{place}</figure>\n"


def entries(values: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> str:
    """Return nested values as a table of dotted names, with a column of sources if there are any."""
    lines = []
    for name, value in _flat(values):
        told = [text(name, "name"), text(value)]
        if sources:
            told.append(text(sources.get(name, "")))
        lines.append(line(told))
    return table(["Name", "Value", *(["From"] if sources else [])], lines, narrow=True)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(one, Mapping) for one in value):
            flat += _flat({str(number): one for number, one in enumerate(value, start=1)}, f"{prefix}{name}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            flat.append((f"{prefix}{name}", ABSENT if value is None else shown))
    return flat


def json_in_html(value: object) -> str:
    """Return JSON that cannot end the script element it stands in, whatever its texts hold."""
    told = json.dumps(value, allow_nan=False)
    return told.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def page(title: str, subtitle: str, body: str, figures: Mapping[str, Figure], *, footer: str = "") -> str:
    """Return a whole page that loads nothing: `body` and `footer` are HTML, the other texts are plain."""
    from plotly.offline import get_plotlyjs  # 5 MB of JavaScript: read only when a page is made

    return PAGE.format(
        title=escape(title),
        subtitle=escape(subtitle),
        style=STYLE,
        body=body,
        footer=footer,
        figures=json_in_html(figures),
        plotly=get_plotlyjs(),
        script=SCRIPT,
    )
