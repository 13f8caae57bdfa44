"""Files of directions: which block each belongs to, and what is refused."""

from __future__ import annotations

import os

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from defenses.errors import VectorError
from defenses.plans import Directions
from defenses.vector_files import read_vectors, write_vectors
from intervene import Site, SteeringVector, capture, fingerprint, save_vector
from tests.tiny import TINY, tiny_batch

WIDTH, BLOCKS = 32, 3


def random_vectors(*layers, width=WIDTH):
    generator = torch.Generator().manual_seed(7)
    return {layer: torch.randn(width, generator=generator) for layer in layers}


def written(path, content):
    torch.save(content, path)
    return path


def control_vector(path, vectors, arch="controlvector", dtype=np.float32):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string(f"{arch}.model_hint", "llama")
    for number, vector in vectors.items():
        writer.add_tensor(f"direction.{number}", np.asarray(vector, dtype=dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- our own ----------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(tmp_path):
    model = TINY["llama"]()
    made = Directions(
        random_vectors(0, 2), "block_output", fingerprint(model), "tiny", {"pooling": "mean", "auc": [1.0]}
    )
    path = write_vectors(tmp_path / "v.safetensors", made)
    again = read_vectors(path, model=model)
    assert (again.component, again.fingerprint, again.model) == (made.component, made.fingerprint, made.model)
    assert again.facts == {"pooling": "mean", "auc": [1.0]}
    assert all(torch.equal(again.at(layer), made.at(layer)) for layer in (0, 2))
    assert read_vectors(path, layers=[3], one_based=True).layers == (2,)
    with pytest.raises(VectorError, match="it exists"):
        write_vectors(path, made)
    assert [file.name for file in tmp_path.iterdir()] == ["v.safetensors"]


def test_another_models_directions_need_a_reason(tmp_path):
    model, other = TINY["llama"](), TINY["llama"](seed=1)
    path = write_vectors(
        tmp_path / "v.safetensors", Directions(random_vectors(1), fingerprint=fingerprint(other), model="o")
    )
    with pytest.raises(VectorError, match=rf"model o \({fingerprint(other)}\): this one is .*{fingerprint(model)}"):
        read_vectors(path, model=model)
    forced = read_vectors(path, model=model, force="its base")
    assert forced.facts["force"] == "its base"


def test_layers_and_widths_that_the_model_or_the_file_lacks(tmp_path):
    model = TINY["llama"]()
    path = write_vectors(tmp_path / "v.safetensors", Directions(random_vectors(1, 5)))
    with pytest.raises(VectorError, match=r"L5\.block_output.*layers 0-2"):
        read_vectors(path, model=model)
    with pytest.raises(VectorError, match=r"layer 2 \(0-based\) is not in it, it has 1, 5\."):
        read_vectors(path, layers=[2])
    with pytest.raises(VectorError, match="no layer was asked for"):
        read_vectors(path, layers=[])
    with pytest.raises(VectorError, match="layer -1, but layers count from 0"):
        read_vectors(path, layers=[-1])
    narrow = write_vectors(tmp_path / "n.safetensors", Directions(random_vectors(1, width=8)))
    with pytest.raises(VectorError, match="it is 8 wide, this model is 32 wide"):
        read_vectors(narrow, model=model)


def test_a_single_steering_vector_is_read(tmp_path):
    vector = SteeringVector(torch.ones(4), Site.parse("L2.block_output"), "ff", "mean_difference", model="m")
    found = read_vectors(save_vector(vector, tmp_path / "one.safetensors"))
    assert (found.layers, found.fingerprint, found.model) == ((2,), "ff", "m")


def test_safetensors_that_say_nothing_or_are_damaged(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "plain.safetensors")
    with pytest.raises(VectorError, match=r"does not say what they are, it holds \['a'\]"):
        read_vectors(tmp_path / "plain.safetensors")
    whole = write_vectors(tmp_path / "v.safetensors", Directions(random_vectors(1))).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-40])
    with pytest.raises(VectorError, match="cut off or damaged"):
        read_vectors(tmp_path / "cut.safetensors")
    with pytest.raises(VectorError, match="no such file"):
        read_vectors(tmp_path / "none.safetensors")
    with pytest.raises(VectorError, match=r"Name it v\.safetensors"):
        write_vectors(tmp_path / "v.pt", Directions(random_vectors(1)))


# --- persona vectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensor", "dict"])
def test_index_k_of_a_persona_vector_is_the_output_of_block_k_minus_1(tmp_path, kind):
    """The file holds what transformers calls hidden_states; each must be what capture reads at the block."""
    model = TINY["llama"]()
    batch = tiny_batch(model)
    with torch.no_grad(), capture(model, [f"L{layer}.block_output" for layer in range(BLOCKS)]) as acts:
        states = model(**batch, output_hidden_states=True).hidden_states
    rows = torch.stack([state.mean((0, 1)) for state in states])  # (N+1, D)
    content = rows if kind == "tensor" else {index: rows[index] for index in (1, 2)}
    found = read_vectors(written(tmp_path / "v.pt", content), model=model)
    assert found.layers == (0, 1)
    for layer in found.layers:
        torch.testing.assert_close(found.at(layer), acts[f"L{layer}.block_output"].mean((0, 1)))
    assert not torch.allclose(rows[BLOCKS], acts["L2.block_output"].mean((0, 1)), rtol=0.01)  # behind the final norm


def test_one_based_layers_of_a_persona_vector(tmp_path):
    path = written(tmp_path / "v.pt", torch.stack([*random_vectors(0, 1, 2, 3).values()]).bfloat16())
    rows = torch.stack([*random_vectors(0, 1, 2, 3).values()]).bfloat16().float()
    assert torch.equal(read_vectors(path, layers=[2], one_based=True).at(1), rows[2])
    assert torch.equal(read_vectors(path, layers=[1]).at(1), rows[2])
    with pytest.raises(VectorError, match="layer 0, but layers count from 1: index 0 of hidden_states is the embed"):
        read_vectors(path, layers=[0], one_based=True)
    with pytest.raises(VectorError, match="index 3 was measured behind the final norm"):
        read_vectors(path, layers=[2])
    assert read_vectors(path, layers=[2], force="made with hooks at the block").layers == (2,)
    with pytest.raises(VectorError, match=r"layer 7 \(0-based\) is not in it, it has 0, 1\."):
        read_vectors(path, layers=[7])


def test_a_vector_without_a_layer_needs_one(tmp_path):
    path = written(tmp_path / "v.pt", torch.ones(WIDTH))
    assert read_vectors(path, layers=[4]).layers == (4,)
    with pytest.raises(VectorError, match="one vector that names no layer"):
        read_vectors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({0: torch.ones(4), 1: torch.ones(4)}, "index 0. .* 0 are the embeddings"),
        ({-1: torch.ones(4)}, "index -1"),
        ({"20": torch.ones(4)}, "found a dict"),
        ([torch.ones(4)], "found a list"),
        (torch.ones(2, 3, 4), r"found a tensor \(2, 3, 4\)"),
        (torch.ones(9, WIDTH), "9 rows, but this model has 3 blocks and so 4 hidden states"),
        ({1: torch.zeros(WIDTH)}, "layer 0: its norm is 0"),
    ],
)
def test_persona_vectors_that_are_none(tmp_path, content, message):
    with pytest.raises(VectorError, match=message):
        read_vectors(written(tmp_path / "v.pt", content), model=TINY["llama"]())


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["TEST_PICKLE_TARGET"],)


def test_a_pickle_that_runs_code_is_refused_and_runs_none(tmp_path, monkeypatch):
    target = tmp_path / "was_run"
    monkeypatch.setenv("TEST_PICKLE_TARGET", str(target))
    path = written(tmp_path / "v.pt", {1: torch.ones(4), 2: Malicious()})
    with pytest.raises(VectorError, match="could run code and is not loaded"):
        read_vectors(path)
    assert not target.exists()
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:100])
    with pytest.raises(VectorError, match="damaged"):
        read_vectors(tmp_path / "cut.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(VectorError, match="damaged"):
        read_vectors(tmp_path / "empty.pt")


# --- control vectors --------------------------------------------------------------------------------------------------


def test_control_vectors_by_either_convention(tmp_path):
    vectors = random_vectors(1, 2)
    path = control_vector(tmp_path / "v.gguf", vectors)
    generated, repeng = read_vectors(path), read_vectors(path, gguf_first=0)
    assert (generated.layers, repeng.layers) == ((0, 1), (1, 2))
    assert torch.equal(generated.at(0), vectors[1])
    assert torch.equal(repeng.at(1), vectors[1])
    assert generated.facts["model_hint"] == "llama"
    half = read_vectors(control_vector(tmp_path / "half.gguf", vectors, dtype=np.float16))
    torch.testing.assert_close(half.at(1), vectors[2].half().float())


def test_ggufs_that_are_no_control_vector(tmp_path):
    with pytest.raises(VectorError, match="a GGUF of llama, not a control vector"):
        read_vectors(control_vector(tmp_path / "m.gguf", random_vectors(1), arch="llama"))
    with pytest.raises(VectorError, match=r"tensor 'direction\.0'\. With gguf_first=1"):
        read_vectors(control_vector(tmp_path / "z.gguf", random_vectors(0, 1)))
    (tmp_path / "no.gguf").write_bytes(b"not a gguf file, but long enough to be read as one")
    with pytest.raises(VectorError, match="damaged, or no GGUF"):
        read_vectors(tmp_path / "no.gguf")
    (tmp_path / "v.npy").write_bytes(b"")
    with pytest.raises(VectorError, match=r"\.npy is no kind known"):
        read_vectors(tmp_path / "v.npy")
