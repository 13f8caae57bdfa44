"""`Group`: the processes that fit together, each on its share of every batch, with their gradients added up.

    with joined() as group:                              # on every rank, under torchrun
        fit_together(model, plans, pairs, budget, seeds=[0], group=group)

Every rank holds the model and all pairs (with a `Disk` space they are run once and mapped by all), and the same plans.
What comes out is what one process computes, up to the rounding of sums in another order, whatever the number of ranks.
A rank that dies takes the others down with it: their next transfer fails, at the latest after `timeout`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from intervene.errors import InterveneError, asked_found_do

TIMEOUT = 600.0  # seconds that a rank waits for another: one may still be loading what the other has
_NEEDED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@dataclass(frozen=True)
class Group:
    """This process among those that fit together: its number from 0, how many there are, where transfers start."""

    rank: int
    size: int
    device: torch.device

    def share(self, rows: Tensor, parts: int = 1) -> tuple[Tensor, float]:
        """Return this rank's share of a batch, and what share of it that is: 0 to 1, adding up to 1 over the ranks.

        `rows` (parts * b,) holds one batch of b for each of `parts` plans, of which the same places are taken. Shares
        differ by one row at most. A rank for which none is left gets one row that counts for nothing (0.0): so it runs
        as many passes as the others, and draws from its generators as often.
        """
        batches = rows.view(parts, -1)  # (R, b)
        mine = batches.tensor_split(self.size, dim=1)[self.rank]
        weight = mine.shape[1] / batches.shape[1]
        return (mine if mine.shape[1] else batches[:, :1]).reshape(-1), weight

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put into each tensor its sum over the ranks, all in one transfer; every rank then holds the same bits."""
        flat, sizes = self._flat(tensors), [tensor.numel() for tensor in tensors]
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, sizes), strict=True):
            tensor.copy_(part.view_as(tensor))

    def add_gradients(self, parameters: Sequence[Tensor], losses: Tensor) -> None:
        """Add up the gradients of `parameters` (0 where a rank has none) and the losses, all in one transfer."""
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        self.add_up([*(parameter.grad for parameter in parameters if parameter.grad is not None), losses])

    def gathered(self, answers: Tensor, n: int) -> Tensor:
        """Return (R, n): the answers to all `n` pairs; `answers` (R, b) are this rank's, to its `share` of them."""
        mine, weight = self.share(torch.arange(n))
        every = answers.new_zeros(len(answers), n)
        if weight:
            every[:, mine.to(every.device)] = answers
        self.add_up([every])
        return every

    @torch.no_grad()
    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Put into each tensor what rank 0 has there, all in one transfer."""
        flat, sizes = self._flat(tensors), [tensor.numel() for tensor in tensors]
        dist.broadcast(flat, src=0)
        for tensor, part in zip(tensors, torch.split(flat, sizes), strict=True):
            tensor.copy_(part.view_as(tensor))

    def told(self, value: Any) -> Any:
        """Return rank 0's `value`, which can be pickled; what the others pass is not looked at."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def require_alike(self, what: str, value: Any) -> None:
        """Refuse, on all ranks at once, what would make them run different steps.

        Raises:
            InterveneError: `value` is not the same on every rank.
        """
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
        if other is not None:
            raise InterveneError(
                asked_found_do(
                    f"{what} on {self.size} ranks",
                    f"rank 0 has {found[0]} and rank {other} has {found[other]}.",
                    "Give every rank the same pairs, plans and budget.",
                )
            )

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        return torch.cat([tensor.detach().reshape(-1).to(self.device, dtype) for tensor in tensors])


def launched() -> bool:
    """Return whether something like torchrun started this process as one of several."""
    return os.environ.keys() >= _NEEDED


@contextmanager
def joined(*, backend: str | None = None, timeout: float = TIMEOUT) -> Iterator[Group]:
    """Yield the group of all processes that torchrun started; leave it when the block ends.

    Args:
        backend: "nccl" or "gloo"; None: nccl where there are GPUs, each rank taking the one of its local number.
        timeout: seconds after which a rank gives up waiting for another.

    Raises:
        InterveneError: this process was not started by torchrun.
    """
    if not launched():
        raise InterveneError(
            asked_found_do(
                "Data-parallel fitting",
                "RANK, WORLD_SIZE and MASTER_ADDR are not set.",
                "Run: torchrun --nproc_per_node 2 run_das.py --parallel data ...",
            )
        )
    chosen = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cpu")
    if chosen == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group(chosen, timeout=timedelta(seconds=timeout))
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
