"""What ranks tell each other: the weights they begin with, and sums."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0; adapters are drawn at random, on each rank anew."""
    seen: set[int] = set()
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in seen and tensor.numel():
            seen.add(id(tensor))
            dist.broadcast(tensor.detach(), src=0)


def reduced(value: Tensor, how: dist.ReduceOp.RedOpType, device: torch.device) -> Tensor:
    """Return `value` reduced over all ranks, where it was; transfers go by way of `device`."""
    sent = value.detach().to(device, copy=True).contiguous()
    dist.all_reduce(sent, how)
    return sent.to(value.device)
