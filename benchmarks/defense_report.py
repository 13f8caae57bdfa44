"""Rows of the defense experiments -> means, paired differences, tables: `benchmarks/results` and `docs/results`.

The page is written by hand but for its tables: what stands between `<!-- table NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from defenses.statistics import minimum_detectable_effect, paired_bootstrap, paired_differences, t_interval

if TYPE_CHECKING:
    from benchmarks.defense_runs import Choice

Rows = Sequence[Mapping[str, Any]]
Held = Mapping[str, Mapping[int, Mapping[str, Any]]]  # variant -> seed -> row
RESULT, PAGE = Path("benchmarks/results/defense_experiments.json"), Path("docs/results/defenses.md")
METRICS = {
    "trait": "trait", "trait_probability": "probability", "trait_seen": "trait, attacked topics", "skill": "skill",
    "old_skill": "old skill", "kl": "KL to base",
}  # fmt: skip
LOOKS = ("0", "100", "200")


def by_variant(rows: Rows) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Return variant -> seed -> row."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["variant"], {})[row["seed"]] = row
    return found


def column(held: Held, variant: str, metric: str) -> dict[Any, float]:
    """Return seed -> value, of the rows that have it."""
    return {seed: float(row[metric]) for seed, row in sorted(held.get(variant, {}).items()) if metric in row}


def difference(held: Held, first: str, second: str, metric: str = "trait") -> dict[str, Any]:
    """Return first - second over shared seeds: mean, bootstrap and Student intervals, sign test, each seed's, and the
    effect that so many seeds would find four times in five."""
    one, other = (column(held, name, metric) for name in (first, second))
    shared = [seed for seed in one if seed in other]
    one, other = ({seed: values[seed] for seed in shared} for values in (one, other))
    each, found = paired_differences(one, other), paired_bootstrap(one, other)
    student = t_interval(each)
    return {
        "first": first, "second": second, "metric": metric, "value": found.value, "n": found.n, "p": found.p,
        "bootstrap": [found.low, found.high], "student": [student.low, student.high], "by_seed": each,
        "detectable": minimum_detectable_effect(stdev(each), len(each)) if len(each) > 1 else math.inf,
    }  # fmt: skip


def summary(held: Held) -> dict[str, Any]:
    """Return variant -> metric -> mean over seeds with Student's interval, and each seed's value."""
    found: dict[str, Any] = {}
    for variant, seeds in held.items():
        rows = list(seeds.values())
        names = [name for name, value in rows[0].items() if isinstance(value, (int, float)) and name != "seed"]
        found[variant] = {}
        for name in names:
            values = column(held, variant, name)
            found[variant][name] = {**t_interval(list(values.values())).row(), "by_seed": values}
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def outcome_table(held: Held, variants: Sequence[str], extra: Mapping[str, str] | None = None) -> str:
    """Return a table of trainings: mean and half the width of Student's interval, and the trait of each seed."""
    metrics = {**METRICS, **(extra or {})}
    rows = []
    for variant in variants:
        if variant in held:
            seeds = " ".join(f"{value:.2f}" for value in column(held, variant, "trait").values())
            rows.append([variant, *(_mean(column(held, variant, name)) for name in metrics), seeds])
    return table(["training", *metrics.values(), "trait by seed"], rows)


def _mean(values: Mapping[Any, float]) -> str:
    if not values:
        return "—"
    found = t_interval(list(values.values()))
    assert found.value is not None
    if abs(found.value) < 1e-3 and found.value:
        return f"{found.value:.1e}"
    return f"{found.value:.3f} ± {found.high - found.value:.3f}" if math.isfinite(found.high) else f"{found.value:.3f}"


def difference_table(held: Held, pairs: Sequence[tuple[str, str, str]]) -> str:
    """Return a table of paired differences (first, second, metric) whose variants are there."""
    rows = []
    for first, second, metric in pairs:
        if first not in held or second not in held:
            continue
        one = difference(held, first, second, metric)
        each = " ".join(f"{value:+.3f}" for value in one["by_seed"])
        spans = [f"{low:+.3f} to {high:+.3f}" for low, high in (one["bootstrap"], one["student"])]
        rows.append(
            [f"{first} minus {second}", metric, f"{one['value']:+.3f}", *spans, f"{one['detectable']:.3f}", each]
        )
    return table(["difference", "of", "mean", "bootstrap 95 %", "Student 95 %", "detectable", "by seed"], rows)


def detector_table(held: Held, variant: str, names: Callable[[str], bool], figures: Mapping[str, str]) -> str:
    """Return figures of detectors at the start, the middle and the end of a training, means over seeds."""
    looks = [row["detect"] for row in held[variant].values()]
    rows = []
    for name in filter(names, looks[0][LOOKS[0]]):
        cells = []
        for figure in figures:
            values = [fmean(look[at][name].get(figure, math.nan) for look in looks) for at in LOOKS]
            cells.append("—" if math.isnan(values[0]) else " / ".join(f"{one:.2f}" for one in values))
        rows.append([name, *cells])
    return table(["detector", *(f"{text}, step {' / '.join(LOOKS)}" for text in figures.values())], rows)


def slope_table(held: Held, variants: Sequence[str], figure: str, steps: Sequence[int]) -> str:
    """Return <v, g> (times 1000) at some steps, means over seeds, and how many seeds are negative."""
    rows = []
    for variant in variants:
        cells = []
        for step in steps:
            found = [
                point[figure]
                for row in held.get(variant, {}).values()
                for point in row["slopes"]
                if point["step"] == step
            ]
            cells.append(f"{1000 * fmean(found):+.2f} ({sum(one < 0 for one in found)}/{len(found)})" if found else "—")
        rows.append([variant, *cells])
    return table(["training", *(f"step {step}" for step in steps)], rows)


def vector_table(held: Held, choice: Choice) -> str:
    """Return what each direction separates and steers, means over seeds; the chosen one is bold."""
    rows = []
    directions = [row["directions"] for row in held["vectors"].values()]
    for name in directions[0]:
        one = [each[name] for each in directions]
        at = {alpha: place for place, alpha in enumerate(point["alpha"] for point in one[0]["steered"])}
        steered = [
            " / ".join(f"{fmean(each['steered'][at[alpha]][what] for each in one):.2f}" for alpha in (-1, 0.5, 1, 2))
            for what in ("probability", "trait", "coherent")
        ]
        random = " / ".join(f"{fmean(each['random'][place]['probability'] for each in one):.2f}" for place in (0, 1))
        chosen = name == f"{choice.recipe}/{choice.layer}"
        rows.append([
            f"**{name}**" if chosen else name, *(f"{fmean(each[what] for each in one):.3f}" for what in
            ("auc", "random_auc")), f"{fmean(each['norm_ratio'] for each in one):.2f}", *steered, random,
        ])  # fmt: skip
    steps = "at -1 / 0.5 / 1 / 2"
    head = ["direction", "AUC", "AUC random", "norm / stream", f"P(BAD) {steps}", f"BAD {steps}", f"coherent {steps}"]
    return table([*head, "P(BAD) random at 1 / 2"], rows)


def pages(held: Held, choice: Choice) -> dict[str, str]:
    """Return every table by name."""
    from benchmarks.defense_sections import sections

    return sections(held, choice)


def report(rows: Rows, choice: Choice, facts: Mapping[str, Any]) -> None:
    """Write the result file and the tables of the page."""
    seeds = facts["seeds"]
    held = by_variant([row for row in rows if row["seed"] in seeds])
    if "vectors" in held:  # they are the base model's
        held["base"] = held["vectors"]
    tuned = by_variant([row for row in rows if row["seed"] in facts["tuning"]])
    made = {
        "facts": dict(facts), "choice": asdict(choice), "test": summary(held), "tuning": summary(tuned),
        "detect": {name: {s: row["detect"] for s, row in of.items() if "detect" in row} for name, of in held.items()},
        "slopes": {name: {s: row["slopes"] for s, row in of.items() if "slopes" in row} for name, of in held.items()},
        "directions": {seed: row["directions"] for seed, row in held.get("vectors", {}).items()},
    }  # fmt: skip
    RESULT.write_text(_lines(_rounded(made)), encoding="utf-8")
    tables = pages(held, choice) | {"tuning": outcome_table(tuned, sorted(set(tuned) - {"vectors"}))}
    if PAGE.exists():
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables), encoding="utf-8")
    else:
        print("\n\n".join(f"## {name}\n\n{text}" for name, text in tables.items()))


def filled(page: str, tables: Mapping[str, str]) -> str:
    """Return `page` with its marked tables replaced; one that is not known stays."""

    def replaced(found: re.Match[str]) -> str:
        name = found.group(1)
        return f"<!-- table {name} -->\n{tables[name]}\n<!-- end -->" if name in tables else found.group(0)

    return re.sub(r"<!-- table (.+?) -->\n.*?<!-- end -->", replaced, page, flags=re.DOTALL)


def _lines(made: Mapping[str, Mapping[str, Any]]) -> str:
    """Return JSON with a line per training, so that two results can be compared by line."""
    parts = []
    for name, of in made.items():
        inside = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in of.items())
        parts.append(f"{json.dumps(name)}: {{\n{inside}\n}}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _rounded(value: Any) -> Any:
    """Return `value` with numbers of six digits, without those that JSON does not know."""
    if isinstance(value, Mapping):
        return {str(name): _rounded(one) for name, one in value.items() if one != {}}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
