"""A plan read from pyvene's configurations, folders and modules gives what they give in pyvene."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from intervene import (
    Add,
    AllTokens,
    At,
    BoundarySwap,
    Identity,
    InterveneError,
    Intervention,
    Site,
    Swap,
    Zero,
    trainable_parameters,
)
from intervene.pyvene_compat import PyveneEdit, from_pyvene

from . import oracle
from .cases import (
    BASE,
    BASE_AT,
    HERE,
    LOCATIONS,
    MODULES,
    SOURCE,
    SOURCE_AT,
    VECTOR,
    WIDTH,
    ours,
    same,
    seeded,
    theirs,
    wide,
)
from .tiny import tiny

pyvene = oracle.pyvene
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")  # pyvene's SigmoidMask


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


def orthonormal_in_fp64(module):
    """Return the module in fp64 with its rotation's base made orthonormal there.

    As it is drawn in fp32 the base is off by 1e-7. pyvene, which rotates the whole activation there and back, then
    changes all of it by as much (1.2e-6 in the logits); we leave what is outside the swapped part alone.
    """
    module.double()
    for name, base in module.named_buffers():
        if name.endswith(".base"):
            q, r = torch.linalg.qr(base)
            base.copy_(q * r.diagonal().sign())
    return module


@pytest.mark.parametrize("kind", ["LowRankRotatedSpace", "RotatedSpace, part", "SigmoidMaskRotatedSpace"])
def test_from_a_folder(kind, tmp_path):
    """As pyvene saves and loads it, for two layers under one kind."""
    types = seeded(lambda: [MODULES[kind](), MODULES[kind]()])
    names = [HERE | {"layer": layer, "low_rank_dimension": 4, "intervention_type": type(types[0])} for layer in (0, 2)]
    engine = oracle.wrapped(wide(), names)
    for module, made in zip(types, engine.interventions.values(), strict=True):
        made.double().load_state_dict(orthonormal_in_fp64(module).state_dict())
        made.set_interchange_dim(module.interchange_dim)
    engine.save(str(tmp_path / "saved"))
    locations = {"sources->base": ([SOURCE_AT] * 2, [BASE_AT] * 2)}
    with torch.no_grad():
        wanted = engine({"input_ids": BASE}, [{"input_ids": SOURCE}] * 2, locations)[1].logits
    plan = from_pyvene(tmp_path / "saved", unit_locations=locations, trainable=False)
    assert [str(item.site) for item in plan] == ["L0.mlp_output", "L2.mlp_output"]
    same(ours(plan), wanted)


def test_from_a_folder_of_swaps_and_constants(tmp_path):
    """A saved swap holds no tensors, only pyvene's idea of the width; a constant is a file."""
    representations = [
        HERE | {"layer": 0, "intervention_type": pyvene.VanillaIntervention},
        HERE | {"layer": 1, "intervention_type": pyvene.AdditionIntervention, "source_representation": VECTOR},
        HERE | {"layer": 2, "intervention_type": pyvene.ZeroIntervention},
    ]
    engine = oracle.wrapped(wide(), representations)
    engine.save(str(tmp_path))
    locations = {"sources->base": ([SOURCE_AT] * 3, [BASE_AT] * 3)}
    with torch.no_grad():
        wanted = engine({"input_ids": BASE}, [{"input_ids": SOURCE}] * 3, locations)[1].logits
    model = wide()
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
            plan = from_pyvene(written, unit_locations=LOCATIONS, subspaces=subspaces, trainable=False)
            same(ours(plan), wanted)
        edit = PyveneEdit(module, subspaces=chosen)
        same(ours([Intervention("L1.mlp_output", edit, At(BASE_AT), source_positions=At(SOURCE_AT))]), wanted)


def test_string_paths_become_path_sites():
    written = {"component": "model.layers[1].mlp.output", "intervention": pyvene.VanillaIntervention()}
    (item,) = from_pyvene(written, unit_locations=LOCATIONS)
    assert str(item.site) == "path:model.layers.1.mlp.output"
    same(ours([item]), theirs(written))
