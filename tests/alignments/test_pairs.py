"""LanguagePairs: tokens, marks and labels by hand, and logits equal to a plain interchange on the full model."""

from __future__ import annotations

import pytest
import torch

from alignments import LanguagePairs
from alignments.tokens import encode
from intervene import BadPosition, Intervention, LastToken, Set, ShapeMismatch, Site, Subspace, Swap, interchange
from intervene.content import Match
from intervene.marked import Marked
from intervene.prefix import positions_of
from tasks import Example, Pair
from tests.alignments.planted import WORDS, toy_tokenizer
from tests.tiny import tiny_model

SHORT = "When Ann and Bob went to the park , Bob gave a ring to"
LONG = "While Cid and Dan went to the store and the park , Cid gave a drink to"


def example(prompt, answer, subject):
    begin = prompt.rindex(subject)
    return Example(prompt, answer, {}, {"subject2": (begin, begin + 3), "last": (len(prompt) - 2, len(prompt))})


def pairs():
    short, long = example(SHORT, " Ann", "Bob"), example(LONG, " Dan", "Cid")
    return [Pair(short, long, "position", " Bob"), Pair(long, short, "position", " Dan")]


def test_examples_are_padded_on_the_left_and_marked_by_hand_count():
    tokens = encode(toy_tokenizer(), [one.base for one in pairs()], ["subject2", "last"], "cpu")
    words = [SHORT.split(), LONG.split()]
    pad = len(words[1]) - len(words[0])
    assert tokens.attention_mask.sum(1).tolist() == [len(words[0]), len(words[1])]
    assert tokens.input_ids[0, :pad].tolist() == [0] * pad
    assert [WORDS[i] for i in tokens.input_ids[0, pad:]] == words[0]
    assert tokens.marks["subject2"].tolist() == [[pad + 9], [12]]
    assert tokens.marks["last"].tolist() == [[len(words[1]) - 1]] * 2
    assert tokens.answers.tolist() == [WORDS.index("Ann"), WORDS.index("Dan")]


def test_a_missing_span_names_those_there_are():
    with pytest.raises(BadPosition, match=r"Position 'verb': .* marks only subject2, last\. Name one of those"):
        encode(toy_tokenizer(), [pairs()[0].base], ["verb"], "cpu")


@pytest.mark.parametrize("where", ["subject2", "last"])
def test_logits_equal_a_plain_interchange(where):
    model, tokenizer, site = tiny_model("llama"), toy_tokenizer(), Site("block_output", 1)
    data = LanguagePairs(model, tokenizer, pairs(), sites=[site], positions=["subject2", "last"], batch_size=2)
    assert data.prefix.exact
    lens = Subspace(32, 4, seed=3)
    found = data.logits([Intervention(site, Swap(), Marked(where), lens)], torch.arange(2))
    assert data.labels.tolist() == [WORDS.index("Bob"), WORDS.index("Dan")]
    for row, pair in enumerate(pairs()):  # one pair at a time, unpadded, positions found another way
        batch = [tokenizer(one.prompt, return_tensors="pt") for one in (pair.base, pair.source)]
        names = [one.prompt[slice(*one.spans["subject2"])] for one in (pair.base, pair.source)]
        here, there = [
            LastToken() if where == "last" else Match(name, tokenizer=tokenizer, occurrence=-1) for name in names
        ]
        plan = [Intervention(site, Swap(), here, lens, source_positions=there)]
        inputs = [{"input_ids": one["input_ids"], "position_ids": positions_of(one["attention_mask"])} for one in batch]
        expected = interchange(model, plan, *inputs).logits[0, -1]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


def test_task_accuracy_is_that_of_the_plain_model():
    model, tokenizer = tiny_model("llama"), toy_tokenizer()
    data = LanguagePairs(model, tokenizer, pairs(), sites=[Site("block_output", 0)], positions=["last"])
    with torch.no_grad():
        top = [int(model(**tokenizer(p, return_tensors="pt")).logits[0, -1].argmax()) for p in (SHORT, LONG)]
    answers = [WORDS.index("Ann"), WORDS.index("Dan")]
    right = [a == b for a, b in zip(top, answers, strict=True)]
    assert [one.tolist() for one in data.task_correct()] == [right, right[::-1]]


def test_no_pairs_are_refused():
    model, tokenizer = tiny_model("llama"), toy_tokenizer()
    with pytest.raises(ShapeMismatch, match="no pairs were given"):
        LanguagePairs(model, tokenizer, [], sites=[Site("block_output", 0)], positions=["last"])


def test_the_source_is_read_at_its_own_position_and_only_where_the_edit_needs_one():
    model, tokenizer, site = tiny_model("llama"), toy_tokenizer(), Site("block_output", 1)
    names = ["subject2", "last"]
    data = LanguagePairs(model, tokenizer, pairs(), sites=["L-1.block_output", site], positions=names)
    moved = Intervention(site, Swap(), Marked("last"), source_positions=Marked("subject2"))
    rows = torch.arange(2)
    expected = Intervention(site, Set(data.streams[site, "subject2"]), Marked("last"))
    torch.testing.assert_close(data.logits([moved], rows), data.logits([expected], rows), atol=1e-6, rtol=0)
    straight = data.logits([Intervention(site, Swap(), Marked("last"))], rows)
    assert not torch.allclose(data.logits([moved], rows), straight, atol=1e-3)
    last = Site("block_output", len(model.model.layers) - 1)
    assert data.sites == (last, site)  # negative layers count from the end here too
    torch.testing.assert_close(
        data.logits([Intervention("L-1.block_output", Swap(), Marked("last"))], rows),
        data.logits([Intervention(last, Swap(), Marked("last"))], rows),
    )


def test_a_source_that_was_not_kept_names_those_that_were():
    model, tokenizer = tiny_model("llama"), toy_tokenizer()
    data = LanguagePairs(model, tokenizer, pairs(), sites=["L1.block_output"], positions=["last"])
    for site, where in (("L0.block_output", "last"), ("L1.block_output", "lst")):
        with pytest.raises(BadPosition, match=r"these pairs keep only L1\.block_output @ last\. Name"):
            data.logits([Intervention(site, Swap(), Marked(where))], torch.arange(2))
