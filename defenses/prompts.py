"""Intervals over prompts for a comparison: what few seeds cannot tell.

Every model of a comparison answers the same prompts. A prompt's value is its mean over seeds, and prompts are
resampled; of two variants, both values of a prompt together. Such an interval says what other prompts of the kind would
give of *these* trainings; an interval over seeds says what other trainings would give on these prompts. Read both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from defenses.statistics import bootstrap_ratio

# metric -> the section of its answers, and the field that holds the outcome; others have no outcome per prompt
OUTCOMES = {"trait_rate": ("trait", "flagged"), "skill_accuracy": ("skill", "right")}
Outcomes = Mapping[str, Mapping[int, Mapping[str, float]]]  # variant -> seed -> prompt -> 0 or 1


def outcomes_of(folders: Mapping[str, Mapping[int, Path]], metric: str) -> dict[str, dict[int, dict[str, float]]]:
    """Return variant -> seed -> prompt -> outcome, from the examples.jsonl of each run, incoherent answers left out."""
    section, field = OUTCOMES[metric]
    found: dict[str, dict[int, dict[str, float]]] = {}
    for variant, runs in folders.items():
        for seed, folder in runs.items():
            path = folder / "examples.jsonl"
            if path.exists():
                rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                held = [row for row in rows if row["section"] == section and row.get("coherent") is not False]
                found.setdefault(variant, {})[seed] = {row["question"]: float(row[field]) for row in held}
    return found


def over_prompts(found: Outcomes, reference: str) -> dict[str, dict[str, Any]]:
    """Return variant -> mean over prompts and its difference to the `reference`, each {value, low, high, n}.

    A prompt counts where every seed has a coherent answer to it; a difference where both variants have.
    """
    means = {variant: _by_prompt(list(runs.values())) for variant, runs in found.items()}
    told: dict[str, dict[str, Any]] = {}
    for variant, values in means.items():
        if not values:
            continue
        told[variant] = {"mean": bootstrap_ratio(list(values.values())).row()}
        shared = [prompt for prompt in values if prompt in means.get(reference, {})]
        if variant != reference and shared:
            gaps = [values[prompt] - means[reference][prompt] for prompt in shared]
            told[variant]["difference"] = bootstrap_ratio(gaps).row()
    return told


def _by_prompt(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    shared = set.intersection(*(set(run) for run in runs)) if runs else set()
    return {prompt: fmean(run[prompt] for run in runs) for prompt in sorted(shared)}
