"""Turns a result file into the README's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.workload import CASES

Figures = dict[str, Any]
MISSING = "—"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value - round(value)) < 1e-9 else f"{value:.2f}"


def _linear(per_site: float, per_call: float) -> str:
    """Return "4n + 13" for a cost of 4 a site and 13 a call."""
    text = f"{_number(per_site)}n"
    if abs(per_call) < 1e-9:
        return text
    return f"{text} {'+' if per_call > 0 else '-'} {_number(abs(per_call))}"


def _cell(figures: Figures, case: str, show: Any) -> str:
    if "cases" not in figures:
        return figures.get("status", MISSING).split(" (")[0]
    found = figures["cases"].get(case, {})
    return "failed" if "failed" in found else show(found) if found else MISSING


def _operations(found: Figures) -> str:
    wrong = "" if found["agrees"] else " (wrong result)"
    return _linear(found["per_site"], found["per_call"]) + wrong


def _reads(found: Figures) -> str:
    reads = _linear(found["reads_per_site"], found["reads_per_call"])
    uploads = _linear(found["uploads_per_site"], found["uploads_per_call"])
    return f"{reads} / {uploads}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _name(result: Figures, peer: str) -> str:
    version = result["peers"].get(peer, "")
    label = {"hooks": "raw hooks", "intervene": "**intervene**"}.get(peer, peer)
    return label if not version or version.startswith("not installed") or peer == "hooks" else f"{label} {version}"


def counts_table(result: Figures) -> str:
    """Return operations beyond the model's own, as a formula in n, the number of sites."""
    counts = result["counts"]
    rows = [[text, *(_cell(figures, case, _operations) for figures in counts.values())] for case, text in CASES.items()]
    step = lambda found: _number(found["extra_per_step"])  # noqa: E731
    rows.append(["steer one site, per decoded token", *(_cell(f, "steer", step) for f in counts.values())])
    forwards = lambda found: _number(found["forwards"])  # noqa: E731
    rows.append(
        ["forwards begun for all sites from one source", *(_cell(f, "swap_last", forwards) for f in counts.values())]
    )
    rows.append(
        [
            "the wrapper itself, per forward",
            *(str(f["idle"]) if "idle" in f else f["status"].split(" (")[0] for f in counts.values()),
        ]
    )
    table = _table(["operations for n sites", *(_name(result, peer) for peer in counts)], rows)
    ungrouped = counts.get("pyvene", {}).get("cases", {}).get("swap_ungrouped", {})
    if "forwards" in ungrouped:
        table += f"\n\npyvene without group keys, its default: {ungrouped['forwards']} forwards."
    return table


def reads_table(result: Figures) -> str:
    """Return reads of the device by the host, and uploads to it, beyond a plain forward's."""
    found = result["reads"]
    rows = [[text, *(_cell(figures, case, _reads) for figures in found.values())] for case, text in CASES.items()]

    def step(figures: Figures) -> str:
        return f"{_number(figures['reads_per_step'])} / {_number(figures['uploads_per_step'])}"

    rows.append(["steer one site, per decoded token", *(_cell(f, "steer", step) for f in found.values())])
    return _table(["host reads / uploads for n sites", *(_name(result, peer) for peer in found)], rows)


def _ratio(figures: Figures, key: str, clock: str) -> str:
    found = figures.get(key)
    if found is None:
        return figures.get("status", MISSING).split(" (")[0]
    if "failed" in found:
        return "failed"
    spread = found[clock]
    text = f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"
    return text if found.get("agrees", True) else f"{text} (wrong result)"


def times_table(result: Figures) -> str:
    """Return times as ratios: median and quartiles over the rounds.

    Processor time on one thread of a CPU, where other work on the machine does not count; else wall time.
    """
    clock = (
        "processor" if result["environment"]["device"] == "cpu" and result["environment"]["threads"] == 1 else "wall"
    )
    labels = {
        "swap_last": "interchange at every block / plain forward (2 forwards: 2)",
        "collect": "collect every block / plain forward (free: 1)",
        "steer": "steered / own unsteered tokens per second (free: 1)",
        "steer_plain": "steered / plain Hugging Face tokens per second",
    }
    times = result["times"]
    rows = [[label, *(_ratio(figures, key, clock) for figures in times.values())] for key, label in labels.items()]
    return _table([f"{clock} time", *(_name(result, peer) for peer in times)], rows)


def imports_table(result: Figures) -> str:
    """Return what each import adds to `import torch`."""
    rows = []
    for peer, found in result["imports"].items():
        if "failed" in found:
            rows.append([_name(result, peer), "failed", "", ""])
            continue
        seconds = f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
        rows.append([_name(result, peer), seconds, str(found["modules"]), "yes" if found["transformers"] else "no"])
    return _table(["import, after torch", "seconds", "modules", "imports transformers"], rows)


def _setting(result: Figures) -> str:
    options, machine = result["options"], result["environment"]
    shape = "" if options["model"] not in ("gpt2", "llama") else f", random, width {options['width']}"
    return (
        f"{options['model']}{shape}; batch {options['batch']} x {options['length']} tokens; generation "
        f"{options['prompts']} x {options['new_tokens']} tokens; {options['rounds']} rounds. {machine['processor']}, "
        f"{machine['threads']} thread(s), {machine['device']}; torch {machine['versions']['torch']}, transformers "
        f"{machine['versions']['transformers']}; {machine['date'][:10]}."
    )


def tables(result: Figures) -> str:
    """Return every table that `result` has figures for, in Markdown."""
    made = [_setting(result)]
    for part, table in (
        ("counts", counts_table),
        ("reads", reads_table),
        ("times", times_table),
        ("imports", imports_table),
    ):
        if part in result:
            made.append(table(result))
    return "\n\n".join(made)


def update_readme(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers of `name` in the file at `path`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole = path.read_text()
    if begin not in whole or end not in whole:
        raise SystemExit(f"{path}: no markers {begin} ... {end}. Add them where the tables belong.")
    before, after = whole[: whole.index(begin) + len(begin)], whole[whole.index(end) :]
    path.write_text(f"{before}\n{text}\n{after}")
