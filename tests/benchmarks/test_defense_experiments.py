"""That the defense experiments' tables say what their rows say: means, paired differences, choices, marked tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.defense_detectors import correlation, quality
from benchmarks.defense_experiments import Table, choose_direction, choose_strengths
from benchmarks.defense_report import by_variant, difference, filled, outcome_table, summary, table
from benchmarks.defense_runs import GRID, HORIZONS, RATES, RECIPES, Choice

ROWS = [
    {"variant": name, "seed": seed, "trait": trait, "skill": 0.9}
    for name, traits in (("sft", (0.5, 0.7, 0.9)), ("static 1", (0.1, 0.2, 0.3)))
    for seed, trait in enumerate(traits)
]


def test_difference_is_paired_by_seed() -> None:
    held = by_variant(list(reversed(ROWS)))
    found = difference(held, "static 1", "sft")
    assert found["by_seed"] == pytest.approx([-0.4, -0.5, -0.6])
    assert found["value"] == pytest.approx(-0.5)
    half = 4.302653 * 0.1 / math.sqrt(3)  # Student's t of 2 degrees
    assert found["student"] == pytest.approx([-0.5 - half, -0.5 + half], abs=1e-6)
    assert found["bootstrap"] == pytest.approx([-0.6, -0.4], abs=0.02)
    assert found["p"] == 0.25  # 2 / 2^3


def test_difference_leaves_out_seeds_that_only_one_has() -> None:
    assert difference(by_variant(ROWS[1:]), "static 1", "sft")["by_seed"] == pytest.approx([-0.5, -0.6])


def test_summary_is_mean_with_student_interval() -> None:
    found = summary(by_variant(ROWS))["sft"]["trait"]
    assert found["value"] == pytest.approx(0.7)
    assert found["high"] - found["value"] == pytest.approx(4.302653 * 0.2 / math.sqrt(3), abs=1e-6)
    assert found["by_seed"] == {0: 0.5, 1: 0.7, 2: 0.9}


def test_outcome_table_shows_every_seed_and_leaves_out_what_was_not_run() -> None:
    lines = outcome_table(by_variant(ROWS), ["sft", "never run"]).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| sft | 0.700 ± 0.497 |")
    assert "0.50 0.70 0.90" in lines[2]


def test_filled_replaces_marked_tables_only() -> None:
    page = "a\n<!-- table E1 -->\nold\n<!-- end -->\nb\n<!-- table E99 -->\nkept\n<!-- end -->\n"
    made = table(["x"], [["1"]])
    assert filled(page, {"E1": made}) == page.replace("old", "| x |\n|---|\n| 1 |")
    assert filled(filled(page, {"E1": made}), {"E1": made}) == filled(page, {"E1": made})


def test_quality_counts_by_hand() -> None:
    clean = torch.arange(1.0, 20.0)  # 19 scores: at 5 % the threshold is the largest
    found = quality(np.array([30.0, 10.0, 25.0, -1.0]), np.array([True, True, False, False]), clean)
    assert found == pytest.approx({
        "auroc": 0.75, "threshold": 19.0, "fpr_zero": 0.5, "recall_zero": 1.0, "fpr_calibrated": 0.5,
        "recall_calibrated": 0.5,
    })  # fmt: skip


def test_correlation_leaves_out_what_is_not_finite() -> None:
    assert correlation(np.array([1.0, 2.0, 3.0, np.inf]), np.array([2.0, 4.0, 6.0, 0.0])) == pytest.approx(1.0)
    assert math.isnan(correlation(np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0])))


def _direction(auc: float, trait: float) -> dict:
    steered = [{"alpha": a, "trait": trait if a == 1.0 else 0.0, "probability": 1.0} for a in (-1.0, 0.0, 1.0)]
    return {"auc": auc, "steered": steered}


def test_choose_direction_asks_for_separation_first_then_for_steering() -> None:
    rows = [{"directions": {"words/0": _direction(0.9, 1.0), "words/1": _direction(1.0, 0.4),
                            "other/2": _direction(1.0, 0.6)}}]  # fmt: skip
    chosen = choose_direction(rows)
    assert (chosen.recipe, chosen.layer) == ("other", 2)


def test_choose_strengths_takes_the_highest_skill_minus_trait() -> None:
    def row(variant: str, trait: float, skill: float) -> dict:
        return {"variant": variant, "seed": 100, "trait": trait, "trait_probability": trait, "skill": skill}

    traits = dict(zip(GRID, (0.5, 0.38, 0.1, 0.05, 0.0), strict=True))
    skills = dict(zip(GRID, (0.9, 0.9, 0.9, 0.89, 0.8), strict=True))
    rows = [row("sft", 0.8, 0.9)]
    rows += [row(f"static {alpha:g}", traits[alpha], skills[alpha]) for alpha in GRID]
    rows += [row(f"ema {h} rate {r:g}", 0.5 if (h, r) == (100, 1e-4) else 0.6, 0.9) for h in HORIZONS for r in RATES]
    rows += [row(name, 0.2 if name == "kl neutral 1" else 0.4, 0.9) for name in RECIPES if name.startswith("kl ")]
    look = {"delta 0.1": {"auroc": 0.9}, "delta 0.5": {"auroc": 0.95}}
    rows.append({**row("sft p=0.3", 0.2, 0.9), "detect": {"0": look}})
    chosen = choose_strengths(Choice("words", 1), rows)
    assert chosen == Choice("words", 1, 2.0, 0.5, 0.5, rate=1e-4, horizon=100.0, kl="kl neutral 1")


def test_rows_are_kept_and_not_made_again(tmp_path) -> None:
    held = Table(tmp_path / "out" / "rows.jsonl")
    assert held.missing(["a", "b"], [0, 1]) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    held.add({"variant": "a", "seed": 1})
    again = Table(tmp_path / "out" / "rows.jsonl")
    assert again.missing(["a", "b"], [0, 1]) == [("a", 0), ("b", 0), ("b", 1)]
    assert again.of([1], ["a"]) == [{"variant": "a", "seed": 1}]
