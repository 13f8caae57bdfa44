"""MIB submissions: what is written is read back, also by a hand-written reader that does what their loader does."""

from __future__ import annotations

import ast
import json

import pytest
import torch

from alignments.mib import MIB_MODELS, export_mib, read_mib
from intervene import (
    Add,
    At,
    BadPosition,
    GatedSwap,
    Identity,
    Intervention,
    LastToken,
    Site,
    StoreError,
    Subspace,
    Swap,
    Unsupported,
)
from intervene.featurizers import Block
from intervene.marked import Marked

NAMES = {"task": "ioi_task", "model": "Qwen2ForCausalLM", "variable": "output_position"}
FOLDER = "ioi_task_Qwen2ForCausalLM_output_position"
UNIT = "ResidualStream(Layer-17,Token-last_token)"


def plan(lens=None, site="L17.block_output", where="last", edit=None):
    lens = Subspace(16, 4, seed=3) if lens is None else lens
    return [Intervention(site, edit or Swap(), Marked(where), lens)]


class Rotate(torch.nn.Module):
    def __init__(self, width, rank):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(width, rank))


class Featurize(torch.nn.Module):
    def __init__(self, rotate):
        super().__init__()
        self.rotate = rotate

    def forward(self, x):
        features = x @ self.rotate.weight
        return features, x - features @ self.rotate.weight.T


def load_as_theirs(base):
    """Do what the benchmark's loader does: rebuild a rotation of the stored shape, and load the state strictly."""
    first, second = (torch.load(f"{base}{end}", weights_only=True) for end in ("_featurizer", "_inverse_featurizer"))
    info = first["model_info"]
    if info["featurizer_class"] == "IdentityFeaturizerModule":
        torch.nn.Module().load_state_dict(first["state_dict"])
        return None, info["n_features"]
    assert info["featurizer_class"] == "SubspaceFeaturizerModule"
    matrix = info["additional_config"]["rotation_matrix"]
    rotate = Rotate(*matrix.shape)
    rotate.weight.data.copy_(matrix)
    rotate = torch.nn.utils.parametrizations.orthogonal(rotate)
    rotate.requires_grad_(info["additional_config"]["requires_grad"])
    module = Featurize(rotate)
    module.load_state_dict(first["state_dict"])
    module.load_state_dict(second["state_dict"])
    return module, info["n_features"]


def verify(folder):
    """Do what verify_submission.py does to one folder: literal indices, named classes, all three files per unit."""
    known = {f"{kind}{side}Module" for kind in ("Subspace", "Identity") for side in ("Featurizer", "InverseFeaturizer")}
    units = {file.name.rpartition("_")[0].removesuffix("_inverse") for file in folder.iterdir()}
    for unit in units:
        text = (folder / f"{unit}_indices").read_text()
        assert text == "null" or isinstance(ast.literal_eval(text), list)
        for side in ("featurizer", "inverse_featurizer"):
            told = torch.load(folder / f"{unit}_{side}", weights_only=True)
            assert told["model_info"][f"{side}_class"] in known and "state_dict" in told
    return units


def test_a_subspace_is_read_by_their_loader_and_by_ours(tmp_path):
    lens = Subspace(16, 4, seed=3)
    folder = export_mib(tmp_path, [plan(lens)], **NAMES)
    assert folder.name == FOLDER and verify(folder) == {UNIT}
    theirs, features = load_as_theirs(folder / UNIT)
    frame = lens.frame().detach()
    torch.testing.assert_close(theirs.rotate.weight.detach(), frame, atol=1e-5, rtol=1e-5)
    x = torch.randn(3, 16)
    read, error = theirs(x)
    torch.testing.assert_close(read, x @ frame, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(error, x - x @ frame @ frame.T, atol=1e-5, rtol=1e-5)
    assert features == 4
    found = read_mib(folder, {"last_token": LastToken()})
    assert (found.task, found.model, found.variable) == tuple(NAMES.values())
    (item,) = found.plans[UNIT]
    assert (item.site, item.positions) == (Site("block_output", 17), LastToken())
    torch.testing.assert_close(item.featurizer.frame(), frame, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 16])
def test_any_rank_up_to_the_width(tmp_path, rank):
    lens = Subspace(16, rank, seed=1)
    folder = export_mib(tmp_path, [plan(lens)], **NAMES)
    theirs, _ = load_as_theirs(folder / UNIT)
    torch.testing.assert_close(theirs.rotate.weight.detach(), lens.frame().detach(), atol=1e-5, rtol=1e-5)
    (item,) = read_mib(folder, {"last_token": At(0)}).plans[UNIT]
    torch.testing.assert_close(item.featurizer.frame(), lens.frame().detach(), atol=1e-5, rtol=1e-5)


def test_blocks_and_gates_become_subspaces_without_indices(tmp_path):
    whole = Subspace(16, 6, seed=2)
    gate = GatedSwap(6)
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([1.0, -1, 1, -1, -1, -1]))
    plans = [plan(Block(whole, 2, 5)), plan(whole, site="L3.block_output", edit=gate)]
    folder = export_mib(tmp_path, plans, **NAMES)
    first, _ = load_as_theirs(folder / UNIT)
    torch.testing.assert_close(first.rotate.weight, whole.frame()[:, 2:5].detach(), atol=1e-5, rtol=1e-5)
    second, features = load_as_theirs(folder / "ResidualStream(Layer-3,Token-last_token)")
    torch.testing.assert_close(second.rotate.weight, whole.frame()[:, [0, 2]].detach(), atol=1e-5, rtol=1e-5)
    assert features == 2
    assert {json.loads(file.read_text()) for file in folder.glob("*_indices")} == {None}


def test_identity_heads_and_the_input_of_the_first_block(tmp_path):
    plans = [
        plan(Identity()),
        plan(site="L2.head_output[5]", where="subject2"),
        plan(site="L0.block_input", where="subject2"),
    ]
    folder = export_mib(tmp_path, plans, **NAMES)
    head = "AttentionHead(Layer-2,Head-5,Token-subject2)"
    embedded = "ResidualStream(Layer--1,Token-subject2)"
    assert verify(folder) == {UNIT, head, embedded}
    assert load_as_theirs(folder / UNIT) == (None, None)
    found = read_mib(folder, {"last_token": LastToken(), "subject2": At(3)})
    assert isinstance(found.plans[UNIT][0].featurizer, Identity)
    assert str(found.plans[head][0].site) == "L2.head_attention_value_output[5]"
    assert str(found.plans[embedded][0].site) == "L0.block_input"


@pytest.mark.parametrize("unit", ["ResidualStream(Layer:4,Token:x)", "ResidualStream(Layer-4,block_output,Token-x)"])
def test_other_spellings_of_a_unit_are_read(tmp_path, unit):
    folder = export_mib(tmp_path, [plan()], **NAMES)
    for file in list(folder.iterdir()):
        file.rename(folder / file.name.replace(UNIT, unit))
    assert str(read_mib(folder, {"x": At(0)}).plans[unit][0].site) == "L4.block_output"


def test_exports_that_their_loader_could_not_read_are_refused(tmp_path):
    for made, message in (
        ([], "no plan was given"),
        ([plan(), plan()], "two plans are at ResidualStream"),
        ([plan(site="L3.mlp_output")], r"L3\.mlp_output: its loader has no such unit"),
        ([plan(site="L-1.block_output")], "with n from 0"),
        ([plan(edit=Add(torch.ones(4)))], "Add does more than"),
        ([plan(where="a,b")], "cannot stand in a file's name"),
        ([[Intervention("L3.block_output", Swap(), LastToken())]], "LastToken.* has no name there"),
        ([[*plan(), *plan()]], "a plan of 2 interventions"),
    ):
        with pytest.raises((StoreError, Unsupported), match=message):
            export_mib(tmp_path, made, **NAMES)
    gate = GatedSwap(16)
    with torch.no_grad():
        gate.logits[3] = 1.0
    with pytest.raises(Unsupported, match="single coordinates would be lost"):
        export_mib(tmp_path, [plan(Identity(), edit=gate)], **NAMES)
    assert list(tmp_path.iterdir()) == []


def test_names_are_the_benchmarks(tmp_path):
    with pytest.raises(StoreError, match=r"no task 'ioi'\. Did you mean ioi_task"):
        export_mib(tmp_path, [plan()], **{**NAMES, "task": "ioi"})
    with pytest.raises(StoreError, match="no variable 'position'"):
        export_mib(tmp_path, [plan()], **{**NAMES, "variable": "position"})
    assert "Qwen2ForCausalLM" in MIB_MODELS
    export_mib(tmp_path, [plan()], **NAMES)
    with pytest.raises(StoreError, match=r"it exists\. Choose another folder"):
        export_mib(tmp_path, [plan()], **NAMES)


def test_damaged_submissions_say_so(tmp_path):
    folder = export_mib(tmp_path, [plan()], **NAMES)
    with pytest.raises(BadPosition, match="say nothing of token 'last_token'"):
        read_mib(folder, {})
    with pytest.raises(StoreError, match="is not <task>_<model>_<variable>"):
        read_mib(tmp_path, {})
    (folder / f"{UNIT}_inverse_featurizer").unlink()
    with pytest.raises(StoreError, match="_inverse_featurizer is missing"):
        read_mib(folder, {"last_token": At(0)})
    (folder / f"{UNIT}_featurizer").rename(folder / "Neuron(3)_featurizer")
    (folder / "Neuron(3)_inverse_featurizer").write_bytes((folder / "Neuron(3)_featurizer").read_bytes())
    with pytest.raises(StoreError, match=r"MIB unit 'Neuron\(3\)'"):
        read_mib(folder, {"last_token": At(0)})
