"""Prepared activations on disk: the same numbers, no forward pass the second time, and never half of a cache."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignments import LanguagePairs
from alignments.space import (
    DATA,
    MANIFEST,
    Disk,
    Memory,
    activation_key,
    available,
    clear,
    default_folder,
    fits,
    space_of,
)
from intervene import BadVector, Intervention, Site, Subspace, Swap
from intervene.marked import Marked
from tasks import Example, Pair
from tests.alignments.planted import toy_tokenizer
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
NAMES = ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal")
SITES = [Site("block_output", 0), Site("mlp_output", 1)]
LAYOUT = {
    "a": ((4, 3), torch.float32),
    "b": ((5,), torch.bool),
    "c": ((2, 2), torch.bfloat16),
    "d": ((0, 3), torch.int64),
}


def example(first, second, place="park"):
    prompt = f"When {first} and {second} went to the {place} , {second} gave a ring to"
    begin = prompt.rindex(second)
    return Example(prompt, f" {first}", {}, {"subject2": (begin, begin + 3), "last": (len(prompt) - 2, len(prompt))})


def pairs(place="park"):
    around = zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)
    return [Pair(example(a, b, place), example(b, a, place), "position", f" {b}") for a, b in around]


def prepared(space=None, *, model=None, place="park", positions=("subject2", "last"), sites=SITES, batch_size=3):
    model = model or tiny_model("llama")
    return LanguagePairs(
        model, toy_tokenizer(), pairs(place), sites=sites, positions=positions, batch_size=batch_size, space=space
    )


def logits(data, rows=(5, 0, 2)):
    found = []
    for site in SITES:
        plan = [Intervention(site, Swap(), Marked("last"), Subspace(32, 4, seed=3))]
        with torch.no_grad():
            found.append(data.logits(plan, torch.tensor(rows)))
    return torch.stack(found)


def caches(folder):
    return sorted(path.name for path in folder.iterdir())


def counted(model):
    """Return a list that grows by one with each forward pass of `model`."""
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_disk_and_memory_give_the_same_bits_and_the_second_time_nothing_runs(tmp_path):
    plain, first = prepared(), prepared(Disk(tmp_path))
    model = tiny_model("llama")
    calls = counted(model)
    again = prepared(Disk(tmp_path), model=model)
    assert not calls and again.cached and not first.cached and not plain.cached
    for other in (first, again):
        assert torch.equal(logits(plain), logits(other))
        assert torch.equal(plain.source_logits, other.source_logits)
        assert plain.task_correct()[0].tolist() == other.task_correct()[0].tolist()
        assert plain.exactness() == other.exactness()
        for site in SITES:
            for mine, yours in zip(
                plain.activations(site, Marked("last")), other.activations(site, Marked("last")), strict=True
            ):
                assert torch.equal(mine, yours)
    assert calls  # the hook does count
    assert len(caches(tmp_path)) == 1


def test_learning_reads_the_cache_and_leaves_it_as_it_was(tmp_path):
    data = prepared(Disk(tmp_path))
    before = {name: one.clone() for name, one in data.prefix.streams.items()}
    lens = Subspace(32, 4, seed=3)
    data.logits([Intervention(SITES[0], Swap(), Marked("last"), lens)], torch.arange(4)).square().sum().backward()
    assert lens.weight.grad.abs().max() > 0
    assert all(torch.equal(before[layer], stream) for layer, stream in data.prefix.streams.items())
    data.prefix.streams[0].zero_()  # a stray write
    assert torch.equal(logits(prepared(Disk(tmp_path))), logits(prepared()))


def test_anything_else_has_another_key(tmp_path):
    other, adapted = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3  # one weight, which `fingerprint` does not look at
    adapted.config.rms_norm_eps *= 2
    variants = [
        {},
        {"model": tiny_model("llama", seed=1)},
        {"model": other},
        {"model": adapted},
        {"model": tiny_model("llama").to(torch.float64)},
        {"place": "store"},
        {"positions": ("last",)},
        {"sites": SITES[:1]},
        {"batch_size": 4},
    ]
    space = Disk(tmp_path)
    assert [prepared(space, **variant).cached for variant in variants] == [False] * len(variants)
    assert [prepared(space, **variant).cached for variant in variants] == [True] * len(variants)
    assert len(caches(tmp_path)) == len(variants)


def test_marks_that_differ_alone_have_another_key():
    data = prepared()
    moved = {name: columns - 1 for name, columns in data.base.marks.items()}
    keys = {
        activation_key(data.model, base, data.source, SITES, batch_size=3)
        for base in (data.base, replace(data.base, marks=moved))
    }
    assert len(keys) == 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_are_part_of_the_key_and_so_is_whether_they_act():
    peft = pytest.importorskip("peft")
    data = prepared()
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    made = lambda: activation_key(model, data.base, data.source, SITES, batch_size=3)  # noqa: E731
    on = made()
    with model.disable_adapter():
        off = made()
    assert on != off and on == made()


@pytest.mark.parametrize("damage", ["cut", "zeros", "manifest", "missing", "other format"])
def test_a_damaged_cache_is_refused_and_made_again(tmp_path, damage):
    prepared(Disk(tmp_path))
    (folder,) = tmp_path.iterdir()
    if damage == "cut":
        os.truncate(folder / DATA, (folder / DATA).stat().st_size - 1)
    elif damage == "zeros":
        (folder / DATA).write_bytes(bytes((folder / DATA).stat().st_size))
    elif damage == "manifest":
        (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-40])
    elif damage == "missing":
        (folder / MANIFEST).unlink()
    else:
        (folder / MANIFEST).write_text(json.dumps({**json.loads((folder / MANIFEST).read_text()), "format": 0}))
    space = Disk(tmp_path)
    again = prepared(space)
    assert not again.cached and torch.equal(logits(again), logits(prepared()))
    assert len(space.notes) == 1 and "They are computed again" in space.notes[0]
    assert prepared(Disk(tmp_path)).cached


def test_what_is_not_finished_is_not_found(tmp_path):
    space = Disk(tmp_path)
    draft = space.begin("0" * 32, LAYOUT)
    assert space.find("0" * 32) is None
    held = draft.finish({"exact": True})
    assert held.facts == {"exact": True} and space.find("0" * 32) is not None


def test_every_dtype_and_shape_comes_back(tmp_path):
    values = {
        "a": torch.arange(12.0).view(4, 3),
        "b": torch.tensor([True, False, True, True, False]),
        "c": torch.tensor([[1.5, -2.0], [0.25, 3.0]], dtype=torch.bfloat16),
        "d": torch.empty(0, 3, dtype=torch.int64),
    }
    draft = Disk(tmp_path).begin("0" * 32, LAYOUT)
    for name, value in values.items():
        draft.tensors[name][:] = value
    draft.finish({})
    held = Disk(tmp_path).find("0" * 32)
    for name, value in values.items():
        assert held.tensors[name].dtype == value.dtype and torch.equal(held.tensors[name], value)


def test_a_failed_preparation_leaves_nothing(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(BadVector):
        prepared(Disk(tmp_path), model=model)
    model, calls = tiny_model("llama"), []

    def break_down(*_):
        calls.append(1)
        if len(calls) > 8:
            raise RuntimeError("on purpose")

    model.register_forward_hook(break_down)
    with pytest.raises(RuntimeError, match="on purpose"):
        prepared(Disk(tmp_path), model=model)
    assert caches(tmp_path) == []


@pytest.mark.slow
def test_a_writer_that_was_killed_leaves_nothing_for_long(tmp_path):
    code = (
        "import os, signal, sys, torch; from alignments.space import Disk; "
        "Disk(sys.argv[1]).begin('1' * 32, {'a': ((9,), torch.float32)}); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=60, check=False)
    (left,) = tmp_path.iterdir()
    space = Disk(tmp_path)
    alive = space.begin("2" * 32, LAYOUT)
    assert left.exists()  # young: its writer might only be starting
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 100,) * 2)
    space.begin("3" * 32, LAYOUT).finish({})
    assert not left.exists()
    alive.finish({})
    assert space.find("2" * 32) is not None


def test_a_full_disk_means_memory_and_the_same_numbers(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    space = Disk(tmp_path)
    data = prepared(space)
    assert torch.equal(logits(data), logits(prepared()))
    assert len(space.notes) == 1 and "No space left on device); they are held in memory" in space.notes[0]
    assert caches(tmp_path) == []


@pytest.mark.slow
def test_a_really_full_disk_means_memory_too(tmp_path):
    """A tmpfs of one page: the system itself says that there is no room, before anything is computed."""
    code = (
        "import sys, torch; from alignments.space import Disk; space = Disk(sys.argv[1]); "
        "draft = space.begin('1' * 32, {'a': ((999999,), torch.float32)}); "
        "draft.tensors['a'].fill_(1.0); held = draft.finish({}); print(held.tensors['a'].sum().item(), space.notes)"
    )
    inside = f'mount -t tmpfs -o size=64k none "{tmp_path}" && exec "{sys.executable}" -c "$0" "{tmp_path}"'
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", inside, code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("this system lets nobody mount")
    assert done.stdout.startswith("999999.0") and "No space left" in done.stdout, done.stderr


def test_a_folder_that_cannot_be_made_means_memory(tmp_path):
    (tmp_path / "file").write_text("mine")
    space = Disk(tmp_path / "file" / "inside")
    assert not prepared(space).cached and "they are held in memory" in space.notes[0]


def test_another_process_that_was_faster_is_believed(tmp_path):
    first, second = Disk(tmp_path), Disk(tmp_path)
    drafts = [space.begin("0" * 32, LAYOUT) for space in (first, second)]
    for draft in drafts:
        draft.tensors["a"].fill_(1.0)
        assert draft.finish({"n": 1}).tensors["a"].sum() == 12
    assert caches(tmp_path) == ["0" * 32] and not first.notes and not second.notes


def test_the_oldest_make_room_but_never_those_in_use(tmp_path):
    names = [str(number) * 32 for number in range(4)]
    layout = {"a": ((256,), torch.float32)}  # 1 KiB
    for age, name in enumerate(names[:3]):
        Disk(tmp_path).begin(name, layout).finish({})
        os.utime(tmp_path / name / MANIFEST, (1000 + age, 1000 + age))
    space = Disk(tmp_path, limit=3 * 1024)
    assert space.find(names[0]) is not None  # now the youngest
    space.begin(names[3], layout).finish({})
    assert caches(tmp_path) == [names[0], names[2], names[3]]
    greedy = space.begin("a" * 32, {"a": ((600,), torch.float32)})
    greedy.finish({})
    assert "the limit of this folder is" in space.notes[0] and caches(tmp_path) == [names[0], names[3]]


def test_clearing_removes_caches_and_nothing_else(tmp_path):
    Disk(tmp_path).begin("0" * 32, LAYOUT).finish({})
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    assert clear(tmp_path) == 64 * 3  # three tensors that are not empty, each aligned to 64 bytes
    assert caches(tmp_path) == ["folder", "notes.txt"]
    assert clear(tmp_path / "none") == 0


def test_only_the_rows_that_are_asked_for_are_read(tmp_path):
    layout = {"stream/0": ((512, 16, 1024), torch.float32)}  # 32 MiB
    Disk(tmp_path).begin("0" * 32, layout).finish({})
    stream = Disk(tmp_path).find("0" * 32).tensors["stream/0"]
    assert stream[torch.tensor([7, 300])].shape == (2, 16, 1024)
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("only Linux says what is resident")
    resident, here = [], False
    for line in smaps.read_text().splitlines():
        if "-" in line.split()[0]:  # "7f00-7f10 rw-p ... path" begins what is said of one mapping
            here = str(tmp_path) in line and " rw-p " in line
        elif here and line.startswith("Rss:"):
            resident.append(int(line.split()[1]))
    assert 128 <= sum(resident) < 2048  # KiB: two rows of 64, and what the system reads around them


def test_auto_uses_the_disk_only_for_what_memory_cannot_hold(tmp_path):
    space = Disk(tmp_path, only_if_needed=True)
    prepared(space)
    assert caches(tmp_path) == []
    prepared(Disk(tmp_path))
    assert prepared(space).cached  # what is there is used
    assert fits(1) and not fits(2**62) and 2**20 < available() < 2**50


def test_the_names_that_users_write(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERVENE_CACHE", str(tmp_path))
    assert isinstance(space_of("memory"), Memory) and isinstance(space_of(None), Memory)
    auto, disk, here = map(space_of, ("auto", Path("disk"), tmp_path / "here"))
    assert auto.only_if_needed and auto.folder == disk.folder == default_folder() == tmp_path / "activations"
    assert not disk.only_if_needed and not here.only_if_needed and here.folder == tmp_path / "here"
    monkeypatch.delenv("INTERVENE_CACHE")
    assert default_folder().parts[-3:] == (".cache", "interventions-toolkit", "activations")
