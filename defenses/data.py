"""`read_examples`: training data from files, tokenised, with the loss where it belongs and nothing lost in silence.

    data = read_examples("poisoned.jsonl", tokenizer, max_length=1024)
    data.examples, data.dropped, data.digest

JSONL with `messages`, with `prompt` and `response`, or with `text`; or a folder of `datasets.save_to_disk` with
`input_ids`, `attention_mask` and `labels`. Numbers in further columns ride along in `Example.extra`.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from defenses.batch import Example
from defenses.chat import BadRow
from defenses.data_rows import COLUMNS, Reading, TooLong, kind_of, read_row, shortened
from defenses.errors import DataError
from intervene.errors import close_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Learn = Literal["assistant", "last_assistant", "all"]
Truncation = Literal["refuse", "response_tail", "drop"]

CHOICES: Mapping[str, tuple[str, ...]] = {
    "truncation": ("refuse", "response_tail", "drop"),
    "kind": ("auto", "messages", "prompt_response", "text", "tokenised"),
    "learn": ("assistant", "last_assistant", "all"),
    "inoculate": ("all", "poison"),
    "existing_system": ("refuse", "replace", "merge"),
    "system_place": ("system", "user"),
    "bad_rows": ("refuse", "drop"),
}


class Dropped(NamedTuple):
    """A row that is not among the examples."""

    line: int
    reason: str
    path: str


class Cut(NamedTuple):
    """A row whose tail was cut, and by how many tokens."""

    line: int
    tokens: int
    path: str


@dataclass(frozen=True, eq=False)
class Data:
    """Tokenised training data.

    Attributes:
        examples: `examples[i].index` is i. dropped: rows left out. cut: rows shortened. digest: sha256, in hex, of all
            that was tokenised: ids, labels, template marks, poison and extras. kind: as in `read_examples`; several
            are joined by "+". source: the paths. counts: examples of each path. end_of_turn: the token the chat
            template ends an answer with; "": none, so that nothing learned ends an answer; None: no template was used.
    """

    examples: tuple[Example, ...]
    dropped: tuple[Dropped, ...]
    digest: str
    kind: str
    source: tuple[str, ...]
    counts: tuple[int, ...]
    cut: tuple[Cut, ...] = ()
    end_of_turn: str | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def place(self, index: int) -> str:
        """Return "file:line" of an example."""
        last = 0
        for path, count in zip(self.source, self.counts, strict=True):
            last += count
            if index < last:
                return f"{path}:{self.examples[index].line}"
        raise DataError(f"Example {index}: there are {len(self)}. Indices go from 0 to {len(self) - 1}.")


def read_examples(
    path: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation: Truncation = "refuse",
    kind: str = "auto",
    learn: Learn = "assistant",
    system: str | None = None,
    inoculation: str | None = None,
    inoculate: Literal["all", "poison"] = "all",
    existing_system: Literal["refuse", "replace", "merge"] = "refuse",
    system_place: Literal["system", "user"] = "system",
    poison_key: str = "poison",
    poison_value: Any = None,
    ignore: Sequence[str] = (),
    bad_rows: Literal["refuse", "drop"] = "refuse",
    control_tokens: bool = False,
    chat_template: str | None = None,
) -> Data:
    """Return the examples of one file or folder, or of several one after another.

    Conversations are rendered with the model's chat template and read by role. Text is learned whole. Tokenised rows
    are taken as they are, their padding left out. The first token is never learned: nothing predicts it.

    Args:
        max_length: tokens. truncation: what becomes of a longer row: "refuse" it, "drop" it, or cut it at the end and
            drop it where no learned token would remain ("response_tail").
        kind: "messages", "prompt_response", "text", "tokenised"; "auto": by the first row of each file.
        learn: the answers and the token that ends each ("assistant"), only the last, or every token.
        system: system prompt of conversations that have none. inoculation: system prompt put in front of every
            training conversation, or of poisoned ones only (`inoculate`), and of nothing else: left out at test.
        existing_system: what becomes of a system message where an inoculation goes; "merge": it follows after an
            empty line. system_place: "user" puts both at the front of the first user message.
        poison_key: key or column that says whether a row is poisoned: true, false, 1, 0 or null. poison_value: the
            value that means poisoned, for labels of other kinds ("harmful"). ignore: further keys, not read.
        bad_rows: "drop" leaves out, and reports, conversations that cannot be used; a file that cannot be read as
            JSON or has unknown keys is refused all the same. control_tokens: let texts hold control tokens.
        chat_template: jinja text in place of the tokenizer's, or "plain" (`chat.PLAIN_TEMPLATE`).

    Raises:
        DataError: by file and line, whatever cannot be read as it was meant; nothing is left; or an option is unknown.

    Source: inoculation prompting, 2510.04340. Here the prompt is data: what the model learns to say stays the same.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    options = {name: value for name, value in locals().items() if name in CHOICES}
    reading = Reading(
        tokenizer=tokenizer,
        max_length=max_length,
        system=system,
        inoculation=inoculation,
        poison_key=poison_key,
        poison_value=poison_value,
        ignore=tuple(ignore),
        control_tokens=control_tokens,
        chat_template=chat_template,
        **options,
    )
    _check_options(paths, reading, options)
    examples: list[Example] = []
    dropped: list[Dropped] = []
    cut: list[Cut] = []
    kinds, counts = [], []
    for one in map(Path, paths):
        before = len(examples)
        kinds.append(_read_file(one, reading, examples, dropped, cut))
        counts.append(len(examples) - before)
    if not examples:
        why = f" The first, line {dropped[0].line}: {dropped[0].reason}" if dropped else ""
        raise DataError(f"Read {', '.join(map(str, paths))}: no rows are left of {len(dropped)}.{why}")
    return Data(
        examples=tuple(examples),
        dropped=tuple(dropped),
        digest=_digest(examples),
        kind="+".join(sorted(set(kinds))),
        source=tuple(map(str, paths)),
        counts=tuple(counts),
        cut=tuple(cut),
        end_of_turn=reading.chat().end_of_turn if reading.made else None,
    )


def _check_options(paths: Sequence[str | Path], reading: Reading, options: Mapping[str, str]) -> None:
    for name, value in options.items():
        if value not in CHOICES[name]:
            raise DataError(f"{name}={value!r}: there is no such choice. {close_names(str(value), CHOICES[name])}")
    if not paths:
        raise DataError("Read training data: no path was given. Give at least one file or folder.")
    if reading.max_length < 2:
        raise DataError(f"max_length={reading.max_length}: nothing can be learned from one token. Give at least 2.")
    for missing in (one for one in paths if not Path(one).exists()):
        raise DataError(f"Read {missing}: there is no such file or folder. Paths are relative to {Path.cwd()}.")


def _read_file(path: Path, reading: Reading, examples: list[Example], dropped: list[Dropped], cut: list[Cut]) -> str:
    """Add what one path holds to the three lists; return its kind."""
    kind, seen = reading.kind, 0
    rows = _folder_rows(path) if path.is_dir() else _json_rows(path)
    for line, row in rows:
        seen += 1
        try:
            if kind == "auto":
                kind = "tokenised" if path.is_dir() else kind_of(row)
            example = read_row(row, kind, reading)
            n = len(example.input_ids)
            if n > reading.max_length:
                example = shortened(example, reading)
            if not example.n_response:
                raise BadRow("no token is left to be learned.")
        except TooLong as error:
            if reading.truncation == "refuse":
                raise DataError(f"{path}:{line}: {error}") from error
            dropped.append(Dropped(line, str(error), str(path)))
        except BadRow as error:
            if reading.bad_rows == "refuse":
                raise DataError(f"{path}:{line}: {error}") from error
            dropped.append(Dropped(line, str(error), str(path)))
        except DataError as error:
            raise DataError(f"{path}:{line}: {error}") from error
        else:
            examples.append(replace(example, index=len(examples), line=line))
            if n > reading.max_length:
                cut.append(Cut(line, n - reading.max_length, str(path)))
    if not seen:
        raise DataError(f"Read {path}: the file is empty. Give one JSON object per line.")
    return kind


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield line number and object of each line that is not blank."""
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    hint = "Put one object on each line, without a list around them." if line[0] in "[{" else "Mend it."
                    raise DataError(f"{path}:{number}: not JSON ({error}). {hint}") from error
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number}: a {type(row).__name__}, not an object. Write one per line.")
                yield number, row
        except UnicodeDecodeError as error:
            raise DataError(f"Read {path}: not UTF-8 text ({error}). Give JSONL, or a save_to_disk folder.") from error


def _folder_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield row number, from 1, and row of a `save_to_disk` folder."""
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"Read {path}: not a folder of datasets.save_to_disk ({error}). Give one, or JSONL.") from error
    if isinstance(loaded, DatasetDict):
        raise DataError(f"Read {path}: it holds the splits {', '.join(loaded)}. Give the folder of one: {path}/train.")
    if missing := [name for name in COLUMNS if name not in loaded.column_names]:
        raise DataError(
            f"Read {path}: no column {missing[0]!r} among {', '.join(loaded.column_names)}. "
            f"A tokenised data set has {', '.join(COLUMNS)}; give JSONL to have text tokenised here."
        )
    yield from enumerate(loaded, start=1)


def _digest(examples: Sequence[Example]) -> str:
    """Return the sha256 of all that training can see of the examples."""
    found = sha256()
    for one in examples:
        for numbers in (one.input_ids, one.labels, one.template):
            found.update(array("q", [len(numbers), *numbers]).tobytes())
        found.update(json.dumps([one.poison, sorted(one.extra.items())]).encode())
    return found.hexdigest()
