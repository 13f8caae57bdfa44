"""What the values of a configuration may be: the checked types of `RunDas`' fields, and how texts become them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from alignments.methods import METHODS, OPTIONS
from alignments.rows import CONTROL_PREFIX
from intervene.errors import InterveneError, close_names
from records.config_files import ConfigError

CONTROLS = ("random_subspace", "random_model", "shuffled_labels", "complement")
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


def _method(name: str) -> str:
    if name not in METHODS or name.startswith(CONTROL_PREFIX):
        known = [one for one in METHODS if not one.startswith(CONTROL_PREFIX)]
        raise ValueError(f"there is no such method. {close_names(name, known)}")
    return name


def _control(name: str) -> str:
    if name not in CONTROLS and not name.startswith("rival:"):
        raise ValueError(f"there is no such control. {close_names(name, [*CONTROLS, 'rival:<variable>'])}")
    return name


def _options(values: dict[str, Any]) -> dict[str, Any]:
    unknown = [name for name in values if name not in OPTIONS]
    if unknown:
        raise ValueError(f"methods have no option {unknown[0]!r}. {close_names(unknown[0], OPTIONS)}")
    for name in values:
        try:
            OPTIONS[name].read(values)
        except InterveneError as error:  # pydantic gathers ValueErrors
            raise ValueError(str(error)) from None
    return values


def _maybe_none(value: object) -> object:
    return () if value == "none" else _names(value)


Text: TypeAlias = Annotated[str, Field(min_length=1)]
Count: TypeAlias = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Layer: TypeAlias = Annotated[int, BeforeValidator(_no_bool)]
Rate: TypeAlias = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, allow_inf_nan=False)]
Whole: TypeAlias = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
Share: TypeAlias = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=1, allow_inf_nan=False)]
Method: TypeAlias = Annotated[Text, AfterValidator(_method)]
Control: TypeAlias = Annotated[Text, AfterValidator(_control)]
Layers: TypeAlias = Annotated[
    Annotated[tuple[Layer, ...], Field(min_length=1)] | Literal["all"] | None, BeforeValidator(_layers)
]
Ranks: TypeAlias = Annotated[tuple[Count, ...], BeforeValidator(_numbers), Field(min_length=1)]
Options: TypeAlias = Annotated[dict[str, Any], AfterValidator(_options)]
Seeds: TypeAlias = Annotated[tuple[Whole, ...], BeforeValidator(_numbers), Field(min_length=1)]
Methods: TypeAlias = Annotated[tuple[Method, ...], BeforeValidator(_names), Field(min_length=1)]
Controls: TypeAlias = Annotated[tuple[Control, ...], BeforeValidator(_maybe_none)]
Trackers: TypeAlias = Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_maybe_none)]
Names: TypeAlias = Annotated[Annotated[tuple[Text, ...], Field(min_length=1)] | None, BeforeValidator(_names)]
