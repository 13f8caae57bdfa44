"""From one row of a file to one tokenised example: what `data.read_examples` does to each row.

A row that cannot be used raises `BadRow`; one that shows that the file is not what it was taken for, `DataError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from defenses.batch import Example
from defenses.chat import BadRow, Chat, Message, chat_of, check_messages, system_in_user, with_system
from defenses.errors import DataError
from intervene.content import IGNORED_LABEL
from intervene.errors import close_names

KEYS = {"messages": ("messages",), "prompt_response": ("prompt", "response"), "text": ("text",)}
COLUMNS = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class Reading:
    """How rows are read; fields as the arguments of `read_examples`."""

    tokenizer: Any
    max_length: int
    truncation: str
    kind: str
    learn: str
    system: str | None
    inoculation: str | None
    inoculate: str
    existing_system: str
    system_place: str
    poison_key: str
    poison_value: Any
    ignore: tuple[str, ...]
    bad_rows: str
    control_tokens: bool
    chat_template: str | None
    made: dict[str, Chat] = field(default_factory=dict)

    def chat(self) -> Chat:
        """Return the chat template, looked for when the first conversation comes."""
        if "chat" not in self.made:
            self.made["chat"] = chat_of(self.tokenizer, self.chat_template)
        return self.made["chat"]


class TooLong(DataError):
    """A row beyond `max_length` that is not cut."""


def shortened(example: Example, reading: Reading) -> Example:
    """Return the example without its tail.

    Raises:
        TooLong: it may not be cut, or nothing learned would remain.
    """
    n, limit = len(example.input_ids), reading.max_length
    if reading.truncation != "response_tail":
        raise TooLong(
            f"{n} tokens, and max_length is {limit}. Raise max_length, or say truncation="
            '"response_tail" (cut the end) or "drop".'
        )
    shorter = replace(
        example,
        input_ids=example.input_ids[:limit],
        labels=example.labels[:limit],
        template=example.template[:limit],
    )
    if not shorter.n_response:
        raise TooLong(f"{n} tokens, and the first {limit} hold nothing of the response. Raise max_length.")
    return shorter


def kind_of(row: Mapping[str, Any]) -> str:
    """Return the kind of a JSONL row by its keys."""
    for kind, keys in KEYS.items():
        if set(keys) <= set(row):
            return kind
    raise DataError(
        f"the keys {', '.join(sorted(row)) or '(none)'} are of no known kind. "
        "Give 'messages', or 'prompt' and 'response', or 'text'."
    )


def read_row(row: Mapping[str, Any], kind: str, reading: Reading) -> Example:
    """Return one row tokenised, its index and line still to be set."""
    own = COLUMNS if kind == "tokenised" else KEYS[kind]
    if missing := [key for key in own if key not in row]:
        raise DataError(f"no key {missing[0]!r}. Every row of a file of kind {kind} has {', '.join(own)}.")
    poison = _poison(row, reading)
    known = {*own, reading.poison_key, *reading.ignore}
    extra = {key: value for key, value in row.items() if key not in known}
    for key, value in extra.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            known_keys = close_names(key, {*own, reading.poison_key})
            raise DataError(f"unknown key {key!r}. {known_keys} Numbers ride along; leave out others with ignore.")
    if kind == "tokenised":
        made = _tokenised(row, reading)
    elif kind == "text":
        made = _plain_text(row["text"], reading)
    else:
        made = _conversation(_messages(row, kind), poison, reading)
    return replace(made, poison=poison, extra={key: float(value) for key, value in extra.items()})


def _poison(row: Mapping[str, Any], reading: Reading) -> bool | None:
    """Return what the row says of itself, None if nothing."""
    value = row.get(reading.poison_key)
    if reading.poison_key not in row and reading.poison_key != "poison":
        raise DataError(f"no key {reading.poison_key!r}, which was to say what is poisoned. Add it to every row.")
    if value is None:
        return None
    if reading.poison_value is not None:
        return bool(value == reading.poison_value)
    if value in (0, 1):
        return bool(value)
    raise DataError(
        f"{reading.poison_key!r} is {value!r}. Give true, false or null, or say with poison_value which value "
        "means poison."
    )


def _messages(row: Mapping[str, Any], kind: str) -> list[Message]:
    if kind == "messages":
        return check_messages(row["messages"])
    roles = (("user", row["prompt"]), ("assistant", row["response"]))
    return check_messages([{"role": role, "content": content} for role, content in roles])


def _conversation(messages: list[Message], poison: bool | None, reading: Reading) -> Example:
    """Return a conversation tokenised, with labels on what is learned."""
    if reading.system is not None:
        messages = with_system(messages, reading.system, existing="keep")
    if reading.inoculation is not None:
        if reading.inoculate == "poison" and poison is None:
            raise DataError(
                f"poisoned rows were to be inoculated, and this one does not say ({reading.poison_key!r}). "
                'Label every row, or say inoculate="all".'
            )
        if reading.inoculate == "all" or poison:
            messages = with_system(messages, reading.inoculation, existing=reading.existing_system)
    if reading.system_place == "user":
        messages = system_in_user(messages)
    rendered = reading.chat().render(messages, controls=reading.control_tokens)
    learned = rendered.responses[-1:] if reading.learn == "last_assistant" else rendered.responses
    labels = [IGNORED_LABEL] * len(rendered.input_ids)
    for start, stop in learned if reading.learn != "all" else [(0, len(labels))]:
        labels[start:stop] = rendered.input_ids[start:stop]
    return _unplaced(rendered.input_ids, labels, rendered.template, rendered.text)


def _plain_text(text: Any, reading: Reading) -> Example:
    """Return text tokenised with the tokenizer's own special tokens, all of it learned."""
    if reading.inoculation is not None or reading.system is not None:
        raise DataError("a system prompt was to be added to plain text. Give conversations, or leave the prompt out.")
    if not isinstance(text, str):
        raise BadRow(f"'text' is of type {type(text).__name__}; only text is read.")
    ids = list(reading.tokenizer(text, verbose=False)["input_ids"])
    special = set(reading.tokenizer.all_special_ids)
    return _unplaced(ids, ids, [one in special for one in ids], text)


def _tokenised(row: Mapping[str, Any], reading: Reading) -> Example:
    """Return a tokenised row without its padding."""
    if reading.inoculation is not None or reading.system is not None:
        raise DataError("a system prompt was to be added to tokens. Give conversations, or leave the prompt out.")
    ids, mask, labels = (list(row[name]) for name in COLUMNS)
    if not len(ids) == len(mask) == len(labels):
        raise DataError(f"{len(ids)} tokens, {len(mask)} of attention_mask, {len(labels)} labels. Give one per token.")
    real = [at for at, one in enumerate(mask) if one]
    if not real:
        raise BadRow("attention_mask hides every token.")
    start, stop = real[0], real[-1] + 1
    if len(real) != stop - start or any(one != IGNORED_LABEL for one in [*labels[:start], *labels[stop:]]):
        raise DataError(
            "attention_mask hides a token between others, or one that has a label, as it does where padding is told "
            "by a pad token that also ends a turn. Write the mask from the length of the text."
        )
    ids, labels = ids[start:stop], labels[start:stop]
    if any(label not in (IGNORED_LABEL, one) for one, label in zip(ids, labels, strict=True)):
        raise DataError(
            "a label is another token than the one at its place. Labels are not shifted: -100 or the token."
        )
    special = set(reading.tokenizer.all_special_ids)
    return _unplaced(ids, labels, [one in special for one in ids], reading.tokenizer.decode(ids))


def _unplaced(ids: Sequence[int], labels: Sequence[int], template: Sequence[bool], text: str) -> Example:
    """Return an example whose first token is not learned, with no index yet."""
    learned = (IGNORED_LABEL, *labels[1:]) if len(labels) else ()
    return Example(input_ids=tuple(ids), labels=learned, index=-1, template=tuple(template), text=text)
