"""Seeded values that several test files share: tensors, frames, dictionaries, and edits off their start."""

from __future__ import annotations

import torch

from intervene import SAE, Gated
from intervene.codecs import REFUSED

D, K = 12, 4  # width of the activations, number of features


def randn(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def frame(rank=K, width=D):
    return torch.linalg.qr(randn(width, rank, seed=2, dtype=torch.float64)).Q.float()


def sae(activation="relu", **options):
    parts = {
        "encoder_bias": randn(20, seed=6),
        "decoder_bias": randn(D, seed=7),
        "threshold": randn(20, seed=8).abs() if activation == "jumprelu" else None,
    }
    return SAE(randn(D, 20), randn(20, D, seed=5), activation=activation, **{**parts, **options})


def classes(base):
    """Return the names of our final classes of `base` that a user puts into a plan and that can be stored."""
    ours = {kind for kind in base.__subclasses__() if kind.__module__.startswith("intervene.")}
    deeper = set().union(*(classes(kind) for kind in ours))
    return {kind.__name__ for kind in ours if not kind.__name__.startswith("_") and kind is not Gated} - {
        *REFUSED
    } | deeper


def learned(edit):
    """Return `edit`, or a featurizer, with its parameters moved off their start."""
    with torch.no_grad():
        for parameter in edit.parameters():
            parameter.add_(0.3 * randn(*parameter.shape, seed=9))
    return edit
