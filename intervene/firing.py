"""What happens when a watched module runs: `Firing` edits its tensor, `Reader` copies from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from intervene.applied import Recorder
from intervene.block import Block
from intervene.captured import Captured
from intervene.errors import InterveneError, ShapeMismatch
from intervene.families import Tap
from intervene.interventions import Bound
from intervene.passes import Pass, Selection
from intervene.sites import Site


class Stop(BaseException):
    """Ends a forward pass after the last captured site. Not an Exception: user code must not swallow it."""


def _three_axes(h: Tensor, current: Pass) -> Tensor:
    """Return h as (B, S, D): routers and some fully connected layers see (B*S, D), plain networks (B, D)."""
    if h.dim() >= 3 and h.shape[:2] == (current.rows, current.length):
        return h if h.dim() == 3 else h.flatten(2)
    if h.dim() == 2 and len(h) == current.rows * current.length:
        return h.view(current.rows, current.length, -1)
    raise ShapeMismatch(
        f"Activation of shape {tuple(h.shape)}: expected ({current.rows}, {current.length}, D), examples by tokens. "
        "This module's axes are not examples and tokens (a batch_first=False network?), so positions mean nothing here."
    )


class _Columns:
    """A site's columns of the module's last axis; an irregular choice goes to the device once, not at every firing."""

    def __init__(self, columns: slice | tuple[int, ...] | None) -> None:
        self.columns = columns
        self._index: Tensor | None = None

    def cut(self, h: Tensor) -> Tensor:
        """Return the site's columns of h (B, P, D')."""
        if self.columns is None:
            return h
        if isinstance(self.columns, slice):
            return h.narrow(-1, self.columns.start, self.columns.stop - self.columns.start)
        return h.index_select(-1, self._on(h.device))

    def paste(self, h: Tensor, value: Tensor) -> Tensor:
        """Return a new h (B, P, D') whose site columns are `value`."""
        if self.columns is None:
            return value
        if isinstance(self.columns, slice):
            return torch.slice_scatter(h, value, dim=-1, start=self.columns.start, end=self.columns.stop)
        return h.index_copy(-1, self._on(h.device), value)

    def _on(self, device: torch.device) -> Tensor:
        if self._index is None or self._index.device != device:
            self._index = torch.tensor(self.columns, device=device)
        return self._index


def _beside(selection: Selection, device: torch.device) -> Selection:
    """Return `selection` with its indices on `device`: those of a pass lie where its tokens are."""
    held = selection.mask if selection.dense else selection.rows
    if held is None or held.device == device:
        return selection
    moved: dict[str, Any] = {
        name: value.to(device)
        for name in ("mask", "rows", "columns", "valid")
        if (value := getattr(selection, name)) is not None
    }
    if selection.kept is not None:
        moved["kept"] = tuple(part.to(device) for part in selection.kept)
    return replace(selection, **moved)


def _version(h: Tensor) -> int:
    """Return how often h was written to in place; inference tensors do not count."""
    return 0 if h.is_inference() else h._version


class Firing:
    """One bound intervention inside one block: makes the edit and records what it did."""

    def __init__(self, number: int, bound: Bound, source: Tensor | None, block: Block, recorder: Recorder) -> None:
        self.number = number
        self.bound = bound
        self.source = source
        self.block = block
        self.recorder = recorder
        self.columns = _Columns(bound.tap.columns)
        modules = [module for module in (bound.featurizer, bound.edit, bound.when) if module is not None]
        tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
        self.device = next((tensor.device for tensor in tensors), None)

    def __call__(self, h: Tensor) -> Tensor | None:
        current, again = self.block.pass_of_tap(self.number)
        selection = current.selections[self.number]
        if not again:
            self.recorder.calls += 1
        if selection is None:
            return None
        if self.device is not None and h.device != self.device:
            h = h.to(self.device)  # the input of a model's first block on another device arrives from the one before
        selection = _beside(selection, h.device)
        whole = _three_axes(h, current)
        before = whole if selection.dense else whole[selection.rows, selection.columns]  # (B, P, D')
        after, applies = self._edited(before, current, selection)
        if selection.dense:
            # the model may add to its tensors in place, which an expanded one does not allow
            after = after.contiguous() if selection.mask is None else torch.where(selection.mask, after, before)
            result = after
        elif selection.kept is None:
            assert selection.rows is not None and selection.columns is not None
            result = whole.index_put((selection.rows, selection.columns), after)
        else:
            rows, slots, columns = selection.kept
            result = whole.index_put((rows, columns), after[rows, slots])
        if not again:
            self.recorder.add(before, after, selection, applies)
        return result.reshape(h.shape) if result.shape != h.shape else result

    def _edited(self, before: Tensor, current: Pass, selection: Selection) -> tuple[Tensor, Tensor | None]:
        """Return the module's rows (B, P, D') with the site's columns edited, and where the condition held (B, P)."""
        tap, edit, when = self.bound.tap, self.bound.edit, self.bound.when
        site = self.columns.cut(before)  # (B, P, D)
        if tap.scale != 1.0:
            site = site * tap.scale
        lens = self.bound.featurizer.lens()
        version = _version(site)
        z = lens.read(site)  # (B, P, K)
        changed = lens.write(site, edit(z, *self._others(edit, lens, z, current)))
        self._check_result(site, changed, version)
        applies = None
        if when is not None:
            mask = selection.mask
            valid = (None if mask is None else mask[..., 0]) if selection.dense else selection.valid  # (B, P)
            applies = when(site, valid)
            applies = applies if valid is None else applies & valid
            changed = torch.where(applies[..., None], changed, site)
        if tap.scale != 1.0:
            changed = changed / tap.scale
        return self.columns.paste(before, changed.to(before.dtype)), applies

    def _check_result(self, site: Tensor, changed: Tensor, version: int) -> None:
        """Refuse what a user's own edit or featurizer may get wrong: another shape, or writing into the stream."""
        if changed.shape != site.shape:
            raise ShapeMismatch(
                f"{self.bound.intervention}: the edit returned shape {tuple(changed.shape)} for activations of "
                f"{tuple(site.shape)}. Return one value for each feature it was given."
            )
        if _version(site) != version:
            raise InterveneError(
                f"{self.bound.intervention}: the edit wrote into the activation it was given, which the model still "
                "uses elsewhere. Return a new tensor: z * 2, not z.mul_(2)."
            )

    def _others(self, edit: Any, lens: Any, z: Tensor, current: Pass) -> tuple[Any, ...]:
        """Return what the edit is given beside z: the source's features, what was drawn for this pass, or both."""
        if not edit.draws:
            return (self._source_features(lens, z),)
        if self.number not in current.draws:
            current.draws[self.number] = edit.draw(z)
        drawn = current.draws[self.number]
        return (self._source_features(lens, z), drawn) if edit.needs_source else (drawn,)

    def _source_features(self, lens: Any, z: Tensor) -> Tensor | None:
        if self.source is None:
            return None
        source = self.source.to(z.device)
        if len(source) != len(z):
            source = source.repeat_interleave(len(z) // len(source), 0)
        if source.shape[1] not in (1, z.shape[1]):
            raise ShapeMismatch(
                f"{self.bound.intervention}: the source has {source.shape[1]} positions, this pass edits {z.shape[1]}."
            )
        features: Tensor = lens.read(source)
        return features


class Reader:
    """One captured site inside one block: copies the wanted rows; with `stop_at`, ends the pass once all are read."""

    def __init__(
        self, number: int, site: Site, tap: Tap, block: Block, captured: Captured, stop_at: int | None
    ) -> None:
        self.number = number
        self.site = site
        self.tap = tap
        self.block = block
        self.captured = captured
        self.stop_at = stop_at
        self.columns = _Columns(tap.columns)

    def __call__(self, h: Tensor) -> None:
        current, again = self.block.pass_of_tap(self.number)
        selection = current.selections[self.number]
        value = valid = None
        if selection is not None:
            selection = _beside(selection, h.device)
            whole = _three_axes(h, current)
            rows = whole if selection.dense else whole[selection.rows, selection.columns]
            value, valid = self.columns.cut(rows), selection.valid
            if selection.dense:
                value = value.clone()  # a later module may write in place (falcon adds attention to its MLP output)
            if self.tap.scale != 1.0:
                value = value * self.tap.scale
        if again:  # only now: checkpointing demands that a recomputation saves the same tensors for backward
            return
        self.captured.add(self.site, value, valid)
        current.read.add(self.number)
        if self.stop_at is not None and len(current.read) == self.stop_at:
            raise Stop
