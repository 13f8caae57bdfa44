"""`Example` and `Batch`: tokenised training data, one by one and as a padded micro-batch.

Labels are -100 where nothing is learned; a response token is one that has a label. A batch holds N samples in B rows:
N is B unless several samples are packed into a row, and `sample` says whose each token is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from defenses.errors import DataError
from intervene.content import IGNORED_LABEL

NO_SAMPLE = -1
UNKNOWN = -1  # of `Batch.poison`


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised training example.

    Attributes:
        labels: as long as `input_ids`; -100 where nothing is learned. index: its row in the data set, over all epochs.
        template: tokens of the chat template and special ones, which no injection touches; (): none are known.
        poison: what the data says of it, None if nothing. extra: numbers that ride along. line: of its file, from 1.
        text: as it was rendered, for reports.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    index: int
    template: tuple[bool, ...] = ()
    poison: bool | None = None
    extra: Mapping[str, float] = field(default_factory=dict)
    line: int = 0
    text: str = ""

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.input_ids) or len(self.template) not in (0, len(self.input_ids)):
            raise DataError(
                f"Example {self.index}: {len(self.input_ids)} tokens, {len(self.labels)} labels and "
                f"{len(self.template)} template marks. Give one of each per token."
            )

    @property
    def n_response(self) -> int:
        """Number of tokens that are learned: those with a label, the first column excepted, which nothing predicts."""
        return sum(label != IGNORED_LABEL for label in self.labels[1:])


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch of one rank, padded on the right.

    Attributes:
        input_ids, labels, attention_mask: (B, S) int64. sample: (B, S) int64, which of the N samples; -1: padding.
        indices: (N,) int64, `Example.index`. poison: (N,) int8: 1, 0, or -1 where nobody said.
        template: (B, S) bool. extra: name -> (N,) fp32. position_ids: (B, S), only where rows are packed.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    sample: Tensor
    indices: Tensor
    poison: Tensor
    template: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    position_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def response(self) -> Tensor:
        """(B, S) bool: tokens with a label."""
        return self.labels != IGNORED_LABEL

    def inputs(self) -> dict[str, Tensor]:
        """Return what the model is called with, labels left out.

        Packed rows go without an attention mask: transformers then reads from `position_ids` where a sample begins and
        keeps the samples of a row apart.
        """
        if self.position_ids is not None:
            return {"input_ids": self.input_ids, "position_ids": self.position_ids}
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def prompt(self, columns: Tensor) -> dict[str, Any]:
        """Return what `intervene(..., prompt=)` is given: `Marked("scope")` then means `columns` (B, P), -1: none."""
        masks = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return {**masks, "labels": self.labels, "marks": {"scope": columns}}

    def to(self, device: torch.device | str) -> Batch:
        """Return this batch on `device`."""
        held: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in held.items()
        }
        moved["extra"] = {name: value.to(device) for name, value in self.extra.items()}
        return Batch(**moved)


def collate(examples: Sequence[Example], pad_token_id: int, *, multiple: int = 8) -> Batch:
    """Return `examples` as rows of one batch, padded to the longest, rounded up to a `multiple` of columns.

    Raises:
        DataError: there are none, or they carry different extras.
    """
    if not examples:
        raise DataError("Batch of no examples: nothing could be learned. Give at least one.")
    width = -(-max(len(one.input_ids) for one in examples) // multiple) * multiple
    shape = (len(examples), width)
    input_ids, labels = torch.full(shape, pad_token_id), torch.full(shape, IGNORED_LABEL)
    sample, template = torch.full(shape, NO_SAMPLE), torch.zeros(shape, dtype=torch.bool)
    for row, one in enumerate(examples):
        n = len(one.input_ids)
        input_ids[row, :n], labels[row, :n] = torch.tensor(one.input_ids), torch.tensor(one.labels)
        sample[row, :n] = row
        if one.template:
            template[row, :n] = torch.tensor(one.template)
    return Batch(
        input_ids=input_ids,
        labels=labels,
        attention_mask=(sample != NO_SAMPLE).long(),
        sample=sample,
        indices=torch.tensor([one.index for one in examples]),
        poison=poison_of(examples),
        template=template,
        extra=extras_of(examples),
    )


def poison_of(examples: Sequence[Example]) -> Tensor:
    """Return (N,) int8: 1 poisoned, 0 clean, -1 where the data does not say."""
    return torch.tensor([UNKNOWN if one.poison is None else int(one.poison) for one in examples], dtype=torch.int8)


def extras_of(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return name -> (N,) fp32.

    Raises:
        DataError: some example lacks a number that another has.
    """
    names = set().union(*(one.extra for one in examples))
    for one in examples:
        if missing := sorted(names - set(one.extra)):
            raise DataError(f"Example {one.index} has no {missing[0]!r}, which others have. Give it to all or to none.")
    return {name: torch.tensor([float(one.extra[name]) for one in examples]) for name in sorted(names)}
