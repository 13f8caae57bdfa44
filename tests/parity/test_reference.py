"""The hand-written forward passes are those of transformers, so they may judge the engine."""

from __future__ import annotations

import pytest
import torch

from .reference import Recorder, gpt2_logits, llama_logits, replacing
from .tiny import LAYERS, tiny, token_ids

FORWARDS = {
    "gpt2": gpt2_logits,
    "llama": llama_logits,
    "llama_wide_heads": llama_logits,
    "mistral": llama_logits,
    "qwen2": llama_logits,
}


@pytest.mark.parametrize("name", FORWARDS)
def test_logits_equal_those_of_transformers(name):
    model, ids = tiny(name), token_ids()
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    torch.testing.assert_close(FORWARDS[name](model, ids), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FORWARDS)
def test_logits_equal_those_of_transformers_with_left_padding(name):
    model, ids = tiny(name), token_ids()
    ids[0, :3] = 0
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    found = FORWARDS[name](model, ids, mask=mask, positions=positions)
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FORWARDS)
def test_residual_stream_is_the_sum_of_the_writes_and_equals_hidden_states(name):
    model, ids, record = tiny(name), token_ids(), Recorder()
    FORWARDS[name](model, ids, at=record)
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    for layer in range(LAYERS):
        stream = record.seen["block_input", layer]
        torch.testing.assert_close(stream, states[layer], atol=1e-5, rtol=0)
        total = stream + record.seen["attention_write", layer] + record.seen["mlp_write", layer]
        torch.testing.assert_close(total, record.seen["block_output", layer], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FORWARDS)
def test_every_component_reaches_the_logits(name):
    model, ids, record = tiny(name), token_ids(), Recorder()
    plain = FORWARDS[name](model, ids, at=record)
    for component, layer in record.seen:
        # not the same factor for every column: a norm would undo that
        changed = FORWARDS[name](model, ids, at=replacing(component, layer, lambda h: h + h.flip(-1)))
        assert (changed - plain).abs().max() > 1e-3, (component, layer)
