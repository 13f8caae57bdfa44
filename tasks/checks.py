"""What a set of pairs is worth before any model sees it: `check` re-derives every label and scores trivial answers.

    report = check(task, pairs)          # raises if a label, prompt or split is wrong
    print(report)                        # n, label balance, baselines, informative pairs, what to beware of

A score means something only above the best trivial answer on the very same pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from tasks.base import Example, Pair, PairSet, Task
from tasks.errors import BadData, TaskError, require_known

# A trivial answer that is right this often leaves no room for a finding.
_SOLVED = 0.95
# A rule over one variable is looked for where that has at most so many values, with so many pairs for each on average:
# then what it gains by being chosen on the pairs it is scored on is small, and no pairs are held out for it.
_VALUES, _PAIRS_PER_VALUE = 8, 10


@dataclass(frozen=True)
class PairReport:
    """What `inspect` found about one set of pairs. Shares are of all pairs, in [0, 1].

    Attributes:
        n: number of pairs.
        problems: what is wrong, one line per finding; empty for a sound set.
        labels: label -> number of pairs.
        kinds: the task's kind -> number of pairs.
        baselines: trivial answer -> share of pairs it gets right. "majority" always names the most frequent label of
            these same pairs, so no constant does better. "best_base_rule" and "best_source_rule" are there only where
            they beat all others: see `one_sided_rules`.
        informative: share of pairs whose label is neither the base's answer nor the source's.
    """

    n: int
    problems: tuple[str, ...]
    labels: Mapping[str, int]
    kinds: Mapping[str, int]
    baselines: Mapping[str, float]
    informative: float

    @property
    def best_trivial(self) -> tuple[str, float]:
        """The baseline that is right most often, and how often."""
        return max(self.baselines.items(), key=lambda item: item[1])

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of a score on these pairs has to know."""
        return tuple(
            f"{name} is right on {share:.0%} of the pairs: a high score here shows where the answer is carried, "
            "not that the variable was found."
            for name, share in self.baselines.items()
            if share >= _SOLVED
        )

    def __str__(self) -> str:
        """Return the report as lines of text."""
        most = sorted(self.labels.items(), key=lambda item: -item[1])[:5]
        width = max(12, *map(len, self.baselines))
        lines = [
            f"pairs        {self.n} ({', '.join(f'{count} {kind}' for kind, count in self.kinds.items())})",
            f"labels       {len(self.labels)} different; most often {', '.join(f'{t!r} {c}' for t, c in most)}",
            f"informative  {self.informative:.3f}",
            *(f"{name:<{width}} {share:.3f}" for name, share in self.baselines.items()),
            *(f"beware: {line}" for line in self.warnings),
            *(f"WRONG: {line}" for line in self.problems),
        ]
        return "\n".join(lines)


def baselines(labels: Sequence[object], answers: Mapping[str, Sequence[object]]) -> dict[str, float]:
    """Return name -> share of `labels` that the answers of that name equal, and "majority" of these labels.

    Raises:
        BadData: no labels, or answers of another number.
    """
    if not labels:
        raise BadData("Baselines: there are no pairs. Give at least one.")
    for name, given in answers.items():
        if len(given) != len(labels):
            raise BadData(f"Baseline {name!r}: {len(given)} answers for {len(labels)} labels. Give one for each.")
    shares = {
        name: sum(answer == label for answer, label in zip(given, labels, strict=True)) / len(labels)
        for name, given in answers.items()
    }
    return {**shares, "majority": max(Counter(labels).values()) / len(labels)}


def one_sided_rules(task: Task, pairs: Sequence[Pair]) -> dict[str, tuple[str, float]]:
    """Return "best_base_rule" and "best_source_rule" -> (variable, share of the labels the rule gets right).

    A rule reads one computed variable on one side, the base's or the source's, and answers with the label most frequent
    for that value on these very pairs (in a mixture of variables: for that value and the variable interchanged). So it
    needs no interchange: a score up to its share is no evidence that both sides are combined. It is chosen on the pairs
    it is scored on; hence only variables of at most 8 values with 10 pairs for each are tried. A side on which there is
    none, such as one whose variables are all numbers of many values, has no entry.
    """
    labels = [pair.label for pair in pairs]
    variables = [pair.variable for pair in pairs]
    model = task.causal_model
    sides = {
        "best_base_rule": [model.intervene(pair.base.setting, {}) for pair in pairs],
        "best_source_rule": [model.intervene(pair.source.setting, {}) for pair in pairs],
    }
    best: dict[str, tuple[str, float]] = {}
    for side, settings in sides.items():
        for name in model.mechanisms:
            share = _rule_share(list(zip(variables, (one[name] for one in settings), strict=True)), labels)
            if share is not None and share > best.get(side, ("", 0.0))[1]:
                best[side] = name, share
    return best


def _rule_share(values: Sequence[tuple[str, object]], labels: Sequence[str]) -> float | None:
    """Return how often the label most frequent for a value is right, or None where the values are too many."""
    counts: dict[tuple[str, object], Counter[str]] = {}
    most = min(_VALUES * len({variable for variable, _ in values}), len(labels) // _PAIRS_PER_VALUE)
    for value, label in zip(values, labels, strict=True):
        try:
            counts.setdefault(value, Counter())[label] += 1
        except TypeError:  # a list or an array: no value to look up
            return None
        if len(counts) > most:
            return None
    return sum(max(found.values()) for found in counts.values()) / len(labels)


def _told(named: Mapping[str, float], rules: Mapping[str, tuple[str, float]], n: int) -> dict[str, float]:
    """Return the rules that beat every named baseline by more than two standard errors: more than by being chosen."""
    best = max(named.values())
    least = best + 2 * (best * (1 - best) / n) ** 0.5
    return {side: share for side, (_, share) in rules.items() if share > least}


def inspect(task: Task, pairs: Sequence[Pair], split: str | None = None) -> PairReport:
    """Return the report of `pairs`, problems included.

    Every label is derived anew by running the causal model, every prompt and answer by rendering its setting, and every
    entity is looked up in the lists of `split` (by default that of a `PairSet`; None skips this).

    Raises:
        BadData: there are no pairs, or a setting is one that the causal model cannot run.
        UnknownName: the task has no such split.
    """
    if split is None and isinstance(pairs, PairSet):
        split = pairs.split
    if split is not None:
        require_known(f"{task.name} split", split, task.splits)
    problems = tuple(line for index, pair in enumerate(pairs) for line in _problems(task, index, pair, split))
    trivial = [task.trivial_answers(pair) for pair in pairs]
    labels = [pair.label for pair in pairs]
    names = trivial[0] if trivial else {}
    informative = sum(pair.label not in (pair.base.answer, pair.source.answer) for pair in pairs)
    named = baselines(labels, {name: [answers[name] for answers in trivial] for name in names})
    return PairReport(
        n=len(pairs),
        problems=problems,
        labels=dict(Counter(labels)),
        kinds=dict(Counter(task.kind(pair) for pair in pairs)),
        baselines={**named, **_told(named, one_sided_rules(task, pairs), len(pairs))},
        informative=informative / len(pairs),
    )


def check(task: Task, pairs: Sequence[Pair], split: str | None = None) -> PairReport:
    """Return the report of `pairs`, once nothing in them is wrong.

    Raises:
        BadData: a label is not what the causal model gives, a prompt or answer is not that of its setting, or an entity
            belongs to another split. The message names the first pair and the number of findings.
    """
    report = inspect(task, pairs, split)
    if report.problems:
        raise BadData(f"{task.name}: {len(report.problems)} problems in {report.n} pairs. First: {report.problems[0]}")
    return report


def distinguishes(task: Task, pairs: Sequence[Pair], variable_a: str, variable_b: str) -> float:
    """Return the share of `pairs` on which the two variables predict different answers.

    At 0 no score on these pairs can tell one variable from the other.

    Raises:
        BadData: there are no pairs.
        UnknownName: the causal model has no such variable.
    """
    if not pairs:
        raise BadData("distinguishes: there are no pairs. Give at least one.")
    differ = sum(
        task.label(variable_a, pair.base.setting, pair.source.setting)
        != task.label(variable_b, pair.base.setting, pair.source.setting)
        for pair in pairs
    )
    return differ / len(pairs)


def leakage(task: Task) -> dict[str, frozenset[str]]:
    """Return "kind of entity: split, split" -> the entities both may use. Empty when the splits are disjoint."""
    shared = {}
    for a, b in combinations(task.splits, 2):
        others = task.entities(b)
        for kind, words in task.entities(a).items():
            if words & others[kind]:
                shared[f"{kind}: {a}, {b}"] = words & others[kind]
    return shared


def _problems(task: Task, index: int, pair: Pair, split: str | None) -> list[str]:
    try:
        found = [
            *_example_problems(task, pair.base, f"pair {index}, base"),
            *_example_problems(task, pair.source, f"pair {index}, source"),
        ]
        right = task.label(pair.variable, pair.base.setting, pair.source.setting)
    except (TaskError, KeyError, TypeError, IndexError) as error:
        raise BadData(f"{task.name}, pair {index}: its setting cannot be run ({error!r}). Remove the pair.") from error
    if pair.label != right:
        found.append(f"pair {index}: label {pair.label!r}, and the causal model gives {right!r}. Use that.")
    if split is not None:
        found.extend(_stray_entities(task, index, pair, split))
    return found


def _example_problems(task: Task, example: Example, where: str) -> list[str]:
    right = task.render(example.setting)
    lines = []
    if example.prompt != right.prompt:
        lines.append(f"{where}: prompt {example.prompt!r}, and its setting says {right.prompt!r}. Render it anew.")
    if example.answer != right.answer:
        lines.append(f"{where}: answer {example.answer!r}, and the causal model gives {right.answer!r}. Use that.")
    if dict(example.spans) != dict(right.spans):
        lines.append(f"{where}: its spans are not those of its prompt. Render it anew.")
    return lines


def _stray_entities(task: Task, index: int, pair: Pair, split: str) -> list[str]:
    allowed = task.entities(split)
    return [
        f"pair {index}: {kind} {word!r} is not of split {split!r}. Draw the pair from that split."
        for example in (pair.base, pair.source)
        for kind, words in task.entities_in(example).items()
        for word in sorted(words - allowed.get(kind, words))
    ]
