"""A run goes on exactly where it was, whatever ended it; what cannot be gone on from says why."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from defenses.backend import PlainBackend
from defenses.checkpoints import Checkpoints, digest, file_digest
from defenses.config import TrainDefense, load_config
from defenses.defense import Sft
from defenses.errors import CheckpointError
from defenses.running import run
from records.files import RecordError
from tests.defenses.tiny_runs import ROOT, arguments, environment, tiny_world, trained, write_data

STEPS = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("world"))


def weights(folder: Path):
    return load_file(folder / "model" / "model.safetensors")


def largest_gap(first: Path, second: Path) -> float:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def rows_of(folder: Path):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def started(flags):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_defense.py"), *map(str, flags)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment(),
    )  # fmt: skip


def wait_for_rows(process, folder: Path, n: int) -> None:
    deadline = time.monotonic() + 120
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < n:
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.002)


def config_of(world, out, method="sft", **flags):
    vectors = {"vectors": [str(world["vectors"])]} if method != "sft" else {}
    base = {
        "model": str(world["model"]), "train_data": [str(world["data"])], "steps": 8, "batch_size": 8, "lr": 0.01,
        "micro_batch_size": 4, "max_length": 64, "warmup": 2, "device": "cpu", "report": False, "out": str(out),
        "method": method,
        "save_every": 3,
    }  # fmt: skip
    return load_config(TrainDefense, None, (), {**base, **vectors, **flags})


def quiet(config):
    lines: list[str] = []
    return run(config, told=lines.append), "\n".join(lines)


def steps_of(folder):
    return [row for row in rows_of(folder) if row.get("kind", "train") == "train"]


def cut_short(monkeypatch, config, after: int) -> str:
    """Run until `after` rows are written, then end as a kill does: without another word."""
    from defenses.progress import Journal

    whole = Journal.row

    class Killed(BaseException):
        pass

    def row(self, values):
        whole(self, values)
        if values["step"] == after:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "row", row)
        with pytest.raises(Killed):
            quiet(config)
    return str(config.out)


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("sft", {}),
        pytest.param("sft", {"lora_rank": 2, "merge": True}, marks=pytest.mark.slow),
        pytest.param("injection", {"schedule": "rise", "alpha": 2}, marks=pytest.mark.slow),
        pytest.param("immune_projection", {"alpha": 2}, marks=pytest.mark.slow),
        pytest.param("delta_loss", {"fpr": 0.2, "holdout": 0.2}, marks=pytest.mark.slow),
        ("closed_loop", {}),
    ],
)
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_never_stopped(world, tmp_path, monkeypatch, method, flags):
    quiet(config_of(world, tmp_path / "whole", method, **flags))
    cut_short(monkeypatch, config_of(world, tmp_path / "cut", method, **flags), after=5)
    assert len(steps_of(tmp_path / "cut")) == 5
    _, told = quiet(config_of(world, tmp_path / "cut", method, resume=True, **flags))
    assert "resumed after step 3" in told
    assert largest_gap(tmp_path / "whole", tmp_path / "cut") < 1e-6
    whole, cut = steps_of(tmp_path / "whole"), steps_of(tmp_path / "cut")
    assert [row["step"] for row in cut] == list(range(1, 9))
    assert [row["loss"] for row in cut] == pytest.approx([row["loss"] for row in whole], abs=1e-6)
    samples = [
        [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
        if (tmp_path / name / "samples.jsonl").exists()
    ]
    assert not samples or samples[0] == samples[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "injection", "immune_projection"])
def test_a_killed_process_goes_on_to_the_same_weights(world, tmp_path, method):
    more = {"injection": ["--schedule", "rise", "--alpha", 2], "immune_projection": ["--alpha", 2]}.get(method, [])
    flags = [*arguments(world, *more, "--save_every", 7, steps=STEPS, method=method)]
    done = trained(*flags, "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stdout + done.stderr
    process = started([*flags, "--out", tmp_path / "killed"])
    wait_for_rows(process, tmp_path / "killed", 24)
    process.kill()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.json").exists()
    refused = trained(*flags, "--out", tmp_path / "killed")
    assert refused.returncode == 2 and "pass --resume" in refused.stdout
    done = trained(*flags, "--out", tmp_path / "killed", "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed after step" in done.stdout
    assert largest_gap(tmp_path / "whole", tmp_path / "killed") < 1e-6
    assert [row["step"] for row in rows_of(tmp_path / "killed")] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_signal_saves_and_ends_with_its_number(world, tmp_path, number, status):
    flags = arguments(world, "--save_every", 0, "--out", tmp_path / "run", steps=150)
    process = started(flags)
    wait_for_rows(process, tmp_path / "run", 20)
    process.send_signal(number)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == status, told
    assert f"{signal.Signals(number).name}: stopped after step" in told
    kept = rows_of(tmp_path / "run")
    assert [one.name for one in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{len(kept):08d}"]
    done = trained("run", "--out", tmp_path / "run", "--resume")  # which knows what it was asked
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumed after step {len(kept)}" in done.stdout
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, 151))
    assert rows_of(tmp_path / "run")[: len(kept)] == kept


def test_changed_data_are_named(world, tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    mine = {**world, "data": write_data(data)}
    cut_short(monkeypatch, config_of(mine, tmp_path / "run"), after=5)
    write_data(data, seed=1)
    with pytest.raises(CheckpointError, match=r"data train was [0-9a-f]{12}, is [0-9a-f]{12}\. Restore what it was"):
        quiet(config_of(mine, tmp_path / "run", resume=True))
    write_data(data)
    assert quiet(config_of(mine, tmp_path / "run", resume=True))[0].result["steps"] == 8


def test_changed_data_are_refused_before_the_first_checkpoint_too(world, tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    mine = {**world, "data": write_data(data)}
    cut_short(monkeypatch, config_of(mine, tmp_path / "run"), after=2)
    write_data(data, seed=1)
    with pytest.raises(RecordError, match="this run has data_digests"):
        quiet(config_of(mine, tmp_path / "run", resume=True))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"method": "injection"}, r"method was \{'name': 'sft'\}, is \{'name': 'injection'\}"),
        ({"lr": 0.5}, r"lr was 0\.01, is 0\.5"),
        ({"batch_size": 4}, "batch_size was 8, is 4"),
    ],
)
def test_a_changed_method_or_rate_is_named(world, tmp_path, monkeypatch, flags, text):
    cut_short(monkeypatch, config_of(world, tmp_path / "run"), after=4)
    with pytest.raises(RecordError, match=text):
        quiet(config_of(world, tmp_path / "run", resume=True, **flags))


def test_changed_vectors_are_named(world, tmp_path, monkeypatch):
    from tests.defenses.tiny_runs import write_directions

    own = tmp_path / "v.safetensors"
    mine = {**world, "vectors": write_directions(own)}
    cut_short(monkeypatch, config_of(mine, tmp_path / "run", "injection"), after=4)
    own.unlink()
    write_directions(own, layers=(2,))
    with pytest.raises(CheckpointError, match=r"data .*v\.safetensors was"):
        quiet(config_of(mine, tmp_path / "run", "injection", resume=True))


# --- Checkpoints by themselves ------------------------------------------------------------------------------------


def tiny_backend():
    torch.manual_seed(0)
    return PlainBackend(torch.nn.Linear(3, 2))


def test_the_newest_whole_checkpoint_counts_and_old_ones_go(tmp_path):
    backend, lines = tiny_backend(), []
    held = Checkpoints(tmp_path, {"method": "sft"}, keep=2, say=lines.append)
    for step in (1, 2, 3):
        with torch.no_grad():
            backend.model.weight.fill_(step)
        assert held.save(backend, Sft(), step, rows=10 * step)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    (tmp_path / "step-00000003" / "meta.json").unlink()  # as a kill in between would leave it
    backend = tiny_backend()
    meta = held.load(backend, Sft())
    assert (meta.step, meta.rows) == (2, 20) and backend.model.weight[0, 0].item() == 2
    path = tmp_path / "step-00000002" / "rank-0.pt"
    path.write_bytes(path.read_bytes()[:-10])  # and as a full disk would
    assert held.load(backend, Sft()) is None and not lines


def test_a_damaged_file_of_the_right_size_is_named(tmp_path):
    backend = tiny_backend()
    held = Checkpoints(tmp_path, {})
    held.save(backend, Sft(), 1)
    path = tmp_path / "step-00000001" / "rank-0.pt"
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(CheckpointError, match=r"rank-0\.pt: it cannot be read.* Delete"):
        held.load(backend, Sft())


def test_a_checkpoint_that_would_run_code_is_not_loaded(tmp_path):
    backend = tiny_backend()
    held = Checkpoints(tmp_path / "c", {})
    held.save(backend, Sft(), 1)

    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "c" / "step-00000001" / "rank-0.pt"
    torch.save({"backend": Attack(), "defense": {}}, path)
    meta = json.loads((path.parent / "meta.json").read_text())
    meta["sizes"]["rank-0.pt"] = path.stat().st_size
    (path.parent / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="cannot be read"):
        held.load(backend, Sft())
    assert not (tmp_path / "ran").exists()


def test_another_run_or_number_of_ranks_is_refused_by_name(tmp_path):
    backend = tiny_backend()
    Checkpoints(tmp_path, {"method": "sft", "data train": "abc"}).save(backend, Sft(), 1)
    with pytest.raises(CheckpointError, match=r"data train was abc, is def; method was sft, is kl\. Restore"):
        Checkpoints(tmp_path, {"method": "kl", "data train": "def"}).load(backend, Sft())
    backend.world = 2
    with pytest.raises(CheckpointError, match=r"written by 1 rank, now there are 2\. Start 1 of them"):
        Checkpoints(tmp_path, {"method": "sft", "data train": "abc"}).load(backend, Sft())


def test_digests_follow_content_and_not_order(tmp_path):
    assert digest({"a": 1, "b": 2}) != digest({"a": 1, "b": 3})
    (tmp_path / "x").write_text("one")
    before = file_digest(tmp_path / "x")
    (tmp_path / "x").write_text("two")
    assert file_digest(tmp_path / "x") != before and len(before) == 12


FULL_DISK = """
import resource, signal, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
import defenses.checkpoints as checkpoints
whole = checkpoints._write_state
def write(path, held):
    full = "00000004" in str(path)
    if full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        whole(path, held)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints._write_state = write
import train_defense
train_defense.app()
"""


@pytest.mark.slow
def test_a_full_disk_at_a_checkpoint_costs_that_checkpoint_only(world, tmp_path):
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK.format(root=str(ROOT)))
    flags = arguments(world, "--save_every", 2, "--keep", 5, "--out", tmp_path / "run", steps=8)
    done = subprocess.run(
        [sys.executable, str(script), "train_defense.py", *flags],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING: the checkpoint of step 4 could not be written (File too large); that of step 2 is kept" in (
        " ".join(done.stdout.split())
    )
    names = sorted(one.name for one in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000006", "step-00000008"]  # and no torn one beside them
    assert len(rows_of(tmp_path / "run")) == 8


def test_a_full_disk_leaves_the_checkpoint_before_it_whole(tmp_path):
    backend, lines = tiny_backend(), []
    held = Checkpoints(tmp_path, {}, say=lines.append)
    assert held.save(backend, Sft(), 1)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        assert not held.save(backend, Sft(), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "checkpoint of step 2 could not be written (File too large); that of step 1 is kept" in lines[0]
    assert [one.name for one in tmp_path.iterdir()] == ["step-00000001"] and held.load(backend, Sft()).step == 1
    assert held.save(backend, Sft(), 3)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero2"])
def test_two_killed_ranks_go_on_to_the_same_weights(world, tmp_path, backend):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    more = ["--backend", backend, "--save_every", 7, "--schedule", "rise", "--alpha", 2]
    flags = arguments(world, *more, steps=STEPS, method="injection")

    def both(out, *last):
        command = [*launch, str(ROOT / "train_defense.py"), *flags, "--out", str(out), *last]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment()
        )

    whole = both(tmp_path / "whole")
    told, _ = whole.communicate(timeout=200)
    assert whole.returncode == 0, told[-3000:]
    killed = both(tmp_path / "killed")
    wait_for_rows(killed, tmp_path / "killed", 24)
    for one in [*psutil.Process(killed.pid).children(recursive=True), killed]:  # each rank has a session of its own
        one.kill()
    killed.communicate(timeout=30)
    again = both(tmp_path / "killed", "--resume")
    told, _ = again.communicate(timeout=200)
    assert again.returncode == 0 and "resumed after step" in told, told[-3000:]
    assert largest_gap(tmp_path / "whole", tmp_path / "killed") < 1e-6
