"""pyvene's configurations, folders and modules give here what they give in pyvene, or are refused by name."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch

from intervene import (
    Add,
    AllTokens,
    At,
    BoundarySwap,
    Coordinates,
    GatedSwap,
    Identity,
    InterveneError,
    Intervention,
    LastToken,
    Set,
    Site,
    Subspace,
    Swap,
    Zero,
    interchange,
    intervene,
    trainable_parameters,
)
from intervene.errors import BadPosition, ShapeMismatch, StoreError, Unsupported
from intervene.pyvene_compat import (
    Location,
    PyveneEdit,
    from_pyvene,
    locations_to_pyvene,
    positions_from_pyvene,
    to_pyvene,
)

from . import oracle
from .tiny import random_frame, random_tensor, tiny, token_ids

pyvene = oracle.pyvene
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")  # pyvene's SigmoidMask

TOLERANCE = 2e-6  # logits of size 4 in fp32, after two orders of the same products
WIDTH = 32
BASE, SOURCE = token_ids(0), token_ids(1)
BASE_AT, SOURCE_AT = [[4], [5]], [[2], [3]]
LOCATIONS = oracle.positions(BASE_AT, SOURCE_AT)
HERE = {"layer": 1, "component": "mlp_output"}
VECTOR = random_tensor(WIDTH, seed=1)


def ours(plan, model=None):
    """Return our logits, with a source run where some edit needs one."""
    model = tiny("llama") if model is None else model
    with torch.no_grad():
        return interchange(model, plan, {"input_ids": BASE}, {"input_ids": SOURCE}).logits


def theirs(representations, locations=LOCATIONS, **options):
    """Return pyvene's logits, with a source run unless the locations are of the base alone."""
    source = None if "base" in locations else SOURCE
    return oracle.run(tiny("llama"), representations, BASE, source=source, locations=locations, **options)


def same(found, wanted):
    assert (wanted - tiny("llama")(input_ids=BASE).logits).abs().max() > 1e-3, "the edit shows in nothing"
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def shaken(module):
    """Return the module with gates and temperature that are neither all open nor all shut."""
    for name, parameter in module.named_parameters():
        if name in ("mask", "masks"):
            parameter.data = random_tensor(*parameter.shape, seed=2)
        if name == "temperature":
            parameter.data = torch.tensor(0.7)
    return module


MODULES = {
    "Vanilla": lambda: pyvene.VanillaIntervention(),
    "Vanilla, part": lambda: _part(pyvene.VanillaIntervention(embed_dim=WIDTH)),
    "Vanilla, constant": lambda: pyvene.VanillaIntervention(source_representation=VECTOR),
    "Zero": lambda: pyvene.ZeroIntervention(),
    "Addition": lambda: pyvene.AdditionIntervention(source_representation=VECTOR),
    "Addition, part": lambda: _part(pyvene.AdditionIntervention(embed_dim=WIDTH, source_representation=VECTOR)),
    "Subtraction": lambda: pyvene.SubtractionIntervention(source_representation=VECTOR[None, None]),
    "LowRankRotatedSpace": lambda: pyvene.LowRankRotatedSpaceIntervention(embed_dim=WIDTH, low_rank_dimension=4),
    "RotatedSpace": lambda: pyvene.RotatedSpaceIntervention(embed_dim=WIDTH),
    "RotatedSpace, part": lambda: _part(pyvene.RotatedSpaceIntervention(embed_dim=WIDTH)),
    "SigmoidMask": lambda: shaken(pyvene.SigmoidMaskIntervention(embed_dim=WIDTH)),
    "SigmoidMaskRotatedSpace": lambda: shaken(pyvene.SigmoidMaskRotatedSpaceIntervention(embed_dim=WIDTH)),
}


def _part(module):
    module.set_interchange_dim(5)
    return module


@pytest.mark.parametrize("kind", MODULES)
def test_from_a_module(kind):
    representation = HERE | {"intervention": seeded(MODULES[kind])}
    plan = from_pyvene(copy.deepcopy(representation), unit_locations=LOCATIONS)
    same(ours(plan), theirs(representation))


@pytest.mark.parametrize("kind", MODULES)
def test_pyvene_edit_runs_the_module_itself(kind):
    module = seeded(MODULES[kind])
    wanted = theirs(HERE | {"intervention": copy.deepcopy(module)})
    source_at = At(SOURCE_AT) if not module.is_source_constant else None
    item = Intervention("L1.mlp_output", PyveneEdit(module), At(BASE_AT), source_positions=source_at)
    assert item.edit.needs_source is not module.is_source_constant
    same(ours([item]), wanted)


@pytest.mark.parametrize("kind", ["LowRankRotatedSpace", "RotatedSpace, part", "SigmoidMaskRotatedSpace"])
def test_from_a_folder(kind, tmp_path):
    """As pyvene saves and loads it, for two layers under one kind."""
    types = seeded(lambda: [MODULES[kind](), MODULES[kind]()])
    names = [HERE | {"layer": layer, "low_rank_dimension": 4, "intervention_type": type(types[0])} for layer in (0, 2)]
    engine = oracle.wrapped(tiny("llama"), names)
    for module, made in zip(types, engine.interventions.values(), strict=True):
        made.load_state_dict(module.state_dict())
        made.set_interchange_dim(module.interchange_dim)
    engine.save(str(tmp_path / "saved"))
    locations = {"sources->base": ([SOURCE_AT] * 2, [BASE_AT] * 2)}
    with torch.no_grad():
        wanted = engine({"input_ids": BASE}, [{"input_ids": SOURCE}] * 2, locations)[1].logits
    plan = from_pyvene(tmp_path / "saved", unit_locations=locations)
    assert [str(item.site) for item in plan] == ["L0.mlp_output", "L2.mlp_output"]
    same(ours(plan), wanted)


def test_from_a_folder_of_swaps_and_constants(tmp_path):
    """A saved swap holds no tensors, only pyvene's idea of the width; a constant is a file."""
    representations = [
        HERE | {"layer": 0, "intervention_type": pyvene.VanillaIntervention},
        HERE | {"layer": 1, "intervention_type": pyvene.AdditionIntervention, "source_representation": VECTOR},
        HERE | {"layer": 2, "intervention_type": pyvene.ZeroIntervention},
    ]
    engine = oracle.wrapped(tiny("llama"), representations)
    engine.save(str(tmp_path))
    locations = {"sources->base": ([SOURCE_AT] * 3, [BASE_AT] * 3)}
    with torch.no_grad():
        wanted = engine({"input_ids": BASE}, [{"input_ids": SOURCE}] * 3, locations)[1].logits
    model = tiny("llama")
    plan = from_pyvene(tmp_path, model, unit_locations=locations)
    assert [type(item.edit) for item in plan] == [Swap, Add, Zero]
    same(ours(plan, model), wanted)
    with pytest.raises(InterveneError, match="Pass model="):
        from_pyvene(tmp_path)


def test_a_saved_swap_covers_heads_wider_than_the_stream(tmp_path):
    """pyvene saves hidden_size, 32, for a component that is 64 wide: the whole was meant."""
    model = tiny("llama_wide_heads")
    names = {"layer": 1, "component": "query_output", "intervention_type": pyvene.VanillaIntervention}
    oracle.wrapped(tiny("llama_wide_heads"), names).save(str(tmp_path))
    (item,) = from_pyvene(tmp_path, model)
    assert isinstance(item.featurizer, Identity)


def test_a_folder_is_read_without_pyvene(tmp_path):
    oracle.wrapped(
        tiny("llama"),
        HERE | {"low_rank_dimension": 4, "intervention_type": pyvene.LowRankRotatedSpaceIntervention},
    ).save(str(tmp_path))
    code = (
        "import sys; sys.modules['pyvene'] = None\n"
        "from intervene.pyvene_compat import from_pyvene\n"
        f"print(from_pyvene({str(tmp_path)!r})[0].featurizer.rank)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "4"


def test_from_every_way_of_writing_a_configuration():
    named = pyvene.RepresentationConfig(2, "block_input", intervention_type=pyvene.ZeroIntervention)
    listed = [2, "block_input", "pos", 1, None, "<class 'pyvene.models.interventions.ZeroIntervention'>"]
    as_dict = {"layer": 2, "component": "block_input", "intervention_type": "ZeroIntervention"}
    config = pyvene.IntervenableConfig([{"layer": 2, "component": "block_input"}], pyvene.ZeroIntervention)
    loose = {"representations": [{"layer": 2, "component": "block_input"}], "intervention_types": ["ZeroIntervention"]}
    for written in (named, [named], [listed], as_dict, [as_dict], config, loose):
        (item,) = from_pyvene(written)
        assert (str(item.site), type(item.edit), item.positions) == ("L2.block_input", Zero, AllTokens())
    (default,) = from_pyvene({})
    assert (str(default.site), type(default.edit)) == ("L0.block_output", Swap)


def test_fresh_rotations_take_their_width_from_the_model():
    model = tiny("llama")
    written = [
        {
            "component": "mlp_activation",
            "low_rank_dimension": 3,
            "intervention_type": "LowRankRotatedSpaceIntervention",
        },
        {"component": "key_output", "intervention_type": "SigmoidMaskIntervention"},
    ]
    low, mask = from_pyvene(written, model)
    assert (low.featurizer.width, low.featurizer.rank, mask.edit.features) == (48, 3, 16)
    assert len(trainable_parameters([low, mask])) == 2
    assert trainable_parameters(from_pyvene(written, model, trainable=False)) == []
    with pytest.raises(InterveneError, match="Pass model="):
        from_pyvene(written)


def test_boundless_keeps_rotation_boundary_and_temperature_and_warns_of_the_other_gate():
    module = seeded(lambda: pyvene.BoundlessRotatedSpaceIntervention(embed_dim=WIDTH))
    module.set_intervention_boundaries(0.25)
    module.set_temperature(torch.tensor(0.1))
    with pytest.warns(UserWarning, match="never swaps more than half of the first feature"):
        (item,) = from_pyvene(HERE | {"intervention": module}, unit_locations=LOCATIONS)
    assert isinstance(item.edit, BoundarySwap)
    torch.testing.assert_close(item.featurizer.frame(), module.rotate_layer.weight.detach(), atol=1e-6, rtol=0)
    assert int(item.edit.rank()) == 8
    assert item.edit.temperature * WIDTH == pytest.approx(0.1)
    index = torch.arange(WIDTH, dtype=torch.float32)
    pyvenes = torch.sigmoid(index / 0.1) * torch.sigmoid((8 - index) / 0.1)
    difference = (item.edit.gate() - pyvenes).abs().detach()
    assert difference[0] == pytest.approx(0.5, abs=1e-3)
    assert difference[8] == pytest.approx(0.5, abs=1e-2)  # theirs is half open at the boundary itself
    assert difference[[i for i in range(WIDTH) if i not in (0, 8)]].max() < 0.01
    wanted = theirs(HERE | {"intervention": copy.deepcopy(module)})
    exact = Intervention("L1.mlp_output", PyveneEdit(module), At(BASE_AT), source_positions=At(SOURCE_AT))
    same(ours([exact]), wanted)


def test_heads():
    frame_module = seeded(lambda: pyvene.LowRankRotatedSpaceIntervention(embed_dim=16, low_rank_dimension=3))
    locations = oracle.heads_at([3, 1], BASE_AT, SOURCE_AT)
    for module in (pyvene.VanillaIntervention(), frame_module):
        written = {"layer": 1, "component": "head_attention_value_output", "unit": "h.pos", "max_number_of_units": 2}
        written["intervention"] = module
        wanted = theirs(copy.deepcopy(written), locations)
        (item,) = from_pyvene(written, unit_locations=locations)
        assert item.site == Site("head_output", 1, (3, 1))
        same(ours([item]), wanted)
        itself = Intervention(item.site, PyveneEdit(module, heads=2), At(BASE_AT), source_positions=At(SOURCE_AT))
        same(ours([itself]), wanted)


def test_subspaces_and_partitions():
    """Named columns, columns by partition, and columns of a rotation."""
    partition = [[0, 8], [8, 24], [24, 30, 31]]
    low = seeded(lambda: pyvene.LowRankRotatedSpaceIntervention(embed_dim=WIDTH, low_rank_dimension=6))
    full = seeded(lambda: pyvene.RotatedSpaceIntervention(embed_dim=WIDTH))
    low_parted = seeded(
        lambda: pyvene.LowRankRotatedSpaceIntervention(
            embed_dim=WIDTH, low_rank_dimension=6, subspace_partition=[[0, 2], [2, 6]]
        )
    )
    cases = [
        (pyvene.VanillaIntervention(), None, [3, 7]),
        (pyvene.VanillaIntervention(subspace_partition=partition), partition, [0, 2]),
        (full, None, [0, 1, 2]),
        (low, None, [1, 4]),
        (low_parted, [[0, 2], [2, 6]], [1]),
    ]
    for module, parted, chosen in cases:
        written = HERE | {"intervention": module, "subspace_partition": parted}
        wanted = theirs(copy.deepcopy(written), subspaces=[[chosen] * 2])
        for subspaces in (chosen, [chosen], [[chosen, chosen]]):
            same(ours(from_pyvene(written, unit_locations=LOCATIONS, subspaces=subspaces)), wanted)
        edit = PyveneEdit(module, subspaces=chosen)
        same(ours([Intervention("L1.mlp_output", edit, At(BASE_AT), source_positions=At(SOURCE_AT))]), wanted)


def test_string_paths_become_path_sites():
    written = {"component": "model.layers[1].mlp.output", "intervention": pyvene.VanillaIntervention()}
    (item,) = from_pyvene(written, unit_locations=LOCATIONS)
    assert str(item.site) == "path:model.layers.1.mlp.output"
    same(ours([item]), theirs(written))


# --- PyveneEdit -------------------------------------------------------------------------------------------------


def test_pyvene_edit_joins_positions_for_a_module_made_for_several():
    """One rotation over two positions together, which no featurizer of ours is."""
    module = seeded(lambda: pyvene.LowRankRotatedSpaceIntervention(embed_dim=2 * WIDTH, low_rank_dimension=5))
    base_at, source_at = [[2, 4], [3, 5]], [[1, 2], [2, 3]]
    written = HERE | {"intervention": copy.deepcopy(module), "max_number_of_units": 2}
    wanted = theirs(written, oracle.positions(base_at, source_at))
    edit = PyveneEdit(module, positions=2)
    same(ours([Intervention("L1.mlp_output", edit, At(base_at), source_positions=At(source_at))]), wanted)
    with pytest.raises(ShapeMismatch, match="it takes 2 positions at once, and 1 were selected"):
        ours([Intervention("L1.mlp_output", edit, At(4))])
    with pytest.raises(Unsupported, match="LowRankRotatedSpaceIntervention at 'mlp_output' over 2 positions"):
        from_pyvene(written)


def test_pyvene_edit_runs_noise_and_lambdas_and_trains():
    noise = pyvene.NoiseIntervention(embed_dim=WIDTH)
    at = [[1, 2, 3, 4]] * 2
    wanted = theirs(HERE | {"intervention": copy.deepcopy(noise)}, {"base": [at]})
    same(ours([Intervention("L1.mlp_output", PyveneEdit(noise, positions=4), At(at))]), wanted)

    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, base, source, subspaces=None):
            return self.weight * (base + source)

    plan = [Intervention("L1.mlp_output", PyveneEdit(Half()), At(4))]
    assert len(trainable_parameters(plan)) == 1
    model = tiny("llama")
    out = interchange(model, plan, {"input_ids": BASE}, {"input_ids": SOURCE})
    out.logits.sum().backward()
    assert plan[0].edit.module.weight.grad.abs() > 0

    class Looker(torch.nn.Module):
        def forward(self, base, source, subspaces=None):
            return None

    with torch.no_grad(), intervene(model, [Intervention("L1.mlp_output", PyveneEdit(Looker(), needs_source=False))]):
        assert torch.equal(model(input_ids=BASE).logits, tiny("llama")(input_ids=BASE).logits)


@pytest.mark.parametrize("kind", ["CollectIntervention", "SkipIntervention"])
def test_pyvene_edit_refuses_what_is_no_edit(kind):
    with pytest.raises(Unsupported, match=kind):
        PyveneEdit(getattr(pyvene, kind)())


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intervention_type": "CollectIntervention"}, "CollectIntervention.*capture"),
        ({"intervention_type": "SkipIntervention"}, "SkipIntervention"),
        ({"intervention_type": "NoiseIntervention"}, "NoiseIntervention.*four positions"),
        ({"intervention_type": "PCARotatedSpaceIntervention"}, "PCARotatedSpaceIntervention.*standard deviation"),
        ({"intervention_type": "AutoencoderIntervention"}, "AutoencoderIntervention.*SAE"),
        ({"intervention_type": "JumpReLUAutoencoderIntervention"}, "JumpReLUAutoencoderIntervention.*SAE"),
        ({"intervention_type": "LoreftIntervention"}, "LoreftIntervention.*not known.*PyveneEdit"),
        ({"intervention": lambda base, source: base}, "LambdaIntervention.*PyveneEdit"),
        ({"intervention_type": "AdditionIntervention"}, "AdditionIntervention.*no source_representation"),
        ({"intervention_type": "SubtractionIntervention"}, "SubtractionIntervention.*no source_representation"),
        ({"unit": "t"}, "unit 't'"),
        ({"unit": "h"}, "unit 'h'"),
        ({"component": "head_query_output"}, "unit 'pos'"),
        ({"component": "attention_weight"}, "attention_weight"),
        ({"moe_key": 3}, "moe_key"),
        ({"keep_last_dim": True}, "keep_last_dim"),
        ({"intervention_type": "SigmoidMaskIntervention", "max_number_of_units": 2}, "over 2 positions"),
    ],
)
def test_refused_by_name(change, message):
    with pytest.raises(Unsupported, match=message):
        from_pyvene(HERE | change, tiny("llama"))


def test_refused_combinations():
    with pytest.raises(Unsupported, match="serial"):
        from_pyvene({"representations": [HERE], "mode": "serial"})
    masked = HERE | {"intervention": pyvene.SigmoidMaskIntervention(embed_dim=WIDTH)}
    with pytest.raises(Unsupported, match="pyvene ignores them for this kind"):
        from_pyvene(masked, subspaces=[1])
    linked = HERE | {"intervention_link_key": 0}
    with pytest.raises(Unsupported, match="linked interventions on parts"):
        from_pyvene([linked, linked], subspaces=[1])
    heads = {"component": "head_query_output", "unit": "h", "intervention": pyvene.VanillaIntervention()}
    with pytest.raises(Unsupported, match="subspaces within several heads"):
        from_pyvene(heads, subspaces=[1])


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(StoreError, match=r"config\.json cannot be read"):
        from_pyvene(tmp_path)
    rotation = HERE | {"low_rank_dimension": 4, "intervention_type": pyvene.LowRankRotatedSpaceIntervention}
    oracle.wrapped(tiny("llama"), rotation).save(str(tmp_path))
    (file,) = tmp_path.glob("intkey_*.bin")
    whole = file.read_bytes()
    file.unlink()
    with pytest.raises(StoreError, match=r"needs intkey_.*mlp_output of layer 1"):
        from_pyvene(tmp_path)
    file.write_bytes(whole[:100])
    with pytest.raises(StoreError, match="no plain tensors"):
        from_pyvene(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["representations"][0][1] = "../elsewhere/mlp_output"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError, match="leads out of it"):
        from_pyvene(tmp_path)


def test_a_folder_never_runs_code(tmp_path):
    """pyvene imports the class that config.json names and unpickles the file; we do neither."""
    rotation = HERE | {"low_rank_dimension": 4, "intervention_type": pyvene.LowRankRotatedSpaceIntervention}
    oracle.wrapped(tiny("llama"), rotation).save(str(tmp_path))
    (file,) = tmp_path.glob("intkey_*.bin")
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    torch.save({"rotate_layer": Evil()}, file)
    with pytest.raises(StoreError, match="no plain tensors"):
        from_pyvene(tmp_path)
    assert not ran.exists()


# --- locations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("locations", "units", "wanted"),
    [
        (None, ["pos"], [Location()]),
        ({"base": 3}, ["pos"], [Location(At(3))]),
        ({"base": [3, 5]}, ["pos"] * 2, [Location(At(3, 5))] * 2),
        ({"base": [[[1], [2]]]}, ["pos"], [Location(At([[1], [2]]))]),
        ({"base": [[[1, 2], [1, 2]]]}, ["pos"], [Location(At(1, 2))]),
        ({"sources->base": 3}, ["pos"], [Location(At(3), At(3))]),
        ({"sources->base": (2, 4)}, ["pos"], [Location(At(4), At(2))]),
        ({"sources->base": ([[[1], [2]]], [[[3], [4]]])}, ["pos"], [Location(At([[3], [4]]), At([[1], [2]]))]),
        ({"sources->base": (None, [[[3]], [[4]]])}, ["pos"] * 2, [Location(At(3)), Location(At(4))]),
        ({"base": [[[2], [2]]]}, ["h"], [Location(heads=(2,))]),
        ({"base": [[[[2, 1]], [[5]]]]}, ["h.pos"], [Location(At(5), heads=(2, 1))]),
    ],
)
def test_positions_from_pyvene(locations, units, wanted):
    assert positions_from_pyvene(locations, units) == tuple(wanted)


def test_columns_of_a_padded_batch_become_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"attention_mask": mask}
    (location,) = positions_from_pyvene({"base": [[[3], [1]]]}, inputs=inputs)
    assert location.positions == At([[1], [1]])
    assert location.positions.resolve(inputs).tolist() == [[3], [1]]
    with pytest.raises(BadPosition, match="padding"):
        positions_from_pyvene({"base": 4}, inputs=inputs)


@pytest.mark.parametrize(
    ("locations", "units", "error", "message"),
    [
        ({"source_0->base": 1}, ["pos"], Unsupported, "source_0->base"),
        ({"base": [[[1], [2]]]}, ["h"], Unsupported, "differ between examples"),
        ({"sources->base": ([[[1]]], [[[2]]])}, ["h"], Unsupported, r"heads \(1,\) read into \(2,\)"),
        ({"base": [[[1]], [[2]]]}, ["pos"], BadPosition, "for 2 interventions: there are 1"),
        ({"base": 3}, ["h.pos"], BadPosition, r"need \[heads, positions\]"),
        ({"base": [[[1], [2, 3]]]}, ["pos"], BadPosition, "ragged"),
    ],
)
def test_refused_locations(locations, units, error, message):
    with pytest.raises(error, match=message):
        positions_from_pyvene(locations, units)


# --- to_pyvene --------------------------------------------------------------------------------------------------


def gated(frame=None):
    edit = GatedSwap(WIDTH, temperature=0.5)
    edit.logits.data = random_tensor(WIDTH, seed=4)
    return edit


EXPORTED = {
    "swap": lambda: (Swap(), None),
    "part of a swap": lambda: (Swap(), Coordinates(range(7))),
    "zero": lambda: (Zero(), None),
    "set": lambda: (Set(VECTOR), None),
    "add": lambda: (Add(VECTOR, 1.5), None),
    "subspace": lambda: (Swap(), Subspace(WIDTH, 4)),
    "fixed subspace": lambda: (Swap(), Subspace.from_frame(random_frame(WIDTH, 4))),
    "whole rotation": lambda: (Swap(), Subspace(WIDTH, WIDTH)),
    "gates": lambda: (gated(), None),
    "gates in a rotation": lambda: (gated(), Subspace(WIDTH, WIDTH)),
    "a pyvene module": lambda: (PyveneEdit(pyvene.ZeroIntervention()), None),
}


@pytest.mark.parametrize("kind", EXPORTED)
def test_to_pyvene_and_back(kind):
    edit, lens = EXPORTED[kind]()
    source_at = At(SOURCE_AT) if edit.needs_source else None
    plan = [Intervention("L1.mlp_output", edit, At(BASE_AT), lens, source_positions=source_at)]
    wanted = ours(plan)
    locations = locations_to_pyvene(plan, {"input_ids": BASE}, {"input_ids": SOURCE})
    representations = to_pyvene(plan)
    same(theirs(copy.deepcopy(representations), locations), wanted)
    (back,) = from_pyvene(representations, unit_locations=locations)
    assert (back.site, back.positions, back.source_positions) == (plan[0].site, At(BASE_AT), source_at)
    if kind != "a pyvene module":
        assert (type(back.edit), type(back.featurizer)) == (type(edit), type(plan[0].featurizer))
    same(ours([back]), wanted)


def test_to_pyvene_of_heads_a_path_and_a_shared_featurizer():
    shared = Subspace(16, 3)
    where = {"positions": At(BASE_AT), "source_positions": At(SOURCE_AT)}
    plan = [
        Intervention("L0.head_output[3,1]", Swap(), featurizer=shared, **where),
        Intervention("path:model.layers.1.mlp.output", Swap(), **where),
        Intervention("L2.block_output", Swap(), LastToken()),
    ]
    locations = locations_to_pyvene(plan, {"input_ids": BASE}, {"input_ids": SOURCE})
    representations = to_pyvene(plan)
    same(theirs(copy.deepcopy(representations), locations), ours(plan))
    back = from_pyvene(representations, unit_locations=locations)
    assert [str(item.site) for item in back] == [str(item.site) for item in plan]
    same(ours(back), ours(plan))

    swap = Swap()
    twice = [Intervention(f"L{layer}.mlp_output", swap, featurizer=Subspace(WIDTH, 2)) for layer in (0, 1)]
    one = Subspace(WIDTH, 2)
    tied = [Intervention(f"L{layer}.mlp_output", swap, featurizer=one) for layer in (0, 1)]
    apart, together = ([r["intervention"] for r in to_pyvene(p)] for p in (twice, tied))
    assert apart[0] is not apart[1] and together[0] is together[1]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Intervention("L0.mlp_write", Zero()), "component 'mlp_write'"),
        (Intervention("L-1.mlp_output", Zero()), "counted from the end"),
        (Intervention("L0.mlp_output[3]", Zero()), "single columns"),
        (Intervention("L0.head_output", Zero()), "without naming them"),
        (Intervention("L0.mlp_output", Zero(), phase="both"), "phase 'both'"),
        (Intervention("L0.mlp_output", Zero(), featurizer=Subspace(WIDTH, 2)), "Zero through Subspace"),
        (Intervention("L0.mlp_output", Swap(), featurizer=Coordinates([1])), "first n coordinates"),
        (Intervention("L0.mlp_output", Add(VECTOR, relative=True)), "one constant vector"),
        (Intervention("L0.mlp_output", GatedSwap(WIDTH).eval()), r"edit\.train"),
        (Intervention("L0.mlp_output", GatedSwap(4), featurizer=Subspace(WIDTH, 4)), "full rotation"),
    ],
)
def test_to_pyvene_refuses_by_name(item, message):
    with pytest.raises(Unsupported, match=message):
        to_pyvene([item])


def test_ragged_positions_have_no_locations():
    inputs = {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    with pytest.raises(Unsupported, match="as many positions in every example"):
        locations_to_pyvene([Intervention("L0.mlp_output", Zero())], inputs)
