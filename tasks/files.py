"""Pair files: one JSON object per line, to keep a set, to hand it on, or to bring one's own.

    write_pairs(pairs, "ioi-test.jsonl")
    pairs = read_pairs("ioi-test.jsonl")
    check(task, pairs)                    # the file's labels are the file's claim until they are derived anew

A row has task, split, seed, variable, label, base and source; base and source have prompt, answer, setting and spans.
Only variable, label and the prompts and answers are needed to read a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.base import Example, Pair, PairSet
from tasks.errors import BadData

_PAIR_FIELDS = ("base", "source", "variable", "label")
_EXAMPLE_FIELDS = ("prompt", "answer")
_COMMON = ("task", "split", "variable", "seed")


def write_pairs(pairs: PairSet, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write `pairs` to `path`, one JSON object per line, and return the path.

    Raises:
        BadData: there are no pairs, the file exists and `overwrite` is not given, or a setting is not plain JSON.
    """
    path = Path(path)
    if not len(pairs):
        raise BadData(f"{path}: there are no pairs to write. Draw at least one.")
    if path.exists() and not overwrite:
        raise BadData(f"{path}: the file exists. Pass overwrite=True or choose another name.")
    head = {"task": pairs.task, "split": pairs.split, "seed": pairs.seed}
    rows = [{**head, **_pair_row(pair)} for pair in pairs]
    try:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except TypeError as error:
        raise BadData(
            f"{path}: a setting does not fit into JSON ({error}). Use texts, numbers and booleans."
        ) from error
    path.write_text(text, encoding="utf-8")
    return path


def read_pairs(path: str | Path) -> PairSet:
    """Return the pairs of a file. Task, split and seed are "", "" and None where the rows do not say.

    Raises:
        BadData: the file is missing or empty, a line is not JSON, a field is missing or of the wrong type, or rows
            disagree about task, split, variable or seed. The message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise BadData(f"{path}: there is no such file. Give the path of a pair file.")
    # splitlines() would also break at characters such as U+2028, which JSON leaves unescaped inside strings.
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [(number, _parse(path, number, line)) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise BadData(f"{path}: the file is empty. Write at least one row.")
    first_line, first = rows[0]
    items = []
    for number, row in rows:
        items.append(_pair(path, number, row))
        for name in _COMMON:
            if row.get(name) != first.get(name):
                raise BadData(
                    f"{path}: {name} {row.get(name)!r} (line {number}) and {first.get(name)!r} (line {first_line}) "
                    "are in one file. Write one file for each."
                )
    task, split = str(first.get("task", "")), str(first.get("split", ""))
    return PairSet(tuple(items), task, split, first["variable"], _seed(path, first_line, first.get("seed")))


def _pair_row(pair: Pair) -> dict[str, Any]:
    return {
        "variable": pair.variable,
        "label": pair.label,
        **{side: _example_row(getattr(pair, side)) for side in ("base", "source")},
    }


def _example_row(example: Example) -> dict[str, Any]:
    return {
        "prompt": example.prompt,
        "answer": example.answer,
        "setting": dict(example.setting),
        "spans": {name: list(span) for name, span in example.spans.items()},
    }


def _parse(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadData(
            f"{path}: data row is not JSON (line {number}): {error.msg}. Write one object per line."
        ) from None
    if not isinstance(row, dict):
        raise BadData(f"{path}: data row is no object (line {number}). Write {{...}} with {', '.join(_PAIR_FIELDS)}.")
    return row


def _pair(path: Path, number: int, row: Mapping[str, Any]) -> Pair:
    _require_fields(path, number, row, _PAIR_FIELDS, "")
    return Pair(
        base=_example(path, number, row["base"], "base"),
        source=_example(path, number, row["source"], "source"),
        variable=_text(path, number, row["variable"], "variable"),
        label=_text(path, number, row["label"], "label"),
    )


def _example(path: Path, number: int, value: object, side: str) -> Example:
    if not isinstance(value, dict):
        raise BadData(f"{path}: {side} is no object (line {number}). Write {{...}} with {', '.join(_EXAMPLE_FIELDS)}.")
    _require_fields(path, number, value, _EXAMPLE_FIELDS, f"{side}.")
    prompt = _text(path, number, value["prompt"], f"{side}.prompt")
    answer = _text(path, number, value["answer"], f"{side}.answer")
    setting, spans = value.get("setting", {}), value.get("spans", {})
    for name, given in (("setting", setting), ("spans", spans)):
        if not isinstance(given, dict):
            raise BadData(f"{path}: {side}.{name} is no object (line {number}). Write {{name: value}}.")
    return Example(
        prompt, answer, setting, {name: _span(path, number, side, name, span, prompt) for name, span in spans.items()}
    )


def _span(path: Path, number: int, side: str, name: str, span: object, prompt: str) -> tuple[int, int]:
    whole = isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)
    if not whole or not 0 <= span[0] < span[1] <= len(prompt):  # type: ignore[index]
        raise BadData(
            f"{path}: {side}.spans.{name} is {span!r} (line {number}). "
            f"Write two whole numbers [begin, end] with 0 <= begin < end <= {len(prompt)}."
        )
    return span[0], span[1]  # type: ignore[index]


def _require_fields(path: Path, number: int, row: Mapping[str, Any], fields: tuple[str, ...], prefix: str) -> None:
    missing = [f"{prefix}{name}" for name in fields if name not in row]
    if missing:
        raise BadData(f"{path}: data row missing a field (line {number}): {', '.join(missing)}. Add it.")


def _text(path: Path, number: int, value: object, name: str) -> str:
    if not isinstance(value, str):
        raise BadData(f"{path}: {name} is {type(value).__name__}, not text (line {number}). Write it in quotes.")
    return value


def _seed(path: Path, number: int, value: object) -> int | None:
    if value is not None and type(value) is not int:
        raise BadData(f"{path}: seed is {value!r} (line {number}). Write a whole number or leave it out.")
    return value
