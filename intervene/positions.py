"""Which tokens: value objects that turn the inputs of a forward pass into columns, never counting padding.

`resolve(inputs)` returns (B, P) int64 columns of the padded batch, valid ones first, -1 where an example has fewer.
Every number a user writes counts *real* tokens: `At(0)` is the first token that is not padding, whichever side the
batch is padded on. Tokens generated later are not in the prompt; a selector says with `decodes(step)` whether it
means them too. Selectors that look at the tokens' content are in `content`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from intervene.errors import BadPosition

Inputs = Mapping[str, Any]


def check_mask(inputs: Inputs) -> None:
    """Refuse an attention mask from which padding cannot be told: anything but (B, S)."""
    mask = inputs.get("attention_mask")
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return
    shape = f"one of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
    raise BadPosition(
        f"Positions need a (B, S) attention mask: found {shape}, which does not say what is padding (a static cache "
        "makes such masks). Pass prompt=<the tokenised batch, with its attention_mask> to intervene() or capture()."
    )


def real_tokens(inputs: Inputs) -> Tensor:
    """Return (B, S) bool on the CPU: which columns are real tokens. Without an attention mask, all are."""
    check_mask(inputs)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor):
        return mask.detach().to("cpu").bool()
    for name in ("input_ids", "inputs_embeds"):
        tensor = inputs.get(name)
        if isinstance(tensor, Tensor):
            return torch.ones(tensor.shape[:2], dtype=torch.bool)
    raise BadPosition(
        f"Positions need input_ids, inputs_embeds or attention_mask: found {sorted(inputs)}. "
        "Pass one of them to the model, or prompt=<the tokenised batch> to intervene()."
    )


def pack(selected: Tensor) -> Tensor:
    """Return (B, P) columns where `selected` (B, S) is true, valid first, -1 after; P is the largest count."""
    counts = selected.sum(1)
    width = int(counts.max()) if len(counts) else 0
    order = torch.argsort((~selected).to(torch.int8), dim=1, stable=True)[:, :width]
    slots = torch.arange(width)[None]
    return torch.where(slots < counts[:, None], order, torch.full_like(order, -1))


class Positions(ABC):
    """Which tokens of each example an intervention touches. Final subclasses are frozen values."""

    @abstractmethod
    def resolve(self, inputs: Inputs) -> Tensor:
        """Return (B, P) int64 columns of the padded prompt, valid first, then -1.

        Args:
            inputs: the batch as given to the model; `input_ids` (B, S), `attention_mask` (B, S), `labels` (B, S).

        Raises:
            BadPosition: a position is out of range, padding, ragged, or not found in some example.
        """

    def decodes(self, step: int) -> bool:
        """Return whether this selects the `step`-th generated token (0-based)."""
        return False

    @property
    def can_decode(self) -> bool:
        """Whether this can select generated tokens at all."""
        return False


@dataclass(frozen=True)
class AllTokens(Positions):
    """Every real token, of the prompt and of what is generated. Padding is left alone."""

    def resolve(self, inputs: Inputs) -> Tensor:
        return pack(real_tokens(inputs))

    def decodes(self, step: int) -> bool:
        return True

    @property
    def can_decode(self) -> bool:
        return True


def _pick(real: Tensor, wanted: npt.NDArray[np.int64], name: str) -> Tensor:
    """Return the columns of the `wanted` (B, P) real tokens, negative counting from the end.

    In numpy, like everything that is done once per pass on the CPU: it costs no tensor operations.
    """
    present = real.numpy()
    counts = present.sum(1, keepdims=True)
    slots = np.where(wanted < 0, counts + wanted, wanted)
    bad = (slots < 0) | (slots >= counts)
    if bad.any():
        row, slot = (int(index) for index in np.argwhere(bad)[0])
        count = int(counts[row, 0])
        raise BadPosition(
            f"{name}: position {int(wanted[row, slot])} was asked of example {row}, which has {count} tokens "
            f"(padding is not counted). Use {-count} to {count - 1}."
        )
    order = np.argsort(~present, axis=1, kind="stable")
    return torch.from_numpy(np.take_along_axis(order, slots, 1).astype(np.int64))


@dataclass(frozen=True)
class LastToken(Positions):
    """The last real token of the prompt; while decoding (phase "both" or "decode"), the newest token of each step."""

    def resolve(self, inputs: Inputs) -> Tensor:
        real = real_tokens(inputs)
        return _pick(real, np.full((len(real), 1), -1), "LastToken()")

    def decodes(self, step: int) -> bool:
        return True

    @property
    def can_decode(self) -> bool:
        return True


@dataclass(frozen=True)
class First(Positions):
    """The first `count` real tokens.

    Raises:
        BadPosition: `count` is below 1; on resolving, an example has fewer tokens.
    """

    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise BadPosition(f"{self}: selects no token. Give a count of at least 1.")

    def resolve(self, inputs: Inputs) -> Tensor:
        real = real_tokens(inputs)
        return _pick(real, np.tile(np.arange(self.count), (len(real), 1)), repr(self))


def _whole(value: Any) -> int:
    """Return `value` as an int, refusing what int() would bend into one: True is no position, and 1.7 not token 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise BadPosition(f"At: {value!r} is no whole number. Count tokens, or use Mask for a true/false per column.")
    return int(value)


@dataclass(frozen=True, init=False)
class At(Positions):
    """Given real tokens: `At(3)`, `At(0, -1)` for every example, or `At([[3], [5]])` with one row per example.

    Negative numbers count from the last real token. Rows must be of one length.

    Raises:
        BadPosition: no position is given, one is no whole number, or the rows are ragged; on resolving, a position
            beyond an example's tokens or rows that are not as many as the batch.
    """

    indices: tuple[int, ...] | tuple[tuple[int, ...], ...]

    def __init__(self, *indices: int | Sequence[int] | Sequence[Sequence[int]] | Tensor) -> None:
        given: Any = indices[0] if len(indices) == 1 else indices
        if isinstance(given, Tensor):
            given = given.tolist()
        if not isinstance(given, Iterable):
            given = (given,)
        rows: Any = tuple(tuple(map(_whole, row)) if isinstance(row, Sequence) else _whole(row) for row in given)
        self._check(rows)
        object.__setattr__(self, "indices", rows)

    @staticmethod
    def _check(rows: tuple[Any, ...]) -> None:
        widths = [len(row) if isinstance(row, tuple) else -1 for row in rows]
        if not rows or 0 in widths:
            raise BadPosition("At(): no position was given. Name at least one, e.g. At(3) or At(-1).")
        if len(set(widths)) > 1:
            raise BadPosition(
                f"At{rows}: ragged, the rows have {[max(width, 1) for width in widths]} positions. "
                "Give every example as many, or use Mask for a different number in each."
            )

    def resolve(self, inputs: Inputs) -> Tensor:
        real = real_tokens(inputs)
        wanted = np.array(self.indices, dtype=np.int64)
        if wanted.ndim == 1:
            wanted = np.tile(wanted, (len(real), 1))
        if len(wanted) != len(real):
            if len(real) % len(wanted):
                raise BadPosition(
                    f"At with {len(wanted)} rows: the batch has {len(real)} examples. Give one row per example."
                )
            wanted = wanted.repeat(len(real) // len(wanted), 0)  # beams; intervene() proves that they are
        return _pick(real, wanted, "At")

    @property
    def rows(self) -> int | None:
        """How many examples this is written for; None if for any."""
        return len(self.indices) if isinstance(self.indices[0], tuple) else None


@dataclass(frozen=True)
class Span(Positions):
    """Real tokens `start` to `stop` (exclusive) of each example; negative counts from the end, None is open."""

    start: int = 0
    stop: int | None = None

    def resolve(self, inputs: Inputs) -> Tensor:
        real = real_tokens(inputs)
        counts = real.sum(1)
        start = counts + self.start if self.start < 0 else torch.full_like(counts, self.start)
        stop = counts if self.stop is None else torch.full_like(counts, self.stop)
        if self.stop is not None and self.stop < 0:
            stop = counts + self.stop
        bad = (start < 0) | (stop > counts) | (start >= stop)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise BadPosition(
                f"{self}: empty or out of range in example {row}, which has {int(counts[row])} tokens "
                "(padding is not counted). Choose start < stop within it."
            )
        ordinal = real.cumsum(1) - 1
        return pack(real & (ordinal >= start[:, None]) & (ordinal < stop[:, None]))


@dataclass(frozen=True, eq=False)
class Mask(Positions):
    """The columns where `selected` (B, S) is true, in the batch as given, padding included in the count of columns.

    Raises:
        BadPosition: it is no tensor of true/false or 0/1; on resolving, the shape is not the batch's, nothing is
            selected, or a selected column is padding.
    """

    selected: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.selected, Tensor):
            raise BadPosition(f"Mask: a bool tensor (B, S) is needed, found a {type(self.selected).__name__}.")
        given = self.selected
        if given.dtype != torch.bool and not bool(((given == 0) | (given == 1)).all()):
            raise BadPosition(
                f"Mask of {given.dtype}: it holds more than 0 and 1. Compare first (scores > 0.5), or use At."
            )

    def resolve(self, inputs: Inputs) -> Tensor:
        real = real_tokens(inputs)
        selected = self.selected.detach().to("cpu").bool()
        if selected.shape != real.shape:
            raise BadPosition(
                f"Mask of shape {tuple(selected.shape)}: the batch is {tuple(real.shape)}. "
                "Build the mask from the padded batch."
            )
        if not bool(selected.any()):
            raise BadPosition("Mask: it selects no token in any example. Select at least one.")
        if bool((selected & ~real).any()):
            row, column = (int(index) for index in (selected & ~real).nonzero()[0])
            raise BadPosition(
                f"Mask: column {column} of example {row} is padding. Combine it with the attention mask: "
                "Mask(selected & attention_mask.bool())."
            )
        return pack(selected)


@dataclass(frozen=True)
class DecodeSteps(Positions):
    """Generated tokens number `start` to `stop` (exclusive; None is open), each when it is fed back to the model."""

    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise BadPosition(f"{self}: it selects no step. Count generated tokens from 0, with start below stop.")

    def resolve(self, inputs: Inputs) -> Tensor:
        return torch.empty((len(real_tokens(inputs)), 0), dtype=torch.int64)

    def decodes(self, step: int) -> bool:
        return step >= self.start and (self.stop is None or step < self.stop)

    @property
    def can_decode(self) -> bool:
        return True
