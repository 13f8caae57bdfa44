"""JSON files that are whole or absent, and what values become in them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import IO, Any


class RecordError(Exception):
    """A run folder that cannot be started, resumed or written as asked."""


def plain_mapping(value: Any) -> dict[str, Any]:
    """Return a configuration or result (mapping, dataclass, or with `to_json()`) as the JSON its file will hold."""
    if hasattr(value, "to_json"):
        value = value.to_json()
    elif is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    plain: dict[str, Any] = json.loads(dump(dict(value)))
    return plain


def dump(value: object, indent: int | None = None) -> str:
    """Return strict JSON.

    Raises:
        RecordError: a value is NaN, infinite or nothing that JSON has.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False, default=_plain)
    except (ValueError, TypeError) as error:
        do = "Pass finite numbers and texts."
        raise RecordError(f"Record: a value cannot be written as JSON ({error}). {do}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; RecordError if it cannot be read."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read ({error}). Restore it, or choose another --out.") from error
    return values


def replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all: a kill leaves the old one."""
    data = (dump(value, indent=2) + "\n").encode()
    part = path.with_name(path.name + ".part")
    with part.open("wb") as stream:
        write_through(stream, data)
    os.replace(part, path)


def write_through(stream: IO[bytes], data: bytes) -> None:
    """Write all of `data` and wait until it is on disk."""
    left = memoryview(data)
    while left:  # an unbuffered stream may take less than it is given
        left = left[stream.write(left) :]
    stream.flush()
    os.fsync(stream.fileno())


def _plain(value: Any) -> object:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "item"):  # numpy and torch scalars
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON")
