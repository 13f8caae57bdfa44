"""In which precision small matrices meet activations: at least fp32, also in bf16 models and under autocast.

A frame, dictionary or gate rounded to bf16 is another one: its columns are not orthonormal, and 1 + 0.001 is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def compute_dtype(h: Tensor) -> torch.dtype:
    """Return the dtype in which parameters are applied to `h`: fp32, or fp64 if `h` is."""
    return torch.promote_types(h.dtype, torch.float32)


def full_precision(h: Tensor) -> torch.autocast:
    """Return a context in which autocast does not round the matrix products of `h`'s device."""
    return torch.autocast(h.device.type, enabled=False)


def contiguous(tensor: Tensor) -> Tensor:
    """Return `tensor` in row-major memory: a product with another layout may differ in its last bit."""
    return tensor.contiguous()


@contextmanager
def fast_products() -> Iterator[None]:
    """Let fp32 linear layers multiply in bf16 and add up in fp32, where the processor can, until the block ends.

    On CPUs with AMX such a product is three to four times faster; elsewhere nothing changes. Only linear layers are
    meant, forwards and backwards: attention gets slower by it, and frames and other small matrices are not touched.
    Storage stays fp32. For the steps of a fit, whose noise is larger; never for a score.
    """
    with _FastLinears():
        yield


class _FastLinears(TorchFunctionMode):
    """Sends every `linear` of fp32 tensors through `_FastLinear`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.linear and not kwargs and args[0].dtype == torch.float32:
            return _FastLinear.apply(*args, *[None] * (3 - len(args)))  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _FastLinear(torch.autograd.Function):
    """x W^T + b whose products, and those of its gradients, may be made in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        with _products("medium"):
            return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # (B S, out)
        with _products("medium"):
            to_x = (rows @ weight).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
            to_weight = rows.mT @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


@contextmanager
def _products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
