"""`DdpBackend`: every rank holds the whole model; torch's DistributedDataParallel adds up the gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from defenses.backend import Optimiser, PlainBackend, Turns, require_own, signed
from defenses.errors import BackendError
from defenses.ranks import reduced, spread
from intervene.errors import asked_found_do


class DdpBackend:
    """Replicas on all ranks. Gradients travel once per step, while its last backward pass is still running."""

    def __init__(
        self, model: nn.Module, optimiser: Optimiser | None = None, *, device: torch.device | str = "cpu"
    ) -> None:
        """Move `model` to `device`, give it the weights of rank 0, and wrap it; collective.

        Raises:
            BackendError: see `PlainBackend`.
        """
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.replica = PlainBackend(model, optimiser, device=device)
        self.model, self.device, self.named = self.replica.model, self.replica.device, self.replica.named
        spread(self.model)
        self.wrapped = DistributedDataParallel(self.model, init_sync=False)
        self.turns = Turns()

    def forward(self, **inputs: Any) -> Any:
        """Return the model's output; whether this pass's gradients will travel is decided at `backward`."""
        self.turns.forward()
        with self.wrapped.no_sync(), self.precision():
            return self.wrapped(**inputs)

    def precision(self) -> AbstractContextManager[Any]:
        """Return autocast to bf16, or nothing."""
        return self.replica.precision()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; on the last one, add up those of all ranks."""
        self.turns.backward(last)
        if not last:
            with self.wrapped.no_sync():
                self.replica.backward(loss, last=last)
            return
        # What DistributedDataParallel.forward does outside no_sync; here, since only now it is known to be the last.
        self.wrapped.reducer.prepare_for_backward([])
        self.replica.backward(loss, last=last)
        self._require_all_reduced()
        torch._foreach_mul_([one.grad for one in self.named.values() if one.grad is not None], float(self.world))

    def _require_all_reduced(self) -> None:
        try:
            self.wrapped.reducer._check_reducer_finalized()
        except RuntimeError:
            found = "some parameters took no part in the last loss of the step, so gradients were not added up."
            do = "Add 0 * their sum to the loss, freeze them, or use backend fsdp."
            raise BackendError(asked_found_do("Backward on DDP", found, do)) from None

    def step(self, lr: float) -> float:
        """Clip, step, forget the gradients; return the norm before clipping."""
        self.turns.step()
        return self.replica.step(lr)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained."""
        return self.named

    def value(self, name: str) -> Tensor:
        """Return a copy of a parameter."""
        return self.replica.value(name)

    def write(self, name: str, value: Tensor) -> None:
        """Set a parameter; every rank is given the same `value`."""
        self.replica.write(name, value)

    def gradient(self, name: str) -> Tensor | None:
        """Return a copy of a gradient."""
        return self.replica.gradient(name)

    def write_gradient(self, name: str, value: Tensor) -> None:
        """Set a gradient; every rank is given the same `value`."""
        self.replica.write_gradient(name, value)

    def sum(self, value: Tensor) -> Tensor:
        """Return `value` summed over ranks."""
        return reduced(value, dist.ReduceOp.SUM, self.device)

    def max(self, value: Tensor) -> Tensor:
        """Return the largest `value` of all ranks."""
        return reduced(value, dist.ReduceOp.MAX, self.device)

    def weights(self) -> dict[str, Tensor] | None:
        """Return the model's state dict on the CPU of rank 0."""
        return self.replica.weights() if self.rank == 0 else None

    def state(self) -> dict[str, Any]:
        """Return parameters, optimiser and this rank's random state."""
        return signed(self.replica.state(), "ddp", self.rank, self.world)

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up where `state` left off."""
        require_own(state, "ddp", self.rank, self.world)
        self.replica.load_state(signed(state, "plain", 0, 1))
