"""Prompts as tensors: tokenised, padded on the left, each with the columns of its named positions.

A position is named by the task ("subject2": the last token of that span; "subject2[:]": all its tokens) or is an
absolute column ("0", "7", "-1"), which means the same token in every prompt only if all are equally long.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intervene.errors import BadPosition, ShapeMismatch
from tasks.base import Example
from tasks.tokens import token_ids, token_span

WHOLE = "[:]"  # after a name: all tokens of the span
_COLUMN = re.compile(r"^-?\d+$")


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokenised examples: ids and mask (N, S) left-padded; marks name -> (N, P) columns; answers (N,)."""

    input_ids: Tensor
    attention_mask: Tensor
    marks: dict[str, Tensor]
    answers: Tensor

    def __len__(self) -> int:
        """Return N."""
        return len(self.answers)

    def batch(self, rows: slice) -> dict[str, Any]:
        """Return the inputs of some examples, marks included."""
        marks = {name: columns[rows] for name, columns in self.marks.items()}
        return {"input_ids": self.input_ids[rows], "attention_mask": self.attention_mask[rows], "marks": marks}


def first_token(tokenizer: Any, text: str, prompt: str = "") -> int:
    """Return the id of the first token of `text` as it continues `prompt`, or running text if there is none.

    Tokenised alone, a word may get a space in front that it does not have behind the prompt's line break.
    """
    before = list(tokenizer(prompt)["input_ids"]) if prompt else []
    both = list(tokenizer(prompt + text)["input_ids"]) if prompt else []
    if before and both[: len(before)] == before and len(both) > len(before):
        return int(both[len(before)])
    return token_ids(tokenizer, text)[0]  # the seam merges tokens: nothing continues the prompt's own


def is_column(name: str) -> bool:
    """Return whether a position's name is an absolute column."""
    return _COLUMN.match(name) is not None


def encode(tokenizer: Any, examples: Sequence[Example], positions: Sequence[str], device: str | torch.device) -> Tokens:
    """Return `examples` tokenised and left-padded, with the columns of each of `positions`.

    Raises:
        BadPosition: an example has no span of that name, or not as many tokens in it as the others; an absolute column
            lies outside the prompts.
        ShapeMismatch: absolute columns are asked for, and the prompts are not equally long.
    """
    ids = [list(tokenizer(example.prompt)["input_ids"]) for example in examples]
    length = max(map(len, ids))
    pads = [length - len(one) for one in ids]
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Tokens(
        input_ids=torch.tensor([[filler] * pad + one for one, pad in zip(ids, pads, strict=True)], device=device),
        attention_mask=torch.tensor([[0] * pad + [1] * (length - pad) for pad in pads], device=device),
        marks={name: _columns(tokenizer, examples, name, pads, length).to(device) for name in positions},
        answers=torch.tensor(
            [first_token(tokenizer, example.answer, example.prompt) for example in examples], device=device
        ),
    )


def _columns(tokenizer: Any, examples: Sequence[Example], name: str, pads: Sequence[int], length: int) -> Tensor:
    """Return (N, P): the columns of position `name` in each left-padded prompt."""
    if is_column(name):
        return _absolute(examples, int(name), name, pads, length)
    found = []
    for example, pad in zip(examples, pads, strict=True):
        span = name.removesuffix(WHOLE)
        if span not in example.spans:
            raise BadPosition(
                f"Position {name!r}: {example.prompt!r} marks only {', '.join(example.spans)}. Name one of those."
            )
        tokens = token_span(tokenizer, example.prompt, example.spans[span])
        found.append([pad + token for token in (tokens if name.endswith(WHOLE) else tokens[-1:])])
    counts = sorted({len(columns) for columns in found})
    if len(counts) > 1:
        raise BadPosition(
            f"Position {name!r}: it is {counts[0]} tokens long in some prompts and {counts[-1]} in others. "
            f"Use {name.removesuffix(WHOLE)!r}, its last token."
        )
    return torch.tensor(found)


def _absolute(examples: Sequence[Example], column: int, name: str, pads: Sequence[int], length: int) -> Tensor:
    odd = next((index for index, pad in enumerate(pads) if pad), None)
    if odd is not None:
        raise ShapeMismatch(
            f"Position {name}: an absolute column, but prompts differ in length (example {odd}, "
            f"{examples[odd].prompt!r}, has {length - pads[odd]} tokens and the longest {length}), so that it is "
            "another token in each. Use the task's named positions."
        )
    if not -length <= column < length:
        raise BadPosition(f"Position {name}: the prompts have {length} tokens. Use 0 to {length - 1}, or names.")
    return torch.full((len(examples), 1), column % length)
