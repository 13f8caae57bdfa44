"""Columns and widths: how wide a module's tensor is, and which of its columns belong to which head.

Widths are measured on the modules, never computed from the configuration: hidden_size // heads is not the width of a
head in Qwen3, Gemma, Mistral or gpt-oss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from intervene.errors import UnsupportedModel, asked_found_do
from intervene.locate import Located

Side = Literal["input", "output"]
Columns = slice | tuple[int, ...] | None


def features(module: nn.Module, side: Side) -> int | None:
    """Return the size of the last axis of a module's input or output, or None if the module does not say.

    Knows Linear and what imitates it (LoRA, quantised), transformers' Conv1D, Embedding, LayerNorm and RMSNorms.
    """
    size = getattr(module, f"{'in' if side == 'input' else 'out'}_features", None)
    weight = getattr(module, "weight", None)
    if isinstance(size, int):
        return size
    if isinstance(getattr(module, "nf", None), int) and isinstance(weight, Tensor):  # Conv1D keeps (in, out)
        return full_shape(weight)[0 if side == "input" else 1]
    if isinstance(module, nn.Embedding):
        return None if side == "input" else module.embedding_dim
    if isinstance(weight, Tensor) and len(full_shape(weight)) == 1 and "norm" in type(module).__name__.lower():
        return full_shape(weight)[0]
    return None


def full_shape(weight: Tensor) -> torch.Size:
    """Return the shape of a weight also where ZeRO-3 has left it empty between passes."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape


def measured(module: nn.Module, side: Side, path: str) -> int:
    """Return `features(module, side)`; raise UnsupportedModel, naming `path`, where the module does not say."""
    size = features(module, side)
    if size is None:
        raise UnsupportedModel(
            asked_found_do(
                f"Width of the {side} of {path}",
                f"a {type(module).__name__} has neither in_features/out_features nor a weight we can read.",
                "Use a 'path:' site, whose width is taken from the tensor.",
            )
        )
    return size


def as_columns(columns: Sequence[int], total: int) -> Columns:
    """Return `columns` of a tensor with `total` of them as None (all, in order), a slice, or a tuple."""
    first, n = columns[0], len(columns)
    if list(columns) != list(range(first, first + n)):
        return tuple(columns)
    return None if n == total else slice(first, first + n)


def n_heads(place: Located, *, kv: bool) -> int:
    """Return the number of query heads, or of key/value heads."""
    family, config = place.family, place.config
    if not kv or family.kv_heads is None:
        return int(getattr(config, family.heads))
    if isinstance(family.kv_heads, int):
        return family.kv_heads
    n = getattr(config, family.kv_heads, None)
    return int(getattr(config, family.heads) if n is None else n)


def head_table(place: Located, component: str, width: int) -> npt.NDArray[np.int64]:
    """Return the module's columns that belong to each head, (heads, d), for a head, query, key or value component."""
    part = component.removeprefix("head_").removesuffix("_output")
    heads, groups = n_heads(place, kv=False), n_heads(place, kv=True)
    every = np.arange(width)  # not torch: building a plan must cost the model no tensor operations
    fused = place.family.qkv_proj is not None and part != "attention_value"
    n = groups if part in ("key", "value") else heads
    parts = heads + 2 * groups if fused else n
    if width % parts or heads % groups:
        raise UnsupportedModel(
            asked_found_do(
                f"Heads of {component} in this {place.model_type}",
                f"{width} columns do not divide into {heads} query and {groups} key/value heads.",
                "Use the component without 'head_', or register a family that fits.",
            )
        )
    if not fused:
        return every.reshape(n, width // n)
    d = width // parts
    which = ("query", "key", "value").index(part)
    if place.family.qkv_layout == "stacked":
        first = (0, heads, heads + groups)[which]
        return every.reshape(parts, d)[first : first + n]
    if place.family.qkv_layout == "per_head":
        return every.reshape(heads, 3, d)[:, which]
    grouped = every.reshape(groups, heads // groups + 2, d)
    return grouped[:, :-2].reshape(heads, d) if part == "query" else grouped[:, which - 3]
