"""What a task needs to know of a tokenizer, which always comes in as an argument.

`single_tokens` keeps the words that are one token in running text; `token_span` finds the tokens of a character span.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tasks.errors import BadData

Tokenizer = Callable[..., Any]


def token_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Return the token ids of `text` without special tokens."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def single_tokens(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[str, ...]:
    """Return the words that are one token with a leading space, in their order."""
    return tuple(word for word in words if len(token_ids(tokenizer, f" {word}")) == 1)


def token_span(tokenizer: Tokenizer, prompt: str, span: tuple[int, int]) -> tuple[int, ...]:
    """Return the indices of the tokens of `prompt` that overlap the characters `span`, first to last.

    Indices count from the first token of the unpadded prompt, special tokens included as the tokenizer adds them by
    default: add the number of pads when the batch is padded on the left.

    Raises:
        BadData: the span is empty or outside the prompt, or no token overlaps it.
    """
    begin, end = span
    if not 0 <= begin < end <= len(prompt):
        raise BadData(f"Span {span}: the prompt has characters 0 to {len(prompt)}. Give a non-empty part of it.")
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    # Special tokens have the empty offset (0, 0) and so overlap nothing.
    found = tuple(i for i, (first, last) in enumerate(offsets) if max(first, begin) < min(last, end))
    if not found:
        raise BadData(f"Span {span}: no token of {prompt!r} overlaps it. Use a tokenizer that reports offsets.")
    return found
