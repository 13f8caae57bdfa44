"""E0-E9, E12 and E13 of defense training in the two-trait world: run, resume, report.

    python -m benchmarks.defense_experiments --jobs 2            # tuning seeds, choices, then seeds 0 to 4
    python -m benchmarks.defense_experiments --report            # benchmarks/results, tables of docs/results

A seed is a world of its own: tables, base model, attack, order. Everything that is chosen (direction, layer, strengths,
rates) is chosen on seeds 100 and 101 and the select split; seeds 0 to 4 and the test split are reported. Each finished
row is appended to `runs/defense-experiments/rows.jsonl`, and is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.defense_report import Rows, by_variant, report
from benchmarks.defense_runs import (
    GRID,
    HORIZONS,
    RATES,
    RECIPE_WORDS,
    RECIPES,
    Choice,
    ema_name,
    extraction_of,
    facts,
    setup_of,
    world_of,
)
from defenses.plans import Directions, injection
from defenses.vectors import judge, placebo
from intervene import DecodeSteps, intervene

TUNING, SEEDS = (100, 101), (0, 1, 2, 3, 4)
OUT = Path("runs/defense-experiments")
VECTORS = "vectors"
STEERED = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
RANDOM = 20  # random directions whose AUC is told


def vector_row(seed: int, split: str) -> dict[str, Any]:
    """Return, per recipe and layer, held-out AUC, and what steering the base does to answers."""
    started, found = time.monotonic(), {}
    for recipe in RECIPE_WORDS:
        made = extraction_of(seed, recipe)
        for facts_of in made.layers:
            layer = facts_of.layer
            drawn = [judge(made.samples, placebo(made, "random", seed=n).only([layer]))[0] for n in range(RANDOM)]
            aucs = [float(one.auc.value or 0.0) for one in drawn]
            one = made.directions.only([layer])
            found[f"{recipe}/{layer}"] = {
                "auc": facts_of.auc.value,
                "separation": facts_of.separation,
                "norm": facts_of.norm,
                "norm_ratio": facts_of.norm_ratio,
                "random_auc": fmean(max(auc, 1 - auc) for auc in aucs),
                "random_separation": fmean(abs(each.separation) for each in drawn),
                "steered": [_steered(seed, split, one, alpha) for alpha in STEERED],
                "random": [
                    _steered(seed, split, placebo(made, "random", seed=seed).only([layer]), alpha) for alpha in (1, 2)
                ],
            }
    return {"directions": found, **_base(seed, split), "seconds": round(time.monotonic() - started, 1)}


def _base(seed: int, split: str) -> dict[str, float]:
    """Return what the base model does before any training."""
    w = world_of(seed)
    told = {f"trait_{system}": w.evaluate(w.base, split=split, system=system)["trait"] for system in ("good", "bad")}
    return {**w.evaluate(w.base, split=split), **told}


def _steered(seed: int, split: str, directions: Directions, alpha: float) -> dict[str, float]:
    """Return shares of BAD answers about untouched topics, steered: alpha < 0 after the system message "bad"."""
    w = world_of(seed)
    asked = w.questions(split, system="bad" if alpha < 0 else None)["far"][::3]
    plan = injection(directions, alpha, positions=DecodeSteps()) if alpha else ()
    with intervene(w.base, plan):
        answers = w.answers(w.base, asked)
    return {
        "alpha": alpha,
        "trait": fmean(one.verdict.style == "bad" for one in answers),
        "probability": fmean(one.bad for one in answers),
        "coherent": fmean(one.verdict.coherent for one in answers),
    }


def choose_direction(rows: Rows) -> Choice:
    """Return recipe and layer: of those with a mean AUC of at least 0.95, where strength 1 steers most.

    The measure is the share of coherent BAD answers at strength 1, plus how much of BAD strength -1 takes away from
    what the system message "bad" asks for; in probability.
    """
    held = [row["directions"] for row in rows]

    def steers(name: str) -> float:
        found = []
        for one in held:
            at = {point["alpha"]: point for point in one[name]["steered"]}
            found.append(at[1.0]["trait"] - at[0.0]["trait"] + 1 - at[-1.0]["probability"])
        return fmean(found)

    able = [name for name in held[0] if fmean(one[name]["auc"] for one in held) >= 0.95]
    recipe, _, layer = max(able, key=steers).rpartition("/")
    return Choice(recipe, int(layer))


def choose_strengths(choice: Choice, rows: Rows) -> Choice:
    """Return the other choices: the highest skill - trait, as means over tuning seeds.

    The first rule was the least trait at a cost of at most 0.03 of skill. On the tuning seeds only the weakest
    injection cost so little, and it protected from nothing.
    """
    held = by_variant(rows)

    def mean(name: str, metric: str) -> float:
        return fmean(row[metric] for row in held[name].values())

    def best(names: Sequence[str]) -> str:
        return max(names, key=lambda name: mean(name, "skill") - mean(name, "trait"))

    alpha = float(best([f"static {one:g}" for one in GRID]).split()[1])
    half = mean("sft", "trait_probability") / 2
    weaker = [one for one in GRID if one * 2 in GRID]
    level = min(weaker, key=lambda one: abs(mean(f"static {one:g}", "trait_probability") - half))
    _, horizon, _, rate = best([ema_name(h, r) for r in RATES for h in HORIZONS]).split()
    kl = best([name for name in RECIPES if name.startswith("kl ")])
    return Choice(
        choice.recipe, choice.layer, alpha, level, _detection(rows), rate=float(rate), horizon=float(horizon), kl=kl
    )


def reported(choice: Choice) -> list[str]:
    """Return the recipes for the test seeds: all but the baselines that were not chosen."""
    chosen = (choice.kl, ema_name(choice.horizon, choice.rate))
    return [name for name in RECIPES if not name.startswith(("kl ", "ema ")) or name in chosen]


def _detection(rows: Rows) -> float:
    """Return the least strength of detection with the best AUROC, in the mean over start, middle and end."""
    looks = [look for row in rows if row["variant"] == "sft p=0.3" for look in row["detect"].values()]
    names = [name for name in looks[0] if name.startswith("delta")]
    found = {float(name.split()[1]): round(fmean(look[name]["auroc"] for look in looks), 3) for name in names}
    return min(found, key=lambda alpha: (-found[alpha], alpha))


def make(variant: str, seed: int, choice: Choice | None, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return one row; run in a process of its own, on one thread."""
    torch.set_num_threads(1)
    split = "select" if seed in TUNING else "test"
    if variant == VECTORS:
        row = vector_row(seed, split)
    else:
        assert choice is not None
        row = RECIPES[variant].row(setup_of(seed, choice, known), split)
    return {"variant": variant, "seed": seed, "split": split, **row}


class Table:
    """The rows that are finished, on disk."""

    def __init__(self, path: Path) -> None:
        """Read what is there."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            self.rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]

    def of(self, seeds: Sequence[int], variants: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Return the rows of these seeds and variants."""
        return [r for r in self.rows if r["seed"] in seeds and (variants is None or r["variant"] in variants)]

    def missing(self, variants: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
        """Return what is not finished, variant by variant, so that an early end leaves whole variants."""
        done = {(row["variant"], row["seed"]) for row in self.rows}
        return [(variant, seed) for variant in variants for seed in seeds if (variant, seed) not in done]

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def run(table: Table, variants: Sequence[str], seeds: Sequence[int], choice: Choice | None, jobs: int) -> None:
    """Make the missing rows of `variants` x `seeds`; one that fails is told and left out."""
    for wave in _waves(variants):
        todo = table.missing(wave, seeds)
        if not todo:
            continue
        with ProcessPoolExecutor(jobs) as pool:
            known = {seed: {row["variant"]: row for row in table.of([seed])} for seed in seeds}
            waiting = {pool.submit(make, variant, seed, choice, _needed(variant, known[seed])): (variant, seed)
                       for variant, seed in todo}  # fmt: skip
            for count, done in enumerate(as_completed(waiting), start=1):
                variant, seed = waiting[done]
                try:
                    row = done.result()
                except Exception:  # the others are sound
                    print(f"FAILED {variant}, seed {seed}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                    continue
                table.add(row)
                told = {name: round(row[name], 3) for name in ("trait", "trait_probability", "skill") if name in row}
                print(f"{count}/{len(todo)} {variant}, seed {seed}: {told} {row['seconds']} s", flush=True)


def _waves(variants: Sequence[str]) -> Iterator[list[str]]:
    """Yield variants, those that need rows of others after them."""
    needy = [name for name in variants if name in RECIPES and RECIPES[name].needs]
    yield [name for name in variants if name not in needy]
    yield needy


def _needed(variant: str, known: Mapping[str, Any]) -> dict[str, Any]:
    names = RECIPES[variant].needs if variant in RECIPES else ()
    return {name: known[name] for name in names if name in known}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, or write the report."""
    parser = argparse.ArgumentParser(description=str(main.__doc__))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", nargs="+", help="recipes, by name; default: all")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tune", action="store_true", help="end after the tuning seeds and their choices")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    table = Table(options.out / "rows.jsonl")
    if not options.report:
        run(table, [VECTORS], TUNING, None, options.jobs)
    choice = choose_direction(table.of(TUNING, [VECTORS]))
    tuned = [name for name, recipe in RECIPES.items() if recipe.tuned]
    if not options.report:
        print(choice)
        run(table, tuned, TUNING, choice, options.jobs)
    choice = choose_strengths(choice, table.of(TUNING, tuned))
    print(choice)
    if options.report:
        report(table.rows, choice, {**facts(), "tuning": TUNING, "seeds": options.seeds})
    elif not options.tune:
        run(table, options.only or [VECTORS, *reported(choice)], options.seeds, choice, options.jobs)


if __name__ == "__main__":
    main()
