"""`random_plan`: what a fitted plan has to beat, a plan of the same size whose directions or features are drawn."""

from __future__ import annotations

import copy

import torch

from intervene import PCA, Block, Featurizer, Intervention, Plan, SecondBoundarySwap, Subspace, Swap
from intervene.boundless import FaithfulBoundarySwap
from intervene.edits import Edit
from intervene.errors import InterveneError
from intervene.gates import BoundarySwap, BudgetSwap, GatedSwap, HardConcreteSwap

Mask = GatedSwap | HardConcreteSwap | BudgetSwap
Ranked = Swap | BoundarySwap | FaithfulBoundarySwap | SecondBoundarySwap


def random_plan(plan: Plan, seed: int) -> tuple[Intervention, ...]:
    """Return a plan that swaps as much as `plan` does: the control for methods that choose how much themselves.

    A subspace, or the components of a PCA, become a random subspace of the same rank, under the same boundary if one
    was learned; blocks of one frame stay blocks of one. A mask keeps its basis and has its gates dealt anew.

    Raises:
        InterveneError: an edit that is neither, as of full_vector or loreft.
    """
    generator = torch.Generator().manual_seed(seed)
    copied = copy.deepcopy(tuple(plan))  # at once, so that what they share stays shared
    drawn: dict[int, Subspace] = {}
    made = []
    for item in copied:
        edit, lens = item.edit, item.featurizer
        if isinstance(edit, Mask):
            _deal(edit, generator)
        elif isinstance(edit, Ranked) and isinstance(lens, Subspace | Block | PCA):
            lens = _drawn(lens, drawn, seed)
        else:
            raise InterveneError(
                f"Random plan like {item}: it swaps no part of the activation. Leave this control out."
            )
        made.append(_with(item, edit, lens))
    return tuple(made)


def _deal(edit: Mask, generator: torch.Generator) -> None:
    order = torch.randperm(len(edit.logits), generator=generator).to(edit.logits.device)
    with torch.no_grad():
        edit.logits.copy_(edit.logits[order].clone())


def _drawn(lens: Subspace | Block | PCA, drawn: dict[int, Subspace], seed: int) -> Featurizer:
    if isinstance(lens, Block):
        whole = _drawn(lens.subspace, drawn, seed)
        assert isinstance(whole, Subspace)
        return Block(whole, lens.start, lens.stop)
    if id(lens) not in drawn:
        drawn[id(lens)] = Subspace(lens.width, lens.features(lens.width), seed=seed, trainable=False)
    return drawn[id(lens)]


def _with(item: Intervention, edit: Edit, lens: Featurizer) -> Intervention:
    return Intervention(
        item.site, edit, item.positions, lens, item.phase, item.source_positions, item.when, item.elsewhere
    )
