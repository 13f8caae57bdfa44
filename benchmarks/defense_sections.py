"""Which trainings and differences stand in which table of docs/results/defenses.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.defense_report import (
    Held,
    detector_table,
    difference_table,
    outcome_table,
    slope_table,
    vector_table,
)
from benchmarks.defense_runs import ema_name

if TYPE_CHECKING:
    from benchmarks.defense_runs import Choice

ALL = ("trait", "trait_probability", "skill")
STEPS = (0, 10, 20, 40, 100, 110, 120, 150, 200)
QUALITY = {
    "auroc": "AUROC",
    "fpr_zero": "FPR at 0",
    "fpr_calibrated": "FPR at 5 %",
    "recall_calibrated": "recall at 5 %",
}


def sections(held: Held, choice: Choice) -> dict[str, str]:
    """Return every table by name; trainings that are not there are left out."""
    static, low, high = (f"static {alpha:g}" for alpha in (choice.alpha, choice.level, 2 * choice.level))
    tuned = ema_name(choice.horizon, choice.rate)
    made = {"E0": vector_table(held, choice)} if "vectors" in held else {}
    for name, variants in _outcomes(static, low, high, tuned, choice.kl).items():
        made[name] = outcome_table(held, variants, _EXTRA.get(name))
    for name, pairs in _differences(static, high, tuned, choice.kl).items():
        made[f"{name} differences"] = difference_table(held, pairs)
    for figure in ("poison", "poison_injected", "clean"):
        made[f"E4 {figure}"] = slope_table(held, ("sft", static, "withdrawn"), figure, STEPS)
    for variant in ("sft p=0.3", "static p=0.3"):
        if variant in held:
            delta = {**QUALITY, "correlation": "correlation"}
            made[f"E5 {variant}"] = detector_table(held, variant, lambda n: n.startswith(("delta", "first")), delta)
            probe = {"auroc": "AUROC", "recall_calibrated": "recall at 5 %", "correlation": "correlation with exact"}
            made[f"E7 {variant}"] = detector_table(held, variant, lambda n: n.startswith(("probe", "first")), probe)
            made[f"E8 {variant}"] = detector_table(held, variant, lambda n: n.startswith("state"), QUALITY)
    return made


_BLOCKED = {"blocked_poison": "blocked of poison", "blocked_clean": "of clean"}
_EXTRA = {
    "E3": {"mean_strength": "mean strength"},
    "E6": _BLOCKED,
    "E6 by item": {**_BLOCKED, "skill_poisoned": "skill, poisoned items", "skill_clean": "other items"},
    "E9": {"leak": "leak of the subspace"},
    "E12": {"trait_bad": "trait after «bad»"},
}


def _outcomes(static: str, low: str, high: str, tuned: str, kl: str) -> dict[str, list[str]]:
    grid = [f"static {alpha:g}" for alpha in (0.25, 0.5, 1, 2, 4)]
    by_item = [f"{name} by item" for name in ("sft", "mask", "inject", "oracle")]
    return {
        "E1": ["base", "sft p=0.1", "sft p=0.3", "sft p=0.5", "sft"],
        "E2": ["sft", *grid, "random vector", "shuffled vector", "closed loop", "closed loop, bounded"],
        "E3": [low, "rise", "rise, mean", "late rise", "late rise, mean", high],
        "E6": ["sft p=0.3", "mask", "first-order mask", "inject", "static p=0.3", "oracle", "random mask"],
        "E6 by item": by_item,
        "E9": ["sft", "withdrawn", "gradient projection", "update projection", "continuation", static],
        "E12": ["base", "sft", "inoculation", static],
        "E13": ["sft", "ablation one", "ablation all", "ablation random"],
        "baselines": ["sft", tuned, kl, static],
    }


def _differences(static: str, high: str, tuned: str, kl: str) -> dict[str, list[tuple[str, str, str]]]:
    def both(pairs: list[tuple[str, str]], metrics: tuple[str, ...] = ALL) -> list[tuple[str, str, str]]:
        return [(first, second, metric) for first, second in pairs for metric in metrics]

    return {
        "E1": both([("sft", "base")]),
        "E2": both(
            [(static, "sft"), ("random vector", "sft"), (static, "random vector"), ("closed loop, bounded", static)]
        ),
        "E3": both([("rise", "rise, mean"), ("rise", high), ("late rise", "late rise, mean"), ("late rise", high)]),
        "E6": both([("mask", "sft p=0.3"), ("mask", "random mask"), ("inject", "mask"), ("oracle", "mask")], ALL[1:]),
        "E6 by item": [
            ("inject by item", "mask by item", metric)
            for metric in ("trait_probability", "skill_poisoned", "skill_clean")
        ],
        "E9": both(
            [(name, "withdrawn") for name in ("gradient projection", "update projection", "continuation")]
            + [("withdrawn", "sft"), ("update projection", static)]
        ),
        "E12": [*both([("inoculation", "sft")]), ("inoculation", "sft", "trait_bad")],
        "E13": both([("ablation one", "sft"), ("ablation all", "sft"), ("ablation all", "ablation random")]),
        "baselines": both([(static, tuned), (static, kl)]),
    }
