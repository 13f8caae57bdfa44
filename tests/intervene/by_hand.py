"""Interventions made with a raw torch hook, so that what `intervene` does is checked against something simple."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CPU_TOLERANCE = {"rtol": 0.0, "atol": 1e-5}

HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """Return the list of blocks of a tiny model, found without the toolkit."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 3]
    return lists[0]


@contextmanager
def block_output(model: nn.Module, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the output h (B, S, D) of a block by `change(h)` in every forward pass."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = blocks_of(model)[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def added(vector: Tensor, selected: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a change that adds `vector` (broadcasting to (B, S, D)) where `selected` (B, S) is true."""
    return lambda h: h + selected[..., None].to(h.dtype) * vector


def hook_state(model: nn.Module) -> dict[str, list[Any]]:
    """Return every hook on every module, in order."""
    return {
        f"{name}.{kind}": list(getattr(module, kind).items())
        for name, module in model.named_modules()
        for kind in HOOK_DICTS
        if isinstance(getattr(module, kind, None), dict) and getattr(module, kind)
    }


def flags(model: nn.Module) -> dict[str, bool]:
    """Return `training` of every module and `requires_grad` of every parameter."""
    training = {f"training {name}": module.training for name, module in model.named_modules()}
    return {**training, **{f"grad {name}": p.requires_grad for name, p in model.named_parameters()}}


def vector(seed: int, *shape: int, width: int = 32) -> Tensor:
    """Return a random tensor (*shape, D)."""
    return torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> None:
    """Assert that two tensors agree to 1e-5, the contract's bound in fp32."""
    torch.testing.assert_close(a, b, **CPU_TOLERANCE)
