"""`write_report`: report.html of one training, or of a comparison of several, from the files in its folder.

The page loads nothing from elsewhere. Everything on it is read from the folder, so it can be made again at any time:
`train_defense.py plot runs/...`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from defenses.errors import DefenseError
from defenses.progress import read_samples
from defenses.report_figures import Figure, histogram, lines, pareto, told, with_interval
from intervene.errors import asked_found_do
from records.page_parts import Entry, entries, figure, line, page, share, table, text, whole

UNKNOWN = "unknown, no answer counted"
SMOOTH = 5  # steps a curve of a comparison is averaged over
NOT_SHOWN = ("step", "kind", "seconds", "tokens", "samples", "poisoned", "clean")  # the latter say what the data are
ENDS, STUDENT = ("low", "high"), ("t_low", "t_high")
METRIC_TEXTS = {
    "trait_rate": "share of held-out prompts whose answer shows the trait",
    "skill_accuracy": "share of held-out items of the skill that are right",
    "perplexity": "of neutral texts",
    "kl": "divergence from the base model per token of neutral texts, in nats",
    "over_refusal": "share of harmless prompts that are refused",
    "coherence": "share of answers that are language at all",
    "loss": "of training, in the last tenth of the steps; of a method that injects, under its injection",
}
RUN_FOOTER = """<p>Intervals of one training are over prompts (Wilson 95 %, or bootstrap where a metric is no share).
They say nothing of what another seed would give: compare methods over seeds.</p>"""
COMPARISON_FOOTER = """<p>Means are over seeds, intervals Student's 95 % over seeds; a difference is taken per seed on
the same data in the same order. With two or three seeds these intervals are wide, and should be; where all seeds agree
to the last digit they are empty, which proves nothing. Intervals over prompts
(bootstrap, a prompt's answers of both variants together) say what other prompts would give of these trainings. A
method's strength must be chosen on other prompts than those it is reported on.</p>"""


def write_report(folder: str | Path) -> Path:
    """Write report.html into the folder of a training or a comparison, whole or not at all; return its path.

    Raises:
        DefenseError: the folder holds neither, or nothing finished.
    """
    folder = Path(folder)
    if (folder / "comparison.json").exists():
        made = comparison_page(folder)
    elif (folder / "metrics.jsonl").exists():
        made = run_page(folder)
    else:
        found = "it holds neither comparison.json nor metrics.jsonl."
        raise DefenseError(asked_found_do(f"Report of {folder}", found, "Name the folder of a run or of a comparison."))
    path = folder / "report.html"
    part = path.with_name(path.name + ".part")
    part.write_text(made, encoding="utf-8")
    os.replace(part, path)
    return path


def run_page(folder: Path) -> str:
    """Return the page of one training."""
    rows = read_rows(folder / "metrics.jsonl")
    steps = [row for row in rows if row.get("kind", "train") == "train"]
    if not steps:
        raise DefenseError(asked_found_do(f"Report of {folder}", "it has no finished step.", "Let the run go on."))
    result, config = read(folder / "result.json"), read(folder / "config.json")
    figures: dict[str, Figure] = {}
    name = str(config.get("method", {}).get("name", "sft"))
    body = [_verdict(result.get("sentence") or f"{name}: unfinished, {len(steps)} steps so far.", bool(result))]
    if result.get("evidence"):
        body.append(f'<p class="soft">What is known of {escape(name)}: {escape(result["evidence"])}</p>')
    if result.get("evaluation"):
        body += ["<h2>Evaluation</h2>", _evaluation_table(result["evaluation"], result.get("before", {}))]
    body += ["<h2>Training</h2>", _curves(steps, figures)]
    body += [
        _evaluations_on_the_way([*rows, *_last_evaluation(result)], figures),
        _looks(folder, figures),
        _detection(folder, [row for row in rows if row.get("kind") == "calibration"], figures),
        _ranks(folder, figures),
    ]
    body += [_answers(folder), _facts(folder, config)]
    return page(f"Training with {name}", f"{folder}, {len(steps)} steps", "\n".join(filter(None, body)), figures,
                footer=RUN_FOOTER)  # fmt: skip


def comparison_page(folder: Path) -> str:
    """Return the page of a comparison."""
    made = read(folder / "comparison.json")
    figures: dict[str, Figure] = {}
    variants = list(dict.fromkeys(row["variant"] for row in made["rows"]))
    body = [_verdict(*_sentence(made))]
    if made.get("pareto"):
        figures["pareto"] = pareto(made)
        front = [one["variant"] for one in made["pareto"]["points"] if one["front"]]
        body += ["<h2>What a defense costs</h2>", '<div class="figures">']
        summary = f"Scatter of trait against skill; on the front: {', '.join(front)}"
        body += [figure("pareto", "Trait against skill", summary, figures["pareto"]), "</div>"]
    for metric in _ordered(made["rows"]):
        held = [row for row in made["rows"] if row["metric"] == metric]
        prompts = made.get("prompts", {}).get(metric, {})
        body.append(_metric_section(metric, held, made.get("before", {}).get(metric), prompts))
    if made.get("failed"):
        body += ["<h2>Runs that were left out</h2>", entries({f"{one['variant']}, seed {one['seed']}": one["reason"]
                                                              for one in made["failed"]})]  # fmt: skip
    runs = {name: sorted(folder.glob(f"{name}/seed*")) for name in variants}
    body += [_comparison_curves(runs, figures), _known(runs)]
    body.append(_facts(next((one for held in runs.values() for one in held), folder), read(folder / "compare.json")))
    seeds = max(row["n"] for row in made["rows"])
    title = "Which defense keeps the trait out, and at what cost?"
    subtitle = f"{folder}: {len(variants)} variants, {seeds} seeds, differences to {made['reference']}"
    return page(title, subtitle, "\n".join(filter(None, body)), figures, footer=COMPARISON_FOOTER)


def read(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; {} if there is none."""
    if not path.exists():
        return {}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the whole rows of a file of JSON lines; a torn last one, from a run that was killed, is left out."""
    found = []
    for row in path.read_bytes().splitlines(keepends=True):
        if row.endswith(b"\n"):
            found.append(json.loads(row))
    return found


def _verdict(sentence: str, good: bool) -> str:
    kind = "verdict good" if good else "verdict"
    return f'<div class="{kind}"><p class="sentence">{escape(sentence)}</p></div>'


def _sentence(made: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the comparison in a sentence: what the attack does, and what lowers the trait beyond its interval."""
    found, reference = made.get("pareto"), made["reference"]
    if not found:
        return f"{len({row['variant'] for row in made['rows']})} variants were compared.", False
    rows = {(row["variant"], row["metric"]): row for row in made["rows"]}
    attack = rows.get((reference, found["trait"]))  # none where no answer of any seed counted
    parts = [f"{reference}: {found['trait']} {told(with_interval(attack, made)) if attack else UNKNOWN}"]
    lower = []
    for point in found["points"]:
        gap = rows[point["variant"], found["trait"]].get("difference")
        over = made.get("prompts", {}).get(found["trait"], {}).get(point["variant"], {}).get("difference")
        # a value and an interval of the same prompts: those that both variants answered
        value, low, high = ((over or gap or {}).get(key) for key in ("value", *(ENDS if over else STUDENT)))
        if value is not None and low is not None and high is not None and high < 0:
            cost = rows[point["variant"], found["skill"]].get("difference", {}).get("value")
            paid = "" if cost is None else f", {found['skill']} {cost:+.3f}"
            lower.append(f"{point['variant']} {value:+.3f} [{low:+.3f}, {high:+.3f}]{paid}")
    unit = "prompts" if made.get("prompts", {}).get(found["trait"]) else "seeds"
    parts.append(f"lower, with intervals over {unit}: {'; '.join(lower)}" if lower else "nothing lowers it clearly")
    return ". ".join(parts) + ".", bool(lower)


def _ordered(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(row["metric"] for row in rows))
    first = [name for name in METRIC_TEXTS if name in names]
    return [*first, *(name for name in names if name not in first and not name.startswith("base_"))]


def _metric_section(
    metric: str, rows: Sequence[Mapping[str, Any]], before: float | None, prompts: Mapping[str, Any]
) -> str:
    good = next((row.get("good") for row in rows), None)
    heads = [
        "Variant",
        "#Mean",
        "#95 % over seeds",
        "#Seeds",
        "#Difference",
        "#over seeds",
        "#over prompts",
        "#By seed",
    ]
    if not prompts:
        heads.remove("#over prompts")
    shown = []
    for row in sorted(rows, key=lambda one: one["mean"], reverse=good == "high"):
        gap = row.get("difference") or {}
        cells: list[Entry] = [text(row["variant"], "name"), share(row["mean"]), _interval(row, "low", "high")]
        cells += [whole(row["n"]), _signed(gap.get("value")), _interval(gap, "t_low", "t_high")]
        if prompts:
            cells.append(_interval(prompts.get(row["variant"], {}).get("difference", {}), "low", "high"))
        cells.append((", ".join(f"{value:.3f}" for value in row["seeds"].values()), None, "number"))
        shown.append(line(cells))
    told_of = METRIC_TEXTS.get(metric, "")
    start = "" if before is None else f"before training {before:.3f}"
    note = "; ".join(filter(None, [told_of, f"{good} is good" if good else "", start]))
    return f'<h3>{escape(metric)}</h3><p class="soft">{escape(note)}</p>' + table(heads, shown, sortable=True)


def _interval(row: Mapping[str, Any], low: str, high: str) -> Entry:
    if row.get(low) is None or row.get(high) is None:
        return "-", None, "number"
    return f"[{row[low]:.3f}, {row[high]:.3f}]", row[low], "number"


def _signed(value: float | None) -> Entry:
    return ("-" if value is None else f"{value:+.3f}"), value, "number"


def _evaluation_table(found: Mapping[str, Mapping[str, Any]], before: Mapping[str, float]) -> str:
    shown = []
    for name, one in found.items():
        cells: list[Entry] = [text(name, "name"), share(one["value"]), _interval(one, "low", "high"), whole(one["n"])]
        cells += [whole(one.get("excluded", 0)), share(before.get(name)), text(METRIC_TEXTS.get(name, ""))]
        shown.append(line(cells))
    return table(["Metric", "#Value", "#95 %", "#n", "#Left out", "#Before training", "What it is"], shown)


def _curves(steps: Sequence[Mapping[str, Any]], figures: dict[str, Figure]) -> str:
    """Return a figure for each number that is told of every step and is not the same throughout."""
    names = [name for name in steps[-1] if name not in NOT_SHOWN]
    made = []
    for name in sorted(names, key=lambda name: name != "loss"):
        points = [(row["step"], row[name]) for row in steps if isinstance(row.get(name), int | float)]
        if len({y for _, y in points}) < 2:
            continue
        key = f"curve-{name.replace('_', '-')}"
        figures[key] = lines({name: points}, y=name)
        summary = f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g} over {len(points)} steps"
        made.append(figure(key, name, summary, figures[key]))
    return f'<div class="figures">{"".join(made)}</div>'


def _last_evaluation(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the evaluation of a finished run as a row like those on the way."""
    values = {name: one["value"] for name, one in result.get("evaluation", {}).items()}
    return [{"step": result["steps"], "kind": "evaluation", **values}] if values else []


def _evaluations_on_the_way(rows: Sequence[Mapping[str, Any]], figures: dict[str, Figure]) -> str:
    found = [row for row in rows if row.get("kind") == "evaluation"]
    if len(found) < 3:  # before and after alone are in the table
        return ""
    names = [name for name in found[-1] if name not in (*NOT_SHOWN, "perplexity", "base_perplexity", "kl")]
    # None where no answer counted: a gap in the line
    series = {name: [(row["step"], row.get(name)) for row in found] for name in names}
    figures["on-the-way"] = lines(series, y="share")
    drawn = figure("on-the-way", "Evaluations during training", f"{len(found)} evaluations", figures["on-the-way"])
    return f'<h2>On the way</h2><div class="figures">{drawn}</div>'


def _looks(folder: Path, figures: dict[str, Figure]) -> str:
    """Return what `analyse_every` saw along the directions: streams, gradients, and what the weights add."""
    path = folder / "analysis.jsonl"
    if not path.exists():
        return ""
    rows, made = read_rows(path), []
    for name in ("projection", "gradient_projection", "gradient_cosine", "added_cosine_with_minus_v", "energy_along_v"):
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if name in row:
                series.setdefault(f"L{row['layer']} {row['kind']}", []).append((row["step"], row[name]))
        if series:
            key = f"look-{name.replace('_', '-')}"
            figures[key] = lines(series, y=name)
            made.append(figure(key, name.replace("_", " "), ", ".join(series), figures[key]))
    note = "A negative gradient projection means that learning wants to move along +v."
    return f'<h2>Along the direction</h2><p class="soft">{note}</p><div class="figures">{"".join(made)}</div>'


def _detection(folder: Path, calibrations: Sequence[Mapping[str, Any]], figures: dict[str, Figure]) -> str:
    """Return what the detector said: scores by kind of sample, how well they tell the kinds apart, thresholds."""
    rows = [row for row in read_samples(folder) if row.get("score") is not None]
    if not rows:
        return ""
    kinds = {"poisoned": True, "clean": False, "unknown": None}
    scores = {name: [row["score"] for row in rows if row.get("poison") is kind] for name, kind in kinds.items()}
    scores = {name: values for name, values in scores.items() if values}
    figures["scores"] = histogram(scores, [row["threshold"] for row in calibrations])
    found = read(folder / "result.json").get("detection", {})
    drawn = figure("scores", "Scores by kind of sample", ", ".join(scores), figures["scores"])
    shown = []
    for name, one in found.items():
        held = one if isinstance(one, Mapping) else {"value": one, "n": found["samples"]}
        if name != "samples":
            shown.append(
                line([text(name, "name"), share(held["value"]), _interval(held, "low", "high"), whole(held["n"])])
            )
    made = table(["Measure", "#Value", "#95 %", "#n"], shown) if shown else ""
    return f'<h2>Detector</h2><div class="figures">{drawn}</div>{made}{_calibrated(calibrations)}'


def _calibrated(calibrations: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the thresholds that were calibrated, and of what drift had made of each before the next."""
    if not calibrations:
        return ""
    shown = []
    for row in calibrations:
        value: list[Entry] = [whole(row["step"]), (f"{row['threshold']:.4g}", row["threshold"], "number")]
        value += [whole(row["n"]), share(row["realised"]), _interval(row, "realised_low", "realised_high")]
        value += [share(row["stale"]), _interval(row, "stale_low", "stale_high")]
        shown.append(line(value))
    heads = ["#After step", "#Threshold", "#Clean scores", "#Above it", "#95 %", "#Above the one before", "#95 %"]
    note = "Shares of clean held-out samples. The last says what drift had made of the rate that was asked for."
    return f'<h3>Thresholds</h3><p class="soft">{note}</p>{table(heads, shown)}'


def _ranks(folder: Path, figures: dict[str, Figure]) -> str:
    """Return the share of samples blocked so far, of each rank and of all, where there are several."""
    series: dict[str, list[tuple[float, float]]] = {}
    paths = [folder / "samples.jsonl", *sorted(folder.glob("samples-rank*.jsonl"))]
    for number, path in enumerate(one for one in paths if one.exists()):
        blocked = 0
        for count, row in enumerate(read_rows(path), start=1):
            blocked += bool(row.get("blocked"))
            series.setdefault(f"rank {number}", []).append((row["step"], blocked / count))
    if len(series) < 2:
        return ""
    figures["ranks"] = lines(series, y="share blocked so far")
    drawn = figure("ranks", "Samples blocked, by rank", ", ".join(series), figures["ranks"])
    return f'<div class="figures">{drawn}</div>'


def _comparison_curves(runs: Mapping[str, Sequence[Path]], figures: dict[str, Figure]) -> str:
    made = []
    places = {variant: number for number, variant in enumerate(runs)}  # a variant has one colour in all figures
    for name in ("loss", "blocked", "strength", "alpha"):
        series = {}
        for variant, folders in runs.items():
            held = [read_rows(one / "metrics.jsonl") for one in folders if (one / "metrics.jsonl").exists()]
            points = _mean_curve([[row for row in rows if row.get("kind", "train") == "train"] for rows in held], name)
            if points:
                series[variant] = points
        if series:
            figures[f"runs-{name}"] = lines(series, y=name, places=places)
            made.append(figure(f"runs-{name}", f"{name}, mean over seeds", ", ".join(series), figures[f"runs-{name}"]))
    return f'<h2>Training</h2><div class="figures">{"".join(made)}</div>' if made else ""


def _mean_curve(runs: Sequence[Sequence[Mapping[str, Any]]], name: str) -> list[tuple[float, float]]:
    """Return the mean over runs at each step, averaged over `SMOOTH` steps."""
    held: dict[int, list[float]] = {}
    for rows in runs:
        for row in rows:
            if isinstance(row.get(name), int | float):
                held.setdefault(row["step"], []).append(row[name])
    means = [(step, fmean(values)) for step, values in sorted(held.items())]
    return [(step, fmean(y for _, y in means[max(0, at - SMOOTH + 1) : at + 1])) for at, (step, _) in enumerate(means)]


def _known(runs: Mapping[str, Sequence[Path]]) -> str:
    """Return what is known of each variant's method, and what it cost."""
    shown = []
    for variant, folders in runs.items():
        found = [read(one / "result.json") for one in folders]
        found = [one for one in found if one]
        if found:
            seconds = fmean(one["seconds"] for one in found)
            cells: list[Entry] = [text(variant, "name"), text(found[0]["method"]), share(found[0]["times_sft"], 2)]
            shown.append(line([*cells, share(seconds, 1), text(found[0].get("evidence", ""))]))
    heads = ["Variant", "Method", "#x plain", "#Seconds", "What is known of it"]
    return "<h2>Methods</h2>" + table(heads, shown) if shown else ""


def _answers(folder: Path) -> str:
    """Return some judged answers, those that show the trait first."""
    path = folder / "examples.jsonl"
    if not path.exists():
        return ""
    rows = sorted(read_rows(path), key=lambda row: not row.get("flagged"))[:30]
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = [line([text(str(row.get(name, ""))) for name in names]) for row in rows]
    return f"<details><summary>Answers</summary>{table(names, shown)}</details>"


def _facts(folder: Path, config: Mapping[str, Any]) -> str:
    parts = [f"<details><summary>Configuration</summary>{entries(config)}</details>"]
    environment = read(folder / "environment.json")
    if environment:
        parts.append(f"<details><summary>Environment</summary>{entries(environment)}</details>")
    return "\n".join(["<h2>How it was made</h2>", *parts])
