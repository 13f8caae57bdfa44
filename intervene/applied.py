"""What was really done: per intervention, calls, tokens, changed elements and the size of the change.

The hot path only keeps references or two norms per token, never reading a number back from the device; sums are made
when `report()` is called or every `FOLD` firings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intervene.errors import NotApplied
from intervene.interventions import Bound
from intervene.passes import Selection

FOLD = 64  # firings kept before they are summed: bounds memory in long training or generation


@dataclass(frozen=True)
class Report:
    """What one intervention did in a block.

    `calls`: how often its module ran. `tokens`: tokens it was applied to. `elements`: numbers that changed.
    `relative_norm`: mean over those tokens of |change| / |activation before|, at the module's tensor.
    """

    site: str
    edit: str
    calls: int
    tokens: int
    elements: int
    relative_norm: float

    def __str__(self) -> str:
        return (
            f"{self.edit} at {self.site}: {self.calls} calls, {self.tokens} tokens, {self.elements} elements changed, "
            f"change {self.relative_norm:.3g} of the activation's norm"
        )


class Recorder:
    """Collects what one bound intervention does."""

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.calls = 0
        self.tokens: int = 0
        self._masked: list[Tensor] = []
        self._pending: list[tuple[Tensor, ...]] = []
        self._later: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._elements: Tensor | None = None
        self._ratio: Tensor | None = None

    @torch.no_grad()
    def add(self, before: Tensor, after: Tensor, selection: Selection, columns: slice | tuple[int, ...] | None) -> None:
        """Record one firing: activations before and after, (B, P, D)."""
        if selection.tokens is not None:
            self.tokens += selection.tokens
        else:
            assert selection.mask is not None
            self._masked.append(selection.mask)
        if selection.dense:  # the model may write into `after` later, so it is measured now
            change = after - before
            norms = torch.linalg.vector_norm(change, dim=-1), torch.linalg.vector_norm(before, dim=-1)
            self._pending.append((*norms, torch.count_nonzero(change)))
        else:  # private copies of a few rows: measured when asked
            kept = before.detach() if before.requires_grad else before
            self._later.append((kept, after.detach() if after.requires_grad else after, selection.valid))
        if len(self._pending) + len(self._later) + len(self._masked) >= FOLD:
            self._fold()

    def _fold(self) -> None:
        for before, after, valid in self._later:
            change = after - before
            if valid is not None:
                change = change * valid[..., None]
            norms = torch.linalg.vector_norm(change, dim=-1), torch.linalg.vector_norm(before, dim=-1)
            self._pending.append((*norms, torch.count_nonzero(change)))
        for moved, stood, count in self._pending:
            ratio = (moved.double() / stood.double().clamp_min(1e-30)).sum()
            self._ratio = ratio if self._ratio is None else self._ratio + ratio.to(self._ratio.device)
            self._elements = count if self._elements is None else self._elements + count.to(self._elements.device)
        self.tokens += sum(int(mask.sum()) for mask in self._masked)
        self._masked, self._pending, self._later = [], [], []

    @torch.no_grad()
    def report(self) -> Report:
        """Return the sums so far (reads from the device)."""
        self._fold()
        ratio = 0.0 if self._ratio is None or not self.tokens else float(self._ratio) / self.tokens
        elements = 0 if self._elements is None else int(self._elements)
        item = self.bound.intervention
        return Report(str(self.bound.tap.site), type(item.edit).__name__, self.calls, self.tokens, elements, ratio)

    def touched(self) -> bool:
        """Return whether at least one token was selected; reads the device only if a mask leaves it open."""
        if not self.tokens and self._masked:
            self._fold()
        return self.tokens > 0


class Applied:
    """The interventions of one block and what they have done so far."""

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        self._recorders = list(recorders)

    def report(self) -> list[Report]:
        """Return one `Report` per intervention, in plan order."""
        return [recorder.report() for recorder in self._recorders]

    def check(self, passes: int) -> None:
        """Raise NotApplied, naming them, if some interventions never fired or touched no token."""
        silent = [recorder for recorder in self._recorders if not recorder.touched()]
        if not silent:
            return
        names = "; ".join(
            f"{recorder.bound.intervention} (its module ran {recorder.calls} times)" for recorder in silent
        )
        raise NotApplied(
            f"Not applied: {names}. {passes} forward passes ran in the block. "
            "Run the model inside the block, on inputs that contain the positions, in the phase the intervention names."
        )
