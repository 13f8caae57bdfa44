"""Which columns of which forward pass: prompt passes, chunks of a prompt, decode steps, uncached continuations.

A session is one prompt and what is generated from it. Its columns number the padded prompt from 0 and go on through
the generated tokens, so a token has one column whether it is computed in a full pass, a chunk, or a decode step.
`Tracker.begin` reads the arguments of the pass that is actually running and returns a `Pass`; `Pass.select` says
which rows and columns of that pass's tensors an intervention touches. All of it happens on the CPU, once per pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from intervene.errors import AmbiguousForward, BadPosition, ShapeMismatch
from intervene.forward_inputs import padding_mask, past_length, sign_of_a_part, token_inputs, tokens_of, with_prefix
from intervene.positions import AllTokens, Positions, check_mask, real_tokens


@dataclass(frozen=True, eq=False)
class Target:
    """What a pass must know of one intervention or capture: its positions, its phase, and whether it has a source."""

    name: str
    positions: Positions
    prompt: bool = True
    decode: bool = True
    dense: bool = True  # whole tensors may be handed over; False: always rows picked by index
    padding: bool = False  # every column is meant, padding too (captures only)
    rows: int | None = None  # examples it is written for
    slots: int | None = None  # positions per example it is written for; 1 serves any number
    expected: Tensor | None = None  # (B, P) bool: the slots that the source has tokens for

    @property
    def key(self) -> tuple[Any, ...]:
        """Targets of one key select the same tokens."""
        return (self.positions, self.prompt, self.decode, self.dense, self.padding)

    @property
    def whole(self) -> bool:
        """Whether whole tensors are handed over, never indexed."""
        return self.dense and isinstance(self.positions, AllTokens)

    @property
    def anywhere(self) -> bool:
        """Whether every real token of every pass is meant, so that the place of a pass does not matter."""
        return self.whole and self.prompt and self.decode


@dataclass(frozen=True, eq=False)
class Selection:
    """Tokens of one pass, as indices that broadcast to (B, P), or all of them.

    Dense: all (B, S), where `mask` (B, S, 1) is true. Indexed: `rows`, `columns`; `valid` (B, P) is None unless some
    slots are absent, and `kept` then lists the present ones as (rows, slots, columns), (N,) each.
    """

    dense: bool
    mask: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    valid: Tensor | None = None
    kept: tuple[Tensor, Tensor, Tensor] | None = None
    tokens: int | None = None  # None: count the mask when asked


@dataclass(eq=False)
class Pass:
    """One forward pass: `rows` B, `length` S, `start` its first column, `prompt_length` T of its session."""

    rows: int
    length: int
    start: int
    prompt_length: int
    mask: Tensor | None  # (B, S, 1) bool on the device, or None: no padding known
    selections: dict[int, Selection | None] = field(default_factory=dict)
    draws: dict[int, Tensor] = field(default_factory=dict)  # random tensors by intervention, kept for recomputation
    read: set[int] = field(default_factory=set)  # captures that have fired
    replayed: set[int] = field(default_factory=set)  # taps that checkpointing ran again in the current backward

    @property
    def stop(self) -> int:
        """The column after its last."""
        return self.start + self.length


@dataclass(eq=False)
class _Session:
    """One prompt and what is generated from it."""

    rows: int
    length: int  # T, columns of the padded prompt
    columns: list[Tensor]  # per target (B, P), CPU
    end: int = 0  # columns seen so far
    ids: Tensor | None = None  # (B, T) where a pass without cache may go on from this one, or given as prompt=
    real: Tensor | None = None  # (B, T) bool, CPU, of prompt=
    cache: weakref.ref[Any] | None = None


class Tracker:
    """Follows the forward passes inside one block.

    Args:
        targets: what has to be found in each pass. prompt: the tokenised prompt batch, where the passes alone do not
            show it (chunked prefill, assisted decoding, masks that are not (B, S)).
    """

    def __init__(self, targets: Sequence[Target], prompt: Mapping[str, Any] | None = None) -> None:
        self.targets = list(targets)
        self.prompt = None if prompt is None else token_inputs(prompt)
        self.session: _Session | None = None

    def begin(self, named: Mapping[str, Any]) -> Pass:
        """Return the pass that these arguments start.

        Raises:
            AmbiguousForward: where this pass lies in its sequence cannot be known. BadPosition: a position cannot be
            resolved. ShapeMismatch: a value written per example meets another number of examples.
        """
        named = token_inputs(named)
        tokens, start = tokens_of(named), past_length(named)
        rows, length = int(tokens.shape[0]), int(tokens.shape[1])
        if not rows or not length:
            raise ShapeMismatch(
                f"Forward pass on {rows} examples of {length} tokens: nothing to act on. Pass at least one token."
            )
        session = self._session_of(named, rows, length, start)
        if rows % session.rows:
            raise ShapeMismatch(
                f"Forward pass with {rows} examples: {'prompt=' if self.prompt else 'the pass before it'} has "
                f"{session.rows}. Give the batch that is really run, or a block of its own to each batch."
            )
        session.end = start + length
        _remember(session, named.get("past_key_values"))
        current = Pass(rows, length, start, session.length, _padding(named, session, rows, start, length))
        made: dict[tuple[Any, ...], Selection | None] = {}  # many sites often share one choice of tokens
        for number, target in enumerate(self.targets):
            if target.key not in made:
                made[target.key] = _select(target, session.columns[number], current, tokens.device)
            current.selections[number] = made[target.key]
        return current

    def finish(self, output: Any) -> None:
        """Note the key/value cache that a pass made."""
        cache = output.get("past_key_values") if isinstance(output, Mapping) else None
        if self.session is not None:
            _remember(self.session, cache)

    def _session_of(self, named: dict[str, Any], rows: int, length: int, start: int) -> _Session:
        if self.prompt is not None:
            if self.session is None:
                tokens = tokens_of(self.prompt)
                self.session = self._open(self.prompt, width=int(tokens.shape[1]), start=0)
                self.session.ids = self.prompt.get("input_ids")
            _check_prompt(self.session, self.prompt, named, start)
            return self.session
        last = self.session
        if last is not None and self._continues(last, named, length, start):
            return last
        part = None if self._anywhere or start else sign_of_a_part(named)
        if part is not None:
            raise _ambiguous(part)
        self.session = self._open(with_prefix(named, rows, length, start), width=start + length, start=start)
        if named.get("use_cache") is False and isinstance(named.get("input_ids"), Tensor):
            self.session.ids = named["input_ids"].detach().clone()
        return self.session

    @property
    def _anywhere(self) -> bool:
        return all(target.anywhere for target in self.targets)

    def _continues(self, last: _Session, named: dict[str, Any], length: int, start: int) -> bool:
        """Return whether this pass goes on from the last one, or raise if it might."""
        if start == 0:
            grown = named.get("use_cache") is False and length == last.end + 1
            return grown and _same_prompt(last, named)
        if self._anywhere:
            return True
        if last.cache is not None and last.cache() is not named.get("past_key_values"):
            found = f"its cache of {start} columns is not the one the pass before it filled"
        elif start == last.end and length == 1:
            return True
        elif start == last.end:
            found = f"{length} tokens follow the {last.end} already seen (a prompt in chunks, or several new tokens)"
        elif start < last.end:
            found = f"it starts at column {start}, but {last.end} were already seen (a cache rolled back)"
        else:
            found = f"it starts at column {start}, but only {last.end} were seen (a cache filled elsewhere)"
        raise _ambiguous(found)

    def _open(self, inputs: dict[str, Any], *, width: int, start: int) -> _Session:
        """Return a new session on the padded prompt `inputs` of `width` columns, `start` of them cached before."""
        given = inputs.get("attention_mask")
        mask = padding_mask(inputs, width)
        inputs = {**inputs, "attention_mask": given if mask is None else mask[:, :width]}
        columns: list[Tensor] = []
        made: dict[tuple[Any, ...], Tensor] = {}
        for target in self.targets:
            if target.key not in made:
                made[target.key] = _resolve(target, inputs)
            resolved = made[target.key]
            _check_written(target, resolved, tokens_of(inputs))
            _check_expected(target, resolved)
            if start and bool(((resolved >= 0) & (resolved < start)).any()):
                raise BadPosition(
                    f"{target.name}: its tokens lie in the key/value cache that was filled before this block, so they "
                    f"are not computed again. Run the whole prompt inside the block."
                )
            columns.append(resolved)
        return _Session(int(tokens_of(inputs).shape[0]), width, columns)


def _ambiguous(found: str) -> AmbiguousForward:
    return AmbiguousForward(
        f"Forward pass with a key/value cache: {found}, so prompt and generated tokens cannot be told apart. "
        "Pass prompt=<the tokenised prompt batch> to intervene() or capture()."
    )


def _remember(session: _Session, cache: Any) -> None:
    if session.cache is None and cache is not None:
        with suppress(TypeError):  # a cache of plain tuples: nothing to hold on to
            session.cache = weakref.ref(cache)


def _same_prompt(last: _Session, named: dict[str, Any]) -> bool:
    ids = named.get("input_ids")
    if not isinstance(ids, Tensor) or last.ids is None or len(ids) != len(last.ids):
        return False
    return torch.equal(ids[:, : last.length], last.ids)


def _check_prompt(session: _Session, prompt: Mapping[str, Any], named: Mapping[str, Any], start: int) -> None:
    """Refuse a prompt= that is not what this pass runs, as far as the pass still shows it; take over its padding."""
    if session.real is None:
        masked = named.get("attention_mask") is not None
        if masked and prompt.get("attention_mask") is None and padding_mask(named, 0) is None:
            raise BadPosition("prompt= without attention_mask: the model runs with one. Pass prompt= with it.")
        session.real = real_tokens(prompt)
    stop = min(start + int(tokens_of(named).shape[1]), session.length)
    if start >= stop:
        return
    ids, mask = named.get("input_ids"), padding_mask(named, stop)
    pairs = []
    if isinstance(ids, Tensor) and isinstance(session.ids, Tensor):
        pairs.append(("input_ids", session.ids[:, start:stop].cpu(), ids[:, : stop - start].cpu()))
    if mask is not None:
        pairs.append(("attention_mask", session.real[:, :stop], mask[:, :stop].cpu().bool()))
    for name, said, run in pairs:
        if len(run) % len(said) or not torch.equal(said.repeat_interleave(len(run) // len(said), 0), run):
            raise ShapeMismatch(
                f"Forward pass at columns {start} to {stop}: its {name} are not those of prompt=. "
                "Give the padded batch that is really run, with its attention_mask, and one block to each batch."
            )


def _padding(named: Mapping[str, Any], session: _Session, rows: int, start: int, length: int) -> Tensor | None:
    """Return (B, S, 1) bool on the device: which tokens of this pass are real; None if none is known to be padding."""
    stop, device = start + length, tokens_of(named).device
    if session.real is None:
        mask = padding_mask(named, stop)
        if mask is None or (mask.device.type == "cpu" and bool(mask[:, start:stop].all())):
            return None  # looked at only where looking is free: elsewhere it would wait for the device
        return mask[:, start:stop, None].to(device).bool()
    known = session.real[:, start:stop]
    if bool(known.all()):
        return None
    known = torch.cat([known, known.new_ones((len(known), length - known.shape[1]))], 1)
    return known.repeat_interleave(rows // len(known), 0)[..., None].to(device)


def _resolve(target: Target, inputs: Mapping[str, Any]) -> Tensor:
    if target.whole:
        if not target.padding:
            check_mask(inputs)
        return torch.empty((len(tokens_of(inputs)), 0), dtype=torch.int64)  # never indexed, see _select
    resolved = target.positions.resolve(inputs)
    columns = resolved.numpy()
    if not (columns >= 0).any() and not (target.positions.can_decode and target.decode):
        raise BadPosition(f"{target.name}: its positions select no token of this batch. Choose others.")
    ordered = np.sort(columns, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise BadPosition(f"{target.name}: its positions name one token twice. Name each once.")
    return resolved


def _select(target: Target, prompt_columns: Tensor, current: Pass, device: torch.device) -> Selection | None:
    if target.whole:
        return _dense(target, current, device)
    stop, turn = current.stop, current.prompt_length
    decoding = range(max(turn, current.start), stop) if target.decode else range(0)
    chosen = [column for column in decoding if target.positions.decodes(column - turn)]
    columns = prompt_columns.numpy().repeat(current.rows // len(prompt_columns), 0)
    valid = (columns >= current.start) & (columns < min(stop, turn))
    if not target.prompt or not valid.any():
        columns, valid = columns[:, :0], valid[:, :0]
    if chosen:
        extra = np.tile(np.array(chosen), (current.rows, 1))
        columns, valid = np.concatenate([columns, extra], 1), np.concatenate([valid, extra >= 0], 1)
    if not columns.shape[1]:
        return None
    if current.length == 1 and columns.shape[1] == 1 and valid.all():
        return Selection(dense=True, tokens=current.rows)  # a decode step: its only column, nothing to index
    return _indexed(columns - current.start, valid, device)


def _dense(target: Target, current: Pass, device: torch.device) -> Selection | None:
    stop, turn = current.stop, current.prompt_length
    mask = None if target.padding else current.mask
    in_prompt, in_decode = current.start < turn, stop > turn
    if (in_prompt and not target.prompt) or (in_decode and not target.decode):
        if not (in_prompt and target.prompt) and not (in_decode and target.decode):
            return None
        column = torch.arange(current.start, stop, device=device)
        part = (column < turn if target.prompt else column >= turn)[None, :, None].expand(current.rows, -1, 1)
        mask = part if mask is None else part & mask
    tokens = current.rows * current.length if mask is None else None
    return Selection(dense=True, mask=mask, tokens=tokens)


def _check_written(target: Target, resolved: Tensor, tokens: Tensor) -> None:
    """Refuse a value written for other examples or positions, unless the batch is repeats of those examples (beams)."""
    rows, slots = target.rows, resolved.shape[1]
    if target.slots not in (None, 1, slots) and not target.whole:
        raise ShapeMismatch(
            f"{target.name}: it is written for {target.slots} positions per example, but these are {slots}. "
            "Give one value per position."
        )
    if rows is None or rows == len(tokens):
        return
    if len(tokens) % rows == 0:
        groups = tokens.reshape(rows, len(tokens) // rows, -1)
        if bool((groups == groups[:, :1]).all()):
            return
    raise ShapeMismatch(
        f"{target.name}: it is written for {rows} examples, but the batch has {len(tokens)}. "
        "Give one row per example of the batch."
    )


def _check_expected(target: Target, resolved: Tensor) -> None:
    """Refuse a source that has tokens in other slots than the base: nothing says which of them belong together."""
    if target.expected is None:
        return
    expected, present = target.expected, resolved >= 0
    if expected.shape[1] == 1 and bool(expected.all()):
        return  # one source token per example, for however many base tokens
    found = present.sum(1), expected.sum(1)
    if len(present) % len(expected) == 0:
        expected = expected.repeat_interleave(len(present) // len(expected), 0)
        if expected.shape == present.shape and torch.equal(expected, present):
            return
    row = next((i for i, (a, b) in enumerate(zip(*(f.tolist() for f in found), strict=False)) if a != b), 0)
    raise BadPosition(
        f"{target.name}: ragged, the base has {int(found[0][row])} such tokens in example {row} and the source "
        f"{int(found[1][row])}. Choose positions that give both as many."
    )


def _indexed(local: npt.NDArray[np.int64], valid: npt.NDArray[np.bool_], device: torch.device) -> Selection:
    """Return the selection of columns `local` (B, P) of this pass; slots that are not `valid` are read but not kept."""

    def put(array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    rows, columns = np.arange(len(local))[:, None], np.where(valid, local, 0)
    if valid.all():
        return Selection(False, rows=put(rows), columns=put(columns), tokens=columns.size)
    at, slots = valid.nonzero()
    return Selection(
        False,
        rows=put(rows),
        columns=put(columns),
        valid=put(valid),
        kept=(put(at), put(slots), put(columns[at, slots])),
        tokens=len(at),
    )


def valid_slots(positions: Positions, inputs: Mapping[str, Any]) -> Tensor:
    """Return (B, P) bool: which slots of `positions` hold a token in this batch."""
    return positions.resolve({**inputs, "attention_mask": real_tokens(inputs)}) >= 0
