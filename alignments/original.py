"""The original command line (align-transformers' run_alignment.py), its das_config, and its finished-runs check.

    values = original_flags(["--task_name", "pricing_tag_lb", "--model_path", "alpaca_7b", "--output_dir", "out",
                             "--do_align"])                     # values of RunDas; None of its 26 flags is dead
    grid = finished_grid("out", layers=range(0, 31, 5), positions=range(69, 82), seeds=(42, 66, 77), tasks=("left",))

docs/run_alignment_flags.md lists what each flag means there and here.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from alignments.rows import BadRow, Row
from intervene.errors import asked_found_do, close_names
from records.config_files import ConfigError, read_file

_BRACKET = {"form": "alpaca", "bracket": [5.49, 8.49]}
# task_name there -> variable and task options here. "fixed" is the left boundary with one bracket for all prompts.
ORIGINAL_TASKS: dict[str, dict[str, Any]] = {
    name: {"task": "price_tagging", "variable": variable, "task_options": options}
    for name, variable, options in (
        ("pricing_tag_lb", "left", {"form": "alpaca"}),
        ("pricing_tag_ub", "right", {"form": "alpaca"}),
        ("pricing_tag_lub", "left+right", {"form": "alpaca"}),
        ("pricing_tag_mid_diff", "midpoint", {"form": "alpaca"}),
        ("pricing_tag_bracket", "bracket", {"form": "alpaca"}),
        ("pricing_tag_fixed", "left", _BRACKET),
    )
}
METHOD = "boundless"
TEST_PAIRS = 1000  # fixed there
_RUN_NAME = re.compile(
    r"^(?P<arch>\w+)\.task\.(?P<task>\w+)\.seed\.(?P<seed>\d+)\.intl\.(?P<layer>\d+)\.intr\.(?P<start>\d+)\.(?P<stop>\d+)$"
)


@dataclass(frozen=True)
class DasConfig:
    """Where the original looks: `layer`, and tokens `start` to `stop` (exclusive) of the 82 of its prompt."""

    layer: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """How many tokens, which share one rotation there."""
        return self.stop - self.start


def read_das_config(model_folder: str | Path) -> DasConfig:
    """Return what `<model_folder>/das_config/config.json` says; a file of that kind may be named itself.

    Raises:
        ConfigError: there is none, or it lacks a layer or a token range that begins before it ends.
    """
    path = Path(model_folder)
    file = path if path.is_file() else path / "das_config" / "config.json"
    if not file.is_file() and (path / "config.json").is_file() and path.name == "das_config":
        file = path / "config.json"
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        layer, (start, stop) = told["das_layer"], told["das_token_range"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"das_config {file}: cannot be read ({type(error).__name__}: {error}). It holds das_layer and "
            "das_token_range, such as 15 and [80, 81]."
        ) from None
    whole = all(type(number) is int and number >= 0 for number in (layer, start, stop))
    if not whole or stop <= start:
        raise ConfigError(
            f"das_config {file}: layer {layer!r} and token range [{start!r}, {stop!r}]. Needs whole numbers "
            "from 0, the first token before the end."
        )
    return DasConfig(layer, start, stop)


class _Parser(argparse.ArgumentParser):
    """A parser whose refusals are ConfigErrors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"run_alignment flags: {message}. See docs/run_alignment_flags.md.")


def _parser() -> _Parser:
    parser = _Parser(prog="run_das.py original", allow_abbrev=False, add_help=False)
    numbers: dict[str, tuple[type, Any]] = {
        "train_batch_size": (int, 128), "eval_batch_size": (int, 128), "lr": (float, 0.01), "max_seq_len": (int, None),
        "seed": (int, 42), "gradient_accumulation_steps": (int, 1), "local_rank": (int, -1), "epochs": (int, 10),
        "warm_up": (float, 0.1), "log_step": (int, 10), "valid_steps": (int, 500), "early_stopping": (int, None),
        "n_training_examples": (int, 10000), "n_eval_examples": (int, 1000),
    }  # fmt: skip
    texts: dict[str, Any] = {
        "encoder_config_path": None, "decoder_config_path": None, "model_path": "../alpaca_7b/", "wandb_username": "",
        "device": None, "task_name": "pricing_tag_lb",
    }  # fmt: skip
    for name, (kind, default) in numbers.items():
        parser.add_argument(f"--{name}", type=kind, default=default)
    for name, default in texts.items():
        parser.add_argument(f"--{name}", default=default)
    for name in ("is_wandb", "bf16", "do_align", "do_eval", "do_test"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--output_dir", required=True)
    return parser


FLAGS = tuple(action.dest for action in _parser()._actions)


def original_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Return the values of `RunDas` that mean what `argv` means to the original run_alignment.py.

    Layers and positions are read from the model's das_config; where it has none they are left out, and so searched.

    Raises:
        ConfigError: an unknown flag (the nearest is named), a value of the wrong kind, an unknown task_name, no
            output_dir, or a das_config that cannot be read.
    """
    parser = _parser()
    given, unknown = parser.parse_known_args(list(argv))
    if unknown:
        flag = unknown[0].partition("=")[0]
        names = [f"--{name}" for name in FLAGS]
        raise ConfigError(f"run_alignment flag {flag}: there is none of that name. {close_names(flag, names)}")
    for name, least in (
        ("train_batch_size", 1), ("eval_batch_size", 1), ("epochs", 1), ("gradient_accumulation_steps", 1),
        ("n_training_examples", 1), ("n_eval_examples", 1), ("log_step", 1), ("valid_steps", 1), ("seed", 0),
    ):  # fmt: skip
        if getattr(given, name) < least:
            raise ConfigError(f"run_alignment flag --{name} {getattr(given, name)}: must be at least {least}.")
    if given.task_name not in ORIGINAL_TASKS:
        raise ConfigError(
            f"run_alignment flag --task_name {given.task_name}: there is no such task. "
            f"{close_names(given.task_name, ORIGINAL_TASKS)}"
        )
    values = {} if given.decoder_config_path is None else read_file(Path(given.decoder_config_path))
    place = _place(given)
    values |= _fit_values(given) | _run_values(given, place)
    if place is not None:
        values |= {"layers": (place.layer,), "positions": tuple(str(token) for token in range(place.start, place.stop))}
    return values


def _place(given: argparse.Namespace) -> DasConfig | None:
    if given.encoder_config_path is not None:
        return read_das_config(given.encoder_config_path)
    there = (Path(given.model_path) / "das_config").exists()
    return read_das_config(given.model_path) if there else None


def _fit_values(given: argparse.Namespace) -> dict[str, Any]:
    """Return what says how a fit learns; steps and intervals are mini-batches there and optimiser steps here."""
    accumulate = given.gradient_accumulation_steps
    batches = given.epochs * math.ceil(given.n_training_examples / given.train_batch_size)
    values: dict[str, Any] = {
        "batch_size": given.train_batch_size,
        "eval_batch_size": given.eval_batch_size,
        "lr": given.lr,
        "steps": max(1, batches // accumulate),
        "accumulate": accumulate,
        "warmup": given.warm_up,
        "validate_every": max(1, given.valid_steps // accumulate),
        "log_every": max(1, given.log_step // accumulate),
        "seeds": (given.seed,),
        "n_train": given.n_training_examples,
        "n_select": given.n_eval_examples,
        "n_test": TEST_PAIRS,
        "dtype": "bfloat16" if given.bf16 else "float32",
    }
    if given.early_stopping is not None:
        values["patience"] = given.early_stopping
    if given.max_seq_len is not None:
        values["max_tokens"] = given.max_seq_len
    return values


def _run_values(given: argparse.Namespace, place: DasConfig | None) -> dict[str, Any]:
    """Return what says which task is run, on what, and where it is written."""
    values: dict[str, Any] = {
        **ORIGINAL_TASKS[given.task_name],
        "model": given.model_path,
        "out": Path(given.output_dir) / run_name(given.model_path, given.task_name, given.seed, place),
        "resume": True,
    }
    if given.do_align:
        values["methods"] = (METHOD,)
    elif given.do_eval or given.do_test:
        values["methods"] = ("full_vector",)  # scored, and nothing learned
    else:
        values["do_align"] = False
    if given.device is not None:
        values["device"] = given.device
    elif given.local_rank >= 0:
        values["device"] = f"cuda:{given.local_rank}"
    if given.is_wandb:
        values["trackers"] = ("wandb",)
        if given.wandb_username:
            values["wandb_entity"] = given.wandb_username
    return values


def run_name(model_path: str | Path, task_name: str, seed: int, place: DasConfig | None) -> str:
    """Return the original's name of a run, such as LlamaForCausalLM.task.pricing_tag_lb.seed.42.intl.15.intr.80.81."""
    try:
        told = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))
        architecture = str(told["architectures"][0])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        architecture = re.sub(r"\W+", "_", Path(model_path).name) or "model"
    where = "" if place is None else f".intl.{place.layer}.intr.{place.start}.{place.stop}"
    return f"{architecture}.task.{task_name}.seed.{seed}{where}"


# --- which runs are finished --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GridCell:
    """One experiment of a grid: `state` is "finished", "started" or "missing"; `folder` where it was found."""

    task: str
    seed: int
    layer: int
    position: str
    state: str
    folder: Path | None = None


@dataclass(frozen=True)
class Grid:
    """The cells of a grid of experiments, in the order task, seed, layer, position."""

    cells: tuple[GridCell, ...]

    def missing(self) -> tuple[GridCell, ...]:
        """Return the cells that are not finished."""
        return tuple(cell for cell in self.cells if cell.state != "finished")

    def __str__(self) -> str:
        done = len(self.cells) - len(self.missing())
        lines = [f"{done} of {len(self.cells)} finished"]
        for task, seed in dict.fromkeys((cell.task, cell.seed) for cell in self.cells):
            own = [cell for cell in self.cells if (cell.task, cell.seed) == (task, seed)]
            positions = list(dict.fromkeys(cell.position for cell in own))
            lines.append(f"{task}, seed {seed}; positions {' '.join(positions)}")
            for layer in dict.fromkeys(cell.layer for cell in own):
                signs = ["+~."[_STATES.index(cell.state)] for cell in own if cell.layer == layer]
                lines.append(f"  layer {layer:>3}  {' '.join(signs)}")
        return "\n".join([*lines, "+ finished, ~ started, . missing"])


_STATES = ("finished", "started", "missing")
_Key = tuple[str, int, int, str]


def finished_grid(
    root: str | Path,
    *,
    layers: Iterable[int],
    positions: Iterable[int | str],
    seeds: Iterable[int],
    tasks: Iterable[str],
) -> Grid:
    """Return which experiments of a grid are finished in the run folders below `root`, ours and the original's.

    One of ours is finished when a learned method's row on test is there for its layer, position and seed; "started"
    when its run is there but not that row. The original's is finished once it holds pytorch-rotate-last.bin.

    Args:
        tasks: names of tasks, of variables, or the original's, as "pricing_tag_lb".

    Raises:
        ConfigError: there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ConfigError(asked_found_do(f"Runs in {root}", "there is no such folder.", "Name the output folder."))
    found: dict[_Key, tuple[str, Path]] = {}
    for folder in sorted(path for path in (root, *root.rglob("*")) if path.is_dir()):
        for key, state in _states_in(folder).items():
            if key not in found or _STATES.index(state) < _STATES.index(found[key][0]):
                found[key] = state, folder
    cells = []
    places = [(layer, str(position)) for layer in list(layers) for position in list(positions)]
    for task in tasks:
        for seed in list(seeds):
            for layer, position in places:
                state, at = found.get((task, seed, layer, position), ("missing", None))
                cells.append(GridCell(task, seed, layer, position, state, at))
    return Grid(tuple(cells))


def _states_in(folder: Path) -> dict[_Key, str]:
    """Return the state of every experiment that one run folder holds, under each name its task goes by."""
    named = _RUN_NAME.match(folder.name)
    states: dict[_Key, str] = {}
    if named is not None:
        key = named["task"], int(named["seed"]), int(named["layer"]), named["start"]
        states[key] = "finished" if (folder / "pytorch-rotate-last.bin").is_file() else "started"
    if not (folder / "config.json").is_file() or not (folder / "metrics.jsonl").is_file():
        return states
    for task, seed, layer, position in _asked(folder / "config.json"):
        states.setdefault((task, seed, layer, position), "started")
    for row in _rows(folder / "metrics.jsonl"):
        if row.layer is None or row.is_control:
            continue
        state = "finished" if row.split == "test" and row.rank is not None else "started"
        for task in (row.task, row.variable, *([named["task"]] if named else [])):
            key = task, row.seed, row.layer, row.positions
            if states.get(key) != "finished":
                states[key] = state
    return states


def _asked(file: Path) -> Iterable[_Key]:
    """Yield the experiments that a run's configuration names one by one."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        tasks = [str(told[name]) for name in ("task", "variable") if told.get(name)]
        listed = [told[name] for name in ("seeds", "layers", "positions")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if not all(isinstance(one, list) for one in listed):
        return
    seeds, layers, positions = listed
    yield from ((task, s, n, str(p)) for task in tasks for s in seeds for n in layers for p in positions)


def _rows(file: Path) -> Iterable[Row]:
    """Yield the whole rows of a metrics.jsonl, which another process may be writing; other lines are left out."""
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            values: Mapping[str, Any] = json.loads(line)
            yield Row.from_json(values)
        except (ValueError, TypeError, AttributeError, BadRow):
            continue
