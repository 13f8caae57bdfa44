"""Every backend against `PlainBackend`: same data, same losses, same weights; and the traps of sharded training.

Two processes run all cases of `rank_script.py` once; the tests read what they wrote.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.defenses.rank_cases import CASES, KINDS, PROTECTED, Projected, model_of, run_case
from tests.defenses.rank_script import gradients
from tests.tiny import tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
]
pytest.importorskip("deepspeed")
safetensors = pytest.importorskip("safetensors.torch")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "tests" / "defenses" / "rank_script.py")
CLOSE = 1e-5
PAIRS = [(kind, name) for name, case in CASES.items() for kind in case.kinds]


def launched(out, *command, **environ):
    """Run a launcher without a compiler to be found, and with the lock that a killed build would have left."""
    empty, built = out / "path", out / "extensions"
    (built / "deepspeed_shm_comm").mkdir(parents=True)
    (built / "deepspeed_shm_comm" / "lock").touch()
    empty.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "MASTER"))}
    given = {
        **kept,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": str(empty),
        "TORCH_EXTENSIONS_DIR": str(built),
        "CXX": "none",
    }
    log = out / "log.txt"
    with log.open("w") as text:
        started = subprocess.Popen(
            [sys.executable, *command, "--out", str(out)],
            cwd=ROOT,
            env={**given, **environ},
            stdout=text,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = started.wait(timeout=400)
        finally:
            with suppress(ProcessLookupError):  # ranks outlive a launcher that is killed
                os.killpg(started.pid, signal.SIGKILL)
    assert status == 0, log.read_text()[-4000:]
    return json.loads((out / "facts.json").read_text())


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """The folder of results, and the facts."""
    out = tmp_path_factory.mktemp("ranks")
    facts = launched(out, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT)
    return out, facts


@cache
def plain(name):
    """Rows and weights of one process, and the weights before."""
    start = {key: value.clone() for key, value in model_of(CASES[name]).state_dict().items()}
    return *run_case("plain", name), start


def compared(rows, weights, name):
    """Largest differences in what was told, relatively, and in weights, absolutely; and the largest movement."""
    wanted_rows, wanted, start = plain(name)
    assert [sorted(row) for row in rows] == [sorted(row) for row in wanted_rows]
    told = max(
        abs(row[key] - other[key]) / max(1.0, abs(other[key]))
        for row, other in zip(rows, wanted_rows, strict=True)
        for key in row
    )
    assert weights.keys() == wanted.keys()
    apart = max(float((weights[key] - wanted[key]).abs().max()) for key in wanted)
    moved = max(float((wanted[key] - start[key]).abs().max()) for key in wanted)
    return told, apart, moved


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_two_ranks_train_as_one_process_does(two_ranks, kind, name, record_property):
    out, facts = two_ranks
    weights = safetensors.load_file(out / f"{kind}-{name}.safetensors")
    told, apart, moved = compared(facts["rows"][f"{kind}-{name}"], weights, name)
    record_property("apart", apart)
    assert moved > 1e-3  # three steps at 1e-3: the comparison is not of models that stand still
    assert told < CLOSE
    assert apart < CLOSE


def test_checkpointing_changes_nothing(two_ranks):
    out, _ = two_ranks
    for kind in KINDS:
        off, on = (safetensors.load_file(out / f"{kind}-{name}.safetensors") for name in ("injected", "checkpointed"))
        assert max(float((off[key] - on[key]).abs().max()) for key in off) < 1e-6, kind


def test_clipping_bites_where_it_is_on_and_is_off_where_it_is_off(two_ranks):
    # DeepSpeed clips to 1.0 where nothing is said
    _, facts = two_ranks
    for kind in CASES["unclipped"].kinds:
        norms = [facts["rows"][f"{kind}-{name}"][2]["grad_norm"] for name in ("sft", "unclipped")]
        assert abs(norms[0] - norms[1]) > 1e-3, kind


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_sums_over_ranks_whole_and_unscaled(two_ranks, kind):
    out, _ = two_ranks
    found, wanted = safetensors.load_file(out / f"{kind}-gradients.safetensors"), gradients("plain", None)
    for name in (PROTECTED, "model.norm.weight", "leaf"):
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-5)
    assert found["max"].tolist() == [1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_is_seen_at_once_and_not_undone(two_ranks, kind):
    assert two_ranks[1][kind]["writes"] == pytest.approx({"seen": 0.0, "kept": 0.0, "later": 0.0}, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_protected_subspace_stays(two_ranks, kind):
    out, _ = two_ranks
    method = Projected()
    weights = safetensors.load_file(out / f"{kind}-projected.safetensors")[PROTECTED]

    class Anchor:
        def value(self, name):
            return tiny_model("llama").get_parameter(name).detach()

    method.start(Anchor(), 1)
    moved = weights - method.anchor
    assert moved.abs().max() > 1e-4
    assert (method.frame.T @ moved).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(two_ranks, kind):
    found = two_ranks[1][kind]["resumed"]
    assert found["exact"] is True
    assert found["first"] == found["second"]  # the random state, and both gradient norms
    assert "was left by rank 0 of 3" in found["other_world"]
    whole = 3 * sum(one.numel() for one in tiny_model("llama").parameters())  # weights and two moments
    share = 1 if kind in ("ddp", "zero0") else 2
    assert found["numbers"] == pytest.approx(whole / share + 5680, rel=0.01)  # + random state


@pytest.mark.parametrize("kind", KINDS)
def test_what_would_be_wrong_in_silence_is_refused(two_ranks, kind):
    found = two_ranks[1][kind]["refusals"]
    assert found["two forwards, two backwards"].startswith("BackendError: Backward: there was no backend.forward")
    assert "call backward once" in found["two forwards, two backwards"]
    assert found["no last"].startswith("BackendError: Optimiser step: no backward of this step was called with last")
    assert found["nan"].startswith("TrainingError: Optimiser step: the gradient norm is n")
    assert found["nan changed"] == 0.0
    assert found["after nan"] > 0  # and finite: the bad gradients are forgotten


def test_ddp_refuses_parameters_without_a_gradient(two_ranks):
    assert "took no part in the last loss" in two_ranks[1]["ddp"]["unused"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_wrapper_can_be_captured(two_ranks, kind):
    found = two_ranks[1][kind]["wrapped"]
    assert found["difference"] < 1e-5
    cut = "is cut over the ranks. Take it before the model is sharded." in found["fingerprint"]
    assert cut if kind in ("fsdp", "zero3") else not found["fingerprint"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_to_one_rank_ends_all_after_the_same_step(two_ranks, kind):
    out, facts = two_ranks
    # rank 1 got it in its second step; sums over two ranks
    assert facts[kind]["stopped"] == {"steps": [4.0, 4.0], "reason": "SIGTERM"}
    assert (out / "stopped-0.pt").is_file() and (out / "stopped-1.pt").is_file()


def test_nothing_was_compiled(two_ranks):
    built = two_ranks[0] / "extensions"
    assert [str(one.relative_to(built)) for one in built.rglob("*") if one.is_file()] == ["deepspeed_shm_comm/lock"]


def test_the_deepspeed_launcher(tmp_path):
    launcher = ("-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29631", SCRIPT)
    facts = launched(tmp_path, *launcher, "--kinds", "zero2", "--cases", "sft", "--brief", DS_ACCELERATOR="cpu")
    assert facts["ranks"] == "rank 0 of 2 (started by deepspeed)"
    assert facts["local_rank"] == 0  # which it adds to the arguments
    weights = safetensors.load_file(tmp_path / "zero2-sft.safetensors")
    told, apart, _ = compared(facts["rows"]["zero2-sft"], weights, "sft")
    assert max(told, apart) < CLOSE


def test_alone(tmp_path):
    facts = launched(tmp_path, SCRIPT, "--kinds", "ddp,fsdp,zero3", "--cases", "masked", "--brief")
    assert facts["ranks"] == "1 process (alone)"
    for kind in ("ddp", "fsdp", "zero3"):
        weights = safetensors.load_file(tmp_path / f"{kind}-masked.safetensors")
        told, apart, _ = compared(facts["rows"][f"{kind}-masked"], weights, "masked")
        assert max(told, apart) < CLOSE
