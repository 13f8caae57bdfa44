"""What `run_das.py` is asked to do: one frozen dataclass, where each of its values came from, and how it is read.

Order: defaults < file (YAML or JSON) < `--set key=value` < flags. `None` means derived: it is resolved once, by
`with_derived`, and `describe` prints every value with its source. Every problem is a `ConfigError`, found before a
model is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from intervene.errors import asked_found_do, close_names


class ConfigError(Exception):
    """A configuration that cannot be run: an unknown key, a value of the wrong kind, a file that cannot be read."""


_RANGE = re.compile(r"^(-?\d+)(?:-(\d+)(?::(\d+))?)?$")  # "4", "-1", "0-29", "0-29:4"
_COMMA = re.compile(r",(?![^(\[]*[)\]])")  # a comma outside brackets: "Span(1,3),last" is two positions


def parse_numbers(text: str) -> tuple[int, ...]:
    """Return the whole numbers that "0,4,8", "0-29:4" (both ends included, every 4th) or "0-8:4,29" names.

    Raises:
        ConfigError: a part is no number or range, a range runs backwards or has step 0, or a number comes twice.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = _RANGE.match(part.strip())
        if match is None:
            raise ConfigError(f"Numbers {text!r}: {part.strip()!r} is none. Write e.g. 0,4,8 or 0-29:4.")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if step < 1 or (match[2] is not None and last < first):
            raise ConfigError(
                f"Numbers {text!r}: {part.strip()!r} runs nowhere. Write first-last:step, first below last."
            )
        numbers += range(first, last + 1, step) if match[2] is not None else [first]
    if len(set(numbers)) != len(numbers):
        raise ConfigError(f"Numbers {text!r}: a number comes twice. Name each once.")
    return tuple(numbers)


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _numbers(value: object) -> object:
    if isinstance(value, str):
        try:
            return parse_numbers(value)
        except ConfigError as error:  # pydantic gathers ValueErrors, and the ConfigError that results names the key
            raise ValueError(str(error)) from None
    value = (value,) if isinstance(value, int) and not isinstance(value, bool) else value
    return _distinct(value)


def _layers(value: object) -> object:
    return value if value is None or value == "all" else _numbers(value)


def _names(value: object) -> object:
    if isinstance(value, str):
        value = [part.strip() for part in _COMMA.split(value)]
    return _distinct(value)


def _distinct(value: object) -> object:
    if isinstance(value, list | tuple) and len({str(one) for one in value}) != len(value):
        raise ValueError("each may be named only once")
    return value


def _controls(value: object) -> object:
    return () if value == "none" else _names(value)


Text: TypeAlias = Annotated[str, Field(min_length=1)]
Count: TypeAlias = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Layer: TypeAlias = Annotated[int, BeforeValidator(_no_bool)]
Seed: TypeAlias = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
Rate: TypeAlias = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, allow_inf_nan=False)]
Method: TypeAlias = Literal["full_vector", "das"]
Control: TypeAlias = Literal["random_subspace", "random_model"]
Layers: TypeAlias = Annotated[
    Annotated[tuple[Layer, ...], Field(min_length=1)] | Literal["all"] | None, BeforeValidator(_layers)
]
Seeds: TypeAlias = Annotated[tuple[Seed, ...], BeforeValidator(_numbers), Field(min_length=1)]
Methods: TypeAlias = Annotated[tuple[Method, ...], BeforeValidator(_names), Field(min_length=1)]
Controls: TypeAlias = Annotated[tuple[Control, ...], BeforeValidator(_controls)]
Names: TypeAlias = Annotated[Annotated[tuple[Text, ...], Field(min_length=1)] | None, BeforeValidator(_names)]


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
    rank: Count = 8
    seeds: Seeds = (0, 1, 2)
    n_train: Count = 256
    n_select: Count = 200
    n_test: Count = 300
    batch_size: Count = 16
    lr: Rate = 0.01
    steps: Count = 100
    out: Path | None = None
    resume: bool = False
    dry_run: bool = False
    device: Text | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: Count | None = None
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    __pydantic_config__ = ConfigDict(extra="forbid")

    def to_json(self) -> dict[str, Any]:
        """Return the resolved values as plain JSON, without their sources."""
        return {name: _plain(getattr(self, name)) for name in KEYS}


KEYS = tuple(one.name for one in fields(RunDas) if one.name != "sources")

HELP: dict[str, str] = {
    "task": "causal task that the pairs come from, e.g. ioi",
    "variable": "variable of the task's causal model to look for; derived: the task's first",
    "model": "local folder, Hub id, or the name of the embedded default",
    "methods": "full_vector (swap everything, nothing learned) and/or das (learn a subspace), comma-separated",
    "controls": "random_subspace and/or random_model (a network of random weights), in the best learned cell; or none",
    "layers": "0-based blocks: 0,4,8 or 0-29:4 (both ends included) or all; derived: about eight, evenly spaced",
    "positions": "names of the task's token positions, comma-separated; derived: all that the task marks",
    "rank": "dimensions of the DAS subspace, at most the width of the site",
    "seeds": "one fit per cell and seed: 0,1,2 or 0-4",
    "n_train": "pairs to learn on",
    "n_select": "pairs on which the best cell is chosen",
    "n_test": "pairs on which it is reported",
    "batch_size": "pairs per training step",
    "lr": "learning rate of the subspace",
    "steps": "training steps per fit",
    "out": "folder of this run; derived: runs/<task>-<variable>",
    "resume": "go on with the finished rows of the folder",
    "dry_run": "print the plan, pair counts, task accuracy and cost, and search nothing",
    "device": "cpu, cuda or cuda:N; derived: cuda where there is one",
    "dtype": "precision of the model: float32, bfloat16 or float16",
    "threads": "CPU threads; derived: torch's own choice",
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
    stages.append(("--set", _read_sets(sets)))
    stages.append(("flag", {key: value for key, value in (flags or {}).items() if value is not None}))
    values: dict[str, object] = {}
    sources = dict.fromkeys(KEYS, "default")
    for source, given in stages:
        for path, value in _flatten(given):
            if path not in KEYS:
                raise ConfigError(_unknown_key(path, source))
            values[path] = value
            sources[path] = source
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


def read_file(path: Path) -> dict[str, object]:
    """Return the mapping that a .yaml, .yml or .json file holds; an empty file holds none.

    Raises:
        ConfigError: no such file, another ending, broken syntax, a key that comes twice, or no mapping at the top.
    """
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"Configuration {path}: the ending {path.suffix!r} is unknown. Use .yaml, .yml or .json.")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=_unique) if path.suffix == ".json" else _load_yaml(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Configuration {path}: cannot be read ({error}). Check the path.") from error
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ConfigError(f"Configuration {path}: the syntax is broken: {error}. Mend that line.") from error
    except ConfigError as error:
        raise ConfigError(f"Configuration {path}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"Configuration {path}: holds a {type(values).__name__}. Write lines of 'key: value'.")
    return values


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML is untyped
    """A safe loader that refuses a key given twice, of which YAML would silently keep the last."""


def _unique_mapping(loader: Any, node: Any) -> dict[str, object]:
    loader.flatten_mapping(node)
    return _unique([(loader.construct_object(key), loader.construct_object(one, deep=True)) for key, one in node.value])


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _load_yaml(text: str) -> object:
    loaded: object = yaml.load(text, Loader=_UniqueKeys)  # a SafeLoader: constructs plain values only
    return loaded


def _unique(pairs: Sequence[tuple[Any, object]]) -> dict[str, object]:
    names = [str(key) for key, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} is given twice. Keep one.")
    return {str(key): value for key, value in pairs}


def _read_sets(sets: Iterable[str]) -> dict[str, object]:
    values: dict[str, object] = {}
    for one in sets:
        key, equals, text = one.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {one}: holds no key=value. Write e.g. --set lr=0.001.")
        try:
            values[key.strip()] = _load_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {one}: the value is broken YAML ({error}). Quote it.") from error
    return values


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
        problems.setdefault(key, asked_found_do(where, f"{one['input']!r}: {reason}.", f"Meaning: {HELP[key]}."))
    return list(problems.values())


def _derive_out(config: RunDas) -> RunDas:
    if config.out is not None:
        return config
    name = "-".join([config.task, *([config.variable] if config.variable else [])])
    return with_derived(config, out=Path("runs") / re.sub(r"[^\w.-]+", "_", name))


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "to be derived" if value is None else str(value)
