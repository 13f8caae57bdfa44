"""A method's options from named values: partial ones are laid over its defaults, unknown ones refused by their path.

    made_options(DeltaLossOptions, {"threshold": {"kind": "quantile", "rate": 0.05}}, path="method")

Where a field is one of several dataclasses, each with its own `kind`, `kind` chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from defenses.config_values import numbers
from records.config_files import ConfigError
from records.layered import nearest

T = TypeVar("T")


def made_options(kind: type[T], given: Mapping[str, Any], *, path: str) -> T:
    """Return the checked options.

    Raises:
        ConfigError: an unknown name, with the nearest; a value of another kind; or what the options refuse themselves.
    """
    values = _laid_over(kind, _default(kind), given, path)
    try:
        made: T = _adapter(kind).validate_python(values)  # type: ignore[arg-type]  # a class can be hashed
    except ValidationError as error:
        told: dict[str, str] = {}
        for one in error.errors(include_url=False):
            where = ".".join([path, *(str(part) for part in one["loc"] if str(part)[:1].islower())])
            reason = one["msg"].removeprefix("Value error, ").rstrip(".")
            told.setdefault(where, f"Configuration {where}: {one['input']!r}: {reason}.")
        raise ConfigError("\n".join(told.values())) from None
    return made


def default_options(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield dotted name and default of every option."""
    yield from _leaves(_plain(_default(kind), kind))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value.value if isinstance(value, Enum) else value


def _laid_over(kind: type, default: Any, given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return all values of `kind`: those of `default` (None: none), with `given` on top, unknown names refused."""
    known = [one.name for one in fields(kind)]
    hints = _hints(kind)
    values = _plain(default, kind)
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"Configuration {path}.{name}: there is no such option. {nearest(name, known)}")
        choices = _choices(hints[name])
        now = getattr(default, name, None)
        if choices and (isinstance(value, str) and all("kind" in _names(one) for one in choices)):
            value = {"kind": value}
        if choices and isinstance(value, Mapping):
            chosen = _chosen(choices, value, now, f"{path}.{name}")
            values[name] = _laid_over(chosen, now if type(now) is chosen else _default(chosen), value, f"{path}.{name}")
        elif "tuple" in str(hints[name]) and isinstance(value, str | int | float):
            values[name] = _listed(value)
        else:
            values[name] = value
    return values


def _chosen(choices: tuple[type, ...], value: Mapping[str, Any], now: Any, path: str) -> type:
    """Return which of several dataclasses `value` means: by its kind, else the default's, else the one that fits."""
    if len(choices) == 1:
        return choices[0]
    by_kind = {str(one.default): choice for choice in choices for one in fields(choice) if one.name == "kind"}
    if "kind" in value:
        if value["kind"] not in by_kind:
            found = f"there is no {value['kind']!r}. {nearest(str(value['kind']), by_kind)}"
            raise ConfigError(f"Configuration {path}.kind: {found}")
        return by_kind[value["kind"]]
    if is_dataclass(now) and set(value) <= _names(type(now)):
        return type(now)
    fitting = [choice for choice in choices if set(value) <= _names(choice)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and is_dataclass(now):
        return type(now)  # whose unknown names are told
    raise ConfigError(f"Configuration {path}: which kind is meant? Add {path}.kind={'|'.join(by_kind)}.")


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return numbers(value)
        except ValueError:
            return [part.strip() for part in value.split(",") if part.strip()]
    return [value]


def _plain(value: Any, kind: type) -> dict[str, Any]:
    """Return the fields of a dataclass, inner ones as mappings too; of None, nothing."""
    if value is None:
        return {}
    return {
        one.name: _plain(held, type(held)) if is_dataclass(held := getattr(value, one.name)) else held
        for one in fields(kind)
    }


def _default(kind: type) -> Any:
    """Return `kind()`, or None where something has no default."""
    needed = [one for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]
    if needed:
        return None
    try:
        return kind()
    except ConfigError:  # defaults that are none by themselves
        return None


def _choices(hint: Any) -> tuple[type, ...]:
    """Return the dataclasses among what a hint allows."""
    found = [hint, *get_args(hint)]
    return tuple(one for one in found if isinstance(one, type) and is_dataclass(one))


def _names(kind: type) -> set[str]:
    return {one.name for one in fields(kind)}


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
