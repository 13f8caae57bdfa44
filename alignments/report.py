"""One self-contained report.html from the rows of a search: verdict, heatmaps, controls, failing pairs, how it was run.

    write_report("runs/ioi/report.html", record.finished(), config=config, environment=facts)

The page loads nothing (`report_template` forbids it), reads in light and dark, and says in words and in a table what
its figures show. Rows that allow no verdict still give a report, with the reason where the verdict would stand: a
report must never cost a finished search.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from alignments.metrics import NoVerdict, SeedMean, Verdict, mean_over_seeds, method_text, verdict
from alignments.report_figures import Figure, comparison, heatmap, heatmap_summary, kind_of_site
from alignments.report_sections import (
    control_section,
    divergence_section,
    download_section,
    failure_section,
    init_section,
    rank_section,
    soft_hard_section,
)
from alignments.rows import NO_INTERCHANGE, Cell, Row
from alignments.statistics import Tested, fdr
from records.page_parts import Entry, entries, figure, interval, line, page, share, table, whole

MAPS = 8  # heatmaps beyond which only the rank chosen for each method is drawn

FOOTER = """
<p>Intervals are Wilson 95 % intervals of the mean over seeds, at the number of pairs n; seeds share the pairs, so they
do not add to n, and what they differ by is shown next to it. A score is called above a baseline when the two intervals
do not overlap; the stars on the heatmaps are the exact tests described there.</p>
"""


def write_report(
    path: str | Path,
    rows: Iterable[Row],
    *,
    config: Any = None,
    environment: Mapping[str, Any] | None = None,
    lint: Mapping[str, Any] | None = None,
    examples: Sequence[Mapping[str, Any]] = (),
    title: str | None = None,
    failed: Mapping[str, str] | None = None,
) -> Path:
    """Write the report of `rows` whole or not at all, and return its path. Arguments as in `render_report`."""
    path = Path(path)
    page = render_report(
        rows, config=config, environment=environment, lint=lint, examples=examples, title=title, failed=failed
    )
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
    examples: Sequence[Mapping[str, Any]] = (),
    title: str | None = None,
    failed: Mapping[str, str] | None = None,
) -> str:
    """Return the page of `rows`, which may be of several variables.

    `config` is a mapping or has `to_json()` (a `RunDas` also shows where each value came from); `lint` is the task's
    own check of its pairs, `environment` what `environment.json` holds: nested mappings, shown as they are. `examples`
    are the records of `examples.jsonl`, of which the failing ones are explored. `failed` names the cells that could not
    be scored, each with the reason.

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
    if failed:
        body.append(f"<h2>Cells that could not be scored</h2>\n{entries(failed)}")
    if examples:
        body.append(failure_section(examples))
    if lint:
        body.append(f"<h2>Check of the task</h2>\n{entries(lint)}")
    body += [*_run_sections(config, environment), download_section(rows)]
    tasks, models = ({key[place] for key in groups} for place in (0, 1))
    variables = ", ".join(dict.fromkeys(key[2] for key in groups))
    heading = title or f"Where does the model keep “{variables}”?"
    subtitle = f"Alignment search, task {', '.join(sorted(tasks))}, model {', '.join(sorted(models))}, {len(rows)} rows"
    return page(heading, subtitle, "\n".join(body), figures, footer=FOOTER)


def _variable_section(rows: Sequence[Row], figures: dict[str, Figure], *, named: bool) -> str:
    """Return verdict, figures and table of one variable, and add its figures to `figures`."""
    means = mean_over_seeds(rows)
    best, reason = _try_verdict(rows)
    per_method = _verdict_per_method(rows)
    split = _shown_split(means)
    shown = [mean for mean in means if mean.split == split]
    on_select = {mean.cell: mean.iia for mean in means if mean.split == "select"}
    parts = [f"<h2>{escape(rows[0].variable)}</h2>"] if named else []
    parts += [_verdict_box(best, reason, per_method), _heatmap_section(shown, per_method, on_select, figures)]
    if best is not None:
        parts.append(_comparison_section(best, per_method, figures))
    parts += [
        rank_section(rows, best, figures),
        init_section(rows, split),
        soft_hard_section(shown),
        divergence_section(shown),
        _cell_table(means, {one.reported.cell for one in per_method}),
    ]
    return "\n".join(part for part in parts if part)


def _comparison_section(best: Verdict, per_method: Sequence[Verdict], figures: dict[str, Figure]) -> str:
    name = f"figure-{len(figures)}"
    figures[name] = comparison(best, [one.reported for one in per_method], best.controls)
    summary = "Best cells, controls and trivial baselines with intervals: " + "; ".join(
        [str(one.reported) for one in per_method] + [str(one) for one in (*best.controls, *best.reported.baselines)]
    )
    return (
        "<h2>Best cells against controls and what needs no model</h2>\n"
        '<p class="soft">Each best cell was chosen on the select split and is shown on test. Thin ticks are single '
        "seeds. The dashed line is the upper end of the best trivial baseline's interval.</p>\n"
        + figure(name, "Best cells, controls and trivial baselines", summary, figures[name])
        + control_section(best)
        + _baseline_table(best)
    )


def _try_verdict(rows: Sequence[Row]) -> tuple[Verdict | None, str]:
    try:
        return verdict(rows), ""
    except NoVerdict as error:
        return None, str(error)


def _verdict_per_method(rows: Sequence[Row]) -> list[Verdict]:
    """Return the verdict on each method alone, over all its ranks, where there is one."""
    methods = dict.fromkeys(row.method for row in rows if not row.is_control)
    alone = [_try_verdict([row for row in rows if row.method == method])[0] for method in methods]
    return [one for one in alone if one is not None]


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
        f"<p><code>{escape(best.line)}</code></p>\n"
        f'<p class="soft">{escape(" ".join(notes))}</p>\n{more if others else ""}</section>'
    )


def _heatmap_section(
    means: Sequence[SeedMean],
    per_method: Sequence[Verdict],
    on_select: Mapping[Cell, float],
    figures: dict[str, Figure],
) -> str:
    """Return the heatmaps of `means`, all of one split; in each the cell that is best on select is outlined."""
    tested = _tested(means)
    candidates = sum(_is_candidate(mean) for mean in means)
    chosen = {one.reported.cell.method: one.reported for one in per_method}
    drawn: list[str] = []
    maps, note = _maps(means, chosen)
    for (method, rank, kind), group in maps.items():
        name = f"figure-{len(figures)}"
        known = [mean for mean in group if mean.cell in on_select]
        best = max(known, key=lambda mean: on_select[mean.cell], default=None)
        figures[name] = heatmap(group, best, tested)
        caption = f"{method_text(method, rank)}, {kind}"
        drawn.append(figure(name, caption, heatmap_summary(group, tested), figures[name]))
    return (
        "<h2>IIA by layer and position</h2>\n"
        f'<p class="soft">Mean over seeds on the {means[0].split} split; point at a cell for its interval and every '
        "seed. A star: significantly above the best trivial baseline on the same pairs (exact binomial test, false "
        f"discovery rate 5 % over all {candidates} cells). Outlined: the best of each map on select.{note}</p>\n"
        f'<div class="figures">{"".join(drawn)}</div>'
    )


def _is_candidate(mean: SeedMean) -> bool:
    return not mean.is_control and mean.cell.method not in NO_INTERCHANGE


def _tested(means: Sequence[SeedMean]) -> dict[Cell, Tested]:
    """Return the tests of all cells; controls are a family of their own. What is no interchange discovers nothing."""
    families = [[one for one in means if _is_candidate(one)], [one for one in means if one.is_control]]
    return {one.mean.cell: one for family in families for one in fdr(family)}


Maps = dict[tuple[str, int | None, str], list[SeedMean]]


def _maps(means: Sequence[SeedMean], chosen: Mapping[str, SeedMean]) -> tuple[Maps, str]:
    """Return the cells of each heatmap worth drawing, and a note on those that are not."""
    grouped: Maps = {}
    for mean in means:
        grouped.setdefault((mean.cell.method, mean.cell.rank, kind_of_site(mean)), []).append(mean)
    # A single cell is no map: the comparison or the rank curve shows it.
    several = {key: group for key, group in grouped.items() if len(group) > 1}
    maps = several or {key: group for key, group in grouped.items() if not group[0].is_control} or grouped
    if several and len(maps) <= MAPS:
        return maps, ""
    ranks = {method: mean.cell.rank for method, mean in chosen.items()}
    fewer = {key: group for key, group in maps.items() if ranks.get(key[0], key[1]) == key[1]}
    note = f" Of each method the rank chosen is drawn: {len(fewer)} of {len(maps)} maps."
    return fewer, note if len(fewer) < len(maps) else ""


def _shown_split(means: Sequence[SeedMean]) -> str:
    """Return the split with the most cells; of equals test, then select: a search may score only a few on test."""
    counts = {split: sum(mean.split == split for mean in means) for split in ("test", "select", "train")}
    return max(counts, key=lambda split: counts[split])


def _baseline_table(best: Verdict) -> str:
    ordered = sorted(best.reported.baselines, key=lambda one: -one.value)
    lines = [
        line([(one.name, None, ""), (f"{one.value:.3f}", one.value, "number"), interval(one), whole(best.reported.n)])
        for one in ordered
    ]
    return table(["Trivial baseline", "#Score", "#95 % interval", "#n"], lines, narrow=True)


def _cell_table(means: Sequence[SeedMean], chosen: set[Any]) -> str:
    """Return one line per cell, those best on select first: sorting by test would invite choosing by it."""
    splits: dict[Any, dict[str, SeedMean]] = {}
    for mean in means:
        splits.setdefault(mean.cell, {})[mean.split] = mean
    ordered = sorted(splits.values(), key=lambda one: -one["select"].iia if "select" in one else 1)
    reported = [one.get("test") or one.get("select") or one["train"] for one in ordered]
    mixed = len({mean.split for mean in reported}) > 1
    by_kind = any(mean.kinds for mean in reported)
    lines = []
    for one, shown in zip(ordered, reported, strict=True):
        select = one.get("select")
        baseline = shown.best_baseline
        accuracy = shown.task_accuracy
        seconds = sum(mean.seconds for mean in one.values())
        seeds = ", ".join(f"{value:.2f}" for value in shown.values)
        told: list[Entry] = [
            (shown.method_text, None, "name"),
            (shown.cell.site, shown.layer, "place"),
            (shown.position_label, None, "label"),
            share(None if select is None else select.iia),
            *([(shown.split, None, "")] if mixed else []),
            share(shown.iia),
            interval(shown),
            whole(shown.n),
            (seeds, min(shown.values), "few"),
            *([(", ".join(f"{name} {value:.2f}" for name, value in shown.kinds), None, "")] if by_kind else []),
            (f"{baseline.name} {baseline.value:.2f}", baseline.value, "few"),
            ("above", 1, "yes") if shown.above_baselines else ("no", 0, ""),
            share(accuracy, 2),
            share(seconds, 1),
        ]
        lines.append(line(told, "chosen" if shown.cell in chosen else ""))
    score = ["Split", "#IIA"] if mixed else [f"#IIA on {reported[0].split}"]
    heads = ["Method", "Site", "Position", "#On select", *score, "#95 % interval", "#n", "Each seed"]
    heads += ["By kind of pair"] if by_kind else []
    heads += ["Best trivial", "Above it", "#Task acc.", "#Seconds"]
    return (
        "<h2>Every cell</h2>\n"
        '<p class="soft">Best on select first; a press on a heading sorts. Marked lines are the cells chosen.</p>\n'
        + table(heads, lines, sortable=True)
    )


def _run_sections(config: Any, environment: Mapping[str, Any] | None) -> list[str]:
    sections = []
    if config is not None:
        values = config.to_json() if hasattr(config, "to_json") else dict(config)
        sources = getattr(config, "sources", None) or {}
        sections.append(f"<details><summary>Configuration</summary>\n{entries(values, sources)}</details>")
    if environment:
        sections.append(f"<details><summary>Environment</summary>\n{entries(environment)}</details>")
    return ["<h2>How it was run</h2>", *sections] if sections else []
