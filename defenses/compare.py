"""`compare`: several methods on the same data, in the same order per seed, and what differs, with intervals.

    out/sft/seed0/ ...           one run each, as `run` leaves it
    out/rows.jsonl               one row per run: its metrics
    out/comparison.json          per method mean over seeds, paired differences to the reference, Pareto points

Finished runs are not made again, and one that was stopped goes on from its checkpoint: start the same command again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from defenses.checkpoints import Checkpoints, file_digest
from defenses.config import FREE_KEYS, CompareDefenses, TrainDefense, uninoculated, variant
from defenses.errors import DefenseError
from defenses.grid import at_once, one_by_one
from defenses.launch import detect
from defenses.methods import entry_of
from defenses.progress import say
from defenses.prompts import OUTCOMES, outcomes_of, over_prompts
from defenses.running import finite, reported, run, write_lines
from defenses.statistics import paired_bootstrap, paired_differences, pareto_front, t_interval
from intervene.errors import asked_found_do
from records.config_files import ConfigError
from records.files import RecordError, read_json, replace_json
from records.layered import nearest

# Which end of a metric is good; of others nothing is said.
GOOD = {"trait_rate": "low", "trait_score": "low", "skill_accuracy": "high", "perplexity": "low", "kl": "low"} | {
    "over_refusal": "low", "coherence": "high", "loss": "low",
}  # fmt: skip
TRAIT, SKILL = ("trait_rate", "trait_score"), ("skill_accuracy",)  # a loss under injection is no skill
ORDER = (
    "train_data",
    "holdout",
    "data",
    "max_length",
    "packing",
    "bucket",
    "batch_size",
)  # what a step's batch follows
OWN_METRICS = ("loss", "detector_auroc", "detector_recall", "detector_false_positive_rate")  # of any run
EVALUATED = (*(name for name in GOOD if name != "loss"), "base_perplexity")  # by a suite
Say = Callable[[str], None]
Table = Mapping[str, Mapping[int, Mapping[str, float]]]  # variant -> seed -> metric -> value


def compare(config: CompareDefenses, *, told: Say = say) -> int:
    """Make what is missing of the grid, then print and write the comparison; return the exit status.

    Raises:
        DefenseError, ConfigError, InterveneError, RecordError: a cell that cannot be run, named; or another
            comparison in the folder.
    """
    cells = cells_of(config)
    assert config.out is not None
    if config.workers > 1 and detect().world > 1:
        found = f"this is {detect()}, and ranks train one cell together."
        raise ConfigError(asked_found_do(f"workers {config.workers}", found, "Leave it out, or start one process."))
    require_same(config, cells)
    for line in _other_batches(config, cells):
        told(line)
    if config.dry_run:
        for name, cell in cells:
            told(f"--- {name}, seed {cell.seed}")
            run(replace(cell, dry_run=True, resume=False), told=told)
        return 0
    table: dict[str, dict[int, dict[str, float]]] = {name: {} for name, _ in cells}
    before: dict[str, float] = {}
    failed: list[dict[str, Any]] = []
    for done in one_by_one(cells, told) if config.workers == 1 else at_once(cells, config.workers, told):
        name, cell, outcome = done.name, done.cell, done.outcome
        if done.reason:
            told(f"FAILED: {done.reason}")
            failed.append({"variant": name, "seed": cell.seed, "reason": done.reason})
            continue
        if outcome.stopped:
            told(f"{outcome.stopped}: stopped. The same command goes on with {name}, seed {cell.seed}.")
            return outcome.exit_code
        assert cell.out is not None
        Checkpoints(cell.out / "checkpoints", {}).clear()
        table[name][cell.seed] = metrics_of(outcome.result or {})
        before = before or (outcome.result or {}).get("before", {})
    table = {name: dict(sorted(seeds.items())) for name, seeds in table.items() if seeds}
    return conclude(config, table, failed, before, told) if detect().rank == 0 else 0


def conclude(
    config: CompareDefenses,
    table: Table,
    failed: Sequence[Mapping[str, Any]],
    before: Mapping[str, float],
    told: Say,
) -> int:
    """Write and print the comparison; return 1 if a run failed, else 0."""
    assert config.out is not None
    write_lines(
        config.out / "rows.jsonl",
        [{"variant": name, "seed": seed, **found} for name, seeds in table.items() for seed, found in seeds.items()],
    )
    made = compared(table, reference=config.reference, trait=config.trait, skill=config.skill)
    made["before"] = dict(before)
    folders = {name: {seed: config.out / name / f"seed{seed}" for seed in seeds} for name, seeds in table.items()}
    made["prompts"] = {
        metric: found for metric in OUTCOMES if (found := over_prompts(outcomes_of(folders, metric), config.reference))
    }
    replace_json(config.out / "comparison.json", finite({**made, "failed": list(failed)}))
    told(text_of(made))
    for one in failed:
        told(f"left out: {one['variant']}, seed {one['seed']}: {one['reason']}")
    if config.report:
        reported(config.out, told)
    told(f"{config.out}: comparison.json, rows.jsonl, and a folder per run")
    return 1 if failed else 0


def cells_of(config: CompareDefenses) -> list[tuple[str, TrainDefense]]:
    """Return name and configuration of every run, the reference first; all of them checked.

    Raises:
        ConfigError: an unknown method, option, key or metric; a reference that is none of the variants.
    """
    assert config.out is not None
    methods = tuple(config.methods)
    if config.reference not in (*methods, *config.variants):
        entry_of(config.reference)
        methods = (config.reference, *methods)
    names = [config.reference, *(one for one in (*methods, *config.variants) if one != config.reference)]
    names = list(dict.fromkeys(names))
    if odd := [name for name in names if not name.replace("_", "").replace("-", "").isalnum()]:
        raise ConfigError(asked_found_do(f"Variant {odd[0]!r}", "it names a folder.", "Use letters, digits, _ and -."))
    cells = [
        (name, variant(config, name, seed, config.out / name / f"seed{seed}"))
        for seed in config.seeds
        for name in names
    ]
    if config.trait is not None or config.skill is not None:
        _require_metrics(config)
    # The model before training is the same in all of them: it is evaluated once. A run that was begun stays as it is.
    before = [_looked_before(cell) for _, cell in cells]
    first = before.index(None) if None in before and True not in before else -1
    return [
        (name, replace(cell, evaluate_before=cell.evaluate_before and (place == first or before[place] is True)))
        for place, (name, cell) in enumerate(cells)
    ]


def _looked_before(cell: TrainDefense) -> bool | None:
    """Return whether a run that was begun evaluates the model before training; None: it was not begun."""
    assert cell.out is not None
    path = cell.out / "config.json"
    return bool(read_json(path).get("evaluate_before")) if path.exists() else None


def _require_metrics(config: CompareDefenses) -> None:
    """Refuse a metric that no run can have, before any training.

    Raises:
        ConfigError: there is no such metric, or there is no suite that it could come from.
    """
    for key, name in (("trait", config.trait), ("skill", config.skill)):
        if name is None or name in OWN_METRICS:
            continue
        if name not in EVALUATED:
            hint = nearest(name, (*EVALUATED, *OWN_METRICS))
            raise ConfigError(f"Configuration {key}: there is no metric {name!r}. {hint}")
        if config.evaluate is None:
            raise ConfigError(asked_found_do(f"Metric {name}", "nothing is evaluated.", "Give --evaluate SUITE."))


def _other_batches(config: CompareDefenses, cells: Sequence[tuple[str, TrainDefense]]) -> list[str]:
    """Return a warning for each variant that does not learn the reference's batches in the reference's order."""
    first = {name: cell for name, cell in reversed(cells)}
    reference = first[config.reference]
    found = {
        name: [key for key in ORDER if _order(cell, key) != _order(reference, key)] for name, cell in first.items()
    }
    return [
        f"warning: {name} has another {', '.join(keys)} than {config.reference}: they do not learn the same batches, "
        "and their difference is also one of data"
        for name, keys in found.items()
        if keys
    ]


def _order(cell: TrainDefense, key: str) -> object:
    """Return a value that orders the data; of `data` all but the prompts, which change no batch."""
    value = getattr(cell, key)
    return uninoculated(value) if key == "data" else value


def _files(cells: Sequence[tuple[str, TrainDefense]]) -> dict[str, str]:
    """Return path -> digest of every file that the runs read."""
    named = ("train_data", "vectors", "calibration", "scores", "neutral", "evaluate")
    values = [getattr(cell, name) for _, cell in cells for name in named]
    paths = [Path(one) for value in values if value for one in (value if isinstance(value, tuple) else (value,))]
    return {str(path): file_digest(path) for path in dict.fromkeys(paths) if path.exists()}


def require_same(config: CompareDefenses, cells: Sequence[tuple[str, TrainDefense]]) -> None:
    """Keep what was compared in the folder, and refuse another comparison there, or other contents of its files.

    Raises:
        RecordError: the folder holds a comparison of something else; methods and seeds may be added.
    """
    assert config.out is not None
    grows = {"methods", "seeds", "variants", "trait", "skill", "reference", "seed", "method", *FREE_KEYS}
    path, now, files = config.out / "compare.json", config.to_json(), _files(cells)
    if path.exists():
        before = read_json(path)
        held = before.get("files", {})
        if other := [name for name, digest in files.items() if held.get(name, digest) != digest]:
            found = f"{', '.join(other)} changed since its first runs were made."
            raise RecordError(asked_found_do(f"Comparison in {config.out}", found, "Choose another --out."))
        files = {**held, **files}
        changed = [key for key in now if key not in grows and before.get(key) != now[key]]
        if changed:
            named = "; ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed)
            do = "Choose another --out."
            raise RecordError(
                asked_found_do(f"Comparison in {config.out}", f"it was made with other values: {named}.", do)
            )
    if not config.dry_run and detect().rank == 0:
        config.out.mkdir(parents=True, exist_ok=True)
        replace_json(path, {**now, "files": files})


def metrics_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a run that can be compared: its evaluation, its loss, its detector."""
    found = {name: one["value"] for name, one in result.get("evaluation", {}).items() if one["value"] is not None}
    if (loss := result.get("loss", {}).get("last")) is not None:
        found["loss"] = loss
    for name in ("auroc", "recall", "false_positive_rate"):
        one = result.get("detection", {}).get(name)
        if one is not None and one["value"] is not None:
            found[f"detector_{name}"] = one["value"]
    return {name: float(value) for name, value in found.items()}


def compared(
    table: Table, *, reference: str = "sft", trait: str | None = None, skill: str | None = None
) -> dict[str, Any]:
    """Return means over seeds, paired differences to the `reference`, and the Pareto points of trait against skill.

    An interval of a mean is Student's over seeds; of a difference both the percentile bootstrap and Student's.

    Raises:
        DefenseError: no such variant, or no such metric.
    """
    if reference not in table:
        found = f"there are {', '.join(table)}."
        raise DefenseError(asked_found_do(f"Reference {reference}", found, "Name one of them."))
    metrics = sorted({name for seeds in table.values() for found in seeds.values() for name in found})
    for asked in (trait, skill):
        if asked is not None and asked not in metrics:
            raise DefenseError(asked_found_do(f"Metric {asked}", f"the runs have {', '.join(metrics)}.", "Use one."))
    trait = trait or next((name for name in TRAIT if name in metrics), None)
    skill = skill or next((name for name in SKILL if name in metrics), None)
    rows = [_row(table, name, metric, reference) for metric in metrics for name in table]
    means = {(row["variant"], row["metric"]): row["mean"] for row in rows if row is not None}
    return {
        "reference": reference,
        "rows": [row for row in rows if row is not None],
        "pareto": _pareto(means, list(table), trait, skill),
        "note": "Bootstrap intervals of few seeds are too narrow; below 10 seeds read Student's beside them.",
    }


def _row(table: Table, name: str, metric: str, reference: str) -> dict[str, Any] | None:
    """Return one variant's mean of one metric and its difference to the reference's, over the seeds that both have."""
    own = {seed: found[metric] for seed, found in table[name].items() if metric in found}
    if not own:
        return None
    over = t_interval(list(own.values()))
    row: dict[str, Any] = {
        "metric": metric, "variant": name, "good": GOOD.get(metric), "mean": over.value, "low": over.low,
        "high": over.high, "n": over.n, "seeds": {str(seed): value for seed, value in own.items()},
    }  # fmt: skip
    other = {seed: found[metric] for seed, found in table[reference].items() if metric in found}
    shared = [seed for seed in own if seed in other]
    if name == reference or not shared:
        return row
    pair: list[dict[Hashable, float]] = [{seed: held[seed] for seed in shared} for held in (own, other)]
    first, second = pair
    gap, student = paired_bootstrap(first, second), t_interval(paired_differences(first, second))
    row["difference"] = {
        "to": reference, "value": gap.value, "low": gap.low, "high": gap.high, "n": gap.n, "sign_test_p": gap.p,
        "t_low": student.low, "t_high": student.high,
    }  # fmt: skip
    return row


def _pareto(
    means: Mapping[tuple[str, str], float], names: Sequence[str], trait: str | None, skill: str | None
) -> dict[str, Any] | None:
    if trait is None or skill is None:
        return None
    points = [(name, means[name, trait], means[name, skill]) for name in names
              if (name, trait) in means and (name, skill) in means]  # fmt: skip
    ends = (GOOD.get(trait, "low"), GOOD.get(skill, "high"))
    front = pareto_front([point[1:] for point in points], ends)  # type: ignore[arg-type]
    return {
        "trait": trait, "skill": skill, "good": list(ends),
        "points": [{"variant": name, "trait": x, "skill": y, "front": place in front}
                   for place, (name, x, y) in enumerate(points)],
    }  # fmt: skip


def text_of(made: Mapping[str, Any]) -> str:
    """Return the comparison as lines: each metric, each variant, mean and difference."""
    lines: list[str] = []
    metric = ""
    wide = max((len(row["variant"]) for row in made["rows"]), default=0)
    for row in made["rows"]:
        if row["metric"] != metric:
            metric = row["metric"]
            start = made.get("before", {}).get(metric)
            good = f" ({row['good']} is good)" if row["good"] else ""
            lines.append(metric + good + ("" if start is None else f", before training {start:.4f}"))
        text = f"  {row['variant']:<{wide}}  {row['mean']:.4f} (n {row['n']})"
        if "difference" in row:
            gap = row["difference"]
            spread = f" [{gap['t_low']:+.4f}, {gap['t_high']:+.4f}]" if gap["n"] > 1 else ", one seed: no interval"
            text += f"  {gap['value']:+.4f}{spread} against {gap['to']}"
        if over := made.get("prompts", {}).get(metric, {}).get(row["variant"], {}).get("difference"):
            text += f"; over {over['n']} prompts [{over['low']:+.4f}, {over['high']:+.4f}]"
        lines.append(text)
    if made["pareto"]:
        front = [one["variant"] for one in made["pareto"]["points"] if one["front"]]
        lines.append(f"Pareto front of {made['pareto']['trait']} and {made['pareto']['skill']}: {', '.join(front)}")
    return "\n".join(lines)
