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

FOLD = 64  # firings kept before they are summed,
KEPT = 2**22  # or numbers: bounds memory in long training or generation


@dataclass(frozen=True)
class Report:
    """What one intervention did in a block.

    `calls`: how often its module ran. `tokens`: tokens it was applied to, never padding, and only where its condition
    held; a token that several passes compute counts in each. `elements`: numbers that changed.
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


class _Sum:
    """A running sum whose terms may lie on devices; nothing is read back before `value` is asked for."""

    def __init__(self) -> None:
        self.known = 0
        self.terms: dict[torch.device, Tensor] = {}

    def add(self, term: int | Tensor) -> None:
        if isinstance(term, int):
            self.known += term
        elif term.device in self.terms:
            self.terms[term.device] = self.terms[term.device] + term
        else:
            self.terms[term.device] = term

    @property
    def value(self) -> float:
        return self.known + sum(float(term) for term in self.terms.values())


class Recorder:
    """Collects what one bound intervention does."""

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.calls = 0
        self._selected, self._held, self._elements, self._ratio = _Sum(), _Sum(), _Sum(), _Sum()
        self._masks: list[Tensor] = []  # selections not yet counted
        self._pending: list[tuple[Tensor, ...]] = []
        self._later: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._kept = 0  # numbers in _later

    @torch.no_grad()
    def add(self, before: Tensor, after: Tensor, selection: Selection, applies: Tensor | None) -> None:
        """Record one firing: activations before and after, (B, P, D), and where a condition held, (B, P) or None."""
        if selection.tokens is not None:
            self._selected.add(selection.tokens)
        else:
            assert selection.mask is not None
            self._masks.append(selection.mask)
        if applies is not None:
            self._held.add(applies.sum())
        if selection.dense or after._is_view():  # the model or an optimizer may write into them: measured now
            self._measure(before, after, selection.valid)
        else:  # private copies of a few rows: measured when asked
            kept = before.detach() if before.requires_grad else before
            self._later.append((kept, after.detach() if after.requires_grad else after, selection.valid))
            self._kept += before.numel() + after.numel()
        if len(self._pending) + len(self._later) >= FOLD or self._kept > KEPT:
            self._fold()

    def _measure(self, before: Tensor, after: Tensor, valid: Tensor | None) -> None:
        change = after - before
        if valid is not None:
            change = change * valid[..., None]
        norms = torch.linalg.vector_norm(change, dim=-1), torch.linalg.vector_norm(before, dim=-1)
        self._pending.append((*norms, torch.count_nonzero(change)))

    def _fold(self) -> None:
        for before, after, valid in self._later:
            self._measure(before, after, valid)
        for moved, stood, count in self._pending:
            self._ratio.add((moved.double() / stood.double().clamp_min(1e-30)).sum())
            self._elements.add(count)
        for mask in self._masks:
            self._selected.add(mask.sum())
        self._masks, self._pending, self._later, self._kept = [], [], [], 0

    @torch.no_grad()
    def report(self) -> Report:
        """Return the sums so far (reads from the device)."""
        self._fold()
        tokens = int((self._selected if self.bound.when is None else self._held).value)
        ratio = self._ratio.value / tokens if tokens else 0.0
        edit = type(self.bound.intervention.edit).__name__
        return Report(str(self.bound.tap.site), edit, self.calls, tokens, int(self._elements.value), ratio)

    def evidence(self, seen: dict[int, Tensor]) -> list[int]:
        """Return what is still to be read to know that a token was selected: ids of 0-d tensors, true if so.

        The tensors are put in `seen`; interventions on the same tokens share them. Empty if nothing was selected.
        """
        found = [*self._masks, *self._selected.terms.values()]
        for tensor in found:
            if id(tensor) not in seen:
                seen[id(tensor)] = tensor.any()
        return [id(tensor) for tensor in found]

    @property
    def certain(self) -> bool:
        """Whether a token is known to have been selected, without reading the device."""
        return self._selected.known > 0


class Applied:
    """The interventions of one block and what they have done so far."""

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        self._recorders = list(recorders)

    def report(self) -> list[Report]:
        """Return one `Report` per intervention, in plan order."""
        return [recorder.report() for recorder in self._recorders]

    @torch.no_grad()
    def check(self, passes: int) -> None:
        """Raise NotApplied, naming them, if some interventions never fired or touched no token."""
        seen: dict[int, Tensor] = {}
        open_ones = {recorder: recorder.evidence(seen) for recorder in self._recorders if not recorder.certain}
        truth = _read_together(seen)
        silent = [recorder for recorder, ids in open_ones.items() if not any(truth[number] for number in ids)]
        if not silent:
            return
        names = "; ".join(
            f"{recorder.bound.intervention} (its module ran {recorder.calls} times)" for recorder in silent
        )
        raise NotApplied(
            f"Not applied: {names}. {passes} forward passes ran in the block. "
            "Run the model inside the block, on inputs that contain the positions, in the phase the intervention names."
        )


def _read_together(tensors: dict[int, Tensor]) -> dict[int, bool]:
    """Return the values of 0-d bool tensors with one read of each device."""
    devices: dict[torch.device, list[int]] = {}
    for number, tensor in tensors.items():
        devices.setdefault(tensor.device, []).append(number)
    values: dict[int, bool] = {}
    for numbers in devices.values():
        read = torch.stack([tensors[number] for number in numbers]).tolist()
        values.update(zip(numbers, read, strict=True))
    return values
