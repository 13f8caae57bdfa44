"""The pull towards natural activations that any learned subspace may be fitted with: option "divergence"."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignments.divergence import counterfactual_means, counterfactual_targets, divergence_penalty
from alignments.method import Setup, one_variable
from intervene import Plan
from intervene.errors import InterveneError

PAIRS_PER_STEP = 64


@dataclass(frozen=True, eq=False)
class _Natural:
    """What one fit keeps: activations (N, P, D), each pair's target (N, P, D), and where the drawing of rows is."""

    base: Tensor
    source: Tensor
    targets: Tensor
    generator: torch.Generator


def check_divergence(setup: Setup, method: str) -> None:
    """Refuse option "divergence" where it cannot be computed, before anything is fitted.

    Raises:
        InterveneError: no training pairs, no values of the variable, or several variables.
    """
    if not setup.option("divergence"):
        return
    one_variable(setup, f"{method} with option divergence")
    if not all(map(len, setup.pairs(method).values)):
        raise InterveneError(
            f"Method {method} with option divergence: the pairs do not say the variable's values. Leave the option out."
        )


def natural_penalty(plan: Plan, setup: Setup) -> Tensor:
    """Return the option "divergence" times the mean over 64 training pairs and their tokens of

        1/2 |h' - m|^2 - 1/2 cos(h', m),

    h' the base's activation after `plan` and m the mean natural activation, over bases and sources, at that token where
    the variable has the value that it has on the pair's source. The pairs are drawn anew at each call, by the seed of
    `setup`. 0 without the option.

    Source: the counterfactual latent loss of arXiv 2511.04638. We differ: m is the mean over activations with the
        searched variable's value, whatever the values of the others, and the loss is taken on a sample of the training
        pairs, not on the batch.
    """
    weight = float(setup.option("divergence"))
    if not weight:
        return torch.zeros(())
    if "natural" not in setup.memory:
        setup.memory["natural"] = _natural(setup)
    kept: _Natural = setup.memory["natural"]
    rows = torch.randperm(len(kept.base), generator=kept.generator)[:PAIRS_PER_STEP].to(kept.base.device)
    own = kept.base[rows]
    for item in plan:
        lens = item.featurizer.lens()
        own = lens.write(own, item.edit(lens.read(own), lens.read(kept.source[rows])))
    return weight * divergence_penalty(own.flatten(0, 1), kept.targets[rows].flatten(0, 1))


def _natural(setup: Setup) -> _Natural:
    pairs = setup.pairs("with option divergence")
    base, source = (acts.float() for acts in pairs.activations(setup.site, setup.positions))
    values: Sequence[Hashable] = [*pairs.values[0], *pairs.values[1]]
    means = counterfactual_means(torch.cat([base, source]).flatten(1), values)  # value -> (P*D,)
    targets = counterfactual_targets(means, pairs.values[1]).view_as(base)
    return _Natural(base, source, targets, torch.Generator().manual_seed(setup.seed))
