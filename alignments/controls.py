"""Controls: what a score has to beat before it says something about the model and not about the search.

`shuffled` pairs keep everything but have their labels dealt anew; `complement` swaps what a fitted subspace leaves out.
Random subspaces, random models and rival variables are made where the models and pairs are (`problem`).
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch

from alignments.pairs import PairData
from intervene import Intervention, Plan, Swap
from intervene.edits import Edit
from intervene.errors import InterveneError
from intervene.featurizers import Featurizer


def shuffled(pairs: PairData, seed: int = 0) -> PairData:
    """Return the same pairs with their labels in random order: nothing true can be learned from them.

    A fit on these that scores above the trivial baselines on unshuffled pairs has memorised, or leaks.
    """
    made: Any = copy.copy(pairs)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    made.labels = pairs.labels[order.to(pairs.labels.device)]
    return cast(PairData, made)


class Complement(Featurizer):
    """All that a subspace leaves out: reads h - (hQ)Q^T (width D), writes it back beside the base's own hQ."""

    lossless = False

    def __init__(self, subspace: Featurizer) -> None:
        super().__init__()
        self.subspace = subspace

    @property
    def width(self) -> int | None:
        return self.subspace.width

    def features(self, width: int) -> int:
        return width

    def read(self, h: torch.Tensor) -> torch.Tensor:
        lens = self.subspace.lens()
        return lens.write(h, torch.zeros_like(lens.read(h)))

    def write(self, h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        lens = self.subspace.lens()
        return lens.write(z.to(h.dtype), lens.read(h))


def complement(plan: Plan) -> Plan:
    """Return the plan that swaps everything at its places but what `plan` swaps there.

    A subspace that holds the whole variable leaves nothing: its complement scores no better than copying the base.

    Raises:
        InterveneError: an intervention is no swap of a subspace.
    """
    made = []
    for item in plan:
        if not isinstance(item.edit, Swap) or not hasattr(item.featurizer, "rank"):
            raise InterveneError(f"Complement of {item}: only swaps of a subspace have one. Leave this control out.")
        edit: Edit = Swap()
        made.append(
            Intervention(
                item.site, edit, item.positions, Complement(item.featurizer), item.phase, item.source_positions
            )
        )
    return tuple(made)
