"""One score of a search: `Row`, the flat line of `metrics.jsonl` that metrics, records and reports all read.

A row is one alignment cell (variable, site, positions, method, rank) fitted with one seed and scored on one split,
next to what needs no model at all on the very same pairs: the trivial baselines. Rows are checked when they are made,
so that a score outside its own interval never reaches a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

CONTROL_PREFIX = "control:"  # a method of that name is a control ("control:random_subspace"), never a candidate
NO_INTERCHANGE = frozenset({"loreft"})  # methods that read no source: `Method.interchange` is False
EXTRA_PREFIX = "extra."  # key of a task's own trivial baseline in the flat form: "extra.flip"
KIND_PREFIX = "iia."  # key of the score on one kind of pairs in the flat form: "iia.isolate"
FACT_PREFIX = "fact."  # key of a number that was learned or measured, in the flat form: "fact.hard_rank"
SPLITS = ("train", "select", "test")

_TEXTS = ("task", "model", "variable", "site", "component", "positions", "position_label", "method", "split")
_RATES = ("iia", "low", "high", "copy_base", "copy_source", "majority", "task_accuracy")
_PREFIXED = {"extra": EXTRA_PREFIX, "kinds": KIND_PREFIX, "facts": FACT_PREFIX}  # fields that hold one number per name
_SLACK = 1e-9  # rounding of a mean of zeros and ones, not an allowance


class BadRow(Exception):
    """A row that lacks a field, has one too many, or contradicts itself."""


class Cell(NamedTuple):
    """What a row scores, apart from seed and split."""

    task: str
    model: str
    variable: str
    site: str
    positions: str
    method: str
    rank: int | None


class RowKey(NamedTuple):
    """What makes a row unique within one run: a search skips the keys it has already finished."""

    cell: Cell
    seed: int
    split: str


@dataclass(frozen=True)
class Row:
    """One cell, one seed, one split: interchange-intervention accuracy and the baselines on the same `n` pairs.

    `iia`, `low`, `high` and the baselines are shares from 0 to 1; `low` and `high` bound `iia`. `layer` is 0-based and
    None for a site outside the blocks; `rank` is None where the whole width is swapped; `task_accuracy` is the share of
    these pairs whose base *and* source the model itself gets right, None if it was not measured. `extra` holds trivial
    baselines that belong to the task ("flip": always the other answer). `positions` identifies, `position_label` is
    what people read. `kinds` is the IIA on each kind of pairs ("cause" and "isolate", say), if told; `facts` are finite
    numbers that were learned or measured beside it ("width", "hard_rank", "divergence").

    Raises:
        BadRow: a rate outside 0..1, an interval that does not hold its score, n < 1, an unknown split, an empty text.
    """

    task: str
    model: str
    variable: str
    site: str
    layer: int | None
    component: str
    positions: str
    position_label: str
    method: str
    rank: int | None
    seed: int
    split: str
    n: int
    iia: float
    low: float
    high: float
    copy_base: float
    copy_source: float
    majority: float
    task_accuracy: float | None
    seconds: float
    extra: Mapping[str, float] = field(default_factory=dict)
    kinds: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", dict(self.facts))
        for name, value in self.facts.items():
            if not _is_number(value):
                raise BadRow(f"{self._name()}: {name} is {value!r}, not a finite number. Leave it out instead.")
        object.__setattr__(self, "extra", dict(self.extra))
        object.__setattr__(self, "kinds", dict(self.kinds))
        self._check_texts()
        self._check_counts()
        rates = {name: getattr(self, name) for name in _RATES}
        rates |= {EXTRA_PREFIX + name: value for name, value in self.extra.items()}
        rates |= {KIND_PREFIX + name: value for name, value in self.kinds.items()}
        for name, value in rates.items():
            if value is None and name == "task_accuracy":
                continue
            if not _is_number(value) or not -_SLACK <= value <= 1 + _SLACK:
                raise BadRow(f"{self._name()}: {name} is {value!r}, not a share from 0 to 1. Divide counts by n.")
        if not self.low - _SLACK <= self.iia <= self.high + _SLACK:
            raise BadRow(
                f"{self._name()}: IIA {self.iia} lies outside its own interval [{self.low}, {self.high}]. "
                "Take both from the same count: low, high = wilson(hits, n)."
            )

    def _check_texts(self) -> None:
        for name in _TEXTS:
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise BadRow(f"Row: {name} is {value!r}. Give it a text that is not empty.")
        if self.split not in SPLITS:
            raise BadRow(f"{self._name()}: split {self.split!r} is unknown. Use one of {', '.join(SPLITS)}.")

    def _check_counts(self) -> None:
        for name, least in (("layer", 0), ("rank", 1), ("seed", 0), ("n", 1)):
            value = getattr(self, name)
            if value is None and name in ("layer", "rank"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise BadRow(f"{self._name()}: {name} is {value!r}. It must be a whole number from {least}.")
        if not _is_number(self.seconds) or self.seconds < 0:
            raise BadRow(f"{self._name()}: seconds is {self.seconds!r}. It must be a finite number from 0.")

    def _name(self) -> str:
        return f"Row {self.site} @ {self.position_label}, {self.method}, seed {self.seed}, {self.split}"

    @property
    def cell(self) -> Cell:
        """What this row scores, apart from seed and split."""
        return Cell(self.task, self.model, self.variable, self.site, self.positions, self.method, self.rank)

    @property
    def key(self) -> RowKey:
        """What makes this row unique within a run."""
        return RowKey(self.cell, self.seed, self.split)

    @property
    def is_control(self) -> bool:
        """Whether the method is a control, which is shown but never selected."""
        return self.method.startswith(CONTROL_PREFIX)

    @property
    def is_candidate(self) -> bool:
        """Whether a verdict may choose it: it is no control, and its method is an interchange."""
        return not self.is_control and self.method not in NO_INTERCHANGE

    @property
    def baselines(self) -> dict[str, float]:
        """Return every trivial baseline by the name that reports print: copy-base, copy-source, majority, extras."""
        standard = {"copy-base": self.copy_base, "copy-source": self.copy_source, "majority": self.majority}
        return standard | dict(self.extra)

    def to_json(self) -> dict[str, Any]:
        """Return the row as one flat dict: keys "extra.<name>", "iia.<name>" of `kinds`, "fact.<name>" of `facts`."""
        flat = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _PREFIXED}
        for name, prefix in _PREFIXED.items():
            flat |= {prefix + key: value for key, value in getattr(self, name).items()}
        return flat

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Row:
        """Return the row that `to_json` made.

        Raises:
            BadRow: a field is missing or unknown, each named; or the row contradicts itself.
        """
        plain = {name: value for name, value in values.items() if not name.startswith(tuple(_PREFIXED.values()))}
        told = {
            name: {key[len(prefix) :]: value for key, value in values.items() if key.startswith(prefix)}
            for name, prefix in _PREFIXED.items()
        }
        known = {one.name for one in fields(cls)} - _PREFIXED.keys()
        unknown, missing = sorted(plain.keys() - known), sorted(known - plain.keys())
        if unknown or missing:
            problems = [f"unknown {', '.join(unknown)}"] if unknown else []
            problems += [f"missing {', '.join(missing)}"] if missing else []
            raise BadRow(
                f"Row: {'; '.join(problems)}. Fields are {', '.join(one.name for one in fields(cls))} "
                f"(extra baselines as {EXTRA_PREFIX}<name>); read older files with the version that wrote them."
            )
        return cls(**plain, extra=told["extra"], kinds=told["kinds"], facts=told["facts"])


def preference(select_iia: float, rank: int | None) -> tuple[float, float]:
    """Return what the best cell has most of: IIA on select, then the smaller rank; None, the whole width, is largest.

    Of equals the first of the grid is the best one. Searches, what is saved and verdicts all choose by this.
    """
    return select_iia, -math.inf if rank is None else -rank


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
