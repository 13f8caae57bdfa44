"""Which pairs an alignment gets wrong: groups of pairs by causal setting, those that do worse than the rest first.

    found = explore(read_examples("runs/ioi/examples.jsonl"))
    for group in found.worse: print(group)            # base.position = 2, source.position = 1: IIA 0.41 ...
    found.samples                                     # failing pairs to read

A record is one test pair as `examples.jsonl` holds it: base, source, label, kind, answer, right, and optionally
`base_setting` and `source_setting`, the causal model's values by variable. One IIA can hide a group that always fails.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from alignments.metrics import Interval, wilson
from alignments.statistics import adjusted, fisher_less, p_text

Record = Mapping[str, Any]
BASE, SOURCE = "base_setting", "source_setting"


@dataclass(frozen=True)
class Group:
    """The pairs of one causal setting: `where` is a tuple of (variable, value), IIA with its Wilson interval.

    `p` is Fisher's exact one-sided test of this group against all other pairs, `adjusted` for all groups tested.
    """

    where: tuple[tuple[str, str], ...]
    n: int
    hits: int
    low: float
    high: float
    rest: float  # IIA of the pairs outside
    p: float
    adjusted: float
    worse: bool

    @property
    def iia(self) -> float:
        """Return the share of the group's pairs that are right."""
        return self.hits / self.n

    @property
    def interval(self) -> Interval:
        """Return (low, high)."""
        return self.low, self.high

    @property
    def name(self) -> str:
        """Return the setting in words: "base.position = 2, source.position = 1"."""
        return ", ".join(f"{variable} = {value}" for variable, value in self.where)

    def __str__(self) -> str:
        verdict = f", the rest {self.rest:.2f}: worse, adjusted p {p_text(self.adjusted)}" if self.worse else ""
        return f"{self.name}: IIA {self.iia:.2f} [{self.low:.2f}, {self.high:.2f}], n={self.n}{verdict}"


@dataclass(frozen=True)
class Failures:
    """What `explore` found among `n` pairs: `groups`, worst first, failing `samples`, `notes` on what is left out."""

    n: int
    hits: int
    groups: tuple[Group, ...]
    samples: tuple[Record, ...]
    notes: tuple[str, ...]

    @property
    def worse(self) -> tuple[Group, ...]:
        """Return the groups that do significantly worse than the other pairs."""
        return tuple(group for group in self.groups if group.worse)

    @property
    def sentence(self) -> str:
        """Return the finding in one sentence."""
        text = f"{self.n - self.hits} of {self.n} pairs fail"
        if not self.groups:
            return f"{text}; no causal setting has groups large enough to compare."
        if not self.worse:
            return (
                f"{text}; none of {len(self.groups)} groups by causal setting does significantly worse than the rest."
            )
        group = self.worse[0]
        count = f"{len(self.worse)} of {len(self.groups)} groups do" if len(self.worse) > 1 else "one group does"
        return f"{text}; {count} significantly worse than the rest, most clearly {group}."


def read_examples(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of an `examples.jsonl`.

    Raises:
        ValueError: a line is no JSON object, named by its number.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}). Write the file anew.") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: {type(record).__name__}, not an object. One pair a line.")
        records.append(record)
    return records


def explore(
    records: Iterable[Record],
    *,
    level: float = 0.05,
    max_values: int = 12,
    min_pairs: int = 8,
    n_samples: int = 10,
    combine: int = 2,
    seed: int = 0,
) -> Failures:
    """Return the groups of pairs by each variable of the causal setting, and by up to `combine` of them together.

    Variables are "kind", "base.<name>" and "source.<name>" of the settings, and "<name> on both", same or different. A
    numeric one with more than `max_values` values is cut into quarters of equal count; another one is skipped, and
    `notes` says so, as it does of groups below `min_pairs` pairs. Of groups that hold the same pairs the one with the
    fewest variables stays. Significantly worse ones come first, by adjusted p, then the others from the lowest IIA.

    Raises:
        ValueError: no records, one without `right`, or `combine` outside 1..2.
    """
    pairs = list(records)
    if not pairs or any("right" not in record for record in pairs):
        raise ValueError("Failing pairs: give at least one record, each with `right` (true or false).")
    if combine not in (1, 2):
        raise ValueError(f"Failing pairs: combine={combine}. Group by 1 variable or by 2.")
    right = [bool(record["right"]) for record in pairs]
    columns, notes = _columns(pairs, max_values)
    found, small = _groups(columns, len(pairs), min_pairs, combine)
    if small:
        notes.append(f"{small} groups of fewer than {min_pairs} pairs are not shown.")
    tests = [_test(members, right) for members in found]
    corrected = adjusted([test[2] for test in tests])
    groups = [
        _group(where, len(members), test, q, level)
        for (members, where), test, q in zip(found.items(), tests, corrected, strict=True)
    ]
    groups.sort(key=lambda one: (not one.worse, one.adjusted if one.worse else 0.0, one.iia, -one.n))
    failing = [record for record, hit in zip(pairs, right, strict=True) if not hit]
    drawn = failing if len(failing) <= n_samples else random.Random(seed).sample(failing, n_samples)
    return Failures(len(pairs), sum(right), tuple(groups), tuple(drawn), tuple(notes))


def variables_of(record: Record) -> dict[str, Any]:
    """Return the variables by which a record can be grouped, with their values."""
    base, source = (record.get(key) or {} for key in (BASE, SOURCE))
    found: dict[str, Any] = {"kind": record["kind"]} if record.get("kind") else {}
    found |= {f"base.{name}": value for name, value in base.items()}
    found |= {f"source.{name}": value for name, value in source.items()}
    both = [name for name in base if name in source]
    return found | {f"{name} on both": "same" if base[name] == source[name] else "different" for name in both}


def _columns(pairs: Sequence[Record], max_values: int) -> tuple[dict[str, list[str]], list[str]]:
    """Return variable -> its value in each pair, as texts of few kinds, and notes on what was binned or left out."""
    told = [variables_of(record) for record in pairs]
    names = dict.fromkeys(name for one in told for name in one)
    columns: dict[str, list[str]] = {}
    skipped, binned, partial = [], [], []
    for name in names:
        if any(name not in one for one in told):
            partial.append(name)
            continue
        values = [one[name] for one in told]
        texts = [str(value) for value in values]
        count = len(set(texts))
        if count == 1:
            continue  # all alike: nothing to compare
        if count <= max_values:
            columns[name] = texts
        elif all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            columns[name] = _quarters(values)
            binned.append(name)
        else:
            skipped.append(f"{name} ({count} values)")
    notes = [f"Cut into quarters, having more than {max_values} values: {', '.join(binned)}."] if binned else []
    notes += [f"Skipped, having more than {max_values} values: {', '.join(skipped)}."] if skipped else []
    notes += [f"Skipped, not told for every pair: {', '.join(partial)}."] if partial else []
    return columns, notes


def _quarters(values: Sequence[float]) -> list[str]:
    """Return each value's bin as "3 to 17", bins holding about a quarter of the pairs each; equal values share one."""
    ordered = sorted(values)
    cuts = sorted({ordered[len(ordered) * quarter // 4] for quarter in (1, 2, 3)})
    bins = [sum(value >= cut for cut in cuts) for value in values]
    ends = {
        place: (min(own), max(own))
        for place in set(bins)
        for own in [[value for value, one in zip(values, bins, strict=True) if one == place]]
    }
    return [f"{ends[place][0]:g} to {ends[place][1]:g}" for place in bins]


Where = tuple[tuple[str, str], ...]


def _groups(
    columns: Mapping[str, Sequence[str]], n: int, min_pairs: int, combine: int
) -> tuple[dict[frozenset[int], Where], int]:
    """Return the pairs of each group -> its setting, and how many groups were too small."""
    single: dict[tuple[str, str], frozenset[int]] = {}
    for name, values in columns.items():
        members: dict[str, list[int]] = {}
        for index, value in enumerate(values):
            members.setdefault(value, []).append(index)
        single |= {(name, value): frozenset(own) for value, own in sorted(members.items())}
    found: dict[frozenset[int], Where] = {}
    small = 0
    for size in range(1, combine + 1):
        for chosen in combinations(single, size):
            if len({name for name, _ in chosen}) < size:
                continue
            own = frozenset.intersection(*(single[one] for one in chosen))
            if not own or len(own) == n:
                continue
            small += len(own) < min_pairs
            if len(own) >= min_pairs:
                found.setdefault(own, chosen)  # the first to hold these pairs has the fewest variables
    return found, small


Test = tuple[int, float, float]  # hits, IIA of the rest, p


def _test(members: frozenset[int], right: Sequence[bool]) -> Test:
    hits, total = sum(right[index] for index in members), sum(right)
    others = len(right) - len(members)
    return hits, (total - hits) / others, fisher_less(hits, len(members), total - hits, others)


def _group(where: Where, n: int, test: Test, corrected: float, level: float) -> Group:
    hits, rest, p = test
    return Group(where, n, hits, *wilson(hits, n), rest, p, corrected, corrected <= level)
