"""In which precision small matrices meet activations: at least fp32, also in bf16 models and under autocast.

A frame, dictionary or gate rounded to bf16 is another one: its columns are not orthonormal, and 1 + 0.001 is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary


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
    """Let the linear layers of a frozen fp32 model multiply in bf16 (sums in fp32), until the block ends.

    Only where the processor has instructions for it (AMX, AVX512-BF16); elsewhere nothing changes. Frozen weights are
    kept in bf16 beside the model, half its size again: with few rows a product waits for its weights to be read. Only
    linear layers are meant, forwards and backwards: attention gets slower by it, and frames and other small matrices
    are not touched. For the steps of a fit, whose noise is larger; never for a score.
    """
    if not _fast_here():
        yield
        return
    token = _FAST.set(True)
    try:
        with _FastLinears():
            yield
    finally:
        _FAST.reset(token)


_FAST: ContextVar[bool] = ContextVar("fast_products", default=False)


def multiplies_fast(h: Tensor) -> bool:
    """Return whether products with `h` are to be made in bf16: inside `fast_products`, for fp32 on the CPU."""
    return _FAST.get() and h.device.type == "cpu" and h.dtype == torch.float32


@cache
def _fast_here() -> bool:
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


_ROUNDED = WeakTensorKeyDictionary()  # frozen weight -> its version and its bf16 copy


def rounded(weight: Tensor) -> Tensor:
    """Return `weight` in bf16, made once for each of its values."""
    held: tuple[int, Tensor] | None = _ROUNDED[weight] if weight in _ROUNDED else None  # noqa: SIM401 (get is untyped)
    if held is None or held[0] != weight._version:
        held = weight._version, weight.detach().bfloat16()
        _ROUNDED[weight] = held
    return held[1]


def forget_rounded(model: nn.Module) -> None:
    """Drop the bf16 copies of the weights of `model`: a write through `.data` leaves no other trace."""
    for one in model.parameters():
        if one in _ROUNDED:
            del _ROUNDED[one]


class _FastLinears(TorchFunctionMode):
    """Sends every `linear` of fp32 activations and frozen CPU weights through `_FastLinear`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.linear and not kwargs and _suits(*args[:2]):
            return _FastLinear.apply(*args, *[None] * (3 - len(args)))  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


def _suits(x: Tensor, weight: Tensor) -> bool:
    here = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return here and not weight.requires_grad and not weight.is_inference()


class _FastLinear(torch.autograd.Function):
    """x W^T + b with x and W rounded to bf16, and its gradient to x; the result is fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rounded(weight))
        product = nn.functional.linear(x.bfloat16(), rounded(weight)).float()
        return product if bias is None else product + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        to_x = (grad.bfloat16() @ weight).float() if ctx.needs_input_grad[0] else None
        return to_x, None, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
