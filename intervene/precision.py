"""In which precision small matrices meet activations: at least fp32, also in bf16 models and under autocast.

A frame, dictionary or gate rounded to bf16 is another one: its columns are not orthonormal, and 1 + 0.001 is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(h: Tensor) -> torch.dtype:
    """Return the dtype in which parameters are applied to `h`: fp32, or fp64 if `h` is."""
    return torch.promote_types(h.dtype, torch.float32)


def full_precision(h: Tensor) -> torch.autocast:
    """Return a context in which autocast does not round the matrix products of `h`'s device."""
    return torch.autocast(h.device.type, enabled=False)


def contiguous(tensor: Tensor) -> Tensor:
    """Return `tensor` in row-major memory: a product with another layout may differ in its last bit."""
    return tensor.contiguous()
