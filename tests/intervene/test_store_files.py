"""Plan folders and vector files on disk: whole or not there, never over something else unless asked."""

from __future__ import annotations

import json
import os
from dataclasses import fields

import pytest
import torch
from safetensors.torch import save_file

from intervene import Add, At, Intervention, Scale, Site, SteeringVector, StoreError, Subspace, Zero
from intervene.store import load_plan, load_vector, save_plan, save_vector

D = 32


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vector_at(site="L1.block_output", **changes):
    values = {"vector": randn(D, seed=9), "site": Site.parse(site), "fingerprint": "0123456789abcdef"}
    return SteeringVector(**{**values, "method": "mean_difference", "model": "tiny", "pooling": "last", **changes})


@pytest.fixture
def folder(tmp_path):
    return save_plan(
        [Intervention("L0.mlp_output", Add(randn(D)), At(1), Subspace.from_frame(torch.eye(D)))], tmp_path / "plan"
    )


def test_a_plan_is_not_overwritten_unless_asked(folder):
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(StoreError, match=r"holds a plan already.*overwrite=True"):
        save_plan([], folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    save_plan([], folder, overwrite=True)
    assert load_plan(folder) == ()


def test_half_a_plan_is_not_overwritten_unless_asked(folder):
    (folder / "plan.json").unlink()
    with pytest.raises(StoreError, match="holds a plan already"):
        save_plan([], folder)


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_of_a_run_folder_are_left_alone(tmp_path, overwrite):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{}")
    folder = save_plan([Intervention("L0.mlp_output", Zero())], tmp_path / "run", overwrite=overwrite)
    assert sorted(path.name for path in folder.iterdir()) == ["plan.json", "plan.safetensors", "result.json"]
    assert len(load_plan(folder)) == 1 and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_empty_folder_may_be_there_and_a_file_may_not(tmp_path):
    (tmp_path / "empty").mkdir()
    assert load_plan(save_plan([], tmp_path / "empty")) == ()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="there is a file of that name"):
        save_plan([], tmp_path / "file")


@pytest.mark.parametrize("survivors", [0, 1])
def test_a_save_that_is_cut_short_is_seen(folder, survivors, monkeypatch):
    """Replace a plan, with the power cut before the first or the second of the two moves."""
    moves, real = [], os.replace

    def replace(source, target):
        if len(moves) == survivors:
            raise KeyboardInterrupt
        moves.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save_plan([Intervention("L0.mlp_output", Scale(2.0), featurizer=Subspace(D, 1))], folder, overwrite=True)
    if survivors == 0:
        assert isinstance(load_plan(folder)[0].edit, Add), "the old plan"
    else:
        with pytest.raises(StoreError, match="SHA-256 differs"):
            load_plan(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["plan"]


def test_plan_json_comes_last_into_a_run_folder(tmp_path, monkeypatch):
    """So that a reader who finds plan.json finds the plan."""
    (tmp_path / "result.json").write_text("{}")
    moved, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (moved.append(target.name), real(source, target)))
    save_plan([], tmp_path)
    assert moved == ["plan.safetensors", "plan.json"]


def test_a_new_folder_that_is_cut_short_is_not_there(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_plan([], tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


# vectors


def test_a_vector_comes_back_with_its_provenance(tmp_path):
    vector = vector_at("L1.head_output[2]", n_positive=3, n_negative=4, stream_norm=1 / 3)
    loaded = load_vector(save_vector(vector, tmp_path / "new" / "v.safetensors"))
    assert torch.equal(loaded.vector, vector.vector) and loaded.vector.dtype == vector.vector.dtype
    for field in fields(SteeringVector):
        if field.name != "vector":
            assert getattr(loaded, field.name) == getattr(vector, field.name), field.name
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["v.safetensors"]


def test_an_unknown_stream_norm_comes_back_unknown(tmp_path):
    loaded = load_vector(save_vector(vector_at(), tmp_path / "v.safetensors"))
    assert loaded.stream_norm != loaded.stream_norm


def test_a_vector_file_is_not_overwritten_unless_asked(tmp_path):
    path = save_vector(vector_at(), tmp_path / "v.safetensors")
    with pytest.raises(StoreError, match="there is such a file already"):
        save_vector(vector_at(), path)
    save_vector(vector_at(method="pca"), path, overwrite=True)
    assert load_vector(path).method == "pca"


def test_what_is_no_vector_file_is_refused(tmp_path):
    path = tmp_path / "v.safetensors"
    with pytest.raises(StoreError, match="there is no such file"):
        load_vector(path)
    path.write_bytes(b"not tensors")
    with pytest.raises(StoreError, match="cut off or damaged"):
        load_vector(path)
    save_file({"vector": torch.ones(2)}, path)
    with pytest.raises(StoreError, match="no file of save_vector"):
        load_vector(path)
    provenance = json.dumps({**vector_at().provenance(), "stream_norm": 1.0})
    save_file({"vector": torch.ones(2)}, path, metadata={"schema": "2", "provenance": provenance})
    with pytest.raises(StoreError, match="schema 2, this version reads up to 1: upgrade"):
        load_vector(path)
    save_file({"vector": torch.ones(2)}, path, metadata={"schema": "1", "provenance": '{"layer": 3}'})
    with pytest.raises(StoreError, match="unknown layer"):
        load_vector(path)
    save_file({"vector": torch.zeros(2)}, path, metadata={"schema": "1", "provenance": provenance})
    with pytest.raises(StoreError, match="all zero"):
        load_vector(path)
    save_vector(vector_at(), path, overwrite=True)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StoreError, match="cut off or damaged"):
        load_vector(path)
