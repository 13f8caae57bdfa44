"""How each sample's loss changes along a direction in the stream: slope <v, g> and curvature v' H v.

With g the gradient of a sample's loss with respect to the stream at the tokens in scope, and the same v added to all of
them, L(a) = L + a <v, g> + a^2/2 v' H v + ...: a negative slope means that the sample wants the model to move along v.
Several layers count together, as if injected together.

All passes are those of `backend.model`, inside its wrappers, and start from a natural pass (`shared_passes`): they
compute only the blocks above the lowest direction, and leave no gradient on any parameter. Shown on two ranks of DDP,
FSDP2 and ZeRO-2 and 3, where parameters that are cut over ranks allow slopes and differences but no exact product
(`require_whole`). Reentrant gradient checkpointing gives no gradients of activations: use the other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from defenses.batch import Batch
from defenses.objectives import sample_means, sample_sums
from defenses.plans import ABSENT, Directions, gradient_probe, injection, selects
from defenses.shared_passes import Inside, SharedPasses
from intervene import Plan, intervene

Of: TypeAlias = Literal["samples", "tokens"]
"""Whose loss: the mean over each sample's tokens, or the sum over all tokens, as training weighs them."""

Fields: TypeAlias = dict[int, Tensor]
"""Layer -> (B, P, D) fp32 at the columns of a scope; 0 where a row has fewer."""


def total_of(losses: Tensor, batch: Batch, of: Of) -> Tensor:
    """Return 0-d: the sum over samples of their mean losses, or over tokens of theirs; `losses` (B, S).

    Samples do not see each other, so its gradient at a token is that of the token's own sample.
    """
    return sample_means(losses, batch).sum() if of == "samples" else losses.sum()


def by_sample(values: Tensor, columns: Tensor, batch: Batch) -> Tensor:
    """Return (N,): `values` (B, P) at `columns` (B, P), summed over each sample's."""
    kept = values.masked_fill(columns == ABSENT, 0.0)
    placed = kept.new_zeros(batch.sample.shape).scatter_add(1, columns.clamp_min(0), kept)
    return sample_sums(placed, batch)


def dot(fields: Fields, directions: Directions) -> Tensor:
    """Return (B, P): at each token the sum over layers of <field, v>."""
    parts = [field @ directions.at(layer).to(field.device) for layer, field in fields.items()]
    return torch.stack(parts).sum(0)


def slopes(shared: SharedPasses, directions: Directions, columns: Tensor, *, of: Of = "samples") -> Tensor:
    """Return (N,): <v, g> of each sample at `columns`; 0 for one without tokens in scope or without a loss."""
    with shared.again():
        fields = _gradients(shared, directions, columns, of, wide=False)
    return by_sample(dot(fields, directions), columns, shared.batch)


@dataclass(frozen=True, eq=False)
class Second:
    """Slope (N,), curvature v' H v (N,), and the product H v itself, layer -> (B, P, D)."""

    slope: Tensor
    curvature: Tensor
    product: Fields


def exact_second(shared: SharedPasses, directions: Directions, columns: Tensor, *, of: Of = "samples") -> Second:
    """Return slope and curvature with the exact product H v, by differentiating twice.

    Outside of autocast, and with the attention kernel that can be differentiated twice (torch's plain one: its memory
    grows with S squared).
    """
    batch = shared.batch
    with shared.again(wide=True), sdpa_kernel(SDPBackend.MATH):
        leaves, plan, marked = gradient_leaves(directions, columns)
        with intervene(shared.backend.model, plan, prompt=batch.prompt(marked)):
            total = total_of(Inside(shared.backend, wide=True).token_losses(batch), batch, of)
            first = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
            fields = named(leaves, first, columns)
            along = dot(fields, directions)
            second = torch.autograd.grad(along.sum(), list(leaves.values()), materialize_grads=True)
    product = named(leaves, second, columns)
    return Second(
        by_sample(along.detach(), columns, batch), by_sample(dot(product, directions), columns, batch), product
    )


def difference_second(
    shared: SharedPasses,
    directions: Directions,
    columns: Tensor,
    *,
    epsilon: float,
    central: bool = True,
    wide: bool = True,
    of: Of = "samples",
) -> Second:
    """Return the same with H v from differences of gradients: (g(e v) - g(-e v)) / 2e, or (g(e v) - g(0)) / e.

    Args:
        epsilon: in multiples of v. central: the first formula, with an error of order e^2 instead of e.
        wide: outside of autocast. In bf16 most coordinates of a stream do not change at all when a small v is added,
            and the difference is rounding noise.
    """
    zero, up = 0.0, epsilon
    found: dict[float, Fields] = {}
    for strength in (zero, up, -up) if central else (zero, up):
        plan = injection(directions, strength) if strength else ()
        with shared.again(wide=wide):
            found[strength] = _gradients(shared, directions, columns, of, wide=wide, plan=plan)
    low, width = (found[-up], 2 * up) if central else (found[zero], up)
    product = {layer: (high - low[layer]) / width for layer, high in found[up].items()}
    batch = shared.batch
    return Second(
        by_sample(dot(found[zero], directions), columns, batch),
        by_sample(dot(product, directions), columns, batch),
        product,
    )


def gradient_leaves(directions: Directions, columns: Tensor) -> tuple[Fields, Plan, Tensor]:
    """Return leaves (B, P, D) by layer, the plan that reads gradients into them, and the columns it acts on.

    Where no token is in scope the first ones are marked instead, and their gradients are left out later: every rank
    makes the same passes.
    """
    marked = columns if selects(columns) else torch.zeros_like(columns)
    leaves: Fields = {}
    plan: Plan = ()
    for layer in directions.layers:
        more, leaves[layer] = gradient_probe(
            layer, marked, directions.width, columns.device, component=directions.component
        )
        plan = (*plan, *more)
    return leaves, plan, marked


def named(leaves: Fields, gradients: Sequence[Tensor], columns: Tensor) -> Fields:
    """Return `gradients` of `leaves` by layer, 0 where a row has no token in scope."""
    absent = (columns == ABSENT)[..., None]
    return {layer: one.masked_fill(absent, 0.0) for layer, one in zip(leaves, gradients, strict=True)}


def _gradients(
    shared: SharedPasses, directions: Directions, columns: Tensor, of: Of, *, wide: bool, plan: Plan = ()
) -> Fields:
    leaves, probes, marked = gradient_leaves(directions, columns)
    batch = shared.batch
    with intervene(shared.backend.model, (*plan, *probes), prompt=batch.prompt(marked)):
        total = total_of(Inside(shared.backend, wide=wide).token_losses(batch), batch, of)
        found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return named(leaves, found, columns)
