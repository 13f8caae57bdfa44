"""Which columns of which forward pass: prompt passes, chunks of a prompt, decode steps, uncached continuations.

A session is one prompt and what is generated from it. Its columns number the padded prompt from 0 and go on through
the generated tokens, so a token has one column whether it is computed in a full pass, a chunk, or a decode step.
`Tracker.begin` reads the arguments of the pass that is actually running and returns a `Pass`; `Pass.select` says
which rows and columns of that pass's tensors an intervention touches. All of it happens on the CPU, once per pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from intervene.errors import AmbiguousForward, BadPosition, ShapeMismatch
from intervene.positions import AllTokens, Positions, real_tokens


@dataclass(frozen=True, eq=False)
class Target:
    """What a pass must know of one intervention or capture: its positions, its phase, and whether it has a source."""

    name: str
    positions: Positions
    prompt: bool = True
    decode: bool = True
    dense: bool = True  # whole tensors may be handed over; False: always rows picked by index
    rows: int | None = None  # examples it is written for
    expected: Tensor | None = None  # (B, P) bool: the slots that the source has tokens for

    @property
    def key(self) -> tuple[Any, ...]:
        """Targets of one key select the same tokens."""
        return (self.positions, self.prompt, self.decode, self.dense)

    @property
    def anywhere(self) -> bool:
        """Whether every real token of every pass is meant, so that the place of a pass does not matter."""
        return isinstance(self.positions, AllTokens) and self.prompt and self.decode and self.dense


@dataclass(frozen=True, eq=False)
class Selection:
    """Tokens of one pass. Dense: all (B, S), where `mask` (B, S, 1) is true. Indexed: `rows`, `columns`, broadcasting to (B, P).

    `valid` (B, P) is None unless some slots are absent; `kept_rows`, `kept_columns` then list the present ones.
    """

    dense: bool
    mask: Tensor | None = None  # (B, S, 1)
    rows: Tensor | None = None
    columns: Tensor | None = None
    valid: Tensor | None = None
    kept_rows: Tensor | None = None
    kept_columns: Tensor | None = None
    tokens: int | None = None  # None: count the mask when asked


@dataclass(eq=False)
class Pass:
    """One forward pass: `rows` B, `length` S, `start` its first column, `prompt_length` T of its session."""

    rows: int
    length: int
    start: int
    prompt_length: int
    repeats: int
    mask: Tensor | None  # (B, S, 1) bool on the device, or None: no padding known
    selections: dict[int, Selection | None] = field(default_factory=dict)
    draws: dict[int, Tensor] = field(default_factory=dict)  # random tensors by intervention, kept for recomputation
    read: set[int] = field(default_factory=set)  # captures that have fired


@dataclass(eq=False)
class _Session:
    inputs: dict[str, Any]  # the prompt as given
    prompt_length: int
    columns: list[Tensor]  # per target (B, P), CPU
    end: int = 0  # columns seen so far
    ids: Tensor | None = None


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of `module.forward` by name."""
    if not args:
        return dict(kwargs)
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    except (TypeError, ValueError):  # a call the module itself will refuse, or a signature Python cannot see
        return {**kwargs, "inputs_embeds": args[0]}
    named = dict(bound.arguments)
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            extra = named.pop(parameter.name, ())
            named.update({} if not extra else {"inputs_embeds": extra[0]})
    return named


def token_inputs(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return `named` with its token axis under a name that positions know.

    A module that is no language model is called with some first tensor: integers (B, S) are ids, (B, S, D) are
    embeddings, and (B, D) is taken as one token per example.
    """
    known = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if "input_ids" in known or "inputs_embeds" in known:
        return dict(named)
    first = next(iter(known.values()), None)
    if first is None:
        raise BadPosition(f"Forward pass: no tensor among its arguments {sorted(named)}. Pass the batch as tensors.")
    if not first.is_floating_point() and first.dim() == 2:
        return {**named, "input_ids": first}
    return {**named, "inputs_embeds": first[:, None] if first.dim() < 3 else first}


def _past_length(named: Mapping[str, Any]) -> int:
    cache = named.get("past_key_values")
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2]) if cache and cache[0] is not None else 0


class Tracker:
    """Follows the forward passes inside one block.

    Args:
        targets: what has to be found in each pass. prompt: the tokenised prompt batch, where the passes alone do not
            show it (chunked prefill, assisted decoding).
    """

    def __init__(self, targets: Sequence[Target], prompt: Mapping[str, Any] | None = None) -> None:
        self.targets = list(targets)
        self.prompt = None if prompt is None else dict(prompt)
        self.session: _Session | None = None

    def begin(self, named: Mapping[str, Any]) -> Pass:
        """Return the pass that these arguments start.

        Raises:
            AmbiguousForward: where this pass lies in its sequence cannot be known. BadPosition: a position cannot be
            resolved. ShapeMismatch: a value written per example meets another number of examples.
        """
        named = token_inputs(named)
        tokens = named["input_ids"] if isinstance(named.get("input_ids"), Tensor) else named["inputs_embeds"]
        rows, length, start = int(tokens.shape[0]), int(tokens.shape[1]), _past_length(named)
        session = self._session_of(named, rows, length, start)
        session.end = start + length
        base_rows = len(session.columns[0]) if session.columns else rows
        if base_rows and rows % base_rows:
            raise ShapeMismatch(
                f"Forward pass with {rows} examples: prompt= has {base_rows}. Pass the batch that is really run."
            )
        repeats = rows // base_rows if base_rows else 1
        current = Pass(rows, length, start, session.prompt_length, repeats, self._mask(named, start, length))
        made: dict[tuple[Any, ...], Selection | None] = {}  # many sites often share one choice of tokens
        for number, target in enumerate(self.targets):
            self._check_rows(target, rows, session)
            if target.key not in made:
                made[target.key] = self._select(target, session.columns[number], current, tokens.device)
            current.selections[number] = made[target.key]
        return current

    def _session_of(self, named: dict[str, Any], rows: int, length: int, start: int) -> _Session:
        if self.prompt is not None:
            if self.session is None:
                self.session = self._open(token_inputs(self.prompt), start=0)
            return self.session
        last = self.session
        if last is not None and self._continues(last, named, length, start):
            return last
        self.session = self._open(self._with_prefix(named, rows, length, start), start=start)
        return self.session

    def _continues(self, last: _Session, named: dict[str, Any], length: int, start: int) -> bool:
        """Return whether this pass goes on from the last one, or raise if it might."""
        if start == 0:
            grown = named.get("use_cache") is False and length == last.end + 1
            return grown and self._same_prompt(last, named)
        if all(target.anywhere for target in self.targets):
            return True
        if start == last.end and length == 1:
            return True
        if start == last.end:
            found = f"{length} tokens follow the {last.end} already seen (a prompt in chunks, or several new tokens)"
        elif start < last.end:
            found = f"it starts at column {start}, but {last.end} were already seen (a cache rolled back or another one)"
        else:
            found = f"it starts at column {start}, but only {last.end} were seen (a cache filled elsewhere)"
        raise AmbiguousForward(
            f"Forward pass with a key/value cache: {found}, so prompt and generated tokens cannot be told apart. "
            "Pass prompt=<the tokenised prompt batch> to intervene() or capture()."
        )

    @staticmethod
    def _same_prompt(last: _Session, named: dict[str, Any]) -> bool:
        ids = named.get("input_ids")
        if not isinstance(ids, Tensor) or last.ids is None or len(ids) % len(last.ids):
            return False
        begun = ids[:, : last.prompt_length].cpu()
        return torch.equal(begun, last.ids.repeat_interleave(len(begun) // len(last.ids), 0))

    @staticmethod
    def _with_prefix(named: dict[str, Any], rows: int, length: int, start: int) -> dict[str, Any]:
        """Return the inputs with the cached prefix's columns put in front, so that columns count from its start."""
        if start == 0:
            return named
        made = dict(named)
        for name in ("input_ids", "labels"):
            value = named.get(name)
            if isinstance(value, Tensor):
                made[name] = torch.cat([value.new_full((rows, start), -1), value], 1)
        if not isinstance(named.get("attention_mask"), Tensor):
            made["attention_mask"] = torch.ones((rows, start + length), dtype=torch.int64)
        return made

    def _open(self, inputs: dict[str, Any], start: int) -> _Session:
        width = self._width(inputs)
        inputs = {**inputs, "attention_mask": self._prompt_mask(inputs, width)}
        columns: list[Tensor] = []
        made: dict[tuple[Any, ...], Tensor] = {}
        for target in self.targets:
            if target.key not in made:
                made[target.key] = self._resolve(target, inputs)
            resolved = made[target.key]
            _check_expected(target, resolved)
            present = resolved >= 0
            if bool((present & (resolved < start)).any()):
                raise BadPosition(
                    f"{target.name}: its tokens lie in the key/value cache that was filled before this block, so they "
                    f"are not computed again. Run the whole prompt inside the block."
                )
            columns.append(resolved)
        ids = inputs.get("input_ids")
        return _Session(inputs, width, columns, ids=ids.detach().cpu() if isinstance(ids, Tensor) else None)

    @staticmethod
    def _width(inputs: Mapping[str, Any]) -> int:
        tokens = inputs["input_ids"] if isinstance(inputs.get("input_ids"), Tensor) else inputs["inputs_embeds"]
        return int(tokens.shape[1])

    @staticmethod
    def _prompt_mask(inputs: Mapping[str, Any], width: int) -> Tensor | None:
        mask = inputs.get("attention_mask")
        return mask[:, :width] if isinstance(mask, Tensor) and mask.dim() == 2 else mask

    def _resolve(self, target: Target, inputs: Mapping[str, Any]) -> Tensor:
        if target.dense and isinstance(target.positions, AllTokens):
            return torch.empty((self._batch(inputs), 0), dtype=torch.int64)  # never indexed, see _select
        resolved = target.positions.resolve(inputs)
        if not resolved.shape[1] and not (target.positions.can_decode and target.decode):
            raise BadPosition(f"{target.name}: its positions select no token of this batch. Choose others.")
        ordered = resolved.sort(1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
            raise BadPosition(f"{target.name}: its positions name one token twice. Name each once.")
        return resolved

    @staticmethod
    def _batch(inputs: Mapping[str, Any]) -> int:
        tokens = inputs["input_ids"] if isinstance(inputs.get("input_ids"), Tensor) else inputs["inputs_embeds"]
        return int(tokens.shape[0])

    @staticmethod
    def _mask(named: Mapping[str, Any], start: int, length: int) -> Tensor | None:
        mask = named.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        return mask[:, start : start + length, None].bool()

    def _check_rows(self, target: Target, rows: int, session: _Session) -> None:
        """Refuse a value written for another number of examples, unless the batch is repeats of them (beams)."""
        expected = target.rows
        if expected is None or expected == rows:
            return
        if rows % expected == 0 and session.ids is not None:
            groups = session.ids.repeat_interleave(rows // len(session.ids), 0).unflatten(0, (expected, -1))
            if bool((groups == groups[:, :1]).all()):
                return
        raise ShapeMismatch(
            f"{target.name}: it is written for {expected} examples, but the batch has {rows}. "
            "Give one row per example of the batch."
        )

    def _select(self, target: Target, prompt_columns: Tensor, current: Pass, device: torch.device) -> Selection | None:
        stop, turn = current.start + current.length, current.prompt_length
        decoding = range(max(turn, current.start), stop) if target.decode else range(0)
        chosen = [column for column in decoding if target.positions.decodes(column - turn)]
        if target.dense and isinstance(target.positions, AllTokens):
            return self._dense(target, current, device)
        columns = prompt_columns.repeat_interleave(current.rows // max(len(prompt_columns), 1), 0)
        valid = (columns >= current.start) & (columns < min(stop, turn))
        if not target.prompt or not bool(valid.any()):
            columns, valid = columns[:, :0], valid[:, :0]
        if chosen:
            extra = torch.tensor(chosen).expand(current.rows, -1)
            columns, valid = torch.cat([columns, extra], 1), torch.cat([valid, torch.ones_like(extra).bool()], 1)
        if not columns.shape[1]:
            return None
        return _indexed(columns - current.start, valid, device)

    @staticmethod
    def _dense(target: Target, current: Pass, device: torch.device) -> Selection | None:
        stop, turn = current.start + current.length, current.prompt_length
        mask = None if current.start >= turn else current.mask  # generated tokens are never padding
        in_prompt, in_decode = current.start < turn, stop > turn
        if (in_prompt and not target.prompt) or (in_decode and not target.decode):
            if not (in_prompt and target.prompt) and not (in_decode and target.decode):
                return None
            column = torch.arange(current.start, stop, device=device)
            part = (column < turn if target.prompt else column >= turn)[None, :, None].expand(current.rows, -1, 1)
            mask = part if mask is None else part & mask
        tokens = current.rows * current.length if mask is None else None
        return Selection(dense=True, mask=mask, tokens=tokens)


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


def _indexed(local: Tensor, valid: Tensor, device: torch.device) -> Selection:
    """Return the selection of columns `local` (B, P) of this pass; slots that are not `valid` are read but not kept."""
    rows = torch.arange(len(local))[:, None]
    columns = torch.where(valid, local, torch.zeros_like(local))
    if bool(valid.all()):
        return Selection(False, rows=rows.to(device), columns=columns.to(device), tokens=columns.numel())
    kept_rows, slots = valid.nonzero(as_tuple=True)
    return Selection(
        False,
        rows=rows.to(device),
        columns=columns.to(device),
        valid=valid.to(device),
        kept_rows=kept_rows.to(device),
        kept_columns=columns[kept_rows, slots].to(device),
        tokens=len(kept_rows),
    )


def valid_slots(positions: Positions, inputs: Mapping[str, Any]) -> Tensor:
    """Return (B, P) bool: which slots of `positions` hold a token in this batch."""
    return positions.resolve({**inputs, "attention_mask": real_tokens(inputs)}) >= 0
