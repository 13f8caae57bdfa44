"""Configuration as files and text: YAML, JSON and "key=value", read strictly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml


class ConfigError(Exception):
    """A configuration that cannot be run: an unknown key, a value of the wrong kind, a file that cannot be read."""


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


def read_sets(sets: Iterable[str]) -> dict[str, object]:
    """Return key -> value of texts "key=value", the values read as YAML.

    Raises:
        ConfigError: a text without "=", or broken YAML.
    """
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
