"""What the values of a training's configuration may be, and how texts become them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

_RANGE = re.compile(r"^(-?\d+)(?:-(\d+)(?::(\d+))?)?$")  # "4", "-1", "0-29", "0-29:4"


def numbers(value: object) -> object:
    """Return the whole numbers that "0,4,8" or "0-29:4" (both ends included) names; other values as they are."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if not isinstance(value, str):
        return value
    found: list[int] = []
    for part in value.split(","):
        match = _RANGE.match(part.strip())
        if match is None:
            raise ValueError(f"{part.strip()!r} is no number or range; write e.g. 0,4,8 or 0-29:4")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if step < 1 or last < first:
            raise ValueError(f"{part.strip()!r} runs nowhere; write first-last:step, first below last")
        found += range(first, last + 1, step)
    return found


def _distinct(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(value)) != len(value):
        raise ValueError("each may be named only once")
    return value


def _names(value: object) -> object:
    if value in ("none", ["none"]):
        return ()
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple):
        parts = [part.strip() for one in value for part in (one.split(",") if isinstance(one, str) else [one])]
        return [part for part in parts if part != ""]
    return value


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _none(value: object) -> object:
    return None if value in ("none", "None") else value


Text: TypeAlias = Annotated[str, Field(min_length=1)]
Count: TypeAlias = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Whole: TypeAlias = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
Number: TypeAlias = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Positive: TypeAlias = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, allow_inf_nan=False)]
AtLeastZero: TypeAlias = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, allow_inf_nan=False)]
Share: TypeAlias = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, lt=1, allow_inf_nan=False)]
Rate: TypeAlias = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, lt=1, allow_inf_nan=False)]
Clip: TypeAlias = Annotated[Positive | None, BeforeValidator(_none)]
Names: TypeAlias = Annotated[tuple[Text, ...], BeforeValidator(_names), AfterValidator(_distinct)]
Layers: TypeAlias = Annotated[
    Annotated[tuple[Annotated[int, BeforeValidator(_no_bool)], ...], Field(min_length=1)],
    BeforeValidator(numbers),
    AfterValidator(_distinct),
]
Seeds: TypeAlias = Annotated[
    Annotated[tuple[Whole, ...], Field(min_length=1)], BeforeValidator(numbers), AfterValidator(_distinct)
]
Tracker: TypeAlias = Literal["tensorboard", "wandb"]
Trackers: TypeAlias = Annotated[tuple[Tracker, ...], BeforeValidator(_names), AfterValidator(_distinct)]
BackendName: TypeAlias = Literal["auto", "plain", "ddp", "fsdp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]
Options: TypeAlias = dict[str, Any]
