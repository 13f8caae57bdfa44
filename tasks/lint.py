"""What a task's pair sets are worth together, before a search is run on them: `lint` and its refusals.

    report = lint(task, {split: task.pairs(split, variable="position", n=1000) for split in task.splits})
    print(report)
    report.require_sound()                              # labels, prompts, leakage, duplicates
    require_distinguishable(report, "position")         # no other variable and no trivial answer explains the labels

`check` looks at one set of pairs; this looks at the sets of all splits, and at which of the causal model's variables
they can tell apart: a score for one variable is a score for every other that predicts the same labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from tasks.base import Pair, PairSet, Task
from tasks.checks import PairReport, inspect
from tasks.errors import BadData, TaskError, require_known

# Below this share of pairs on which they differ, two explanations count as one: with 1000 pairs a perfect score for one
# is then a score above 0.9 for the other.
LEAST = 0.1
_SHOWN = 5  # rows or words named in one line


@dataclass(frozen=True)
class SplitLint:
    """What `lint` found about the pairs of one split.

    Attributes:
        report: label balance, kinds, baselines and informative share, with all problems of single pairs.
        wrong_labels: the numbers, from 0, of the pairs whose label is not what the causal model gives.
        apart: (explanation, explanation) -> share of the pairs on which they predict different labels. An explanation
            is a variable of the causal model or a trivial answer; both orders are there.
        unrunnable: variable -> number of pairs on which exchanging it gives an input that the causal model refuses.
            Such a variable is left out of `apart`.
        repeated: number of pairs that stand earlier in this split already.
    """

    report: PairReport
    wrong_labels: tuple[int, ...]
    apart: Mapping[tuple[str, str], float]
    unrunnable: Mapping[str, int]
    repeated: int


@dataclass(frozen=True)
class Lint:
    """What `lint` found about a task's pairs; `str()` is a table for the terminal.

    Attributes:
        task: the task's name.
        variables: split -> the variable that its pairs were drawn for.
        splits: split -> what was found about its pairs.
        shared_entities: "kind: split, split" -> entities that pairs of both splits use.
        shared_pairs: "split, split" -> number of (base prompt, source prompt) that are in both.
        shared_prompts: "split, split" -> number of prompts, of bases or sources, that are in both.
    """

    task: str
    variables: Mapping[str, str]
    splits: Mapping[str, SplitLint]
    shared_entities: Mapping[str, frozenset[str]]
    shared_pairs: Mapping[str, int]
    shared_prompts: Mapping[str, int]

    @property
    def explanations(self) -> tuple[str, ...]:
        """The variables and trivial answers that the matrix compares in every split, variables first."""
        first, *others = self.splits.values()
        names = dict.fromkeys(name for pair in first.apart for name in pair)
        return tuple(name for name in names if all((name, name) in split.apart for split in others))

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, one line per finding; empty for sound sets."""
        lines = []
        for name, found in self.splits.items():
            if found.wrong_labels:
                numbers = _first(map(str, found.wrong_labels))
                lines.append(
                    f"{name}: {len(found.wrong_labels)} labels are not what the causal model gives, at rows {numbers}."
                )
            others = [line for line in found.report.problems if ": label " not in line]
            if others:
                lines.append(f"{name}: {len(others)} other problems. First: {others[0]}")
            if found.repeated:
                lines.append(f"{name}: {found.repeated} pairs stand in it more than once.")
        lines += [f"{kind}: both use {_first(sorted(words))}." for kind, words in self.shared_entities.items()]
        lines += [f"{where}: {count} pairs are in both." for where, count in self.shared_pairs.items()]
        lines += [f"{where}: {count} prompts are in both." for where, count in self.shared_prompts.items()]
        return tuple(lines)

    def apart(self, one: str, other: str) -> float:
        """Return the share of pairs on which the two predict different labels, in the split where it is smallest.

        Raises:
            UnknownName: the matrix has no such explanation.
        """
        for name in (one, other):
            require_known("Explanation", name, self.explanations)
        return min(split.apart[one, other] for split in self.splits.values())

    def require_sound(self) -> None:
        """Do nothing, once nothing is wrong.

        Raises:
            BadData: something is; the message has every finding.
        """
        if self.problems:
            raise BadData(f"{self.task}: {len(self.problems)} findings. {' '.join(self.problems)} Draw the pairs anew.")

    def __str__(self) -> str:
        """Return the tables as lines of text."""
        unrunnable = {name: count for split in self.splits.values() for name, count in split.unrunnable.items()}
        lines = [
            *_columns(self._facts()),
            "",
            "told apart: share of pairs with different labels, in the split where it is smallest",
            *_columns(self._matrix()),
            *(f"not compared: {name}: the causal model refuses to exchange it" for name in unrunnable),
            *(f"WRONG: {line}" for line in self.problems),
        ]
        return "\n".join(lines)

    def _facts(self) -> list[list[str]]:
        reports = [split.report for split in self.splits.values()]
        kinds = dict.fromkeys(kind for report in reports for kind in report.kinds)
        names = dict.fromkeys(name for report in reports for name in report.baselines)
        return [
            [self.task, *self.splits],
            ["variable", *(self.variables[name] for name in self.splits)],
            ["pairs", *(str(report.n) for report in reports)],
            *([f"  {kind}", *(str(report.kinds.get(kind, 0)) for report in reports)] for kind in kinds),
            ["different labels", *(str(len(report.labels)) for report in reports)],
            *([name, *(_share(report.baselines.get(name)) for report in reports)] for name in names),
            ["informative", *(_share(report.informative) for report in reports)],
            ["wrong labels", *(str(len(split.wrong_labels)) for split in self.splits.values())],
        ]

    def _matrix(self) -> list[list[str]]:
        """Return the matrix, its columns headed by the numbers of its rows: names would make it too wide to print."""
        names = self.explanations
        rows = [["", *(str(number) for number in range(1, len(names) + 1))]]
        for number, one in enumerate(names, start=1):
            shares = ("." if one == other else f"{self.apart(one, other):.2f}" for other in names)
            rows.append([f"{number:>2} {one}", *shares])
        return rows


def lint(task: Task, splits: Mapping[str, Sequence[Pair]], variables: Sequence[str] | None = None) -> Lint:
    """Return what is found about the pairs of all `splits` (split -> pairs).

    Args:
        variables: the causal model's variables to compare; default: the task's, and all others that it computes.

    Raises:
        BadData: no splits, a split without pairs, or a setting that the causal model cannot run.
        UnknownName: a split or variable that the task does not have.
    """
    if not splits:
        raise BadData(f"{task.name}: there are no splits to look at. Give split -> pairs.")
    for split in splits:
        require_known(f"{task.name} split", split, task.splits)
    model = task.causal_model
    for name in variables or ():
        require_known(f"{task.name} variable", name, model.variables)
    computed = tuple(name for name in model.variables if name in model.mechanisms)
    # A task may offer names that stand for several variables at once; only single ones can be compared.
    offered = tuple(name for name in task.variables if name in model.variables)
    compared = tuple(dict.fromkeys(variables or (*offered, *computed)))
    return Lint(
        task=task.name,
        variables={
            split: pairs.variable if isinstance(pairs, PairSet) else _first(dict.fromkeys(p.variable for p in pairs))
            for split, pairs in splits.items()
        },
        splits={split: _split_lint(task, split, pairs, compared) for split, pairs in splits.items()},
        shared_entities=_shared_entities(task, splits),
        shared_pairs=_shared({split: set(map(_key, pairs)) for split, pairs in splits.items()}),
        shared_prompts=_shared(
            {split: {prompt for pair in pairs for prompt in _key(pair)} for split, pairs in splits.items()}
        ),
    )


def require_distinguishable(
    report: Lint, variable: str, rivals: Iterable[str] | None = None, *, least: float = LEAST
) -> None:
    """Do nothing, once `variable` predicts other labels than each of `rivals` on enough pairs of every split.

    Args:
        rivals: variables of the causal model, or trivial answers such as "copy_base"; default: all of the matrix.
        least: share of the pairs on which they must differ.

    Raises:
        BadData: it does not; the message says from what it cannot be told apart, the shares, and what to do.
        UnknownName: the matrix has no such explanation.
    """
    names = [name for name in report.explanations if name != variable] if rivals is None else list(rivals)
    shares = {name: report.apart(variable, name) for name in names}
    close = {name: share for name, share in shares.items() if share < least}
    if close:
        found = ", ".join(f"{name} ({share:.1%} of the pairs)" for name, share in close.items())
        raise BadData(
            f"{report.task}: {variable!r} should predict other labels than its rivals on at least {least:.0%} of the "
            f"pairs of each split, and does so too rarely for {found}. A score for it here would be a score for those. "
            "Draw pairs on which they differ (a kind of pairs, more of them), or search for another variable."
        )


def _split_lint(task: Task, split: str, pairs: Sequence[Pair], variables: Sequence[str]) -> SplitLint:
    report = inspect(task, pairs, split)
    # Full settings, run once: each interchange then computes only what lies downstream of it.
    run = [(task.causal_model.run(pair.base.setting), task.causal_model.run(pair.source.setting)) for pair in pairs]
    labels = [task.label(pair.variable, base, source) for pair, (base, source) in zip(pairs, run, strict=True)]
    trivial = [task.trivial_answers(pair) for pair in pairs]
    predictions: dict[str, list[str]] = {}
    unrunnable = {}
    for name in variables:
        found = [_predicted(task, name, base, source) for base, source in run]
        told = [label for label in found if label is not None]
        if len(told) == len(found):
            predictions[name] = told
        else:
            unrunnable[name] = len(found) - len(told)
    for name in trivial[0]:
        predictions[name] = [answers[name] for answers in trivial]
    usual, _ = Counter(labels).most_common(1)[0]
    predictions["majority"] = [usual] * len(pairs)
    return SplitLint(
        report=report,
        wrong_labels=tuple(i for i, pair in enumerate(pairs) if pair.label != labels[i]),
        apart={(a, b): _apart(predictions[a], predictions[b]) for a in predictions for b in predictions},
        unrunnable=unrunnable,
        repeated=len(pairs) - len(set(map(_key, pairs))),
    )


def _predicted(task: Task, variable: str, base: Mapping[str, Any], source: Mapping[str, Any]) -> str | None:
    """Return the label if `variable` were exchanged, or None where the causal model refuses what that gives."""
    try:
        return task.label(variable, base, source)
    except TaskError:
        return None


def _apart(one: Sequence[str], other: Sequence[str]) -> float:
    return sum(a != b for a, b in zip(one, other, strict=True)) / len(one)


def _key(pair: Pair) -> tuple[str, str]:
    return pair.base.prompt, pair.source.prompt


def _shared(sets: Mapping[str, set[tuple[str, str]]] | Mapping[str, set[str]]) -> dict[str, int]:
    counts = {f"{a}, {b}": len(sets[a] & sets[b]) for a, b in combinations(sets, 2)}
    return {where: count for where, count in counts.items() if count}


def _shared_entities(task: Task, splits: Mapping[str, Sequence[Pair]]) -> dict[str, frozenset[str]]:
    used: dict[str, dict[str, set[str]]] = {}
    for split, pairs in splits.items():
        for example in (example for pair in pairs for example in (pair.base, pair.source)):
            for kind, words in task.entities_in(example).items():
                used.setdefault(kind, {}).setdefault(split, set()).update(words)
    shared = {
        f"{kind}: {a}, {b}": frozenset(sets[a] & sets[b])
        for kind, sets in used.items()
        for a, b in combinations(sets, 2)
    }
    return {where: words for where, words in shared.items() if words}


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _first(words: Iterable[str]) -> str:
    listed = list(words)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows with their cells in columns: the first flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
