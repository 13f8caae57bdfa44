"""Positions by name, by whole span and by absolute column, and the answer's token as it continues the prompt."""

from __future__ import annotations

import pytest
import torch

from alignments.tokens import encode, first_token, is_column
from intervene import BadPosition, ShapeMismatch
from tasks import Example
from tests.alignments.planted import WORDS, toy_tokenizer

SHORT = "When Ann and Bob went to the park , Bob gave a ring to"
LONG = "While Cid and Dan went to the store and the park , Cid gave a drink to"


def example(prompt, **spans):
    found = {name: (prompt.index(text), prompt.index(text) + len(text)) for name, text in spans.items()}
    return Example(prompt, " Ann", {}, found)


def test_a_span_is_marked_by_its_last_token_or_whole():
    both = [example(SHORT, pair="Ann and Bob"), example(LONG, pair="Cid and Dan")]
    tokens = encode(toy_tokenizer(), both, ["pair", "pair[:]"], "cpu")
    pad = len(LONG.split()) - len(SHORT.split())
    assert tokens.marks["pair"].tolist() == [[pad + 3], [3]]
    assert tokens.marks["pair[:]"].tolist() == [[pad + 1, pad + 2, pad + 3], [1, 2, 3]]


def test_a_span_of_other_lengths_is_refused_with_both():
    both = [example(SHORT, place="the park"), example(LONG, place="the store and the park")]
    with pytest.raises(BadPosition, match=r"'place\[:\]': it is 2 tokens .* and 5 in others\. Use 'place'"):
        encode(toy_tokenizer(), both, ["place[:]"], "cpu")


def test_absolute_columns_of_prompts_of_one_length():
    twice = [example(SHORT), example(SHORT.replace("Ann", "Cid"))]
    tokens = encode(toy_tokenizer(), twice, ["3", "-1"], "cpu")
    last = len(SHORT.split()) - 1
    assert tokens.marks["3"].tolist() == [[3], [3]] and tokens.marks["-1"].tolist() == [[last], [last]]
    with pytest.raises(BadPosition, match=r"Position 14: the prompts have 14 tokens. Use 0 to 13, or names"):
        encode(toy_tokenizer(), twice, ["14"], "cpu")


def test_absolute_columns_of_prompts_of_unequal_length_are_refused():
    with pytest.raises(ShapeMismatch, match=r"Position 3: an absolute column, but prompts differ in length"):
        encode(toy_tokenizer(), [example(SHORT), example(LONG)], ["3"], "cpu")


def test_columns_are_numbers():
    assert [is_column(name) for name in ("3", "-1", "last", "subject2", "")] == [True, True, False, False, False]


def test_the_answer_is_the_token_that_follows_the_prompt():
    class Joined:
        """A tokenizer that puts a mark before a word unless a line break stands before it, as LLaMA's does."""

        def __call__(self, text, add_special_tokens=True):
            words = [word if text[max(0, start - 1)] == "\n" and start else "_" + word for word, start in _words(text)]
            return {"input_ids": [VOCABULARY.index(word) for word in words]}

    assert first_token(Joined(), "Yes") == VOCABULARY.index("_Yes")
    assert first_token(Joined(), "Yes", "Response:\n") == VOCABULARY.index("Yes")
    assert first_token(toy_tokenizer(), " Ann", SHORT) == WORDS.index("Ann")


VOCABULARY = ["_Response:", "_Yes", "Yes"]


def _words(text):
    return [(word, text.index(word)) for word in text.split()]


def test_marks_are_on_the_device_that_was_asked():
    assert encode(toy_tokenizer(), [example(SHORT)], ["0"], torch.device("cpu")).marks["0"].device.type == "cpu"
