"""Losses per token, and their sums per sample.

A token's loss is stored in its own column: `losses[b, t]` is the cross-entropy of predicting `labels[b, t]` from the
columns before t, in nats, in fp32; 0 where there is no label. The first column of a row is predicted by nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from defenses.batch import Batch
from intervene.content import IGNORED_LABEL
from intervene.families import locate
from intervene.suffix import accepts

if TYPE_CHECKING:
    from defenses.backend import Backend


def token_losses(backend: Backend, batch: Batch, *, grad: bool = True) -> Tensor:
    """Return (B, S): the loss of every response token in one forward pass; 0 elsewhere.

    Logits are computed only in columns that predict something in some row. Interventions are the caller's: wrap the
    call, and the backward pass, in `intervene(backend.model, ...)`. Without `grad` the pass runs inside the wrappers
    and leaves nothing behind for backward.
    """
    if grad:
        return _losses(backend.forward, backend.model, batch)
    with torch.no_grad(), backend.precision():
        return _losses(backend.model, backend.model, batch)


def _losses(forward: Any, model: nn.Module, batch: Batch) -> Tensor:
    columns = predicting_columns(batch)
    keep = {"logits_to_keep": columns} if accepts(locate(model).hf, "logits_to_keep") else {}
    logits = forward(**batch.inputs(), use_cache=False, **keep).logits
    if not keep:
        logits = logits[:, columns]
    targets = batch.labels[:, columns + 1]  # (B, C)
    each = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    losses = each.new_zeros(batch.labels.shape)
    return losses.index_copy(1, columns + 1, each.view(targets.shape))


def predicting_columns(batch: Batch) -> Tensor:
    """Return (C,) the columns whose logits are scored in some row; column 0 where there are none, so that a pass
    without any response token still has a graph, of losses that are all 0."""
    found = batch.response[:, 1:].any(0).nonzero()[:, 0]
    return found if len(found) else found.new_zeros(1)


def learned(batch: Batch) -> Tensor:
    """Return (B, S) bool: response tokens that something predicts."""
    mask = batch.response.clone()
    mask[:, 0] = False
    return mask


def n_tokens(batch: Batch) -> Tensor:
    """Return 0-d int64: how many tokens of this micro-batch are learned."""
    return learned(batch).sum()


def sample_sums(values: Tensor, batch: Batch) -> Tensor:
    """Return (N,): `values` (B, S) summed over the tokens of each sample, padding left out."""
    own = batch.sample.clamp_min(0).flatten()
    kept = torch.where(batch.sample.flatten() >= 0, values.flatten(), values.new_zeros(()))
    return values.new_zeros(len(batch)).index_add(0, own, kept)


def sample_counts(batch: Batch) -> Tensor:
    """Return (N,) fp32: how many tokens of each sample are learned."""
    return sample_sums(learned(batch).float(), batch)


def sample_means(values: Tensor, batch: Batch) -> Tensor:
    """Return (N,): the mean of `values` (B, S) over the learned tokens of each sample; 0 where it has none."""
    return sample_sums(values * learned(batch), batch) / sample_counts(batch).clamp_min(1)


def spread(per_sample: Tensor, batch: Batch) -> Tensor:
    """Return (B, S): each sample's value (N,) at all its tokens; 0 on padding."""
    return torch.where(batch.sample >= 0, per_sample[batch.sample.clamp_min(0)], per_sample.new_zeros(()))
