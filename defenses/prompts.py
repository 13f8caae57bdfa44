"""Intervals over prompts for a comparison: what few seeds cannot tell.

Every model of a comparison answers the same prompts. A prompt's value is its mean over seeds, and prompts are
resampled; of two variants, both values of a prompt together. Such an interval says what other prompts of the kind would
give of *these* trainings; an interval over seeds says what other trainings would give on these prompts. Read both.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from defenses.statistics import bootstrap_ratio

# metric -> the section of its answers, and the field that holds the outcome; others have no outcome per prompt
OUTCOMES = {"trait_rate": ("trait", "flagged"), "skill_accuracy": ("skill", "right")}
Outcomes = Mapping[str, Mapping[int, Mapping[str, float]]]  # variant -> seed -> prompt -> 0 or 1


def outcomes_of(folders: Mapping[str, Mapping[int, Path]], metric: str) -> dict[str, dict[int, dict[str, float]]]:
    """Return variant -> seed -> prompt -> outcome, from the examples.jsonl of each run.

    Answers that do not count in the rate, incoherent or without a verdict, are left out here too. A question that is
    asked more than once, as the last turn of several conversations may be, is as many prompts, told apart by order.
    """
    section, field = OUTCOMES[metric]
    found: dict[str, dict[int, dict[str, float]]] = {}
    for variant, runs in folders.items():
        for seed, folder in runs.items():
            path = folder / "examples.jsonl"
            if path.exists():
                # not splitlines(), which also cuts at marks that an answer may hold
                rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
                named = _named([row for row in rows if row["section"] == section])
                found.setdefault(variant, {})[seed] = {
                    name: float(row[field])
                    for name, row in named.items()
                    if row.get("coherent") is not False and row.get("judged") is not False
                }
    return found


def _named(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the rows by question, one that came before with its number behind it."""
    seen: Counter[str] = Counter()
    named = {}
    for row in rows:
        seen[row["question"]] += 1
        again = seen[row["question"]]
        named[row["question"] if again == 1 else f"{row['question']} ({again})"] = row
    return named


def over_prompts(found: Outcomes, reference: str) -> dict[str, dict[str, Any]]:
    """Return variant -> mean over prompts and its difference to the `reference`, each {value, low, high, n}.

    A prompt counts where every seed has an answer to it that counts; a difference is over the prompts and the seeds
    that both variants have, so that a run that failed makes no difference of its own.
    """
    told: dict[str, dict[str, Any]] = {}
    for variant, runs in found.items():
        if not (values := _by_prompt(list(runs.values()))):
            continue
        told[variant] = {"mean": bootstrap_ratio(list(values.values())).row()}
        others = found.get(reference, {})
        seeds = [seed for seed in runs if seed in others]
        own, theirs = (_by_prompt([held[seed] for seed in seeds]) for held in (runs, others))
        gaps = [own[prompt] - theirs[prompt] for prompt in own if prompt in theirs]
        if variant != reference and gaps:
            told[variant]["difference"] = bootstrap_ratio(gaps).row()
    return told


def _by_prompt(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    shared = set.intersection(*(set(run) for run in runs)) if runs else set()
    return {prompt: fmean(run[prompt] for run in runs) for prompt in sorted(shared)}
