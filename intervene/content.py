"""Which tokens, by what they are: `Prompt`, `Response`, `Match`. See `positions` for those that count tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from intervene.errors import BadPosition
from intervene.positions import Inputs, Positions, pack, real_tokens

IGNORED_LABEL = -100  # torch's cross entropy skips it; Hugging Face marks prompt tokens with it


def _after_marker(inputs: Inputs, marker: tuple[int, ...], name: str) -> Tensor:
    """Return (B, S) bool: real tokens after the last occurrence of `marker` in each example."""
    ids, real = _ids(inputs, name), real_tokens(inputs)
    after = torch.zeros_like(real)
    for row in range(len(real)):
        columns = real[row].nonzero()[:, 0]
        starts = find_all(ids[row, columns].tolist(), marker)
        if not starts:
            raise BadPosition(
                f"{name}: the response marker {list(marker)} is not in example {row}. "
                "Render the example with the same chat template the marker came from, or pass labels."
            )
        after[row, columns[starts[-1] + len(marker) :]] = True
    return after


def _ids(inputs: Inputs, name: str) -> Tensor:
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise BadPosition(f"{name}: needs token ids, found {sorted(inputs)}. Pass input_ids or prompt= with them.")
    ids = ids.detach().to("cpu")
    if bool((ids < 0).any()):
        raise BadPosition(
            f"{name}: it reads the tokens, but some of them are known to the key/value cache only, which was filled "
            "before this block. Run the whole prompt inside it, or pass prompt=<the tokenised batch>."
        )
    return ids


def find_all(haystack: Sequence[int], needle: Sequence[int]) -> list[int]:
    """Return every index at which `needle` begins in `haystack`."""
    width = len(needle)
    return [i for i in range(len(haystack) - width + 1) if list(haystack[i : i + width]) == list(needle)]


def response_marker(tokenizer: Any) -> tuple[int, ...]:
    """Return the token ids with which `tokenizer`'s chat template opens an assistant turn.

    Found by rendering one user message with and without the generation prompt.

    Raises:
        BadPosition: the template adds nothing, so that a response cannot be told from a prompt.
    """
    message = [{"role": "user", "content": "x"}]
    plain = tokenizer.apply_chat_template(message, add_generation_prompt=False, return_dict=True)["input_ids"]
    opened = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    if len(opened) <= len(plain):
        raise BadPosition("Response marker: this chat template opens no assistant turn. Pass labels instead.")
    return tuple(int(token) for token in opened[len(plain) :])


@dataclass(frozen=True)
class Prompt(Positions):
    """Tokens that are not the response: label -100, else everything up to and with `marker`, else the whole prompt."""

    marker: tuple[int, ...] | None = None

    def resolve(self, inputs: Inputs) -> Tensor:
        real = real_tokens(inputs)
        labels = inputs.get("labels")
        if isinstance(labels, Tensor):
            return pack(real & (labels.detach().to("cpu") == IGNORED_LABEL))
        if self.marker is not None:
            return pack(real & ~_after_marker(inputs, self.marker, "Prompt"))
        return pack(real)


@dataclass(frozen=True)
class Response(Positions):
    """Response tokens: those with a label, else those after the last `marker`; and every generated token.

    `Response(marker=response_marker(tokenizer))` finds the answer of a chat template. With neither labels nor marker
    only generated tokens are response.
    """

    marker: tuple[int, ...] | None = None

    def resolve(self, inputs: Inputs) -> Tensor:
        real = real_tokens(inputs)
        labels = inputs.get("labels")
        if isinstance(labels, Tensor):
            return pack(real & (labels.detach().to("cpu") != IGNORED_LABEL))
        if self.marker is not None:
            return pack(_after_marker(inputs, self.marker, "Response"))
        return torch.empty((len(real), 0), dtype=torch.int64)

    def decodes(self, step: int) -> bool:
        return True

    @property
    def can_decode(self) -> bool:
        return True


@dataclass(frozen=True, init=False)
class Match(Positions):
    """The tokens of the `occurrence`-th match (negative from the end) of a text or of token ids, in every example.

    A text is looked up in the decoded prompt, so it is found however the tokenizer splits it; all tokens it overlaps
    are selected. `token` keeps one token of each match (0 the first, -1 the last).

    Raises:
        BadPosition: some example has no such match; or text was given without a tokenizer.
    """

    target: str | tuple[int, ...]
    occurrence: int = 0
    token: int | None = None
    tokenizer: Any = field(default=None, repr=False, hash=False)

    def __init__(
        self, target: str | Sequence[int], *, tokenizer: Any = None, occurrence: int = 0, token: int | None = None
    ) -> None:
        if isinstance(target, str) and tokenizer is None:
            raise BadPosition(f"Match({target!r}): text needs the tokenizer. Write Match({target!r}, tokenizer=...).")
        if not len(target):
            raise BadPosition("Match: nothing to look for. Give a text or token ids.")
        wanted = target if isinstance(target, str) else tuple(int(token_id) for token_id in target)
        object.__setattr__(self, "target", wanted)
        object.__setattr__(self, "occurrence", occurrence)
        object.__setattr__(self, "token", token)
        object.__setattr__(self, "tokenizer", tokenizer)

    def resolve(self, inputs: Inputs) -> Tensor:
        ids, real = _ids(inputs, "Match"), real_tokens(inputs)
        selected = torch.zeros_like(real)
        for row in range(len(real)):
            columns = real[row].nonzero()[:, 0]
            tokens = [int(token_id) for token_id in ids[row, columns]]
            spans = self._spans(tokens)
            if not -len(spans) <= self.occurrence < len(spans):
                raise BadPosition(self._not_found(row, len(spans), tokens))
            start, stop = spans[self.occurrence]
            chosen = range(start, stop) if self.token is None else [range(start, stop)[self.token]]
            selected[row, columns[list(chosen)]] = True
        return pack(selected)

    def _spans(self, tokens: list[int]) -> list[tuple[int, int]]:
        if not isinstance(self.target, str):
            return [(start, start + len(self.target)) for start in find_all(tokens, self.target)]
        ends = [len(self._decode(tokens[: i + 1])) for i in range(len(tokens))]
        text, spans, at = self._decode(tokens), [], -1
        while (at := text.find(self.target, at + 1)) >= 0:
            first = next(i for i, end in enumerate(ends) if end > at)
            last = next(i for i, end in enumerate(ends) if end >= at + len(self.target))
            spans.append((first, last + 1))
        return spans

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _not_found(self, row: int, found: int, tokens: list[int]) -> str:
        shown = repr(self._decode(tokens)) if self.tokenizer is not None else str(tokens)
        return (
            f"Match {self.target!r}, occurrence {self.occurrence}: example {row} has {found} of them, in {shown}. "
            "Check spelling and leading spaces, or choose another occurrence."
        )
