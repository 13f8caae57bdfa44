"""One self-contained report.html from the rows of a search: verdict, heatmaps, baselines, cells, how it was run.

    write_report("runs/ioi/report.html", record.finished(), config=config, environment=facts)

The page loads nothing (`report_template` forbids it), reads in light and dark, and says in words and in a table what
its figures show. Rows that allow no verdict still give a report, with the reason where the verdict would stand: a
report must never cost a finished search.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from alignments.metrics import NoVerdict, SeedMean, Verdict, mean_over_seeds, verdict
from alignments.report_figures import Figure, comparison, heatmap, heatmap_summary, kind_of_site
from alignments.report_template import PAGE, SCRIPT, STYLE
from alignments.rows import Row

ABSENT = "-"  # what a table shows where there is no value
WIDE = 7  # positions of a heatmap from which on half a page is too narrow for its numbers


def write_report(
    path: str | Path,
    rows: Iterable[Row],
    *,
    config: Any = None,
    environment: Mapping[str, Any] | None = None,
    lint: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> Path:
    """Write the report of `rows` whole or not at all, and return its path. Arguments as in `render_report`."""
    path = Path(path)
    page = render_report(rows, config=config, environment=environment, lint=lint, title=title)
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8")
    os.replace(part, path)
    return path


def render_report(
    rows: Iterable[Row],
    *,
    config: Any = None,
    environment: Mapping[str, Any] | None = None,
    lint: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> str:
    """Return the page of `rows`, which may be of several variables.

    `config` is a mapping or has `to_json()` (a `RunDas` also shows where each value came from); `lint` is the task's
    own check of its pairs, `environment` what `environment.json` holds: nested mappings, shown as they are.

    Raises:
        ValueError: there are no rows.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("Report: there are no rows to report. Finish at least one cell first.")
    figures: dict[str, Figure] = {}
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.task, row.model, row.variable), []).append(row)
    body = [_variable_section(group, figures, named=len(groups) > 1) for group in groups.values()]
    if lint:
        body.append(f"<h2>Check of the task</h2>\n{_entries(lint)}")
    body += _run_sections(config, environment)
    tasks, models = ({key[place] for key in groups} for place in (0, 1))
    variables = ", ".join(dict.fromkeys(key[2] for key in groups))
    heading = title or f"Where does the model keep “{variables}”?"
    subtitle = f"Alignment search, task {', '.join(sorted(tasks))}, model {', '.join(sorted(models))}, {len(rows)} rows"
    from plotly.offline import get_plotlyjs  # 5 MB of JavaScript: read only when a page is made

    return PAGE.format(
        title=escape(heading),
        subtitle=escape(subtitle),
        style=STYLE,
        body="\n".join(body),
        figures=_json_in_html(figures),
        plotly=get_plotlyjs(),
        script=SCRIPT,
    )


def _variable_section(rows: Sequence[Row], figures: dict[str, Figure], *, named: bool) -> str:
    """Return verdict, figures and table of one variable, and add its figures to `figures`."""
    means = mean_over_seeds(rows)
    best, reason = _try_verdict(rows)
    per_method = _verdict_per_method(rows)
    chosen = {one.reported.cell for one in per_method}
    parts = [f"<h2>{escape(rows[0].variable)}</h2>"] if named else []
    parts.append(_verdict_box(best, reason, per_method))
    parts.append(_heatmap_section(means, per_method, figures))
    if best is not None:
        controls = _controls(means, best)
        name = f"figure-{len(figures)}"
        figures[name] = comparison(best, [one.reported for one in per_method], controls)
        summary = "Best cells, controls and trivial baselines with intervals: " + "; ".join(
            [str(one.reported) for one in per_method] + [str(one) for one in (*controls, *best.reported.baselines)]
        )
        parts.append(
            "<h2>Best cells against what needs no model</h2>\n"
            '<p class="soft">Each best cell was chosen on the select split and is shown on test. Thin ticks are single '
            "seeds. The dashed line is the upper end of the best trivial baseline's interval.</p>\n"
            + _figure(name, "", summary, figures[name])
            + _baseline_table(best)
        )
    parts.append(_cell_table(means, chosen))
    return "\n".join(parts)


def _try_verdict(rows: Sequence[Row]) -> tuple[Verdict | None, str]:
    try:
        return verdict(rows), ""
    except NoVerdict as error:
        return None, str(error)


def _verdict_per_method(rows: Sequence[Row]) -> list[Verdict]:
    """Return the verdict on each method and rank alone, where there is one."""
    methods = dict.fromkeys((row.method, row.rank) for row in rows if not row.is_control)
    alone = [_try_verdict([row for row in rows if (row.method, row.rank) == method])[0] for method in methods]
    return [one for one in alone if one is not None]


def _controls(means: Sequence[SeedMean], best: Verdict) -> list[SeedMean]:
    """Return each control on test: at the reported place if it was run there, else where it scores highest."""
    place = (best.reported.cell.site, best.reported.cell.positions)
    found: dict[tuple[str, int | None], SeedMean] = {}
    on_test = [mean for mean in means if mean.split == "test" and mean.is_control]
    for mean in sorted(on_test, key=lambda one: ((one.cell.site, one.cell.positions) == place, one.iia)):
        found[mean.cell.method, mean.cell.rank] = mean
    return list(found.values())


def _verdict_box(best: Verdict | None, reason: str, per_method: Sequence[Verdict]) -> str:
    if best is None:
        return f'<section class="verdict"><p class="label">No verdict</p>\n<p>{escape(reason)}</p></section>'
    good = best.above and not best.trivial
    label = "Above every trivial baseline" if best.above else "Not above the trivial baselines"
    label = "Trivially solved" if best.trivial else label
    accuracy = best.reported.task_accuracy
    notes = [
        f"Chosen among {best.candidates} cells on the select split (IIA {best.chosen.iia:.2f} there), reported on the "
        "test split, which took no part in the choice."
    ]
    if accuracy is not None:
        notes.append(f"The model itself answers base and source right on {accuracy:.0%} of these pairs.")
    others = [one for one in per_method if one.reported.cell != best.reported.cell]
    items = "".join(f"<li>{escape(one.sentence)}</li>" for one in others)
    more = f'<p class="soft">The other methods, each at its own best cell:</p>\n<ul class="soft">{items}</ul>'
    return (
        f'<section class="verdict {"good" if good else "bad"}" aria-label="Verdict">\n'
        f'<p class="label">{label}</p>\n<p class="sentence">{escape(best.sentence)}</p>\n'
        f'<p class="soft">{escape(" ".join(notes))}</p>\n{more if others else ""}</section>'
    )


def _heatmap_section(means: Sequence[SeedMean], per_method: Sequence[Verdict], figures: dict[str, Figure]) -> str:
    grouped: dict[tuple[str, int | None, str], list[SeedMean]] = {}
    split = _shown_split(means)
    for mean in means:
        if mean.split == split:
            grouped.setdefault((mean.cell.method, mean.cell.rank, kind_of_site(mean)), []).append(mean)
    chosen = {(one.reported.cell.method, one.reported.cell.rank): one.reported for one in per_method}
    drawn: list[str] = []
    for (method, rank, kind), group in grouped.items():
        if group[0].is_control and len(group) == 1:
            continue  # no map: the comparison below shows it
        name = f"figure-{len(figures)}"
        best = chosen.get((method, rank))
        figures[name] = heatmap(group, best if best is not None and kind_of_site(best) == kind else None)
        caption = f"{group[0].method_text}, {kind}"
        drawn.append(_figure(name, caption, heatmap_summary(group), figures[name]))
    return (
        "<h2>IIA by layer and position</h2>\n"
        f'<p class="soft">Mean over seeds on the {split} split; point at a cell for its interval and every seed. '
        "A star: the interval lies above that of the best trivial baseline. Outlined: the cell chosen on select.</p>\n"
        f'<div class="figures">{"".join(drawn)}</div>'
    )


def _shown_split(means: Sequence[SeedMean]) -> str:
    """Return the split with the most cells; of equals test, then select: a search may score only a few on test."""
    counts = {split: sum(mean.split == split for mean in means) for split in ("test", "select", "train")}
    return max(counts, key=lambda split: counts[split])


def _figure(name: str, caption: str, summary: str, figure: Figure) -> str:
    head = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    height = int(figure["layout"]["height"])
    wide = len(figure["data"][0]["x"]) > WIDE and figure["data"][0]["type"] == "heatmap"
    drawn = f'<div id="{name}" role="img" aria-label="{escape(summary)}" style="height: {height}px"></div>'
    return f"<figure{_class('wide' if wide else '')}>{head}{drawn}</figure>\n"


def _baseline_table(best: Verdict) -> str:
    ordered = sorted(best.reported.baselines, key=lambda one: -one.value)
    lines = [
        _line(
            [(one.name, None, ""), (f"{one.value:.3f}", one.value, "number"), _interval(one), _whole(best.reported.n)]
        )
        for one in ordered
    ]
    return _table(["Trivial baseline", "#Score", "#95 % interval", "#n"], lines, narrow=True)


def _cell_table(means: Sequence[SeedMean], chosen: set[Any]) -> str:
    """Return one line per cell, those best on select first: sorting by test would invite choosing by it."""
    splits: dict[Any, dict[str, SeedMean]] = {}
    for mean in means:
        splits.setdefault(mean.cell, {})[mean.split] = mean
    ordered = sorted(splits.values(), key=lambda one: -one["select"].iia if "select" in one else 1)
    reported = [one.get("test") or one.get("select") or one["train"] for one in ordered]
    mixed = len({mean.split for mean in reported}) > 1
    told = any(mean.kinds for mean in reported)
    lines = []
    for one, shown in zip(ordered, reported, strict=True):
        select = one.get("select")
        baseline = shown.best_baseline
        accuracy = shown.task_accuracy
        seconds = sum(mean.seconds for mean in one.values())
        seeds = ", ".join(f"{value:.2f}" for value in shown.values)
        entries: list[Entry] = [
            (shown.method_text, None, "name"),
            (shown.cell.site, shown.layer, "nowrap"),
            (shown.position_label, None, ""),
            (ABSENT if select is None else f"{select.iia:.3f}", None if select is None else select.iia, "number"),
            *([(shown.split, None, "")] if mixed else []),
            (f"{shown.iia:.3f}", shown.iia, "number"),
            _interval(shown),
            _whole(shown.n),
            (seeds, min(shown.values), "number"),
            *([(", ".join(f"{name} {value:.2f}" for name, value in shown.kinds), None, "nowrap")] if told else []),
            (f"{baseline.name} {baseline.value:.2f}", baseline.value, "nowrap"),
            ("above", 1, "yes") if shown.above_baselines else ("no", 0, ""),
            (ABSENT if accuracy is None else f"{accuracy:.2f}", accuracy, "number"),
            (f"{seconds:.1f}", seconds, "number"),
        ]
        lines.append(_line(entries, "chosen" if shown.cell in chosen else ""))
    score = ["Split", "#IIA"] if mixed else [f"#IIA on {reported[0].split}"]
    heads = ["Method", "Site", "Position", "#On select", *score, "#95 % interval", "#n", "#Each seed"]
    heads += ["By kind of pair"] if told else []
    heads += ["Best trivial", "Above it", "#Task acc.", "#Seconds"]
    return (
        "<h2>Every cell</h2>\n"
        '<p class="soft">Best on select first; a press on a heading sorts. Marked lines are the cells chosen.</p>\n'
        + _table(heads, lines, sortable=True)
    )


Entry = tuple[str, float | None, str]  # text, what to sort by if not the text, class


def _interval(score: Any) -> Entry:
    return f"[{score.low:.3f}, {score.high:.3f}]", score.low, "number"


def _whole(number: int) -> Entry:
    return str(number), number, "number"


def _line(entries: Sequence[Entry], css: str = "") -> str:
    cells = []
    for text, value, kind in entries:
        sort = ("" if text == ABSENT else text) if value is None else repr(float(value))
        cells.append(f'<td{_class(kind)} data-value="{escape(sort)}">{escape(text)}</td>')
    return f"<tr{_class(css)}>{''.join(cells)}</tr>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _table(heads: Sequence[str], lines: Sequence[str], *, sortable: bool = False, narrow: bool = False) -> str:
    """Return a table; a heading that begins with # heads a column of numbers."""
    cell: Callable[[str], str] = (lambda text: f'<button type="button">{text}</button>') if sortable else str
    shown = "".join(
        f'<th scope="col"{_class("number" if head.startswith("#") else "")}>{cell(escape(head.lstrip("#")))}</th>'
        for head in heads
    )
    body = "\n".join(lines)
    opening = f"<table{_class('narrow' if narrow else '')}>"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table">{opening}'
        f"<thead><tr>{shown}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _run_sections(config: Any, environment: Mapping[str, Any] | None) -> list[str]:
    sections = []
    if config is not None:
        values = config.to_json() if hasattr(config, "to_json") else dict(config)
        sources = getattr(config, "sources", None) or {}
        sections.append(f"<details><summary>Configuration</summary>\n{_entries(values, sources)}</details>")
    if environment:
        sections.append(f"<details><summary>Environment</summary>\n{_entries(environment)}</details>")
    return ["<h2>How it was run</h2>", *sections] if sections else []


def _entries(values: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> str:
    """Return nested values as a table of dotted names, with a column of sources if there are any."""
    lines = []
    for name, value in _flat(values):
        entries: list[Entry] = [(name, None, "nowrap"), (value, None, "")]
        if sources:
            entries.append((sources.get(name, ""), None, ""))
        lines.append(_line(entries))
    return _table(["Name", "Value", *(["From"] if sources else [])], lines, narrow=True)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(one, Mapping) for one in value):
            flat += _flat({str(number): one for number, one in enumerate(value, start=1)}, f"{prefix}{name}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            flat.append((f"{prefix}{name}", ABSENT if value is None else text))
    return flat


def _json_in_html(value: object) -> str:
    """Return JSON that cannot end the script element it stands in, whatever its texts hold."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
