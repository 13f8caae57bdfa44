"""`VectorPairs`: pairs of input vectors for any module that maps (N, W) to logits (N, V), such as a small MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from alignments.pairs import Values, interchanging
from intervene import AllTokens, Plan, Positions, Sources, capture, intervene
from intervene.errors import ShapeMismatch
from intervene.families import resolve
from intervene.sites import Site


class VectorPairs:
    """Pairs of input vectors (N, W); activations of the sources are computed once per site and kept.

    A plan of one intervention for several variables swaps all at once: each pair takes the source of the first variable
    that it interchanges.

    Args:
        source: (N, W), or one such tensor per variable, in the order of the plan's interventions that need a source.
            A variable that a pair does not interchange has the base itself there.
        base_answers: (N,) right answers of the bases; None: unknown, taken from `labels` (then copy-base is not told).
    """

    def __init__(
        self,
        model: nn.Module,
        base: Tensor,
        source: Tensor | Sequence[Tensor],
        labels: Tensor,
        *,
        base_answers: Tensor | None = None,
        kinds: Sequence[str] = (),
        values: Values = ((), ()),
    ) -> None:
        sources = [source] if isinstance(source, Tensor) else list(source)
        if not all(len(base) == len(one) == len(labels) for one in sources) or not len(base) or not sources:
            counts = "+".join(str(len(one)) for one in sources)
            raise ShapeMismatch(
                f"VectorPairs: {len(base)} bases, {counts} sources, {len(labels)} labels. Give as many of each."
            )
        self.model = model
        self.base = base
        self.sources = sources
        self.labels = labels
        self.base_answers = labels if base_answers is None else base_answers
        self.kinds: Sequence[str] = tuple(kinds)
        self.values = values
        self.correct: Tensor | None = None
        # (N, number of sources) which sources are not the base itself, and so are interchanged
        self.changed = torch.stack([(one != base).flatten(1).any(1) for one in sources], 1)
        self._first = self.changed.int().argmax(1)  # (N,); 0 if there is none
        self._acts: dict[tuple[Site, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def logits(self, plan: Plan, rows: Tensor) -> Tensor:
        """Return (b, V) under `plan`."""
        sources = self._sources(plan, rows)
        with intervene(self.model, interchanging(plan, self.changed[rows]), sources):
            output: Tensor = self.model(self.base[rows])
        return output

    def losses(self, plan: Plan, rows: Tensor, labels: Tensor) -> Tensor:
        """Return (b,): the cross-entropy in nats of these logits at `labels` (b,)."""
        logits = self.logits(plan, rows).float()
        return nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="none")

    def activations(self, site: Site, positions: Positions) -> tuple[Tensor, Tensor]:
        """Return the activations of bases, and of the first source that is not the base, at `site`: (N, P, D) each."""
        return self._activation(site, -1), self._changing(site)

    def _activation(self, site: Site, number: int) -> Tensor:
        """Return the activation (N, P, D) of source `number` at `site`; -1: of the bases."""
        key = resolve(self.model, site).site, number
        if key not in self._acts:
            inputs = self.base if number < 0 else self.sources[number]
            with torch.no_grad(), capture(self.model, [key[0]], stop_after_last=True) as acts:
                self.model(inputs)
            self._acts[key] = acts[key[0]]
        return self._acts[key]

    def _changing(self, site: Site) -> Tensor:
        """Return the activation (N, P, D) of each pair's first source that is not its base."""
        if len(self.sources) == 1:
            return self._activation(site, 0)
        key = resolve(self.model, site).site, len(self.sources)
        if key not in self._acts:
            every = torch.stack([self._activation(site, number) for number in range(len(self.sources))])
            self._acts[key] = every[self._first, torch.arange(len(self))]
        return self._acts[key]

    def _sources(self, plan: Plan, rows: Tensor) -> Sources:
        needing = [item for item in plan if item.edit.needs_source]
        if len(self.sources) > 1 and len(needing) not in (0, 1, len(self.sources)):
            raise ShapeMismatch(
                f"Plan with {len(needing)} interventions that need a source: the pairs have {len(self.sources)} "
                "sources. Give one intervention for each, or one for all."
            )
        found: list[Tensor | None] = []
        number = 0
        for item in plan:
            assert isinstance(item.positions, AllTokens)
            if not item.edit.needs_source:
                found.append(None)
            elif len(needing) == 1 or len(self.sources) == 1:
                found.append(self._changing(item.site)[rows])
            else:
                found.append(self._activation(item.site, number)[rows])
                number += 1
        return Sources(found)
