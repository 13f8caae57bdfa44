"""Files in the format of the original align-transformers data sets: token ids, with no text.

    pairs = read_original("pairs.jsonl")                    # OriginalPairs
    pairs = as_original(task.pairs(...), tokenizer, position="last")
    write_original(pairs, "pairs.jsonl")

One JSON object per line:

input_ids          the base's tokens
source_input_ids   the source's tokens
labels             as long as input_ids: -100 everywhere but at the last position, where the id of the counterfactual
                   answer stands. It is the token *after* the prompt: labels are not shifted
intervention_ids   which variable is interchanged: 0, 1, ...
token_range, source_token_range          optional, [begin, end) of the tokens to exchange in base and source
attention_mask, source_attention_mask    optional, 1 for a token and 0 for a pad; padding goes on the left

A row without ranges takes its positions from the search, counted from the first token. Such a file must have all its
bases, and all its sources, of one length: else one index would name different words in different rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.base import Example, Pair
from tasks.errors import BadData, require_known
from tasks.tokens import Tokenizer, token_ids, token_span

IGNORED = -100  # a label that is not scored
Ids = tuple[int, ...]
Range = tuple[int, int]
_NEEDED = ("input_ids", "source_input_ids", "labels", "intervention_ids")
_RANGES = ("token_range", "source_token_range")
_MASKS = ("attention_mask", "source_attention_mask")
_SHOWN = 5  # rows named in one message


@dataclass(frozen=True)
class OriginalPairs:
    """N pairs of token ids; every field has one entry per pair.

    Attributes:
        input_ids: the bases' tokens, lengths may differ between rows.
        source_input_ids: the sources' tokens.
        labels: (N,) int64, the id of the token that counts as right after the base's last token.
        intervention_ids: (N,) int64, the number of the variable that is interchanged.
        token_ranges: the tokens [begin, end) to exchange in each base; None where the file leaves it to the search.
        source_token_ranges: the same in each source, as many tokens. None if and only if `token_ranges` is.
        attention_masks: 1 for each token, 0 for each pad; all 1 where the file has none.
        source_attention_masks: the same of the sources.
    """

    input_ids: tuple[Ids, ...]
    source_input_ids: tuple[Ids, ...]
    labels: npt.NDArray[np.int64]
    intervention_ids: npt.NDArray[np.int64]
    token_ranges: tuple[Range, ...] | None
    source_token_ranges: tuple[Range, ...] | None
    attention_masks: tuple[Ids, ...]
    source_attention_masks: tuple[Ids, ...]

    def __len__(self) -> int:
        """Return N."""
        return len(self.input_ids)

    def rows(self) -> tuple[dict[str, Any], ...]:
        """Return the pairs as the rows of a file. Masks are left out where there is no padding."""
        found = []
        for i, ids in enumerate(self.input_ids):
            row: dict[str, Any] = {
                "input_ids": list(ids),
                "source_input_ids": list(self.source_input_ids[i]),
                "labels": [IGNORED] * (len(ids) - 1) + [int(self.labels[i])],
                "intervention_ids": int(self.intervention_ids[i]),
            }
            for name, ranges in zip(_RANGES, (self.token_ranges, self.source_token_ranges), strict=True):
                if ranges is not None:
                    row[name] = list(ranges[i])
            for name, masks in zip(_MASKS, (self.attention_masks, self.source_attention_masks), strict=True):
                if not all(masks[i]):
                    row[name] = list(masks[i])
            found.append(row)
        return tuple(found)


def read_original(path: str | Path) -> OriginalPairs:
    """Return the pairs of a file, checked.

    Raises:
        BadData: the file is missing or empty; a line is no JSON object, lacks a field, or has something else than whole
            numbers in it; labels have not exactly one id, at the last position; a range or a mask does not fit its row;
            or rows without ranges differ in length. The message names the rows, by their line.
    """
    path = Path(path)
    if not path.is_file():
        raise BadData(f"{path}: there is no such file. Give the path of a JSONL file.")
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [_Row.parse(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise BadData(f"{path}: the file is empty. Write at least one row.")
    return _assembled(path, rows)


def write_original(pairs: OriginalPairs, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write `pairs` to `path`, one JSON object per line, and return the path.

    Raises:
        BadData: there are no pairs, or the file exists and `overwrite` is not given.
    """
    path = Path(path)
    if not len(pairs):
        raise BadData(f"{path}: there are no pairs to write. Give at least one.")
    if path.exists() and not overwrite:
        raise BadData(f"{path}: the file exists. Pass overwrite=True or choose another name.")
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs.rows()), encoding="utf-8")
    return path


def as_original(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    *,
    position: str | None = None,
    variables: Sequence[str] | None = None,
) -> OriginalPairs:
    """Return `pairs` as token ids; labels are the first tokens of the counterfactual answers.

    Args:
        position: name of a span; its tokens become the ranges. None writes no ranges, which needs equal lengths.
        variables: their order numbers them; default: in the order in which the pairs first name them.

    Raises:
        BadData: there are no pairs, an example has no such span, the spans of a pair are of different length in
            tokens, or lengths differ and no position is given.
        UnknownName: a pair's variable is not among `variables`.
    """
    if not len(pairs):
        raise BadData("as_original: there are no pairs. Draw at least one.")
    order = tuple(dict.fromkeys(pair.variable for pair in pairs) if variables is None else variables)
    rows = []
    for number, pair in enumerate(pairs, start=1):
        require_known("Variable", pair.variable, order)
        base, source = (tuple(tokenizer(example.prompt)["input_ids"]) for example in (pair.base, pair.source))
        values: dict[str, Any] = {
            "input_ids": list(base),
            "source_input_ids": list(source),
            "labels": [IGNORED] * (len(base) - 1) + [token_ids(tokenizer, pair.label)[0]],
            "intervention_ids": order.index(pair.variable),
        }
        if position is not None:
            for name, example in zip(_RANGES, (pair.base, pair.source), strict=True):
                values[name] = _token_range(tokenizer, example, position)
        rows.append(_Row.checked("as_original", number, values))
    return _assembled("as_original", rows)


def _token_range(tokenizer: Tokenizer, example: Example, position: str) -> list[int]:
    if position not in example.spans:
        marked = ", ".join(example.spans)
        raise BadData(f"Position {position!r}: {example.prompt!r} marks only {marked}. Name one of those.")
    found = token_span(tokenizer, example.prompt, example.spans[position])
    return [found[0], found[-1] + 1]


@dataclass(frozen=True)
class _Row:
    """One line, checked in itself."""

    number: int
    base: Ids
    source: Ids
    label: int
    intervention: int
    ranges: tuple[Range | None, Range | None]
    masks: tuple[Ids, Ids]

    @classmethod
    def parse(cls, path: Path, number: int, line: str) -> _Row:
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadData(f"{path}, row {number}: it is not JSON ({error.msg}). Write one object per line.") from None
        if not isinstance(values, dict):
            raise BadData(f"{path}, row {number}: it is no object. Write {{...}} with {', '.join(_NEEDED)}.")
        return cls.checked(path, number, values)

    @classmethod
    def checked(cls, where: str | Path, number: int, values: Mapping[str, Any]) -> _Row:
        def bad(name: str, found: str, do: str) -> BadData:
            return BadData(f"{where}, row {number}: {name}: {found}. {do}")

        missing = [name for name in _NEEDED if name not in values]
        if missing:
            raise bad("missing", ", ".join(missing), "Add it.")
        base, source = (_token_list(values[name], name, bad) for name in ("input_ids", "source_input_ids"))
        intervention = values["intervention_ids"]
        if type(intervention) is not int or intervention < 0:
            raise bad("intervention_ids", f"it is {intervention!r}", "Write the variable's number: 0, 1, ...")
        both = ((_RANGES[0], _MASKS[0], base), (_RANGES[1], _MASKS[1], source))
        ranges = tuple(_range(values.get(name), name, ids, bad) for name, _, ids in both)
        masks = tuple(_mask(values.get(name), name, ids, bad) for _, name, ids in both)
        _require_alike(ranges[0], ranges[1], bad)
        label = _label(values["labels"], len(base), bad)
        return cls(number, base, source, label, intervention, (ranges[0], ranges[1]), (masks[0], masks[1]))


_Bad = Callable[[str, str, str], BadData]


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _token_list(value: Any, name: str, bad: _Bad) -> Ids:
    if not _is_ids(value) or not value or min(value) < 0:
        found = "it is empty" if value == [] else "it is not a list of token ids"
        raise bad(name, found, "Write whole numbers from 0 on, in a list.")
    return tuple(value)


def _label(value: Any, length: int, bad: _Bad) -> int:
    if not _is_ids(value):
        raise bad("labels", "it is not a list of whole numbers", f"Write {IGNORED} for all but the last position.")
    if len(value) != length:
        raise bad("labels", f"there are {len(value)} for {length} input_ids", "Write one for each.")
    scored = [place for place, item in enumerate(value) if item != IGNORED]
    if scored != [length - 1] or value[-1] < 0:
        at = f"at positions {', '.join(map(str, scored[:_SHOWN]))}" if scored else "nowhere"
        raise bad(
            "labels",
            f"one id is needed, at the last position {length - 1}, and ids stand {at}",
            f"Write {IGNORED} elsewhere and the answer's id there.",
        )
    return int(value[-1])


def _range(value: Any, name: str, ids: Ids, bad: _Bad) -> Range | None:
    if value is None:
        return None
    if not _is_ids(value) or len(value) != 2 or not 0 <= value[0] < value[1] <= len(ids):
        raise bad(name, f"it is {value!r}", f"Write [begin, end] with 0 <= begin < end <= {len(ids)}.")
    return value[0], value[1]


def _mask(value: Any, name: str, ids: Ids, bad: _Bad) -> Ids:
    if value is None:
        return (1,) * len(ids)
    if not _is_ids(value) or len(value) != len(ids) or set(value) - {0, 1}:
        raise bad(name, f"it is no list of {len(ids)} zeros and ones", "Write one for each token.")
    if value != sorted(value) or not value[-1]:
        raise bad(name, "there are pads after a token", "Pad on the left: the answer is read at the last position.")
    return tuple(value)


def _require_alike(base: Range | None, source: Range | None, bad: _Bad) -> None:
    if (base is None) != (source is None):
        raise bad("token_range", "one of base and source has a range and the other none", "Write both or neither.")
    if base is not None and source is not None and base[1] - base[0] != source[1] - source[0]:
        counts = f"it has {base[1] - base[0]} tokens in the base and {source[1] - source[0]} in the source"
        raise bad("token_range", counts, "Exchange as many tokens as there are.")


def _assembled(where: str | Path, rows: Sequence[_Row]) -> OriginalPairs:
    """Return the rows as one value, once they fit together."""
    without = [row.number for row in rows if row.ranges[0] is None]
    if without and len(without) < len(rows):
        raise BadData(f"{where}: {_named(without)} have no token_range and others do. Write it in all rows or in none.")
    for name, lengths in (
        ("input_ids", [len(row.base) for row in rows]),
        ("source_input_ids", [len(row.source) for row in rows]),
    ):
        usual = max(set(lengths), key=lengths.count)
        other = [row.number for row, length in zip(rows, lengths, strict=True) if length != usual]
        if without and other:
            raise BadData(
                f"{where}: {name} has {usual} tokens in most rows, and another number in {_named(other)}. A position "
                "counted from the first token would name different words. Write token_range and source_token_range "
                "in every row, or keep rows of one length."
            )
    ranges = [tuple(row.ranges[side] for row in rows) for side in (0, 1)]
    found = [None if without else tuple(one for one in side if one is not None) for side in ranges]
    return OriginalPairs(
        input_ids=tuple(row.base for row in rows),
        source_input_ids=tuple(row.source for row in rows),
        labels=np.array([row.label for row in rows], dtype=np.int64),
        intervention_ids=np.array([row.intervention for row in rows], dtype=np.int64),
        token_ranges=found[0],
        source_token_ranges=found[1],
        attention_masks=tuple(row.masks[0] for row in rows),
        source_attention_masks=tuple(row.masks[1] for row in rows),
    )


def _named(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_SHOWN]))}{more}"
