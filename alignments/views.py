"""Views of pairs: some rows of a `PairData`, in another order or more than once, without copying what it holds.

    cause = only_kinds(pairs, ("cause",))
    mixed = weighted_kinds(pairs, {"cause": 1.0, "isolate": 0.5})
    train = training_view(pairs, METHODS["mdas"], options)       # what that method is fitted on

Pairs have kinds where a task has them: of "cause" pairs the edit must reach the answer, "isolate" pairs it must leave
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignments.method import Method
from alignments.pairs import PairData, Values
from intervene import Plan, Positions, Site
from intervene.errors import InterveneError


class PairView:
    """The pairs `index` (N',) of other pairs; a row may come several times.

    Raises:
        InterveneError: no row, or a row that is not there.
    """

    def __init__(self, pairs: PairData, index: Tensor) -> None:
        if not len(index) or int(index.min()) < 0 or int(index.max()) >= len(pairs):
            raise InterveneError(f"View of {len(index)} rows: the pairs have rows 0 to {len(pairs) - 1}. Name some.")
        self.pairs = pairs
        self.index = index
        on_device = index.to(pairs.labels.device)
        self.labels = pairs.labels[on_device]
        self.base_answers = pairs.base_answers[on_device]
        self.correct: Tensor | None = None if pairs.correct is None else pairs.correct[on_device]
        rows = index.tolist()
        self.kinds: Sequence[str] = [pairs.kinds[row] for row in rows] if len(pairs.kinds) else ()
        self.values: Values = _chosen(pairs.values[0], rows), _chosen(pairs.values[1], rows)

    @property
    def model(self) -> nn.Module | None:
        """The model the pairs were run through, if they know it."""
        return getattr(self.pairs, "model", None)

    def __len__(self) -> int:
        return len(self.index)

    def logits(self, plan: Plan, rows: Tensor) -> Tensor:
        """Return (b, V): the answer logits of the view's rows `rows` (b,) under `plan`."""
        return self.pairs.logits(plan, self.index.to(rows.device)[rows])

    def losses(self, plan: Plan, rows: Tensor, labels: Tensor) -> Tensor:
        """Return (b,): the cross-entropy in nats of these logits at `labels` (b,)."""
        return self.pairs.losses(plan, self.index.to(rows.device)[rows], labels)

    def activations(self, site: Site, positions: Positions) -> tuple[Tensor, Tensor]:
        """Return the activations of bases and sources, (N', P, D) each."""
        base, source = self.pairs.activations(site, positions)
        return base[self.index.to(base.device)], source[self.index.to(source.device)]


def _chosen(values: Sequence[Any], rows: list[int]) -> Sequence[Any]:
    return [values[row] for row in rows] if len(values) else ()


def only_kinds(pairs: PairData, kinds: Sequence[str]) -> PairData:
    """Return the pairs of these kinds, in their order.

    Raises:
        InterveneError: there are none.
    """
    rows = [row for row, kind in enumerate(pairs.kinds) if kind in kinds]
    if not rows:
        found = ", ".join(sorted(set(pairs.kinds))) or "no kinds"
        raise InterveneError(f"Pairs of kind {', '.join(kinds)}: there are none, the pairs have {found}. Draw some.")
    return PairView(pairs, torch.tensor(rows))


def weighted_kinds(pairs: PairData, weights: Mapping[str, float], seed: int = 0) -> PairData:
    """Return pairs in which the kinds come in the ratio of their weights, so that the mean loss over them is

        sum_k w_k CE_k / sum_k w_k,   CE_k the mean cross-entropy over the pairs of kind k,

    up to rounding to whole pairs. No pair of a kind with a weight is left out: rows of kinds with too few pairs are
    repeated, each as often as the others of its kind, up to one. Kinds without a weight, or of weight 0, are left out.

    Raises:
        InterveneError: no weight above 0, a kind that has a weight but no pairs, or a weight so small that more than
            1000 rows per pair would be needed.
    """
    wanted = {kind: weight for kind, weight in weights.items() if weight > 0}
    rows = {kind: [row for row, one in enumerate(pairs.kinds) if one == kind] for kind in wanted}
    missing = [kind for kind, found in rows.items() if not found]
    if missing or not wanted:
        names = ", ".join(sorted(set(pairs.kinds))) or "no kinds"
        raise InterveneError(
            f"Weights of kinds {dict(weights)}: the pairs have {names}. Each weighed kind needs pairs, one of them at "
            "least a weight above 0."
        )
    scale = max(len(found) / wanted[kind] for kind, found in rows.items())
    counts = {kind: round(scale * weight) for kind, weight in wanted.items()}
    if sum(counts.values()) > 1000 * len(pairs):
        raise InterveneError(f"Weights of kinds {dict(weights)}: too unequal. Use weights within a factor of 1000.")
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for kind, found in rows.items():
        own = torch.tensor(found)[torch.randperm(len(found), generator=generator)]
        parts.append(own.repeat(-(-counts[kind] // len(own)))[: counts[kind]])
    return PairView(pairs, torch.cat(parts).sort().values)


def training_view(pairs: PairData, method: Method, options: Mapping[str, Any]) -> PairData:
    """Return what `method` is fitted on: `pairs`, or where their kinds concern it, those it wants, weighed.

    Pairs without the kinds "cause" and "isolate" are returned themselves.
    """
    if not {"cause", "isolate"} <= set(pairs.kinds):
        return pairs
    if method.train_kinds is not None:
        return only_kinds(pairs, method.train_kinds)
    return pairs if method.kind_weights is None else weighted_kinds(pairs, method.kind_weights(options))
