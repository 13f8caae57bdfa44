"""`FsdpBackend`: torch's FSDP2 (`fully_shard`), each block by itself and then the rest of the model.

Parameters, gradients and optimiser state are cut over the ranks; a block is whole only while it computes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from defenses.backend import (
    Optimiser,
    Turns,
    adamw,
    clipped,
    random_state,
    require_own,
    require_precision,
    set_random_state,
    signed,
    stepped,
    trainable,
)
from defenses.ranks import reduced, spread
from intervene.families import locate


class FsdpBackend:
    """Shards on all ranks. Every backward pass adds its gradients up over the ranks, so none is held whole."""

    def __init__(
        self,
        model: nn.Module,
        optimiser: Optimiser | None = None,
        *,
        device: torch.device | str = "cpu",
        offload: bool = False,
    ) -> None:
        """Move `model` to `device`, give it the weights of rank 0, and shard it; collective.

        Args:
            offload: keep shards and optimiser state in the memory of the CPU; of no effect where that is `device`.

        Raises:
            BackendError: nothing is trainable, or bf16 on a device without it.
            UnknownFamily: nobody knows where the blocks of this model are.
        """
        self.chosen = optimiser or Optimiser()
        self.device, self.rank, self.world = torch.device(device), dist.get_rank(), dist.get_world_size()
        require_precision(self.chosen.precision, self.device)
        trainable(model)
        self.model = model.to(self.device).train()
        spread(self.model)
        self.parts = self._sharded(offload and self.device.type != "cpu")
        self.named = trainable(self.model)
        self.optimiser = adamw(self.named, self.chosen)
        self.turns = Turns()

    def _sharded(self, offload: bool) -> list[FSDPModule]:
        # bf16: weights travel and compute in bf16; shards, sums of gradients and the optimiser stay in fp32
        half = self.chosen.precision == "bf16"
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
        held = CPUOffloadPolicy() if offload else OffloadPolicy()
        mesh = init_device_mesh(self.device.type, (self.world,))
        located = locate(self.model)
        for part in (*located.layers, located.hf):
            fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=held, reshard_after_forward=True)
        parts: list[FSDPModule] = [one for one in self.model.modules() if isinstance(one, FSDPModule)]
        for one in parts:  # gradients are summed, not averaged; gloo knows no other way
            one.set_gradient_divide_factor(1.0)
            one.set_force_sum_reduction_for_comms(True)
        return parts

    def forward(self, **inputs: Any) -> Any:
        """Return the model's output."""
        self.turns.forward()
        return self.model(**inputs)

    def precision(self) -> AbstractContextManager[Any]:
        """Return nothing: the shards themselves are gathered in bf16."""
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`."""
        self.turns.backward(last)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def step(self, lr: float) -> float:
        """Clip, step, forget the gradients; return the norm before clipping."""
        self.turns.step()
        self._settle()
        norm = clipped(self.named, self.chosen.clip)
        stepped(self.optimiser, lr, norm)
        return norm

    def _settle(self) -> None:
        """Let go of blocks that a pass left whole: one that was stopped early, or made without gradients.

        Else the next pass would compute with that copy, and not with what has been written into the shards.
        """
        for one in self.parts:
            one.reshard()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained: sharded tensors."""
        return self.named

    @torch.no_grad()
    def value(self, name: str) -> Tensor:
        """Return a copy of a parameter."""
        return _whole(self.named[name]).to(self.device, torch.float32, copy=True)

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Set a parameter; every rank is given the same `value`."""
        self._settle()
        shard = self.named[name]
        _local(shard).copy_(_local(_cut(value, shard)))

    @torch.no_grad()
    def gradient(self, name: str) -> Tensor | None:
        """Return a copy of a gradient."""
        grad = self.named[name].grad
        return None if grad is None else _whole(grad).to(self.device, torch.float32, copy=True)

    @torch.no_grad()
    def write_gradient(self, name: str, value: Tensor) -> None:
        """Set a gradient; every rank is given the same `value`."""
        self.named[name].grad = _cut(value, self.named[name])

    def sum(self, value: Tensor) -> Tensor:
        """Return `value` summed over ranks."""
        return reduced(value, dist.ReduceOp.SUM, self.device)

    def max(self, value: Tensor) -> Tensor:
        """Return the largest `value` of all ranks."""
        return reduced(value, dist.ReduceOp.MAX, self.device)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor] | None:
        """Return the model's state dict on the CPU of rank 0, one parameter gathered at a time."""
        self._settle()
        held = {}
        for name, value in self.model.state_dict().items():
            whole = _whole(value)
            if self.rank == 0:
                held[name] = whole.detach().cpu().clone()
        return held if self.rank == 0 else None

    def state(self) -> dict[str, Any]:
        """Return this rank's shards, in fp32, those of its optimiser, and its random state."""
        state = {
            "parameters": {name: _local(one.detach()).cpu() for name, one in self.named.items()},
            "optimiser": _each(self.optimiser.state_dict(), lambda one: _local(one).cpu()),
            "random": random_state(),
        }
        return signed(state, "fsdp", self.rank, self.world)

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take up where `state` left off."""
        require_own(state, "fsdp", self.rank, self.world)
        self._settle()
        for name, one in self.named.items():
            _local(one).copy_(state["parameters"][name])
        # the optimiser counts its parameters through its groups
        order = [one for group in self.optimiser.param_groups for one in group["params"]]
        held = state["optimiser"]["state"]
        shards = {index: _each(held[index], partial(_as_shard, like=order[index])) for index in held}
        self.optimiser.load_state_dict({**state["optimiser"], "state": shards})
        set_random_state(state["random"])


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    """Return all parts together; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _cut(value: Tensor, like: Tensor) -> Tensor:
    """Return `value`, which every rank has, cut as `like` is; nothing travels."""
    whole = value.detach().to(like.device, like.dtype)
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _as_shard(part: Tensor, like: Tensor) -> Tensor:
    """Return this rank's `part` as a sharded tensor such as `like`; counters (0-d) stay as they are."""
    if part.dim() == 0 or not isinstance(like, DTensor):
        return part
    local = part.to(_local(like).device)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _each(value: Any, change: Any) -> Any:
    """Return `value` with every tensor in its dicts, lists and tuples changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _each(one, change) for key, one in value.items()}
    return type(value)(_each(one, change) for one in value) if isinstance(value, (list, tuple)) else value
