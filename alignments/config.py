"""What `run_das.py` is asked to do: one frozen dataclass, where each of its values came from, and how it is read.

Order: defaults < file (YAML or JSON) < `--set key=value` < flags. `None` means derived: it is resolved once, by
`with_derived`, and `describe` prints every value with its source. Every problem is a `ConfigError`, found before a
model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from alignments.config_values import (
    Controls,
    Count,
    Layers,
    Methods,
    Names,
    Options,
    Ranks,
    Rate,
    Seeds,
    Share,
    Text,
    Trackers,
    Whole,
)
from intervene.errors import asked_found_do, close_names
from records.config_files import ConfigError, read_file, read_sets

_NESTED = ("options", "task_options")  # keys that hold named values themselves


@dataclass(frozen=True)
class RunDas:
    """One alignment search. What each value means is in `HELP`; None means derived.

    `layers` may still be "all" before the model is known: see `resolve_layers`. `sources` maps every key to where its
    value came from (default, the file's name, --set, flag, derived); it is no part of the configuration.
    """

    task: Text
    variable: Text | None = None
    model: Text = "smollm2-135m"
    methods: Methods = ("full_vector", "das")
    controls: Controls = ("random_subspace", "random_model")
    layers: Layers = None
    positions: Names = None
    component: Text = "block_output"
    rank: Ranks = (8,)
    seeds: Seeds = (0, 1, 2)
    strategy: Literal["grid", "full", "halving"] = "grid"
    budget_seconds: Rate | None = None
    budget_forwards: Count | None = None
    grid_splits: Literal["both", "select"] = "both"
    min_accuracy: Share = 0.5
    force: bool = False
    do_align: bool = True
    n_train: Count = 256
    n_select: Count = 200
    n_test: Count = 300
    max_tokens: Count | None = None
    batch_size: Count = 16
    eval_batch_size: Count = 96
    lr: Rate = 0.01
    steps: Count = 100
    warmup: Share = 0.1
    accumulate: Count = 1
    validate_every: Whole = 0
    patience: Count | None = None
    log_every: Whole = 0
    fast: bool = False
    options: Options = field(default_factory=dict)
    task_options: dict[str, Any] = field(default_factory=dict)
    executor: Literal["local", "processes", "ray", "torchrun"] = "local"
    workers: Count = 2
    parallel: Literal["jobs", "data"] = "jobs"
    cache: Path | None = None
    device_map: Text | None = None
    out: Path | None = None
    resume: bool = False
    dry_run: bool = False
    device: Text | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: Count | None = None
    trackers: Trackers = ()
    wandb_entity: Text | None = None
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    __pydantic_config__ = ConfigDict(extra="forbid")

    def to_json(self) -> dict[str, Any]:
        """Return the resolved values as plain JSON, without their sources."""
        return {name: _plain(getattr(self, name)) for name in KEYS}


KEYS = tuple(one.name for one in fields(RunDas) if one.name != "sources")

HELP: dict[str, str] = {
    "task": "causal task that the pairs come from, e.g. ioi",
    "variable": "variable of the task's causal model to look for; derived: the task's first",
    "model": "local folder, Hub id, the embedded default's name; planted (made by hand) or small (trained on the task)",
    "methods": "full_vector (swap everything), das (learn a subspace) and others of --list_methods, comma-separated",
    "controls": "random_subspace, random_model, shuffled_labels, complement, rival:<variable>, in best cells; or none",
    "layers": "0-based blocks: 0,4,8 or 0-29:4 (both ends included) or all; derived: about eight, evenly spaced",
    "positions": "names of the task's token positions, comma-separated; derived: all that the task marks",
    "component": "what of each layer is searched: block_output, attention_output, mlp_output, head_output[2], ...",
    "rank": "dimensions of the subspace, at most the width of the site; several (1,2,4,8) give a rank curve",
    "seeds": "one fit per cell and seed: 0,1,2 or 0-4",
    "strategy": "grid (first seed everywhere, all in the best cells), full (all seeds everywhere) or halving (screens)",
    "budget_seconds": "halving ends after so many seconds, with the last finished round",
    "budget_forwards": "halving ends after so many pair-passes; repeats exactly, unlike seconds",
    "grid_splits": "score every cell on both select and test, or on select alone (the best cells always on both)",
    "min_accuracy": "share of training pairs, base and source, that the model must answer rightly to be searched",
    "force": "search a model below min_accuracy all the same",
    "do_align": "false: print and record the accuracy on the task alone, and search nothing",
    "n_train": "pairs to learn on",
    "n_select": "pairs on which the best cell is chosen",
    "n_test": "pairs on which it is reported",
    "max_tokens": "refuse prompts longer than this; derived: no limit",
    "batch_size": "pairs per training step",
    "eval_batch_size": "rows per scoring pass, all seeds of a cell together",
    "lr": "learning rate of the subspace",
    "steps": "training steps per fit",
    "warmup": "share of the steps in which the rate rises",
    "accumulate": "batches per training step; all of them count",
    "validate_every": "steps between validations on select, of which the best parameters are kept; 0: none",
    "patience": "validations without a better one that end a fit; derived: never",
    "log_every": "print the loss of a fit every so many steps; 0: never",
    "fast": "training steps may multiply in bf16 where the CPU can; scores never do",
    "options": "of methods, as --set options.frame=cayley; see --list_methods",
    "task_options": "of the task, as --set task_options.form=short",
    "executor": "who carries out the cells: local, processes, ray, or torchrun (started by it)",
    "workers": "of the executor processes or ray",
    "parallel": "under torchrun: jobs (each rank its own, with --executor torchrun) or data (all ranks share each fit)",
    "cache": "folder for activations that do not fit in memory; derived: none is written",
    "device_map": "how a large model is spread over devices, as transformers takes it: auto, balanced, ...",
    "out": "folder of this run; derived: runs/<task>-<variable>",
    "resume": "go on with the finished rows of the folder",
    "dry_run": "print the plan, pair counts, task accuracy and cost, and search nothing",
    "device": "cpu, cuda or cuda:N; derived: cuda where there is one",
    "dtype": "precision of the model: float32, bfloat16 or float16",
    "threads": "CPU threads; derived: torch's own choice",
    "trackers": "tensorboard and/or wandb, which mirror the rows; the folder stays the record; none",
    "wandb_entity": "user or team of the wandb run; derived: wandb's own default",
}

_CHECK = TypeAdapter(RunDas)


def load_config(
    file: str | Path | None = None, sets: Iterable[str] = (), flags: Mapping[str, object] | None = None
) -> RunDas:
    """Return the checked configuration: defaults < `file` < `sets` ("key=value", read as YAML) < `flags`.

    A flag that is None was not given. `out` is derived here, as it needs nothing else; the other None values wait for
    `with_derived`.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or given twice, or values are refused (all are named).
    """
    stages: list[tuple[str, Mapping[str, object]]] = []  # (source, values), later wins
    if file is not None:
        stages.append((str(file), read_file(Path(file))))
    stages.append(("--set", read_sets(sets)))
    stages.append(("flag", {key: value for key, value in (flags or {}).items() if value is not None}))
    values: dict[str, Any] = {}
    sources = dict.fromkeys(KEYS, "default")
    for source, given in stages:
        for path, value in _flatten(given):
            head, _, part = path.partition(".")
            if head in _NESTED and part:
                values[head] = {**values.get(head, {}), part: value}
            elif path in KEYS:
                values[path] = value
            else:
                raise ConfigError(_unknown_key(path, source))
            sources[head] = source
    return _derive_out(_checked(values, sources))


def with_derived(config: RunDas, **values: object) -> RunDas:
    """Return `config` with the values that were None (or "all" layers) resolved; their source becomes "derived".

    Raises:
        ConfigError: a key is unknown, was given by the user, or the value is refused.
    """
    for key in values:
        if key not in KEYS:
            raise ConfigError(_unknown_key(key, "derived"))
        current = getattr(config, key)
        if current is not None and not (key == "layers" and current == "all"):
            found = f"it was given as {_plain(current)!r} ({config.sources.get(key, 'default')})."
            raise ConfigError(asked_found_do(f"Deriving {key}", found, "Derive only what is None."))
    given = {key: getattr(config, key) for key in KEYS} | values
    return _checked(given, {**config.sources, **dict.fromkeys(values, "derived")})


def resolve_layers(config: RunDas, n_layers: int) -> RunDas:
    """Return `config` with `layers` as non-negative block indices of a model that has `n_layers` blocks.

    "all" becomes every block; None becomes about eight, evenly spaced and ending in the last; negative ones count from
    the end.

    Raises:
        ConfigError: a layer the model does not have, or one named twice (as 29 and -1).
    """
    if config.layers is None or config.layers == "all":
        wanted = n_layers if config.layers == "all" else min(8, n_layers)
        last = n_layers - 1
        spread = [round(last * one / max(wanted - 1, 1)) for one in range(wanted)]
        return with_derived(config, layers=tuple(spread) if wanted > 1 else (last,))
    beyond = [layer for layer in config.layers if not -n_layers <= layer < n_layers]
    if beyond:
        asked = f"layers {', '.join(map(str, config.layers))}"
        found = f"this model has layers 0-{n_layers - 1}, and not {', '.join(map(str, beyond))}."
        raise ConfigError(asked_found_do(asked, found, f"Use layers below {n_layers}, or all."))
    resolved = tuple(layer % n_layers for layer in config.layers)
    if len(set(resolved)) != len(resolved):
        asked = f"layers {', '.join(map(str, config.layers))}"
        raise ConfigError(asked_found_do(asked, "two of them are the same block.", "Name each block once."))
    return replace(config, layers=resolved)


def describe(config: RunDas) -> str:
    """Return one line per value, each with its source: "rank        8            --set"."""
    shown = {key: _shown(getattr(config, key)) for key in KEYS}
    wide, long = max(map(len, shown)), min(40, max(map(len, shown.values())))
    return "\n".join(
        f"{key:<{wide}}  {value:<{long}}  {config.sources.get(key, 'default')}" for key, value in shown.items()
    )


def _flatten(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """Return (dotted path, value) of every leaf, so that an unknown key deep down is named by its whole path."""
    leaves: list[tuple[str, object]] = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        leaves += _flatten(value, f"{path}.") if isinstance(value, Mapping) and value else [(path, value)]
    return leaves


def _unknown_key(path: str, source: str) -> str:
    head, _, rest = path.partition(".")
    if rest and head in KEYS:
        found, do = f"{head} has no parts.", f"Write {head} itself."
    else:
        found, do = "there is no such key.", close_names(path.rpartition(".")[2], KEYS)
    return asked_found_do(f"Configuration {path} (from {source})", found, do)


def _checked(values: Mapping[str, object], sources: Mapping[str, str]) -> RunDas:
    try:
        config = _CHECK.validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(error, sources))) from None
    return replace(config, sources=dict(sources))


def _problems(error: ValidationError, sources: Mapping[str, str]) -> list[str]:
    problems: dict[str, str] = {}  # one per key: a union reports every branch that failed
    for one in error.errors(include_url=False):
        key = str(one["loc"][0])
        if one["type"] == "missing":
            do = f"Pass --{key} or write '{key}:' in the file ({HELP[key]})."
            problems[key] = asked_found_do(f"Configuration {key}", "it was not given.", do)
            continue
        where = f"Configuration {key} (from {sources.get(key, 'default')})"
        reason = one["msg"].removeprefix("Value error, ").rstrip(".")
        ended = reason if reason.endswith("?") else f"{reason}."
        problems.setdefault(key, asked_found_do(where, f"{one['input']!r}: {ended}", f"Meaning: {HELP[key]}."))
    return list(problems.values())


def _derive_out(config: RunDas) -> RunDas:
    if config.out is not None:
        return config
    name = "-".join([Path(config.task).stem, *([config.variable] if config.variable else [])])
    return with_derived(config, out=Path("runs") / re.sub(r"[^\w.-]+", "_", name))


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _shown(value: object) -> str:
    if isinstance(value, tuple | dict):
        each = value if isinstance(value, tuple) else [f"{name}={one}" for name, one in value.items()]
        return ",".join(map(str, each)) or "none"
    return "to be derived" if value is None else str(value)
