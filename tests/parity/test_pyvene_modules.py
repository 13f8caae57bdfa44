"""pyvene's modules inside our engine, and plans written as pyvene's."""

from __future__ import annotations

import copy

import pytest
import torch

from intervene import (
    Add,
    At,
    Coordinates,
    GatedSwap,
    Intervention,
    LastToken,
    Set,
    Subspace,
    Swap,
    Zero,
    interchange,
    intervene,
    trainable_parameters,
)
from intervene.errors import ShapeMismatch, Unsupported
from intervene.pyvene_compat import PyveneEdit, from_pyvene, locations_to_pyvene, to_pyvene

from . import oracle
from .cases import BASE, BASE_AT, HERE, SOURCE, SOURCE_AT, VECTOR, WIDTH, ours, same, seeded, theirs, wide
from .tiny import random_frame, random_tensor

pyvene = oracle.pyvene
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")  # pyvene's SigmoidMask


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
    model = wide()
    out = interchange(model, plan, {"input_ids": BASE}, {"input_ids": SOURCE})
    out.logits.sum().backward()
    assert plan[0].edit.module.weight.grad.abs() > 0

    class Looker(torch.nn.Module):
        def forward(self, base, source, subspaces=None):
            return None

    with torch.no_grad(), intervene(model, [Intervention("L1.mlp_output", PyveneEdit(Looker(), needs_source=False))]):
        assert torch.equal(model(input_ids=BASE).logits, wide()(input_ids=BASE).logits)


@pytest.mark.parametrize("kind", ["CollectIntervention", "SkipIntervention"])
def test_pyvene_edit_refuses_what_is_no_edit(kind):
    with pytest.raises(Unsupported, match=kind):
        PyveneEdit(getattr(pyvene, kind)())


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
