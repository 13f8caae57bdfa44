"""A word-level tokenizer for the tiny models, with or without a chat template. Made here, nothing downloaded."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CHAT = (
    "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)


def word_tokenizer(words: Sequence[str] = (), *, size: int = 96, chat: bool = False) -> PreTrainedTokenizerFast:
    """Ids 0 to 3 are pad, begin, end and unknown; then `words`; then w0, w1, ... up to `size`."""
    names = [*SPECIAL, *dict.fromkeys(words)]
    names += [f"w{number}" for number in range(size - len(names))]
    inner = Tokenizer(WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex(r"\s+"), behavior="removed")
    pad, begin, end, unknown = SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, bos_token=begin, eos_token=end, unk_token=unknown
    )
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer
