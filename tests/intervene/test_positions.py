"""Clause 3: a position means the same token on either side of the padding, in chunks, and in a batch."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from intervene import (
    Add,
    AllTokens,
    AmbiguousForward,
    At,
    First,
    Intervention,
    LastToken,
    Mask,
    Match,
    Project,
    Prompt,
    Response,
    Set,
    Span,
    Subspace,
    Swap,
    capture,
    collect_sources,
    interchange,
    intervene,
    response_marker,
)
from intervene.content import find_all
from tests.intervene.by_hand import added, block_output, close, vector
from tests.tiny import tiny_batch, tiny_model

SITE = "L1.block_output"
LENGTHS = (7, 5, 4)
MARKER = (50, 51)

# rows of real tokens; the marker opens the response, and 60 stands twice in each
ROWS = [[60, 11, 12, 50, 51, 60, 13], [60, 50, 51, 14, 60], [50, 51, 60, 60]]
RESPONSE = [[5, 6], [3, 4], [2, 3]]  # ordinals after the marker

# positions -> which real tokens of each row they are, worked out by hand
CASES = {
    "all": (AllTokens(), [[*range(7)], [*range(5)], [*range(4)]]),
    "last": (LastToken(), [[6], [4], [3]]),
    "first": (First(2), [[0, 1], [0, 1], [0, 1]]),
    "at": (At(2), [[2], [2], [2]]),
    "at negative": (At(0, -2), [[0, 5], [0, 3], [0, 2]]),
    "at per example": (At([[6], [1], [-4]]), [[6], [1], [0]]),
    "span": (Span(1, 3), [[1, 2], [1, 2], [1, 2]]),
    "span from the end": (Span(-3, -1), [[4, 5], [2, 3], [1, 2]]),
    "span open": (Span(2), [[2, 3, 4, 5, 6], [2, 3, 4], [2, 3]]),
    "match": (Match([60]), [[0], [0], [2]]),
    "match last": (Match([60], occurrence=-1), [[5], [4], [3]]),
    "match two": (Match([50, 51], token=1), [[4], [2], [1]]),
    "prompt": (Prompt(marker=MARKER), [[0, 1, 2, 3, 4], [0, 1, 2], [0, 1]]),
    "response": (Response(marker=MARKER), RESPONSE),
}


def padded(side: str, rows=ROWS) -> dict[str, torch.Tensor]:
    """Return the rows as a batch padded on `side`."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def selection(ordinals, side) -> torch.Tensor:
    """Return (B, S) bool: the columns that hold these real tokens."""
    mask = padded(side)["attention_mask"].bool()
    chosen = torch.zeros_like(mask)
    for i, row in enumerate(ordinals):
        chosen[i, mask[i].nonzero()[row, 0]] = True
    return chosen


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def single(row):
    return {"input_ids": torch.tensor([row])}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_columns_are_those_worked_out_by_hand(name, side):
    positions, ordinals = CASES[name]
    chosen, batch = selection(ordinals, side), padded(side)
    found = positions.resolve(batch)
    assert found.dtype == torch.int64
    for i in range(3):
        row = found[i][found[i] >= 0]
        assert sorted(row.tolist()) == chosen[i].nonzero()[:, 0].tolist()
        assert (found[i][len(row) :] == -1).all()  # absent slots come last


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_static_edit_is_the_same_single_and_padded(model, name, side):
    positions, ordinals = CASES[name]
    batch, v = padded(side), vector(1)
    with intervene(model, [Intervention(SITE, Add(v), positions)]):
        logits = model(**batch).logits
    with block_output(model, 1, added(v, selection(ordinals, side))):
        by_hand = model(**batch).logits
    real = batch["attention_mask"].bool()
    close(logits[real], by_hand[real])
    for i, row in enumerate(ROWS):
        chosen = torch.zeros(1, len(row), dtype=torch.bool)
        chosen[0, ordinals[i]] = True
        with block_output(model, 1, added(v, chosen)):
            close(logits[i][real[i]], model(**single(row)).logits[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_an_interchange_is_the_same_single_and_padded(model, name, side):
    positions, ordinals = CASES[name]
    turned = [[80 + i if token not in (50, 51, 60) else token for i, token in enumerate(row)] for row in ROWS]
    batch, source = padded(side), padded(side, turned)
    plan = [Intervention(SITE, Swap(), positions, Subspace(32, 5, trainable=False))]
    logits = interchange(model, plan, batch, source).logits
    q = plan[0].featurizer.frame()
    for i, (row, other) in enumerate(zip(ROWS, turned, strict=True)):
        with capture(model, SITE) as acts:
            model(**single(other))
        chosen = torch.zeros(1, len(row), 1)
        chosen[0, ordinals[i]] = 1
        theirs = acts[SITE]
        with block_output(model, 1, lambda h, c=chosen, s=theirs: h + c * ((s - h) @ q) @ q.T):
            close(logits[i][batch["attention_mask"][i].bool()], model(**single(row)).logits[0])


@torch.no_grad()
def test_bases_and_sources_padded_to_different_widths_and_sides(model):
    batch, rows = padded("left"), [[30, *row, 31] for row in ROWS]
    plan = [Intervention("L0.mlp_output", Swap(), LastToken(), source_positions=At(-2))]
    logits = interchange(model, plan, batch, padded("right", rows)).logits
    for i, row in enumerate(ROWS):
        with capture(model, "L0.mlp_output", LastToken()) as acts:
            model(**single(rows[i][:-1]))
        with intervene(model, [Intervention("L0.mlp_output", Set(acts["L0.mlp_output"][0, 0]), LastToken())]):
            close(logits[i, -1], model(**single(row)).logits[0, -1])


@torch.no_grad()
def test_one_source_token_serves_many_base_tokens(model):
    batch, v = padded("right"), vector(3, 3, 1)
    with intervene(model, [Intervention(SITE, Swap(), AllTokens())], [v]):
        found = model(**batch).logits
    with block_output(model, 1, lambda h: torch.where(batch["attention_mask"][..., None].bool(), v, h)):
        close(found, model(**batch).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_labels_say_what_is_prompt_and_response(model, side):
    batch, v = padded(side), vector(1)
    answers = selection(RESPONSE, side)
    labels = torch.where(answers, batch["input_ids"], -100)
    for positions, chosen in ((Response(), answers), (Prompt(), ~answers & batch["attention_mask"].bool())):
        with intervene(model, [Intervention(SITE, Add(v), positions)]):
            found = model(**batch, labels=labels)
        with block_output(model, 1, added(v, chosen)):
            expected = model(**batch, labels=labels)
        close(found.logits, expected.logits)
        close(found.loss, expected.loss)


@torch.no_grad()
def test_a_mask_selects_columns(model):
    batch, v = padded("left"), vector(1)
    chosen = selection([[0, 3], [1], []], "left")
    with intervene(model, [Intervention(SITE, Add(v), Mask(chosen))]) as applied:
        found = model(**batch).logits
    assert applied.report()[0].tokens == 3
    with block_output(model, 1, added(v, chosen)):
        close(found, model(**batch).logits)


@torch.no_grad()
def test_positional_arguments_and_embeddings_are_understood(model):
    batch, v = tiny_batch(model, "right"), vector(1)
    plan = [Intervention(SITE, Add(v), LastToken())]
    with intervene(model, plan):
        expected = model(**batch).logits
        positional = model(batch["input_ids"], batch["attention_mask"]).logits
        embedded = {"inputs_embeds": model.model.embed_tokens(batch["input_ids"])}
        close(model(**embedded, attention_mask=batch["attention_mask"]).logits, expected)
    close(positional, expected)


class Words:
    """A tokenizer whose tokens are pieces of text, to see that matches ignore how a text was split."""

    pieces = ("<pad>", "the ", "c", "at", " sat", "s", "a", "cat")

    def decode(self, ids, **_):
        return "".join(self.pieces[i] for i in ids)

    def apply_chat_template(self, _messages, *, add_generation_prompt, return_dict):
        assert return_dict
        return {"input_ids": [1, 2, 5, 6] if add_generation_prompt else [1, 2]}


def test_a_text_is_found_however_it_is_split():
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4], [0, 1, 7, 4], [7, 5, 2, 3]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]),
    }
    tokenizer = Words()
    assert Match("cat", tokenizer=tokenizer).resolve(batch).tolist() == [[1, 2], [2, -1], [0, -1]]
    last = Match("cat", tokenizer=tokenizer, occurrence=-1, token=-1)
    assert last.resolve(batch).tolist() == [[2], [2], [3]]
    assert Match("at s", tokenizer=tokenizer).resolve({"input_ids": batch["input_ids"][:1]}).tolist() == [[2, 3]]


def test_the_marker_of_a_chat_template():
    assert response_marker(Words()) == (5, 6)
    assert find_all([1, 2, 1, 2, 1], [1, 2, 1]) == [0, 2]


# --- a prompt that comes in parts ---------------------------------------------------------------------------------

GREEDY = {
    "max_new_tokens": 3,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "output_logits": True,
    "return_dict_in_generate": True,
}


def _generated(model, batch, plan, **how):
    prompt = how.pop("prompt", None)
    with intervene(model, plan, prompt=prompt):
        return torch.stack(model.generate(**batch, **GREEDY, **how).logits)


@pytest.mark.parametrize("positions", [LastToken(), At(2), Span(1, 4), Match([51]), Response(marker=MARKER)])
@pytest.mark.parametrize("size", [1, 3, 6])  # of 7: with 6, the second chunk looks like a decode step
@torch.no_grad()
def test_chunked_prefill(model, positions, size):
    batch = {name: value for name, value in padded("left").items() if name != "position_ids"}
    plan = [Intervention(SITE, Add(vector(1)), positions)]
    expected = _generated(model, batch, plan)
    close(_generated(model, batch, plan, prefill_chunk_size=size, prompt=batch), expected)
    with pytest.raises(AmbiguousForward, match=r"Pass prompt=<the tokenised prompt batch> to intervene\(\)"):
        _generated(model, batch, plan, prefill_chunk_size=size)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("edit", [Add(vector(1)), Project(vector(2))])
@torch.no_grad()
def test_chunked_prefill_of_all_tokens_needs_no_prompt(model, edit, size):
    batch = {name: value for name, value in padded("left").items() if name != "position_ids"}
    plan = [Intervention(SITE, edit)]
    with intervene(model, plan) as applied:
        found = torch.stack(model.generate(**batch, **GREEDY, prefill_chunk_size=size).logits)
    close(found, _generated(model, batch, plan))
    assert applied.report()[0].tokens == sum(LENGTHS) + 3 * 2  # no padding in any chunk


@torch.no_grad()
def test_chunked_prefill_of_a_swap_from_a_source(model):
    batch = {name: value for name, value in padded("left").items() if name != "position_ids"}
    plan = [Intervention(SITE, Swap(), Span(1, 4))]
    sources = collect_sources(model, plan, tiny_batch(model, lengths=(6, 6, 6)))
    with intervene(model, plan, sources):
        expected = torch.stack(model.generate(**batch, **GREEDY).logits)
    with intervene(model, plan, sources, prompt=batch) as applied:
        close(torch.stack(model.generate(**batch, **GREEDY, prefill_chunk_size=2).logits), expected)
    assert applied.report()[0].tokens == 9


@torch.no_grad()
def test_chunks_called_by_hand(model):
    batch, cache = padded("right"), DynamicCache()
    plan = [Intervention(SITE, Add(vector(1)), At(1, -2))]
    with intervene(model, plan):
        expected = model(**batch).logits
    found = []
    with intervene(model, plan, prompt=batch):
        for start, stop in ((0, 3), (3, 5), (5, 7)):
            part = {name: batch[name][:, start:stop] for name in ("input_ids", "position_ids")}
            mask = batch["attention_mask"][:, :stop]
            found.append(model(**part, attention_mask=mask, past_key_values=cache).logits)
    real = batch["attention_mask"].bool()
    close(torch.cat(found, 1)[real], expected[real])
    cache = DynamicCache()
    plan = [Intervention(SITE, Add(vector(1)), LastToken())]
    with pytest.raises(AmbiguousForward, match="2 tokens follow the 3 already seen"), intervene(model, plan):
        model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache)
        model(input_ids=torch.tensor([[8, 9]]), past_key_values=cache)


@torch.no_grad()
def test_a_cache_rolled_back_or_exchanged_is_ambiguous(model):
    ids, plan = torch.tensor([[5, 6, 7]]), [Intervention(SITE, Add(vector(1)), LastToken())]
    cache, other = DynamicCache(), DynamicCache()
    model(input_ids=ids, past_key_values=other)
    with pytest.raises(AmbiguousForward, match="is not the one the pass before it filled"), intervene(model, plan):
        model(input_ids=ids, past_key_values=cache)
        model(input_ids=ids[:, :1], past_key_values=other)
    with (
        pytest.raises(AmbiguousForward, match="starts at column 2, but 3 were already seen"),
        intervene(model, plan),
    ):
        out = model(input_ids=ids)
        out.past_key_values.crop(-1)  # one token fewer
        model(input_ids=ids[:, :1], past_key_values=out.past_key_values)
