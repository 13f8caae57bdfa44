"""Other tools' files: written here by torch itself, and read back to the rotation that torch computes."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from alignments.bundle import save_bundle
from alignments.imports import BEST, LAST, import_alignment, import_causalab, import_original, read_featurizer, rotation
from intervene import (
    At,
    Coordinates,
    Identity,
    Intervention,
    LastToken,
    ShapeMismatch,
    Site,
    StoreError,
    Subspace,
    Swap,
    Unsupported,
)
from intervene.store import save_plan
from tests.alignments.planted import toy_tokenizer
from tests.alignments.test_bundle import plan, prepared
from tests.tiny import tiny_model

WIDTH = 32


class Rotate(torch.nn.Module):
    """What the original and CausalAbstraction parametrise: one orthogonally initialised weight."""

    def __init__(self, width, rank):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.nn.init.orthogonal_(torch.empty(width, rank)))


def layer(*, trivialised, rank=WIDTH, width=WIDTH):
    made = torch.nn.utils.parametrizations.orthogonal(Rotate(width, rank), use_trivialization=trivialised)
    with torch.no_grad():  # as after some steps of learning
        weight = made.parametrizations.weight.original
        weight.add_(0.1 * torch.randn(weight.shape))
        if rank < width:  # a Householder form keeps its signs on the diagonal
            weight.diagonal().copy_(weight.diagonal().sign())
    return made


def checkpoint(file, made, boundaries=(0.5, -1.2), temperature=16.9):
    torch.save(
        {
            "rotate_layer": made.state_dict(),
            "intervention_boundaries": torch.nn.Parameter(torch.tensor(list(boundaries))),
            "temperature": torch.nn.Parameter(torch.tensor(temperature)),
        },
        file,
    )
    return file


def das_config(folder, start=80, stop=81, layer=1):
    (folder / "das_config").mkdir(parents=True)
    (folder / "das_config" / "config.json").write_text(
        json.dumps({"das_layer": layer, "das_token_range": [start, stop], "model_type": "llama"})
    )


def same_span(found, wanted):
    torch.testing.assert_close(found @ found.T, wanted @ wanted.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trivialised", [False, True])
@pytest.mark.parametrize("rank", [WIDTH, 5])
def test_a_rotation_is_what_torch_evaluates(trivialised, rank):
    made = layer(trivialised=trivialised, rank=rank)
    assert ("parametrizations.weight.0.base" in made.state_dict()) is trivialised
    found = rotation(made.state_dict())
    torch.testing.assert_close(found.float(), made.weight.detach(), atol=2e-5, rtol=2e-5)


def test_without_a_base_the_rotation_is_the_exponential_of_the_skew_part():
    made = layer(trivialised=False)
    x = made.state_dict()["parametrizations.weight.original"].double()
    skew = x.tril() - x.tril().mT
    torch.testing.assert_close(rotation(made.state_dict()), torch.matrix_exp(skew), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("trivialised", [False, True])
def test_the_original_checkpoint_becomes_the_columns_inside_its_boundary(tmp_path, trivialised):
    made = layer(trivialised=trivialised)
    checkpoint(tmp_path / BEST, made)
    das_config(tmp_path, layer=1)
    found = import_original(tmp_path)
    (item,) = found.plan
    assert (item.site, item.positions) == (Site("block_output", 1), At(80))
    # clamp(0.5) of half of 32 dimensions: 8, where the notebook would have drawn 16
    assert found.facts == pytest.approx({
        "boundary_fraction": 0.5, "temperature": 16.9, "width": 32, "boundary": 8, "boundary_as_plotted": 16
    })  # fmt: skip
    same_span(item.featurizer.frame(), made.weight.detach()[:, :8])
    second = import_original(tmp_path, variable=1).plan[0]
    same_span(second.featurizer.frame(), made.weight.detach()[:, 8:16])


def test_one_boundary_is_of_the_whole_width(tmp_path):
    file = checkpoint(tmp_path / "pytorch-rotate-last.bin", layer(trivialised=True), boundaries=(0.25,))
    found = import_original(file, site="L0.block_output", positions=LastToken())
    assert found.plan[0].featurizer.rank == 8 and found.facts["boundary"] == 8
    with pytest.raises(ShapeMismatch, match=r"variable 1 of 1\. Use 0"):
        import_original(file, site="L0.block_output", positions=LastToken(), variable=1)


def test_the_published_gate_is_the_original_class_s_formula(tmp_path):
    made = layer(trivialised=True)
    file = checkpoint(tmp_path / BEST, made, temperature=2.0)
    for variable, (left, right) in enumerate([(0.0, 8.0), (8.0, 16.0)]):
        found = import_original(
            file, site="L0.block_output", positions=LastToken(), gate="published", variable=variable
        )
        base, source = torch.randn(1, 1, WIDTH), torch.randn(1, 1, WIDTH)
        index = torch.arange(WIDTH)
        mask = torch.sigmoid((index - left) / 2.0) * torch.sigmoid((right - index) / 2.0)
        weight = made.weight.detach()
        expected = ((1 - mask) * (base @ weight) + mask * (source @ weight)) @ weight.T
        item = found.plan[0]
        item.edit.eval()
        lens = item.featurizer
        got = lens.write(base, item.edit(lens.read(base), lens.read(source)))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_several_tokens_or_another_width_are_refused(tmp_path):
    checkpoint(tmp_path / BEST, layer(trivialised=True))
    with pytest.raises(StoreError, match=r"no das_config beside it says where it belongs\. Pass site= and positions="):
        import_original(tmp_path)
    das_config(tmp_path, 79, 81)
    with pytest.raises(Unsupported, match="a rotation of 32 dimensions over 2 tokens"):
        import_original(tmp_path)
    other = tmp_path / "narrow"
    other.mkdir()
    checkpoint(other / BEST, layer(trivialised=True, width=16, rank=16))
    with pytest.raises(Unsupported, match=r"16 dimensions over L0\.block_output, which is 32 wide"):
        import_original(other, site="L0.block_output", positions=At(0), model=tiny_model("llama"))


def test_files_that_would_run_code_or_are_something_else_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    file = tmp_path / BEST
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(StoreError, match="does not hold plain tensors alone"):
        import_original(file, site="L0.block_output", positions=At(0))
    torch.save({"weights": torch.zeros(2)}, file)
    with pytest.raises(StoreError, match=r"holds \['weights'\], an original checkpoint holds rotate_layer"):
        import_original(file, site="L0.block_output", positions=At(0))
    empty = tmp_path / "nothing"
    empty.mkdir()
    with pytest.raises(StoreError, match=f"holds neither {BEST} nor {LAST}"):
        import_original(empty)
    with pytest.raises(StoreError, match=r"the state has keys weight\. Needs"):
        rotation({"weight": torch.eye(3)})


def causalab(base, made, rank, kind="Subspace"):
    """Write what CausalAbstraction's save_modules writes: two files of model_info and state."""
    module = torch.nn.Module()
    if made is not None:
        module.rotate = made
    config = {} if made is None else {"rotation_matrix": made.weight.detach().clone(), "requires_grad": True}
    info = {
        "featurizer_class": f"{kind}FeaturizerModule", "inverse_featurizer_class": f"{kind}InverseFeaturizerModule",
        "n_features": rank, "additional_config": config,
    }  # fmt: skip
    for end in ("_featurizer", "_inverse_featurizer"):
        torch.save({"model_info": info, "state_dict": module.state_dict()}, f"{base}{end}")
    return base


def test_a_causalab_featurizer_is_its_rotation(tmp_path):
    made = layer(trivialised=True, rank=5)
    base = causalab(tmp_path / "unit", made, 5)
    (item,) = import_causalab(base, "L1.block_output", LastToken())
    assert isinstance(item.edit, Swap) and item.featurizer.rank == 5
    same_span(item.featurizer.frame(), made.weight.detach())
    (tmp_path / "unit_indices").write_text("[0, 3]")
    same_span(read_featurizer(base).frame(), made.weight.detach()[:, [0, 3]])
    (tmp_path / "unit_indices").write_text('"all"')
    with pytest.raises(StoreError, match="neither null nor a list"):
        read_featurizer(base)


def test_what_newer_causalab_keeps_in_one_file_is_read_too(tmp_path):
    made = layer(trivialised=True, rank=5)
    told = torch.load(f"{causalab(tmp_path / 'unit', made, 5)}_featurizer", weights_only=True)
    one = {
        "model_info": told["model_info"] | {"featurizer_id": "subspace"},
        "featurizer_state_dict": told["state_dict"],
        "inverse_state_dict": told["state_dict"],
    }
    torch.save(one, tmp_path / "site.pt")
    same_span(read_featurizer(tmp_path / "site.pt").frame(), made.weight.detach())
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(StoreError, match="no model_info and state_dict in it"):
        read_featurizer(tmp_path / "list.pt")


def test_identity_and_unknown_classes(tmp_path):
    base = causalab(tmp_path / "unit", None, None, "Identity")
    assert isinstance(read_featurizer(base), Identity)
    (tmp_path / "unit_indices").write_text("[4]")
    assert isinstance(read_featurizer(base), Coordinates)
    with pytest.raises(Unsupported, match="class 'SAEFeaturizerModule'"):
        read_featurizer(causalab(tmp_path / "sae", None, None, "SAE"))


def test_any_of_them_is_read_by_what_is_there(tmp_path):
    model = tiny_model("llama")
    save_plan(plan(), tmp_path / "plan")
    save_bundle(
        tmp_path / "bundle", plan(), model, toy_tokenizer(), pairs=prepared(model), scores=[], task="toy", variable="p"
    )
    base = causalab(tmp_path / "unit", layer(trivialised=True, rank=5), 5)
    (tmp_path / "run").mkdir()
    checkpoint(tmp_path / "run" / LAST, layer(trivialised=False))
    place = {"site": "L1.block_output", "positions": LastToken()}
    ranks = {
        "plan": import_alignment(tmp_path / "plan"),
        "bundle": import_alignment(tmp_path / "bundle", model=model),
        "unit": import_alignment(base, **place),
        "run": import_alignment(tmp_path / "run", **place),
    }
    assert {name: made[0].featurizer.rank for name, made in ranks.items()} == {
        "plan": 4, "bundle": 4, "unit": 5, "run": 8
    }  # fmt: skip
    with pytest.raises(StoreError, match="says nothing of its place"):
        import_alignment(base)
    with pytest.raises(StoreError, match="no alignment is known there"):
        import_alignment(tmp_path)


def test_pyvenes_folder_is_among_them(tmp_path):
    pyvene = pytest.importorskip("pyvene")
    model = tiny_model("llama")
    config = pyvene.IntervenableConfig([
        {"layer": 1, "component": "block_output", "low_rank_dimension": 3,
         "intervention_type": pyvene.LowRankRotatedSpaceIntervention}
    ])  # fmt: skip
    wrapped = pyvene.IntervenableModel(config, model)
    wrapped.save(str(tmp_path / "pv"))
    (item,) = import_alignment(tmp_path / "pv", model=model)
    assert isinstance(item, Intervention) and isinstance(item.featurizer, Subspace) and item.featurizer.rank == 3
    weight = next(iter(wrapped.interventions.values()))
    weight = weight[0] if isinstance(weight, (tuple, list)) else weight
    same_span(item.featurizer.frame().detach().float(), weight.rotate_layer.weight.detach())
