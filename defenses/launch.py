"""What started this process, and the group of processes it is one of.

    with joined(detect(), cuda=False) as ranks:             # on every rank; alone, ranks.world is 1
        backend = make_backend("auto", model, optimiser, ranks=ranks)

`detect` reads the environment that torchrun or the deepspeed launcher leaves. A launcher that started several
processes without telling them their ranks is refused: each would train by itself, and all write the same files.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from defenses.backend import Backend, Optimiser, PlainBackend
from defenses.backend_ddp import DdpBackend
from defenses.backend_deepspeed import ZeroBackend
from defenses.backend_fsdp import FsdpBackend
from defenses.errors import BackendError
from intervene.errors import asked_found_do, close_names

KINDS = ("plain", "ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")
TIMEOUT = 1800.0  # seconds that a rank waits for another: one may be writing a checkpoint
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TORCHRUN = "torchrun --nproc-per-node 2 train_defense.py ..."
# Launchers that number their processes in words of their own: name -> (how many, what to do).
_FOREIGN = {
    "mpirun": ("OMPI_COMM_WORLD_SIZE", f"Start the ranks with: {_TORCHRUN}"),
    "mpiexec": ("PMI_SIZE", f"Start the ranks with: {_TORCHRUN}"),
    "srun": ("SLURM_STEP_NUM_TASKS", f"Let srun start one task per node, and in it: {_TORCHRUN}"),
}


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        by: what started it: "alone", "torchrun", "deepspeed" or "a launcher". local: its number on this machine.
    """

    by: str = "alone"
    rank: int = 0
    world: int = 1
    local: int = 0

    def __str__(self) -> str:
        if self.world == 1:
            return f"1 process ({self.by})"
        return f"rank {self.rank} of {self.world} (started by {self.by})"

    def device(self, cuda: bool) -> torch.device:
        """Return where this rank computes: the GPU of its local number, or the CPU.

        Raises:
            BackendError: this machine has fewer GPUs than ranks.
        """
        if not cuda:
            return torch.device("cpu")
        if self.local >= torch.cuda.device_count():
            found = f"this machine has {torch.cuda.device_count()} GPUs, and this is its rank {self.local} (from 0)."
            raise BackendError(asked_found_do("One GPU per rank", found, "Start fewer ranks, or train on the CPU."))
        return torch.device("cuda", self.local)


def detect(environ: Mapping[str, str] | None = None) -> Ranks:
    """Return what `environ` (None: that of this process) says about the launcher.

    Raises:
        BackendError: a launcher started this process and gave it no rank, or half of what it needs.
    """
    found = os.environ if environ is None else environ
    given = [name for name in _NEEDED if name in found]
    if "RANK" not in given and "WORLD_SIZE" not in given:
        _refuse_foreign(found)
        return Ranks()
    if missing := [name for name in _NEEDED if name not in found]:
        text = f"{', '.join(given)} set, {', '.join(missing)} not."
        raise BackendError(asked_found_do("Launcher", text, f"Set all four, or use: {_TORCHRUN}"))
    rank, world, local = _number(found, "RANK"), _number(found, "WORLD_SIZE"), _number(found, "LOCAL_RANK", "RANK")
    if not 0 <= rank < world:
        raise BackendError(asked_found_do("Launcher", f"RANK is {rank} of WORLD_SIZE {world}.", f"Use: {_TORCHRUN}"))
    by = "a launcher"
    if "TORCHELASTIC_RUN_ID" in found:
        by = "torchrun"
    elif "CROSS_RANK" in found:
        by = "deepspeed"
    return Ranks(by, rank, world, local)


def _refuse_foreign(found: Mapping[str, str]) -> None:
    for name, (variable, do) in _FOREIGN.items():
        if variable in found and _number(found, variable) > 1:
            text = (
                f"{variable} is {found[variable]}, but RANK and WORLD_SIZE are not set: each process would train alone."
            )
            raise BackendError(asked_found_do(f"Launcher {name}", text, do))
    if any(name.startswith("ACCELERATE_") for name in found):
        text = "it set no RANK and WORLD_SIZE; on CPU it starts one process, whatever --num_processes says."
        raise BackendError(asked_found_do("Launcher accelerate", text, f"Use: {_TORCHRUN}"))


def _number(found: Mapping[str, str], *names: str) -> int:
    name = next((name for name in names if name in found), names[0])
    try:
        return int(found[name])
    except ValueError:
        raise BackendError(asked_found_do("Launcher", f"{name} is {found[name]!r}.", "Give a whole number.")) from None


@contextmanager
def joined(ranks: Ranks, *, cuda: bool, timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """Join the group of all ranks (nccl on GPUs, gloo on CPU) and yield `ranks`; leave it when the block ends.

    Alone it makes a group of one, so that sharding backends can be tried on one process.

    Raises:
        BackendError: the group is of another size than the launcher said.
    """
    device = ranks.device(cuda)
    if cuda:
        torch.cuda.set_device(device)
    # torch's own, at every transfer that FSDP2 and DeepSpeed make by the old name
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    wait = timedelta(seconds=timeout)
    if ranks.world == 1 and ranks.by == "alone":
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not list it
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=0, world_size=1, timeout=wait)
    else:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=wait)
    try:
        require_group(ranks)
        yield ranks
    finally:
        dist.destroy_process_group()


def leave(status: int) -> None:
    """End this process at once with `status` if it is one of several ranks; else return.

    Threads of gloo and DeepSpeed outlive their group. One that still asks for Python while the interpreter is taken
    down aborts the process, and the launcher then calls a finished training failed: rare, on a busy machine.
    """
    if detect().world > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def require_group(ranks: Ranks) -> None:
    """Refuse ranks that have not joined one group: they would be as many separate trainings.

    Raises:
        BackendError: the process group is missing, or of another size than `ranks.world`.
    """
    size = dist.get_world_size() if dist.is_initialized() else 0
    if size != ranks.world:
        found = f"{ranks.by} started {ranks.world} ranks, and the process group has {size}: each would train alone."
        raise BackendError(asked_found_do("Process group", found, "Run inside `with joined(ranks, cuda=...)`."))


def make_backend(
    kind: str,
    model: nn.Module,
    optimiser: Optimiser | None = None,
    *,
    ranks: Ranks | None = None,
    cuda: bool = False,
    offload: bool = False,
) -> Backend:
    """Return the backend `kind` ("auto": plain alone, DDP on several ranks) on this rank's device.

    Args:
        ranks: of `joined`, which has to be active for all kinds but plain; None: this process is alone.
        offload: keep optimiser state in the memory of the CPU: fsdp and zero1-3.

    Raises:
        BackendError: no such kind; plain on several ranks; ranks without their group; offload where there is none;
            ZeRO without deepspeed; what the backend itself refuses.
    """
    ranks = ranks or Ranks()
    if kind == "auto":
        kind = "plain" if ranks.world == 1 else "ddp"
    if kind not in KINDS:
        raise BackendError(asked_found_do(f"Backend {kind!r}", "there is none.", close_names(kind, ("auto", *KINDS))))
    if kind == "plain" and ranks.world > 1:
        found = f"{ranks.by} started {ranks.world} ranks, and each would train alone, over the same files."
        raise BackendError(asked_found_do("Backend plain", found, "Use ddp, fsdp or zero1 to zero3."))
    if offload and kind in ("plain", "ddp", "zero0"):
        raise BackendError(asked_found_do(f"Offload with {kind}", "it keeps all on its device.", "Use fsdp or zero2."))
    device = ranks.device(cuda)
    if kind == "plain":
        return PlainBackend(model, optimiser, device=device)
    require_group(ranks)
    if kind == "ddp":
        return DdpBackend(model, optimiser, device=device)
    if kind == "fsdp":
        return FsdpBackend(model, optimiser, device=device, offload=offload)
    return ZeroBackend(model, optimiser, stage=int(kind[-1]), device=device, offload=offload)
