"""A command's configuration: one frozen dataclass, read in layers: defaults < file < `--set key=value` < flags.

    @dataclass(frozen=True)
    class Extract:
        model: Text = told("smollm2-135m", "local folder or Hub id")
        sources: Mapping[str, str] = SOURCES

    config = load_layered(Extract, "run.yaml", ["batch_size=4"], {"model": "gpt2"})

Every problem is a `ConfigError`: an unknown key with the nearest name, a refused value with what the key means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from records.config_files import ConfigError, read_file, read_sets

C = TypeVar("C")
REQUIRED: Any = object()


def told(default: Any, meaning: str, *, flag: bool = True, nested: bool = False, main: str = "") -> Any:
    """Return a dataclass field with its meaning.

    Args:
        default: REQUIRED: there is none. flag: whether it is a flag; all can be given by --set or in a file. nested:
            it holds named values itself, given as key.name. main: the one of them that the key alone stands for:
            `--method sft` is `--set method.name=sft`.
    """
    metadata = {"help": meaning, "flag": flag and (bool(main) or not nested), "nested": nested, "main": main}
    if default is REQUIRED:
        return field(metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def sources_field() -> Any:
    """Return the field that says where each value came from; it is no part of the configuration."""
    return field(default_factory=dict, compare=False, repr=False, metadata={"sources": True})


def keys_of(kind: type) -> dict[str, Field[Any]]:
    """Return name -> field of a configuration, `sources` left out."""
    return {one.name: one for one in fields(kind) if not one.metadata.get("sources")}


def load_layered(
    kind: type[C],
    file: str | Path | None = None,
    sets: Iterable[str] = (),
    flags: Mapping[str, object] | None = None,
) -> C:
    """Return a checked configuration. A flag that is None was not given.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or given twice, or values are refused (all are named).
    """
    layers: list[tuple[str, Mapping[str, object]]] = []  # (source, values), later wins
    if file is not None:
        layers.append((str(file), read_file(Path(file))))
    layers.append(("--set", read_sets(sets)))
    layers.append(("flag", {name: value for name, value in (flags or {}).items() if value is not None}))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, given in layers:
        for path, value in _flattened(given):
            head, _, rest = path.partition(".")
            _require_known(kind, path, source)
            rest = rest or str(keys_of(kind)[head].metadata.get("main", ""))
            values[head] = _placed(values.get(head), rest, value) if rest else value
            sources[f"{head}.{rest}" if rest else head] = source
    return checked(kind, values, sources)


def checked(kind: type[C], values: Mapping[str, Any], sources: Mapping[str, str]) -> C:
    """Return `values` as a configuration, or a ConfigError that names every one that is refused."""
    try:
        config: Any = _adapter(kind).validate_python(dict(values))  # type: ignore[arg-type]  # a class can be hashed
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(error, keys_of(kind), sources))) from None
    made: C = replace(config, sources=dict(sources))
    return made


def with_derived(config: C, **values: object) -> C:
    """Return `config` with values that were None resolved; their source becomes "derived".

    Raises:
        ConfigError: a value is refused.
    """
    kind = type(config)
    held = {name: getattr(config, name) for name in keys_of(kind)}
    sources = {**config.sources, **dict.fromkeys(values, "derived")}  # type: ignore[attr-defined]
    return checked(kind, held | values, sources)


def describe(config: Any) -> str:
    """Return one line per value, each with its source: "lr        0.001            --set"."""
    sources: Mapping[str, str] = config.sources
    lines: list[tuple[str, str, str]] = []
    for name in keys_of(type(config)):
        value = getattr(config, name)
        if isinstance(value, Mapping) and value:
            lines += [
                (path, _shown(one), sources.get(path, sources.get(name, "default")))
                for path, one in _flattened({name: value})
            ]
        else:
            lines.append((name, _shown(value), sources.get(name, "default")))
    wide, long = max(len(line[0]) for line in lines), min(40, max(len(line[1]) for line in lines))
    return "\n".join(f"{name:<{wide}}  {value:<{long}}  {source}" for name, value, source in lines)


def plain_config(config: Any) -> dict[str, Any]:
    """Return the values as plain JSON, without their sources."""
    return {name: plain_value(getattr(config, name)) for name in keys_of(type(config))}


def plain_value(value: Any) -> Any:
    """Return a value of a configuration as JSON has it."""
    if isinstance(value, tuple):
        return [plain_value(one) for one in value]
    if isinstance(value, Mapping):
        return {name: plain_value(one) for name, one in value.items()}
    return str(value) if isinstance(value, Path) else value


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "Did you mean X?", or what there is."""
    names = list(known)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else f"Use one of: {', '.join(names)}."


def default_of(one: Field[Any]) -> Any:
    """Return the default of a field, None where it has none."""
    if one.default is not MISSING:
        return one.default
    return one.default_factory() if one.default_factory is not MISSING else None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _flattened(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """Return (dotted path, value) of every leaf, so that an unknown key deep down is named by its whole path."""
    leaves: list[tuple[str, object]] = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        leaves += _flattened(value, f"{path}.") if isinstance(value, Mapping) and value else [(path, value)]
    return leaves


def _placed(held: Any, path: str, value: object) -> dict[str, Any]:
    """Return `held` with `value` at a dotted path inside it."""
    head, _, rest = path.partition(".")
    inside = dict(held) if isinstance(held, Mapping) else {}
    inside[head] = _placed(inside.get(head), rest, value) if rest else value
    return inside


def _require_known(kind: type, path: str, source: str) -> None:
    keys = keys_of(kind)
    head, _, rest = path.partition(".")
    if head not in keys:
        raise ConfigError(f"Configuration {path} (from {source}): there is no such key. {nearest(head, keys)}")
    if rest and not keys[head].metadata.get("nested"):
        raise ConfigError(f"Configuration {path} (from {source}): {head} has no parts. Write {head} itself.")


def _problems(error: ValidationError, keys: Mapping[str, Field[Any]], sources: Mapping[str, str]) -> Sequence[str]:
    problems: dict[str, str] = {}  # one per key: a union reports every branch that failed
    for one in error.errors(include_url=False):
        key = str(one["loc"][0])
        meaning = keys[key].metadata.get("help", "") if key in keys else ""
        if one["type"] == "missing":
            problems[key] = (
                f"Configuration {key}: it was not given. Pass --{key} or write '{key}:' in the file ({meaning})."
            )
            continue
        reason = one["msg"].removeprefix("Value error, ").rstrip(".")
        ended = reason if reason.endswith("?") else f"{reason}."
        where = f"Configuration {key} (from {sources.get(key, 'default')})"
        problems.setdefault(key, f"{where}: {one['input']!r}: {ended} Meaning: {meaning}.")
    return list(problems.values())


def _shown(value: object) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) or "none"
    if value == {}:
        return "none"
    return "to be derived" if value is None else str(value)
