"""The engine against the hand-written forward passes: every component, each kind of edit, to 1e-5.

Nothing here needs pyvene. Llama is GQA; its second model has heads wider than D / H.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from intervene import (
    Add,
    At,
    Coordinates,
    Intervention,
    LastToken,
    Scale,
    Set,
    Subspace,
    Swap,
    Zero,
    capture,
    interchange,
    intervene,
)

from .reference import Recorder, gpt2_logits, llama_logits, replacing
from .tiny import random_frame, random_tensor, tiny, token_ids

TOLERANCE = 1e-5
FORWARDS = {"gpt2": gpt2_logits, "llama": llama_logits, "llama_wide_heads": llama_logits}
LAYERLESS = ["embedding_output", "final_norm_output"]
STREAMS = [
    "block_input", "attention_input", "query_output", "key_output", "value_output", "attention_value_output",
    "attention_output", "attention_write", "mlp_input", "mlp_activation", "mlp_neurons", "mlp_output", "mlp_write",
    "block_output",
]  # fmt: skip
HEADS = ["head_query_output", "head_key_output", "head_value_output", "head_attention_value_output"]
LAYER = 1
BASE_AT, SOURCE_AT = [4, 5], [2, 3]  # one position per example


def address(component):
    """Return the layer and the site's text of a component."""
    return (None, component) if component in LAYERLESS else (LAYER, f"L{LAYER}.{component}")


def at_rows(change):
    """Return a function that changes (B, S, ...) at BASE_AT, by change(row tensor, example)."""

    def apply(h):
        h = h.clone()
        for example, position in enumerate(BASE_AT):
            h[example, position] = change(h[example, position], example)
        return h

    return apply


def agrees(name, plan, wanted, *, source=None):
    """Assert that the plan's logits equal `wanted`, and that `wanted` is not the plain forward."""
    model, base = model_of(name), token_ids(0)
    with torch.no_grad():
        if source is None:
            with intervene(model, plan):
                found = model(input_ids=base).logits
        else:
            found = interchange(model, plan, {"input_ids": base}, {"input_ids": source}).logits
        plain = model(input_ids=base).logits
    assert (wanted - plain).abs().max() > 1e-3, "the edit shows in nothing"
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


@cache
def model_of(name):
    """Return one model for all tests here: the engine promises to leave it as it was."""
    return tiny(name)


@cache
def recorded(name, seed):
    """Return every tensor of the hand-written forward pass on `token_ids(seed)`."""
    record = Recorder()
    FORWARDS[name](model_of(name), token_ids(seed), at=record)
    return record.seen


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("component", STREAMS + LAYERLESS)
def test_capture_is_the_hand_written_tensor(name, component):
    model, ids = model_of(name), token_ids(0)
    layer, site = address(component)
    with torch.no_grad(), capture(model, [site]) as acts:
        model(input_ids=ids)
    torch.testing.assert_close(acts[site], recorded(name, 0)[component, layer], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("component", HEADS)
def test_capture_of_heads_is_the_hand_written_tensor(name, component):
    model, ids = model_of(name), token_ids(0)
    with torch.no_grad(), capture(model, [f"L{LAYER}.{component}[1,0]"], positions=LastToken()) as acts:
        model(input_ids=ids)
    wanted = recorded(name, 0)[component, LAYER][:, -1, [1, 0]].flatten(1)[:, None]  # (B, 1, 2d)
    torch.testing.assert_close(acts[f"L{LAYER}.{component}[1,0]"], wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("component", STREAMS + LAYERLESS)
@pytest.mark.parametrize("kind", ["add", "set", "zero"])
def test_static_edits_at_one_position_per_example(name, component, kind):
    layer, site = address(component)
    vector = random_tensor(recorded(name, 0)[component, layer].shape[-1], seed=3)
    edit, change = {
        "add": (Add(vector, 2.0), lambda row, _: row + 2.0 * vector),
        "set": (Set(vector), lambda row, _: vector),
        "zero": (Zero(), lambda row, _: 0 * row),
    }[kind]
    wanted = FORWARDS[name](model_of(name), token_ids(0), at=replacing(component, layer, at_rows(change)))
    agrees(name, [Intervention(site, edit, At([[4], [5]]))], wanted)


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("component", STREAMS + LAYERLESS)
@pytest.mark.parametrize("kind", ["swap", "subspace", "coordinates"])
def test_interchange_from_another_position(name, component, kind):
    layer, site = address(component)
    seen = recorded(name, 1)[component, layer]
    width = seen.shape[-1]
    frame = random_frame(width, 3)
    selected = torch.zeros(width, width)
    selected[[1, 5], [1, 5]] = 1.0
    lens, projection = {
        "swap": (None, torch.eye(width)),
        "subspace": (Subspace.from_frame(frame), frame @ frame.T),
        "coordinates": (Coordinates([1, 5]), selected),
    }[kind]

    def change(row, example):
        return row + (seen[example, SOURCE_AT[example]] - row) @ projection

    wanted = FORWARDS[name](model_of(name), token_ids(0), at=replacing(component, layer, at_rows(change)))
    item = Intervention(site, Swap(), At([[4], [5]]), lens, source_positions=At([[2], [3]]))
    agrees(name, [item], wanted, source=token_ids(1))


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("component", HEADS)
@pytest.mark.parametrize("heads", [(1,), (1, 0)])
@pytest.mark.parametrize("kind", ["swap", "zero", "subspace"])
def test_heads(name, component, heads, kind):
    seen = recorded(name, 1)[component, LAYER]  # (B, S, H, d)
    width = seen.shape[-1] * len(heads)
    frame = random_frame(width, 3)

    def change(row, example):  # (H, d)
        source = seen[example, SOURCE_AT[example]][list(heads)].flatten()
        kept = row[list(heads)].flatten()
        new = {"swap": source, "zero": 0 * kept, "subspace": kept + (source - kept) @ frame @ frame.T}[kind]
        row = row.clone()
        row[list(heads)] = new.view(len(heads), -1)
        return row

    wanted = FORWARDS[name](model_of(name), token_ids(0), at=replacing(component, LAYER, at_rows(change)))
    lens = Subspace.from_frame(frame) if kind == "subspace" else None
    site = f"L{LAYER}.{component}[{','.join(map(str, heads))}]"
    edit = Zero() if kind == "zero" else Swap()
    source_at = None if kind == "zero" else At([[2], [3]])
    item = Intervention(site, edit, At([[4], [5]]), lens, source_positions=source_at)
    agrees(name, [item], wanted, source=None if kind == "zero" else token_ids(1))


@pytest.mark.parametrize("name", FORWARDS)
def test_two_edits_of_which_the_later_layer_reads_the_earlier(name):
    vector = random_tensor(32, seed=4)

    def both(component, layer, h):
        if (component, layer) == ("mlp_output", 0):
            return h + vector
        return h * 0.5 if (component, layer) == ("attention_output", 2) else h

    wanted = FORWARDS[name](model_of(name), token_ids(0), at=both)
    agrees(name, [Intervention("L2.attention_output", Scale(0.5)), Intervention("L0.mlp_output", Add(vector))], wanted)


@pytest.mark.parametrize("name", FORWARDS)
def test_left_padding_moves_nothing(name):
    """The same edit of the same real token, whatever is before it; padding itself is left alone."""
    model, short = model_of(name), token_ids(0)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), short], dim=1)
    mask = (torch.arange(10) >= 3).long().expand(2, -1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    vector = random_tensor(32, seed=5)
    plan = [Intervention("L1.block_output", Add(vector), At([[4], [5]]))]
    change = at_rows(lambda row, _: row + vector)
    wanted = FORWARDS[name](model, short, at=replacing("block_output", 1, change))
    with torch.no_grad(), intervene(model, plan):
        found = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found[:, 3:], wanted, atol=TOLERANCE, rtol=0)
