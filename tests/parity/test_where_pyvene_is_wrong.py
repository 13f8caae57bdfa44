"""Documented differences: what pyvene 0.1.8 gives, what is right, and that we give what is right.

Each test shows three things: pyvene's value differs from a hand-written forward pass, by how much at least, and ours
equals it. If a later pyvene is right, its half of the test fails and says so.
"""

from __future__ import annotations

import pytest
import torch

from intervene import (
    Add,
    AllTokens,
    At,
    Coordinates,
    Intervention,
    LastToken,
    NotApplied,
    Swap,
    Zero,
    capture,
    interchange,
    intervene,
)
from intervene.errors import Unsupported
from intervene.pyvene_compat import from_pyvene

from . import oracle
from .reference import Recorder, llama_logits, replacing
from .tiny import random_tensor, tiny, token_ids

pyvene = oracle.pyvene

TOLERANCE = 1e-5
BASE, SOURCE = token_ids(0), token_ids(1)
BASE_AT, SOURCE_AT = [[4], [5]], [[2], [3]]
HERE = {"layer": 1, "component": "block_output"}


def hand_written(component, layer, change, name="llama", **options):
    """Return the right logits: `change` (B, S, D) -> (B, S, D) applied at one component."""
    return llama_logits(tiny(name), BASE, at=replacing(component, layer, change), **options)


def at_positions(rows, change):
    """Return a function that changes (B, S, D) at rows[example], by change(vector, example)."""

    def apply(h):
        h = h.clone()
        for example, columns in enumerate(rows):
            for column in columns:
                h[example, column] = change(h[example, column], example)
        return h

    return apply


def ours(plan, *, name="llama", source=None, **options):
    model = tiny(name)
    with torch.no_grad():
        if source is not None:
            return interchange(model, plan, {"input_ids": BASE}, {"input_ids": source}).logits
        with intervene(model, plan):
            return model(input_ids=BASE, **options).logits


def wrong_then_right(theirs, found, wanted):
    """Assert that pyvene's logits are not the wanted ones, and that ours are."""
    assert (theirs - wanted).abs().max() > 0.05, "pyvene is right here by now: drop this difference"
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def test_pyvene_removes_the_users_hooks_and_blinds_hidden_states_for_good():
    model, fired = tiny("llama"), []
    model.model.layers[0].register_forward_hook(lambda *_: fired.append(True))
    before = model(input_ids=BASE, output_hidden_states=True).hidden_states

    with intervene(model, [Intervention("L1.block_output", Zero())]):
        model(input_ids=BASE)
    after = model(input_ids=BASE, output_hidden_states=True).hidden_states
    assert len(fired) == 3
    assert len(before) == 4
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))

    oracle.run(model, HERE | {"intervention": pyvene.ZeroIntervention()}, BASE, locations=oracle.positions(BASE_AT))
    assert model(input_ids=BASE, output_hidden_states=True).hidden_states == ()
    assert len(fired) == 3, "the hook has fired no more"


def test_pyvene_freezes_the_model_it_is_given():
    model = tiny("llama").train()
    with intervene(model, [Intervention("L1.block_output", Zero())]):
        model(input_ids=BASE)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    oracle.wrapped(model, HERE | {"intervention": pyvene.ZeroIntervention()})
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_a_shorthand_location_changes_what_later_calls_edit():
    engine = oracle.wrapped(tiny("llama"), HERE | {"intervention": pyvene.VanillaIntervention()})
    batch, sources = {"input_ids": BASE}, [{"input_ids": SOURCE}]
    engine(batch, list(sources), {"sources->base": 4})  # sets use_fast for good
    theirs = engine(batch, list(sources), oracle.positions(BASE_AT, SOURCE_AT))[1].logits

    record = Recorder()
    llama_logits(tiny("llama"), SOURCE, at=record)
    seen = record.seen["block_output", 1]
    change = at_positions(BASE_AT, lambda _, example: seen[example, SOURCE_AT[example][0]])
    plan = [Intervention("L1.block_output", Swap(), At(BASE_AT), source_positions=At(SOURCE_AT))]
    with torch.no_grad():
        interchange(model := tiny("llama"), [Intervention("L1.block_output", Swap(), At(4))], batch, sources[0])
        found = interchange(model, plan, batch, sources[0]).logits
    wrong_then_right(theirs, found, hand_written("block_output", 1, change))


@pytest.mark.parametrize("component", ["attention_value_output", "query_output"])
def test_pyvene_edits_half_of_heads_that_are_wider_than_the_stream(component):
    """64 columns, of which pyvene edits the first 32, the hidden size."""
    name = "llama_wide_heads"
    theirs = oracle.run(
        tiny(name),
        {"layer": 1, "component": component, "intervention_type": pyvene.ZeroIntervention},
        BASE,
        locations=oracle.positions(BASE_AT),
    )
    wanted = hand_written(component, 1, at_positions(BASE_AT, lambda row, _: 0 * row), name)
    found = ours([Intervention(f"L1.{component}", Zero(), At(BASE_AT))], name=name)
    wrong_then_right(theirs, found, wanted)


def test_subspaces_per_example_become_the_union_of_them():
    """pyvene swaps columns 0 to 3 in both examples, asked for 0, 1 in one and 2, 3 in the other."""
    representation = HERE | {"intervention": pyvene.VanillaIntervention()}
    subspaces = [[[0, 1], [2, 3]]]
    locations = oracle.positions(BASE_AT, SOURCE_AT)
    theirs = oracle.run(tiny("llama"), representation, BASE, source=SOURCE, locations=locations, subspaces=subspaces)
    record = Recorder()
    llama_logits(tiny("llama"), SOURCE, at=record)
    seen = record.seen["block_output", 1]

    def change(row, example):
        row = row.clone()
        columns = subspaces[0][example]
        row[columns] = seen[example, SOURCE_AT[example][0]][columns]
        return row

    wanted = hand_written("block_output", 1, at_positions(BASE_AT, change))
    model, rows = tiny("llama"), []
    for example, columns in enumerate(subspaces[0]):
        where = {"positions": At(BASE_AT[example]), "source_positions": At(SOURCE_AT[example])}
        plan = [Intervention("L1.block_output", Swap(), featurizer=Coordinates(columns), **where)]
        one, other = ({"input_ids": ids[example : example + 1]} for ids in (BASE, SOURCE))
        with torch.no_grad():
            rows.append(interchange(model, plan, one, other).logits)
    wrong_then_right(theirs, torch.cat(rows), wanted)
    with pytest.raises(Unsupported, match="subspaces that differ between examples"):
        from_pyvene(HERE | {"intervention_type": "VanillaIntervention"}, subspaces=subspaces)


def test_linked_interventions_write_the_first_sites_activation_into_the_second():
    vector = random_tensor(32, seed=7)
    linked = [
        {
            "layer": layer,
            "component": "block_output",
            "intervention_type": pyvene.AdditionIntervention,
            "source_representation": vector,
            "intervention_link_key": 0,
        }
        for layer in (0, 2)
    ]
    rows = BASE_AT
    theirs = oracle.run(tiny("llama"), linked, BASE, locations={"base": [rows, rows]})
    add = at_positions(rows, lambda row, _: row + vector)
    wanted = llama_logits(
        tiny("llama"),
        BASE,
        at=lambda name, layer, h: add(h) if name == "block_output" and layer in (0, 2) else h,
    )
    plan = from_pyvene(linked, unit_locations={"base": [rows, rows]})
    assert plan[0].edit is plan[1].edit
    wrong_then_right(theirs, ours(plan), wanted)


def test_a_flat_list_of_two_positions_edits_one():
    """pyvene reads [2, 4] as a source position and a base position, also where there is no source."""
    representation = HERE | {"intervention": pyvene.ZeroIntervention()}
    theirs = oracle.run(tiny("llama"), representation, BASE, locations={"base": [2, 4]})
    wanted = hand_written("block_output", 1, at_positions([[2, 4]] * 2, lambda row, _: 0 * row))
    plan = from_pyvene(representation, unit_locations={"base": [2, 4]})
    wrong_then_right(theirs, ours(plan), wanted)


def test_a_hook_that_never_fires_goes_unnoticed():
    """Under SDPA no module computes GPT-2's attention weights: pyvene returns the plain logits, we refuse."""
    model = tiny("gpt2")
    representation = {"layer": 1, "component": "attention_weight", "intervention": pyvene.ZeroIntervention()}
    theirs = oracle.run(model, representation, BASE, locations=oracle.positions([[1], [1]]))
    assert torch.equal(theirs, tiny("gpt2")(input_ids=BASE).logits)
    with pytest.raises(Unsupported, match="attention_weight"):
        from_pyvene(representation)
    model, dead = tiny("gpt2"), Intervention("path:transformer.h.1.attn.attn_dropout.input", Zero())
    with pytest.raises(NotApplied, match="attn_dropout"), intervene(model, [dead]):
        model(input_ids=BASE)


def left_padded(columns):
    ids = torch.cat([torch.zeros(2, columns, dtype=torch.long), BASE], dim=1)
    mask = (torch.arange(ids.shape[1]) >= columns).long().expand(2, -1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def test_left_padding_moves_pyvenes_positions():
    vector = random_tensor(32, seed=8)
    representation = HERE | {"intervention": pyvene.AdditionIntervention(source_representation=vector)}
    batch, locations = left_padded(3), oracle.positions(BASE_AT)
    engine = oracle.wrapped(tiny("llama"), representation)
    with torch.no_grad():
        theirs = engine(batch, unit_locations=locations)[1].logits[:, 3:]
    wanted = hand_written("block_output", 1, at_positions(BASE_AT, lambda row, _: row + vector))
    model = tiny("llama")
    with torch.no_grad(), intervene(model, from_pyvene(representation, unit_locations=locations)):
        found = model(**batch).logits[:, 3:]
    wrong_then_right(theirs, found, wanted)


def test_all_tokens_include_padding_in_pyvene():
    vector = random_tensor(32, seed=8)
    representation = HERE | {"intervention": pyvene.AdditionIntervention(source_representation=vector)}
    batch, model = left_padded(3), tiny("llama")
    with torch.no_grad():
        plain = model(**batch).logits
        with intervene(model, from_pyvene(representation)) as applied:
            found = model(**batch).logits
        theirs = oracle.wrapped(tiny("llama"), representation)(batch, unit_locations=None)[1].logits
    assert from_pyvene(representation)[0].positions == AllTokens()
    assert applied.report()[0].tokens == BASE.numel()
    wrong_then_right(theirs[:, :3], found[:, :3], plain[:, :3])
    torch.testing.assert_close(found[:, 3:], theirs[:, 3:], atol=TOLERANCE, rtol=0)


def test_two_positions_collected_under_a_one_unit_configuration_come_back_in_halves():
    """pyvene joins the positions, keeps as many numbers as one has, and cuts those in two."""
    representation = HERE | {"intervention_type": pyvene.CollectIntervention}
    with torch.no_grad():
        (_, (theirs,)), _ = oracle.wrapped(tiny("llama"), representation)(
            {"input_ids": BASE}, unit_locations={"base": [[[2, 4], [2, 4]]]}
        )
    record = Recorder()
    llama_logits(tiny("llama"), BASE, at=record)
    wanted = record.seen["block_output", 1][:, [2, 4]]
    assert theirs.shape == (2, 2, 16)
    torch.testing.assert_close(theirs.flatten(1), wanted[:, 0], atol=TOLERANCE, rtol=0)
    with torch.no_grad(), capture(model := tiny("llama"), "L1.block_output", At(2, 4)) as acts:
        model(input_ids=BASE)
    torch.testing.assert_close(acts["L1.block_output"], wanted, atol=TOLERANCE, rtol=0)


def test_generation_without_cache_loses_the_edit_of_the_prompt():
    """The first token is right with and without cache; later ones differ, though the two should be one text."""
    vector = 3 * random_tensor(32, seed=9)
    representation = HERE | {"intervention": pyvene.AdditionIntervention(source_representation=vector)}
    batch = {"input_ids": BASE[:1], "attention_mask": torch.ones_like(BASE[:1])}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}

    def theirs(use_cache):
        engine = oracle.wrapped(tiny("llama"), representation)
        where = {"unit_locations": {"base": [[[6]]]}, "intervene_on_prompt": True}
        return torch.stack(engine.generate(batch, use_cache=use_cache, **where, **options)[1].logits)

    def found(use_cache):
        model, plan = tiny("llama"), [Intervention("L1.block_output", Add(vector), LastToken(), phase="prompt")]
        with torch.no_grad(), intervene(model, plan):
            return torch.stack(model.generate(**batch, use_cache=use_cache, **options).logits)

    torch.testing.assert_close(found(True), theirs(True), atol=TOLERANCE, rtol=0)
    wrong_then_right(theirs(False), found(False), found(True))


def test_pyvene_empties_the_users_source_activations():
    representation = HERE | {"intervention": pyvene.VanillaIntervention()}
    engine = oracle.wrapped(tiny("llama"), representation)
    given = {engine.sorted_keys[0]: torch.ones(2, 1, 32)}
    engine({"input_ids": BASE}, unit_locations=oracle.positions(BASE_AT), source_representations=given)
    assert given == {}
    model, sources = tiny("llama"), [torch.ones(2, 1, 32)]
    with intervene(model, [Intervention("L1.block_output", Swap(), At(BASE_AT))], sources):
        model(input_ids=BASE)
    assert len(sources) == 1 and torch.equal(sources[0], torch.ones(2, 1, 32))
