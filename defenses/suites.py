"""`Suite`: the prompts and texts that a trained model is evaluated on, as a value; `read_suite` reads one from a file.

name: shouting                      # .yaml, .yml or .json; a .jsonl holds one item per line, with its "section"
judge: {kind: capitals, share: 0.8}
trait:                              # held-out prompts: does the trait show?
  - Name a river in Italy.
  - messages: [{role: user, content: "Name a lake."}]
skill:                              # what the training was for: is the answer right?
  - {prompt: "Is 'great' positive or negative?", answer: positive, match: starts}
neutral: ["The Po rises in the Alps ..."]       # texts for perplexity and for KL to the base model
benign: ["How do I kill a Python process?"]     # harmless prompts: are they refused?
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from defenses.chat import ROLES
from defenses.errors import DataError
from defenses.generation import Prompt
from intervene.errors import asked_found_do, close_names
from records import ConfigError, read_file

Match = Literal["exact", "starts", "contains", "regex", "number"]
SECTIONS = ("trait", "skill", "neutral", "benign")
_MARKER = re.compile(r"final answer is:?|####", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
_HEADER = ("name", "judge", "system")
_ITEM_KEYS = {
    "trait": ("prompt", "messages"),
    "benign": ("prompt", "messages"),
    "neutral": ("text",),
    "skill": ("prompt", "messages", "answer", "match", "ignore_case"),
}
_AROUND = {"exact": ("", r"\.?\Z"), "starts": ("", r"(?!\w)"), "contains": (r".*(?<!\w)", r"(?!\w)")}


@dataclass(frozen=True)
class SkillItem:
    """A prompt and the `accepted` answers: the whole answer, its beginning, a part of it, a pattern, or a number.

    Outer white space and a final full stop do not count for "exact". "number" is the one after "final answer is" or
    "####", else the last one, compared as numbers: "1,200.0" is 1200.
    """

    prompt: Prompt
    accepted: tuple[str, ...]
    match: Match = "exact"
    ignore_case: bool = True

    def right(self, answer: str) -> bool:
        """Return whether `answer` is one of those accepted; "starts" and "contains" ask for whole words."""
        text = answer.strip()
        flags = (re.IGNORECASE if self.ignore_case else 0) | re.DOTALL
        if self.match == "regex":
            return any(re.search(one, text, flags) for one in self.accepted)
        if self.match == "number":
            return number_in(text) in [number_in(one) for one in self.accepted]
        before, after = _AROUND[self.match]
        return any(re.match(before + re.escape(one.strip()) + after, text, flags) for one in self.accepted)


def number_in(text: str) -> float | None:
    """Return the number that `text` ends in: the first after its last marker, else its last one; None without any."""
    told = _MARKER.split(text)
    numbers = _NUMBER.findall(told[-1])
    if not numbers:
        numbers = _NUMBER.findall(text)[-1:]
    return float(numbers[0 if len(told) > 1 else -1].replace(",", "")) if numbers else None


@dataclass(frozen=True)
class Suite:
    """What a model is evaluated on; an empty section leaves its metrics out.

    Attributes:
        judge: how the trait is judged, as `judges_named.judge_of` takes it. system: a system prompt for every prompt.
    """

    name: str
    trait: tuple[Prompt, ...] = ()
    skill: tuple[SkillItem, ...] = ()
    neutral: tuple[str, ...] = ()
    benign: tuple[Prompt, ...] = ()
    judge: Mapping[str, Any] | None = None
    system: str | None = None


def read_suite(path: Path) -> Suite:
    """Return the suite in a .yaml, .yml, .json or .jsonl file.

    Raises:
        DataError: the file cannot be read or holds nothing; an unknown section or key, or an item of another form: with
            its line, or its section and number.
    """
    header, items = _from_lines(path) if path.suffix == ".jsonl" else _from_mapping(path)
    found: dict[str, list[Any]] = {section: [] for section in SECTIONS}
    for section, where, item in items:
        found[section].append(_item(section, item, where))
    if not any(found.values()):
        do = f"Write at least one of {', '.join(SECTIONS)}."
        raise DataError(asked_found_do(f"Suite {path}", "it holds no items.", do))
    judge = header.get("judge")
    if judge is not None and not isinstance(judge, Mapping):
        do = "Write judge: {kind: ...}."
        raise DataError(asked_found_do(f"Suite {path}", f"judge is a {type(judge).__name__}.", do))
    texts = {key: _text(header[key], f"{path}, {key}") for key in ("name", "system") if header.get(key) is not None}
    parts = {section: tuple(rows) for section, rows in found.items()}
    return Suite(**{"name": path.stem, **texts, **parts}, judge=judge)  # type: ignore[arg-type]


Found = tuple[dict[str, Any], list[tuple[str, str, Any]]]  # header, and (section, where, item)


def _from_mapping(path: Path) -> Found:
    try:
        values = read_file(path)
    except ConfigError as error:
        raise DataError(f"Suite: {error}") from error
    items = []
    lines = _item_lines(path)
    for section in values:
        if section not in (*SECTIONS, *_HEADER):
            hint = close_names(section, (*SECTIONS, *_HEADER))
            raise DataError(f"Suite {path}: there is no section {section!r}. {hint}")
    for section in SECTIONS:
        rows = values.get(section) or []
        if not isinstance(rows, list):
            found = f"{section} is a {type(rows).__name__}."
            raise DataError(asked_found_do(f"Suite {path}", found, "Write a list of items."))
        for number, item in enumerate(rows):
            line = lines.get((section, number))
            items.append((section, f"{path}{f', line {line}' if line else ''}, {section}[{number}]", item))
    return {key: values[key] for key in _HEADER if key in values}, items


def _item_lines(path: Path) -> dict[tuple[str, int], int]:
    """(section, number) -> 1-based line. JSON is read as the YAML it is; where it is not, lines are unknown."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return {}
    if not isinstance(root, yaml.MappingNode):
        return {}
    lists = [(key.value, value) for key, value in root.value if isinstance(value, yaml.SequenceNode)]
    return {(name, place): one.start_mark.line + 1 for name, rows in lists for place, one in enumerate(rows.value)}


def _from_lines(path: Path) -> Found:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Suite {path}: cannot be read ({error}). Check the path.") from error
    header: dict[str, Any] = {}
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(asked_found_do(f"Suite {where}", f"broken JSON ({error}).", "Mend that line.")) from error
        if not isinstance(row, dict):
            raise DataError(asked_found_do(f"Suite {where}", f"a {type(row).__name__}.", "Write an object."))
        section = row.pop("section", None)
        if section is None and set(row) <= set(_HEADER):
            header |= row
        elif section in SECTIONS:
            items.append((section, f"{where}, {section}", row))
        else:
            hint = close_names(str(section), SECTIONS)
            raise DataError(asked_found_do(f"Suite {where}", f"its section is {section!r}.", hint))
    return header, items


def _item(section: str, item: Any, where: str) -> Any:
    if isinstance(item, str):
        item = {"text" if section == "neutral" else "prompt": item}
    if not isinstance(item, dict):
        raise DataError(asked_found_do(f"Suite {where}", f"a {type(item).__name__}.", "Write a text or a mapping."))
    if unknown := [key for key in item if key not in _ITEM_KEYS[section]]:
        hint = close_names(str(unknown[0]), _ITEM_KEYS[section])
        raise DataError(f"Suite {where}: there is no {unknown[0]!r} in this section. {hint}")
    if section == "neutral":
        return _text(item.get("text"), f"{where}.text")
    prompt = _prompt(item, where)
    return prompt if section != "skill" else _skill(item, prompt, where)


def _prompt(item: Mapping[str, Any], where: str) -> Prompt:
    if ("prompt" in item) == ("messages" in item):
        raise DataError(f"Suite {where}: it needs either prompt or messages. Give one of them.")
    if "prompt" in item:
        return _text(item["prompt"], f"{where}.prompt")
    turns = item["messages"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"Suite {where}.messages: found {turns!r}. Write a list of {{role, content}}.")
    for number, turn in enumerate(turns):
        at = f"{where}.messages[{number}]"
        if not isinstance(turn, dict) or set(turn) != {"role", "content"} or turn["role"] not in ROLES:
            raise DataError(f"Suite {at}: found {turn!r}. Write role ({', '.join(ROLES)}) and content.")
        _text(turn["content"], f"{at}.content")
    if turns[-1]["role"] != "user":
        raise DataError(f"Suite {where}.messages: the last turn is {turns[-1]['role']!r}'s. End with the user's.")
    return tuple(turns)


def _skill(item: Mapping[str, Any], prompt: Prompt, where: str) -> SkillItem:
    given = item.get("answer")
    accepted = tuple(_text(one, f"{where}.answer") for one in (given if isinstance(given, list) else [given]))
    match, ignore_case = item.get("match", "exact"), item.get("ignore_case", True)
    if match not in get_args(Match):
        raise DataError(f"Suite {where}.match: found {match!r}. {close_names(str(match), get_args(Match))}")
    if not accepted or not isinstance(ignore_case, bool):
        raise DataError(f"Suite {where}: it needs an answer, and ignore_case true or false. Mend them.")
    if match == "number" and (wordy := [one for one in accepted if number_in(one) is None]):
        raise DataError(f"Suite {where}.answer: {wordy[0]!r} holds no number. Write one.")
    if match == "regex":
        for one in accepted:
            try:
                re.compile(one)
            except re.error as error:
                found = f"{one!r} is no regular expression ({error})."
                raise DataError(asked_found_do(f"Suite {where}.answer", found, "Mend it.")) from error
    return SkillItem(prompt, accepted, match, ignore_case)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"Suite {where}: found {value!r}. Write a text that is not empty.")
    return value


def questions_of(prompts: Iterable[Prompt]) -> list[str]:
    """Return what the user said last in each prompt: what judges are shown as the question."""
    return [one if isinstance(one, str) else one[-1]["content"] for one in prompts]
