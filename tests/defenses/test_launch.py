"""What started us, who is refused, and what a backend says before any rank has met another."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from defenses.backend import Optimiser, PlainBackend, Turns
from defenses.backend_deepspeed import ZeroBackend, engine_settings, loaded
from defenses.errors import BackendError, CheckpointError
from defenses.launch import Ranks, detect, joined, leave, make_backend, require_group
from tests.tiny import tiny_model

FULL = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environ", "found", "text"),
    [
        ({}, Ranks(), "1 process (alone)"),
        ({"SLURM_STEP_NUM_TASKS": "1"}, Ranks(), "1 process (alone)"),
        ({**FULL, "TORCHELASTIC_RUN_ID": "x"}, Ranks("torchrun", 1, 2, 1), "rank 1 of 2 (started by torchrun)"),
        ({**FULL, "CROSS_RANK": "0"}, Ranks("deepspeed", 1, 2, 1), "rank 1 of 2 (started by deepspeed)"),
        ({**FULL, "RANK": "0", "WORLD_SIZE": "1"}, Ranks("a launcher", 0, 1, 1), "1 process (a launcher)"),
    ],
)
def test_what_started_us(environ, found, text):
    assert detect(environ) == found
    assert str(detect(environ)) == text


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"RANK": "0"},
            r"Launcher: RANK set, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not\. Set all four, or use: torchrun",
        ),
        ({**FULL, "RANK": "2"}, r"RANK is 2 of WORLD_SIZE 2"),
        ({**FULL, "RANK": "one"}, r"RANK is 'one'\. Give a whole number"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, r"mpirun: OMPI_COMM_WORLD_SIZE is 2, but RANK and .* each process would train"),
        ({"PMI_SIZE": "2"}, r"Launcher mpiexec: PMI_SIZE is 2"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, r"Launcher srun: .*one task per node, and in it: torchrun"),
        (
            {"ACCELERATE_USE_CPU": "true"},
            r"accelerate: it set no RANK .* whatever --num_processes says\. Use: torchrun",
        ),
    ],
)
def test_a_launcher_that_gave_no_rank_is_refused(environ, message):
    with pytest.raises(BackendError, match=message):
        detect(environ)


def test_several_ranks_may_not_train_alone():
    with pytest.raises(BackendError, match=r"plain: torchrun started 2 ranks, and each would train alone.*Use ddp"):
        make_backend("plain", tiny_model("llama"), ranks=Ranks("torchrun", 0, 2))
    with pytest.raises(BackendError, match=r"torchrun started 2 ranks, and the process group has 0"):
        make_backend("auto", tiny_model("llama"), ranks=Ranks("torchrun", 0, 2))
    with (
        joined(Ranks(), cuda=False),
        pytest.raises(BackendError, match=r"started 2 ranks, and the process group has 1"),
    ):
        require_group(Ranks("torchrun", 0, 2))
    assert not dist.is_initialized()


def test_kinds():
    assert isinstance(make_backend("auto", tiny_model("llama")), PlainBackend)
    with pytest.raises(BackendError, match=r"Backend 'zero4': there is none\. Did you mean zero"):
        make_backend("zero4", tiny_model("llama"))
    with pytest.raises(BackendError, match=r"Offload with ddp: it keeps all on its device\. Use fsdp or zero2"):
        make_backend("ddp", tiny_model("llama"), offload=True)


def test_each_rank_needs_a_gpu_of_its_own():
    with pytest.raises(BackendError, match=r"GPUs, and this is its rank 99 \(from 0\)\. Start fewer"):
        Ranks("torchrun", 99, 100, 99).device(cuda=True)


def test_zero_without_deepspeed(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with joined(Ranks(), cuda=False), pytest.raises(BackendError, match=r"^ZeRO needs: pip install deepspeed$"):
        make_backend("zero3", tiny_model("llama"))


def test_a_deepspeed_whose_compiled_parts_cannot_be_switched_off(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    deepspeed, ops = ModuleType("deepspeed"), ModuleType("deepspeed.ops")
    deepspeed.__version__, deepspeed.ops, deepspeed.__path__ = "0.21.0", ops, []
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    monkeypatch.setitem(sys.modules, "deepspeed.ops", ops)
    with pytest.raises(BackendError, match=r"deepspeed 0\.21\.0 has another table .*pip install 'deepspeed>=0\.19\.8"):
        loaded(torch.device("cpu"))


def test_zero_refuses_reentrant_checkpointing_and_bf16_in_stage_1():
    model = tiny_model("llama")
    model.activation_checkpointing_enable({"use_reentrant": True})
    with joined(Ranks(), cuda=False):
        with pytest.raises(BackendError, match=r"ZeRO 3: model checkpoints with use_reentrant=True: two passes"):
            ZeroBackend(model, stage=3)
        with pytest.raises(BackendError, match=r"ZeRO 1 in bf16: .* Use zero2, ddp, or precision fp32"):
            ZeroBackend(tiny_model("llama"), Optimiser(precision="bf16"), stage=1)


@pytest.mark.parametrize(("clip", "given"), [(None, 0.0), (1.0, 0.25)])
def test_clipping_is_never_left_to_deepspeed(clip, given):
    # averages over 4 ranks are a quarter of the sums, and so is the norm that clips them
    made = engine_settings(2, Optimiser(clip=clip), 4, offload=True, settings={"overlap_comm": False})
    assert made["gradient_clipping"] == given
    assert made["zero_force_ds_cpu_optimizer"] is False
    assert made["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": False}


def test_turns():
    turns = Turns()
    with torch.no_grad():
        turns.forward()
    with pytest.raises(BackendError, match=r"no backend\.forward with gradients"):
        turns.backward(last=False)
    turns.forward()
    turns.forward()
    turns.backward(last=False)  # two passes, their losses added up
    with pytest.raises(BackendError, match=r"ZeRO-3 would drop a gradient\. Add the losses up"):
        turns.backward(last=True)
    with pytest.raises(BackendError, match=r"Optimiser step: no backward of this step was called with last=True"):
        turns.step()
    turns.forward()
    turns.backward(last=True)
    turns.forward()
    with pytest.raises(BackendError, match=r"the last one of this step, called with last=True, has been"):
        turns.backward(last=True)
    turns.step()
    turns.forward()
    turns.backward(last=True)


def test_a_state_goes_back_only_where_it_came_from():
    backend = PlainBackend(tiny_model("llama"))
    state = backend.state()
    backend.load_state(state)
    with pytest.raises(
        CheckpointError, match=r"rank 0 of 1 of backend plain: it was left by rank 1 of 2 of backend ddp"
    ):
        backend.load_state({**state, "backend": "ddp", "rank": 1, "world": 2})


def test_a_rank_ends_at_once_with_its_status_and_what_it_said():
    leave(3)  # alone: goes on
    code = "import atexit; from defenses.launch import leave; atexit.register(print, 'late'); print('said'); leave(3)"
    for environ, status, said in ((FULL, 3, "said\n"), ({}, 0, "said\nlate\n")):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **environ}, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (status, said)
