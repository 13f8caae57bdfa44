"""A tokenizer small enough to know by heart, for the tests of tasks."""

from __future__ import annotations

import re


class WordTokenizer:
    """One token per word with its leading space, two for the words in `split_up`; offsets include the space.

    A word of `split_up` becomes its first letter (with the space) and the rest.
    """

    def __init__(self, split_up: tuple[str, ...] = (), special: bool = False) -> None:
        self.split_up = split_up
        self.special = special
        self.ids: dict[str, int] = {}

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        spans = [(0, 0)] if self.special and add_special_tokens else []
        for found in re.finditer(r" ?[^ ,]+|,", text):
            begin, end = found.span()
            word = found[0].strip()
            if word in self.split_up:
                cut = end - len(word) + 1
                spans += [(begin, cut), (cut, end)]
            else:
                spans.append((begin, end))
        ids = [self.ids.setdefault(text[a:b] if b else "<s>", len(self.ids)) for a, b in spans]
        return {"input_ids": ids, **({"offset_mapping": spans} if return_offsets_mapping else {})}
