"""Clause 4: every way of generating gives the same edit, compared by logits."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from transformers import TextIteratorStreamer

from intervene import (
    Add,
    AllTokens,
    AmbiguousForward,
    At,
    BadPosition,
    DecodeSteps,
    First,
    Intervention,
    LastToken,
    Project,
    ProjectionAbove,
    Response,
    Swap,
    capture,
    collect_sources,
    intervene,
)
from tests.intervene.by_hand import added, block_output, close, vector
from tests.tiny import tiny_batch, tiny_model

SITE = "L1.block_output"
STEPS = 4
GREEDY = {
    "max_new_tokens": STEPS,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "output_logits": True,
    "return_dict_in_generate": True,
}
V, W = vector(1), vector(2)

# plan -> which columns of a prompt of T tokens and of what follows it, by hand: (column, T) -> is it edited
PLANS = {
    "all": ([Intervention(SITE, Add(V))], lambda c, t: True),
    "all in the prompt": ([Intervention(SITE, Add(V), phase="prompt")], lambda c, t: c < t),
    "all in the answer": ([Intervention(SITE, Add(V), phase="decode")], lambda c, t: c >= t),
    "newest": ([Intervention(SITE, Add(V), LastToken())], lambda c, t: c >= t - 1),
    "last of prompt": ([Intervention(SITE, Add(V), LastToken(), phase="prompt")], lambda c, t: c == t - 1),
    "newest of answer": ([Intervention(SITE, Add(V), LastToken(), phase="decode")], lambda c, t: c >= t),
    "response": ([Intervention(SITE, Add(V), Response())], lambda c, t: c >= t),
    "steps": ([Intervention(SITE, Add(V), DecodeSteps(1, 3))], lambda c, t: t + 1 <= c < t + 3),
    "from the end": ([Intervention(SITE, Add(V), At(-2))], lambda c, t: c == t - 2),
}
FAMILIES = ["llama", "gpt2", "gemma3_text", "gpt_neox", "bloom", "falcon", "mixtral", "opt"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@torch.no_grad()
def by_hand(model, batch, edited, vector=V):
    """Return logits (STEPS, B, vocabulary) of a greedy loop without cache, its edits made by a raw hook."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    width, collected = ids.shape[1], []
    for _ in range(STEPS):
        chosen = torch.tensor([edited(c, width) for c in range(ids.shape[1])]).expand_as(ids) & mask.bool()
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with block_output(model, 1, added(vector, chosen)):
            try:
                logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            except (TypeError, ValueError):  # a family without position ids
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        collected.append(logits[:, -1])
        ids = torch.cat([ids, collected[-1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.stack(collected)


def generated(model, batch, plan, *, sources=None, prompt=None, **how):
    with intervene(model, plan, sources, prompt=prompt):
        return torch.stack(model.generate(**batch, **{**GREEDY, **how}).logits)


def one(batch, row):
    real = batch["attention_mask"][row].bool()
    return {name: value[row : row + 1, real] for name, value in batch.items()}


@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_cached_uncached_and_single_equal_a_loop_by_hand(model, name):
    plan, edited = PLANS[name]
    batch = tiny_batch(model, "left")
    expected = by_hand(model, batch, edited)
    assert not torch.allclose(expected, by_hand(model, batch, lambda c, t: False), atol=1e-3)
    close(generated(model, batch, plan), expected)
    close(generated(model, batch, plan, use_cache=False), expected)
    for row in (0, 1):
        close(generated(model, one(batch, row), plan)[:, 0], expected[:, row])
        close(generated(model, one(batch, row), plan, use_cache=False)[:, 0], expected[:, row])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["all", "newest", "from the end"])
@torch.no_grad()
def test_families_generate_alike(family, name):
    model = tiny_model(family)
    plan, edited = PLANS[name]
    batch = tiny_batch(model, "left")
    cached = generated(model, batch, plan)
    close(cached, generated(model, batch, plan, use_cache=False))
    close(cached, by_hand(model, batch, edited))
    for row in (0, 1):
        close(generated(model, one(batch, row), plan)[:, 0], cached[:, row])


class _Words:
    def decode(self, ids, **_):
        return "".join(f"{int(token)} " for token in ids)


@pytest.mark.parametrize("name", ["all", "newest", "steps"])
@torch.no_grad()
def test_streamed_equals_not_streamed(model, name):
    plan, _ = PLANS[name]
    batch = one(tiny_batch(model, "left"), 1)
    with intervene(model, plan):
        ids = model.generate(**batch, **{**GREEDY, "output_logits": False}).sequences[0, 4:]
    streamer, found = TextIteratorStreamer(_Words(), skip_prompt=True), {}

    def work():
        with torch.no_grad():
            found["out"] = model.generate(**batch, **GREEDY, streamer=streamer)

    with intervene(model, plan):
        thread = Thread(target=work)
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert [int(word) for word in text.split()] == ids.tolist()
    close(torch.stack(found["out"].logits), generated(model, batch, plan))


@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_beams(model, name):
    plan, edited = PLANS[name]
    batch = tiny_batch(model, "left")
    how = {**GREEDY, "output_scores": True}
    one_beam = generated(model, batch, plan, num_beams=1)
    close(one_beam, generated(model, batch, plan))
    outputs = []
    for cache in (True, False):
        with intervene(model, plan):
            outputs.append(model.generate(**batch, **how, num_beams=3, num_return_sequences=3, use_cache=cache))
    cached, uncached = outputs
    assert torch.equal(cached.sequences, uncached.sequences)
    close(cached.sequences_scores, uncached.sequences_scores)
    for a, b in zip(cached.scores, uncached.scores, strict=True):
        close(a, b)
    # a beam's score is the mean log probability of its tokens, which a full pass over it gives as well
    prompt = {name: value.repeat_interleave(3, 0) for name, value in batch.items()}
    ids = cached.sequences
    mask = torch.cat([prompt["attention_mask"], torch.ones(6, STEPS, dtype=torch.long)], 1)
    chosen = torch.tensor([edited(c, 7) for c in range(ids.shape[1])]).expand_as(ids) & mask.bool()
    with block_output(model, 1, added(V, chosen)):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    tokens = logits[:, 6:-1].log_softmax(-1).gather(-1, ids[:, 7:, None])
    close(cached.sequences_scores, tokens.mean((1, 2)))


def _sampled(model, batch, plan, sources=None, **how):
    torch.manual_seed(3)
    with intervene(model, plan, sources):
        return model.generate(**batch, **{**GREEDY, "do_sample": True, **how}, num_return_sequences=3)


PER_EXAMPLE = {
    "vector per example": (Add(vector(4, 2)), AllTokens()),
    "vector per token": (Add(vector(4, 2, 2)), First(2)),
    "strength per example": (Add(V, torch.tensor([2.0, -1.0])), LastToken()),
    "positions per example": (Add(V), At([[0], [2]])),
    "source": (Swap(), LastToken()),
}


@pytest.mark.parametrize("name", PER_EXAMPLE)
@pytest.mark.parametrize("how", [{"do_sample": True}, {"do_sample": False, "num_beams": 3}])
@torch.no_grad()
def test_several_sequences_of_each_prompt(model, name, how):
    edit, positions = PER_EXAMPLE[name]
    batch, plan = tiny_batch(model, "left"), [Intervention(SITE, edit, positions)]
    sources = collect_sources(model, plan, tiny_batch(model, "right", seed=9))
    sampled = _sampled(model, batch, plan, sources, **how)
    assert torch.equal(sampled.sequences, _sampled(model, batch, plan, sources, use_cache=False, **how).sequences)
    # the edit of each prompt reaches all its sequences: teacher forcing one of them alone gives the same logits
    for row in (0, 1):
        alone = _alone(edit, positions, row)
        source = None if sources[0] is None else [sources[0][row : row + 1]]
        prompt = one(batch, row)
        with intervene(model, [Intervention(SITE, alone[0], alone[1])], source):
            expected = model(**prompt).logits[0, -1]
        for sequence in range(3):
            close(sampled.logits[0][3 * row + sequence], expected)


def _alone(edit, positions, row):
    """Return the edit and positions of one example."""
    if isinstance(positions, At):
        positions = At(*positions.indices[row])
    if isinstance(edit, Add):
        values = edit.vector if edit.vector.dim() == 1 else edit.vector[row : row + 1]
        strength = 1.0 if edit.strengths is None else float(edit.strengths[row])
        edit = Add(values, strength)
    return edit, positions


@torch.no_grad()
def test_several_sequences_with_the_prompt_given(model):
    batch, plan = tiny_batch(model, "left"), [Intervention(SITE, Add(vector(4, 2, 2)), At([[0, -1], [2, 1]]))]
    how = {"num_beams": 3, "num_return_sequences": 3}
    found = generated(model, batch, plan, prompt=batch, prefill_chunk_size=2, **how)
    close(found, generated(model, batch, plan, **how))


@torch.no_grad()
def test_examples_that_are_equal_share_what_is_written_for_one(model):
    """The rule that lets beams through: rows are repeats if and only if their tokens are."""
    batch = {name: value[:1].repeat(4, 1) for name, value in tiny_batch(model).items()}
    with intervene(model, [Intervention(SITE, Add(vector(4, 2)))]):
        found = model(**batch).logits
    for row in range(4):
        with intervene(model, [Intervention(SITE, Add(vector(4, 2)[row // 2]))]):
            close(found[row], model(**one(batch, row)).logits[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_mode_and_half_precision(dtype):
    model = tiny_model("llama").to(dtype)
    batch = tiny_batch(model, "left")
    plan = [Intervention(SITE, Add(V)), Intervention("L0.mlp_output", Project(W), LastToken())]
    with torch.inference_mode(), intervene(model, plan) as applied:
        found = torch.stack(model.generate(**batch, **GREEDY).logits)
    assert [report.tokens for report in applied.report()] == [11 + 6, 2 + 6]
    with torch.no_grad(), intervene(model, plan):
        assert torch.equal(found, torch.stack(model.generate(**batch, **GREEDY).logits))


@torch.no_grad()
def test_conditions_decide_for_each_generated_token(model):
    plan = [Intervention(SITE, Add(V, 3.0), when=ProjectionAbove(W, 0.2))]
    batch = tiny_batch(model, "left")
    cached = generated(model, batch, plan)
    close(cached, generated(model, batch, plan, use_cache=False))
    close(cached[:, 1], generated(model, one(batch, 1), plan)[:, 0])
    plain = generated(model, batch, [Intervention(SITE, Add(V, 3.0))])
    assert not torch.allclose(cached, plain, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_static_cache(family, name):
    model = tiny_model(family)
    plan, _ = PLANS[name]
    batch = tiny_batch(model, "left")
    static = {"cache_implementation": "static", "disable_compile": True}
    close(generated(model, batch, plan, prompt=batch, **static), generated(model, batch, plan))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # one mask, and a dictionary of masks
@torch.no_grad()
def test_static_cache_hides_the_padding_unless_the_prompt_is_given(family):
    model = tiny_model(family)
    with pytest.raises(BadPosition, match=r"a static cache makes such masks.*Pass prompt="):
        generated(model, tiny_batch(model, "left"), PLANS["all"][0], cache_implementation="static")


@pytest.mark.parametrize("seed", [0, 1])  # an assistant that guesses right, and one that does not
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_assisted_decoding(model, name, seed):
    plan, _ = PLANS[name]
    batch = one(tiny_batch(model), 0)
    assistant = tiny_model("llama", seed=seed)
    found = generated(model, batch, plan, prompt=batch, assistant_model=assistant)
    close(found[:STEPS], generated(model, batch, plan))


@pytest.mark.parametrize("name", ["all", "newest", "last of prompt"])
@torch.no_grad()
def test_prompt_lookup(model, name):
    plan, _ = PLANS[name]
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    close(generated(model, batch, plan, prompt=batch, prompt_lookup_num_tokens=2), generated(model, batch, plan))
    if name != "all":
        with pytest.raises(AmbiguousForward, match="as assisted decoding does for tokens it guessed"):
            generated(model, batch, plan, prompt_lookup_num_tokens=2)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_assisted_decoding_without_the_prompt_is_refused_even_if_one_pass_finishes_it(model):
    batch = one(tiny_batch(model), 0)
    with pytest.raises(AmbiguousForward, match="Pass prompt="):
        generated(model, batch, PLANS["last of prompt"][0], assistant_model=tiny_model("llama"), max_new_tokens=2)


@torch.no_grad()
def test_prompts_one_after_another_in_one_block(model):
    first, second = tiny_batch(model, "left"), tiny_batch(model, "left", seed=8, lengths=(3, 6, 5))
    for plan, edited in (PLANS["newest"], PLANS["steps"], PLANS["all in the prompt"]):
        expected = [by_hand(model, batch, edited) for batch in (first, second)]
        for cache in (True, False):
            with intervene(model, plan) as applied:
                for batch, logits in zip((first, second), expected, strict=True):
                    close(torch.stack(model.generate(**batch, **GREEDY, use_cache=cache).logits), logits)
            assert applied.report()[0].calls == 2 * STEPS


@torch.no_grad()
def test_generation_from_embeddings(model):
    batch = tiny_batch(model, "left")
    embedded = {
        "inputs_embeds": model.model.embed_tokens(batch["input_ids"]),
        "attention_mask": batch["attention_mask"],
    }
    for plan, _ in PLANS.values():
        close(generated(model, embedded, plan), generated(model, batch, plan))


@torch.no_grad()
def test_capture_follows_a_generation(model):
    batch = tiny_batch(model, "left")
    with capture(model, SITE, LastToken()) as acts:
        ids = model.generate(**batch, **GREEDY).sequences
    mask = torch.cat([batch["attention_mask"], torch.ones(2, STEPS, dtype=torch.long)], 1)
    with capture(model, SITE) as whole:
        model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    found = torch.cat([step for step in acts.every(SITE) if step is not None], 1)
    close(found, whole[SITE][:, 6:-1])


@torch.no_grad()
def test_projection_holds_in_every_decode_step(model):
    plan = [Intervention(SITE, Project(V), AllTokens())]
    with intervene(model, plan), capture(model, SITE) as acts:
        model.generate(**tiny_batch(model), **GREEDY)
    for step in acts.every(SITE):
        assert float((step @ V).abs().max()) < 1e-4
