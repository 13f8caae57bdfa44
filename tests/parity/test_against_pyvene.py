"""The engine against pyvene 0.1.8: families x components x kinds, where pyvene is right, to 1e-6.

Each comparison runs pyvene on a copy of the model. `test_where_pyvene_is_wrong.py` holds what is left out here.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from intervene import Add, At, Intervention, LastToken, Subspace, Swap, Zero, capture, families, interchange, intervene
from intervene.families import resolve
from intervene.sites import HEAD_COMPONENTS

from . import oracle
from .tiny import random_tensor, tiny, token_ids

pyvene = oracle.pyvene

TOLERANCE = 1e-6
LAYER = 1
BASE, SOURCE = token_ids(0), token_ids(1)
BASE_AT, SOURCE_AT = [[4], [5]], [[2], [3]]
KNOWN_TO_PYVENE = ["gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "gemma", "gemma2", "qwen2", "olmo"]
FAMILIES = [name for name in KNOWN_TO_PYVENE if name in families.FAMILIES]
CASES = [(name, component) for name in FAMILIES for component in oracle.components(name)]
STREAMS = [case for case in CASES if case[1] not in HEAD_COMPONENTS]
HEADS = [case for case in CASES if case[1] in HEAD_COMPONENTS]


@cache
def model_of(name, dtype=torch.float32):
    """Return one model for all of our runs: the engine promises to leave it as it was."""
    return tiny(name).to(dtype)


@cache
def pyvenes(name, dtype=torch.float32):
    """Return one model for all of pyvene's runs, which do not leave it as it was."""
    return tiny(name).to(dtype)


def ours(name, plan, *, source=False, dtype=torch.float32):
    """Return our logits (B, S, V) on BASE."""
    model = model_of(name, dtype)
    with torch.no_grad():
        if source:
            return interchange(model, plan, {"input_ids": BASE}, {"input_ids": SOURCE}).logits
        with intervene(model, plan):
            return model(input_ids=BASE).logits


def same(found, wanted, name):
    """Assert equal logits that are not the plain ones."""
    with torch.no_grad():
        plain = model_of(name, wanted.dtype)(input_ids=BASE).logits
    assert (wanted - plain).abs().max() > 1e-3, "the edit shows in nothing"
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def representation(component, module, **options):
    return {"layer": LAYER, "component": component, "intervention": module} | options


@pytest.mark.parametrize(("name", "component"), STREAMS)
def test_addition_of_a_constant(name, component):
    site = f"L{LAYER}.{component}"
    vector = random_tensor(resolve(model_of(name), site).width, seed=3)
    module = pyvene.AdditionIntervention(source_representation=vector)
    wanted = oracle.run(pyvenes(name), representation(component, module), BASE, locations=oracle.positions(BASE_AT))
    same(ours(name, [Intervention(site, Add(vector), At(BASE_AT))]), wanted, name)


@pytest.mark.parametrize(("name", "component"), STREAMS)
def test_zeroing(name, component):
    wanted = oracle.run(
        pyvenes(name), representation(component, pyvene.ZeroIntervention()), BASE, locations=oracle.positions(BASE_AT)
    )
    same(ours(name, [Intervention(f"L{LAYER}.{component}", Zero(), At(BASE_AT))]), wanted, name)


@pytest.mark.parametrize(("name", "component"), STREAMS)
def test_interchange_from_another_position(name, component):
    wanted = oracle.run(
        pyvenes(name),
        representation(component, pyvene.VanillaIntervention()),
        BASE,
        source=SOURCE,
        locations=oracle.positions(BASE_AT, SOURCE_AT),
    )
    item = Intervention(f"L{LAYER}.{component}", Swap(), At(BASE_AT), source_positions=At(SOURCE_AT))
    same(ours(name, [item], source=True), wanted, name)


@pytest.mark.parametrize(("name", "component"), STREAMS)
def test_low_rank_das(name, component):
    site = f"L{LAYER}.{component}"
    module, frame = oracle.low_rank(resolve(model_of(name), site).width, 3)
    wanted = oracle.run(
        pyvenes(name, torch.float64),
        representation(component, module),
        BASE,
        source=SOURCE,
        locations=oracle.positions(BASE_AT, SOURCE_AT),
    )
    item = Intervention(site, Swap(), At(BASE_AT), Subspace.from_frame(frame), source_positions=At(SOURCE_AT))
    same(ours(name, [item], source=True, dtype=torch.float64), wanted, name)


@pytest.mark.parametrize(("name", "component"), STREAMS)
def test_collection(name, component):
    wanted = oracle.collect(pyvenes(name), component, LAYER, BASE, oracle.positions([[4], [6]]))
    with torch.no_grad(), capture(model_of(name), f"L{LAYER}.{component}", At([[4], [6]])) as acts:
        model_of(name)(input_ids=BASE)
    torch.testing.assert_close(acts[f"L{LAYER}.{component}"], wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "component"), HEADS)
@pytest.mark.parametrize("heads", [(1,), (1, 0)])
@pytest.mark.parametrize("kind", ["swap", "low_rank"])
def test_heads_at_positions(name, component, heads, kind):
    site = f"L{LAYER}.{component}[{','.join(map(str, heads))}]"
    dtype = torch.float64 if kind == "low_rank" else torch.float32
    rotation, frame = oracle.low_rank(resolve(model_of(name), site).width, 3)
    module = rotation if kind == "low_rank" else pyvene.VanillaIntervention()
    wanted = oracle.run(
        pyvenes(name, dtype),
        representation(component, module, unit="h.pos", max_number_of_units=len(heads)),
        BASE,
        source=SOURCE,
        locations=oracle.heads_at(heads, BASE_AT, SOURCE_AT),
    )
    lens = Subspace.from_frame(frame) if kind == "low_rank" else None
    item = Intervention(site, Swap(), At(BASE_AT), lens, source_positions=At(SOURCE_AT))
    same(ours(name, [item], source=True, dtype=dtype), wanted, name)


@pytest.mark.parametrize(("name", "component"), HEADS)
def test_heads_at_every_token(name, component):
    wanted = oracle.run(
        pyvenes(name),
        representation(component, pyvene.VanillaIntervention(), unit="h"),
        BASE,
        source=SOURCE,
        locations={"sources->base": ([[[1], [1]]], [[[1], [1]]])},
    )
    same(ours(name, [Intervention(f"L{LAYER}.{component}[1]", Swap())], source=True), wanted, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_several_sites_positions_and_layers_at_once(name):
    """Two interventions, each at two positions per example, one in front of the other."""
    base_at, source_at = [[2, 4], [3, 5]], [[1, 3], [2, 4]]
    sites = [(0, "mlp_output"), (2, "block_output")]
    wanted = oracle.run(
        pyvenes(name),
        [
            {"layer": layer, "component": part, "max_number_of_units": 2, "intervention": pyvene.VanillaIntervention()}
            for layer, part in sites
        ],
        BASE,
        source=SOURCE,
        locations={"sources->base": ([source_at] * 2, [base_at] * 2)},
    )
    plan = [
        Intervention(f"L{layer}.{part}", Swap(), At(base_at), source_positions=At(source_at)) for layer, part in sites
    ]
    same(ours(name, plan, source=True), wanted, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_an_edited_prompt(name):
    vector = 3 * random_tensor(32, seed=6)
    engine = oracle.wrapped(
        tiny(name), representation("block_output", pyvene.AdditionIntervention(source_representation=vector))
    )
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    batch = {"input_ids": BASE[:1], "attention_mask": torch.ones_like(BASE[:1])}
    last = BASE.shape[1] - 1
    _, wanted = engine.generate(batch, unit_locations={"base": [[[last]]]}, intervene_on_prompt=True, **options)
    model = model_of(name)
    with torch.no_grad(), intervene(model, [Intervention("L1.block_output", Add(vector), LastToken(), phase="prompt")]):
        found = model.generate(**batch, **options)
    plain = model.generate(**batch, **options)
    assert (wanted.logits[0] - plain.logits[0]).abs().max() > 1e-3, "the edit shows in nothing"
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), atol=TOLERANCE, rtol=0)
