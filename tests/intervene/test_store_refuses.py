"""What `load_plan` and `save_plan` refuse: folders that are half there, and files that say what is not understood."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from intervene import Add, Affine, At, Featurizer, Intervention, StoreError, Subspace, Zero
from intervene.pyvene_compat import PyveneEdit
from intervene.store import load_plan, save_plan

D = 32


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(tmp_path):
    return save_plan(
        [Intervention("L0.mlp_output", Add(randn(D)), At(1), Subspace.from_frame(torch.eye(D)))], tmp_path / "plan"
    )


def rewritten(folder, change):
    """Return `folder` with plan.json changed by change(header)."""
    header = json.loads((folder / "plan.json").read_text())
    change(header)
    (folder / "plan.json").write_text(json.dumps(header))
    return folder


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"nowhere: there is no such folder\. Give"):
        load_plan(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_half_a_folder_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(StoreError, match=rf"{name} missing.*half written\. Save"):
        load_plan(folder)


def test_a_cut_json_is_refused(folder):
    text = (folder / "plan.json").read_bytes()
    for length in (0, 1, len(text) // 2, len(text) - 1):
        (folder / "plan.json").write_bytes(text[:length])
        with pytest.raises(StoreError, match="cut off or damaged"):
            load_plan(folder)
    (folder / "plan.json").write_bytes(b"\xff\xfe" + text)
    with pytest.raises(StoreError, match="cut off or damaged"):
        load_plan(folder)


def test_cut_or_changed_tensors_are_refused(folder):
    whole = (folder / "plan.safetensors").read_bytes()
    for damaged in (whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        (folder / "plan.safetensors").write_bytes(damaged)
        with pytest.raises(StoreError, match="SHA-256 differs"):
            load_plan(folder)


def test_a_newer_schema_is_refused_before_its_unknown_keys(folder):
    def newer(header):
        header.update(schema=3, something_new=1)

    with pytest.raises(StoreError, match=r"schema 3, this version reads up to 1: upgrade\."):
        load_plan(rewritten(folder, newer))


@pytest.mark.parametrize("schema", [None, "1", 0, True, 1.0])
def test_a_schema_that_is_no_number_is_refused(folder, schema):
    with pytest.raises(StoreError, match="no schema number"):
        load_plan(rewritten(folder, lambda header: header.update(schema=schema)))


def test_json_that_is_no_plan_is_refused(folder):
    (folder / "plan.json").write_text("[1, 2]")
    with pytest.raises(StoreError, match="no schema number, found None"):
        load_plan(folder)


def change_record(group, **changes):
    return lambda header: header[group][0].update(changes)


def change_position(**changes):
    return lambda header: header["interventions"][0]["positions"].update(changes)


CHANGES = {
    "edit kind": (change_record("edits", kind="Ad"), r"edits\[0\]: unknown kind 'Ad'\. Did you mean Add"),
    "module path": (change_record("edits", kind="os.system"), r"unknown kind 'os\.system'"),
    "featurizer kind": (change_record("featurizers", kind="Rotation"), r"featurizers\[0\]: unknown kind 'Rotation'"),
    "list as kind": (change_record("featurizers", kind=["SAE"]), r"featurizers\[0\]"),
    "positions kind": (change_position(kind="Somewhere"), r"interventions\[0\], positions: unknown kind 'Somewhere'"),
    "edit of another group": (change_record("edits", kind="Identity"), "unknown kind 'Identity'"),
    "other kind": (change_record("edits", kind="Swap", options={}), r"edits\[0\] \(Swap\)|edits\[0\]: tensors"),
    "top key": (lambda header: header.update(colour=1), r"plan\.json: keys unknown colour"),
    "lost key": (lambda header: header.pop("notes"), "missing notes"),
    "record key": (change_record("edits", colour=1), r"edits\[0\]: keys unknown colour"),
    "option key": (change_record("edits", options={"strength": 1.0, "relative": False, "power": 2}), "unknown power"),
    "lost option": (change_record("edits", options={"strength": 1.0}), "missing relative"),
    "item key": (change_record("interventions", speed=1), r"interventions\[0\]: keys unknown speed"),
    "position option": (change_position(options={"indices": [1], "x": 1}), "unknown x"),
    "option of another type": (change_record("edits", options={"strength": "much", "relative": False}), "do not fit"),
    "no strength": (change_record("edits", options={"strength": None, "relative": False}), "do not fit together"),
    "ragged": (change_position(options={"indices": [[1], [2, 3]]}), "ragged"),
    "index": (change_record("interventions", edit=7), r"interventions\[0\]: edit 7, but 1 edits are stored"),
    "negative index": (change_record("interventions", edit=-1), "edit -1"),
    "no edit": (change_record("interventions", edit=None), "edit None"),
    "no positions": (change_record("interventions", positions=None), "positions"),
    "site": (change_record("interventions", site="L0.mlp_outptu"), r"interventions\[0\].*mlp_outptu"),
    "phase": (change_record("interventions", phase="later"), "phase 'later'"),
    "trainable": (change_record("edits", trainable=["weights"]), "do not fit together"),
    "trainable of another type": (change_record("edits", trainable=None), "do not fit together"),
    "origin without vector": (change_record("edits", origin={"site": "L0.mlp_output"}), "do not fit together"),
    "list": (lambda header: header.update(edits={}), "edits is no list"),
    "record": (lambda header: header.update(edits=[3]), r"edits\[0\]: keys missing"),
    "convention": (lambda header: header.update(convention="1-based"), "counted as '1-based'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_json_that_says_something_else_is_refused(folder, name):
    change, message = CHANGES[name]
    with pytest.raises(StoreError, match=message):
        load_plan(rewritten(folder, change))


def with_tensors(folder, change):
    """Return `folder` with its tensors changed by change(dict), and the hash that fits them."""
    tensors = load_file(folder / "plan.safetensors")
    change(tensors)
    save_file(tensors, folder / "plan.safetensors")
    digest = hashlib.sha256((folder / "plan.safetensors").read_bytes()).hexdigest()
    return rewritten(folder, lambda header: header.update(sha256=digest))


TENSOR_CHANGES = {
    "lost": (lambda tensors: tensors.pop("edits.0.vector"), r"edits\[0\]: its values do not fit"),
    "unknown": (lambda tensors: tensors.update({"edits.0.x": torch.ones(2)}), r"edits\[0\]: tensors .*'x'"),
    "unowned": (lambda tensors: tensors.update(x=torch.ones(2)), "unknown tensors x"),
    "of a later edit": (lambda tensors: tensors.update({"edits.1.vector": torch.ones(2)}), "unknown tensors edits.1"),
    "NaN": (lambda tensors: tensors["edits.0.vector"].fill_(torch.nan), "vector has NaN or infinite entries"),
    "four axes": (lambda tensors: tensors.update({"edits.0.vector": torch.ones(1, 1, 1, 2)}), r"Give \(D,\)"),
    "wide frame": (lambda tensors: tensors.update({"featurizers.0.weight": torch.ones(2, 3)}), "need .D, K."),
}


@pytest.mark.parametrize("name", TENSOR_CHANGES)
def test_tensors_that_do_not_fit_are_refused(folder, name):
    change, message = TENSOR_CHANGES[name]
    with pytest.raises(StoreError, match=message):
        load_plan(with_tensors(folder, change))


def test_a_pyvene_module_is_refused_by_name(tmp_path):
    plan = [Intervention("L0.mlp_output", PyveneEdit(nn.Identity()))]
    with pytest.raises(
        StoreError, match=r"edits\[0\]: PyveneEdit cannot be stored.*pyvene's own save\(\).*from_pyvene"
    ):
        save_plan(plan, tmp_path / "plan")


def test_a_class_of_the_users_is_refused_even_under_a_known_name(tmp_path):
    foreign = type("Identity", (Featurizer,), {"read": lambda self, h: h, "write": lambda self, h, z: z})
    with pytest.raises(StoreError, match=r"featurizers\[0\]: Identity cannot be stored.*Coordinates"):
        save_plan([Intervention("L0.mlp_output", Zero(), featurizer=foreign())], tmp_path / "plan")


def test_what_could_not_be_read_back_is_refused_while_it_still_exists(tmp_path):
    edit = Affine(4)
    with torch.no_grad():
        edit.weight[0, 0] = torch.nan
    with pytest.raises(StoreError, match=r"edits\[0\].*weight has NaN"):
        save_plan([Intervention("L0.mlp_output", edit, featurizer=Subspace(D, 4))], tmp_path / "plan")
    with pytest.raises(StoreError, match="Notes must be plain"):
        save_plan([], tmp_path / "plan", notes=object())
    assert list(tmp_path.iterdir()) == [], "a failed save leaves nothing"


def test_a_single_intervention_is_no_plan(tmp_path):
    with pytest.raises(TypeError, match=r"Write \[intervention\]"):
        save_plan(Intervention("L0.mlp_output", Zero()), tmp_path / "plan")
