"""Several edits in one forward pass: the batch is R equal parts of rows, and each part has a featurizer and an edit.

    plan = [Intervention(site, Parts([(Subspace(D, 4, seed=s), Swap()) for s in range(3)]), LastToken())]

Fits that differ only in their parameters share one forward: repeat the batch R times, one part for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from intervene.edits import Edit
from intervene.errors import InterveneError, ShapeMismatch
from intervene.featurizers import Featurizer

Pair = tuple[Featurizer, Edit]


class Parts(Edit):
    """Rows r*B to (r+1)*B of the R*B rows are edited through the r-th featurizer by the r-th edit, as if alone.

    It acts on the raw activation (R*B, P, D), so the intervention's own featurizer stays `Identity`. If any edit needs
    a source, source rows (R*B, P, D) are given for every part. A pair that occurs twice is one module with the
    gradients of both its parts. It is made for a fit and cannot be stored: store the plan of one part.

    Args:
        pairs: the R featurizers and edits, in the order of the parts.

    Raises:
        ShapeMismatch: no pairs; or featurizers, edits or their constants made for different widths or numbers of rows.
        InterveneError: an edit draws at random or applies a saved vector, which cannot be done for part of a batch.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        super().__init__()
        self.featurizers = nn.ModuleList([featurizer for featurizer, _ in pairs])
        self.edits = nn.ModuleList([edit for _, edit in pairs])
        vars(self)["needs_source"] = any(edit.needs_source for _, edit in pairs)  # of the class elsewhere
        vars(self)["draws"] = self.needs_source and any(edit.draws for _, edit in pairs)
        self._check(pairs)

    @staticmethod
    def _check(pairs: Sequence[Pair]) -> None:
        if not pairs:
            raise ShapeMismatch("Parts of no pairs: nothing would be edited. Give at least one (featurizer, edit).")
        for number, (featurizer, edit) in enumerate(pairs):
            name = f"Parts: pair {number}, {type(edit).__name__} through {type(featurizer).__name__}"
            if edit.draws and not edit.needs_source:
                raise InterveneError(f"{name}: it draws at random, for whole batches only. Run it alone.")
            if edit.made_for is not None:
                raise InterveneError(f"{name}: a saved vector is checked for whole batches only. Give its .vector.")
            features = edit.features if featurizer.width is None else featurizer.features(featurizer.width)
            if edit.features not in (None, 1, features):
                raise ShapeMismatch(f"{name}: the edit is {edit.features} wide, {features} features are read.")
        widths = {featurizer.width for featurizer, _ in pairs if featurizer.width is not None}
        rows = {edit.rows for _, edit in pairs if edit.rows is not None}
        slots = {edit.slots for _, edit in pairs if edit.slots is not None}
        for found, what in ((widths, "widths"), (rows, "numbers of rows"), (slots, "numbers of positions")):
            if len(found) > 1:
                raise ShapeMismatch(f"Parts: pairs made for the {what} {sorted(found)}. Make them all for one.")

    def __len__(self) -> int:
        """Return R, the number of parts."""
        return len(self.edits)

    @property
    def pairs(self) -> list[Pair]:
        """The featurizer and edit of each part."""
        return list(zip(self.featurizers, self.edits, strict=True))  # type: ignore[arg-type]

    @property
    def features(self) -> int | None:
        return next((featurizer.width for featurizer, _ in self.pairs if featurizer.width is not None), None)

    @property
    def rows(self) -> int | None:
        written = next((edit.rows for _, edit in self.pairs if edit.rows is not None), None)
        return None if written is None else written * len(self)

    @property
    def slots(self) -> int | None:
        return next((edit.slots for _, edit in self.pairs if edit.slots is not None), None)

    def draw(self, z: Tensor) -> tuple[Tensor | None, ...]:
        """Return what each gate draws for one pass; None for edits that draw nothing."""
        return tuple(
            edit.draw(own) if edit.draws else None for (_, edit), own in zip(self.pairs, self._cut(z), strict=True)
        )

    def _cut(self, z: Tensor) -> Sequence[Tensor]:
        """Return the R parts (B, P, D) of z (R*B, P, D)."""
        if len(z) % len(self):
            raise ShapeMismatch(
                f"Parts: {len(z)} rows are no {len(self)} equal parts. Repeat the batch {len(self)} times."
            )
        return z.chunk(len(self))

    def forward(self, z: Tensor, source: Tensor | None, drawn: Sequence[Tensor | None] | None = None) -> Tensor:
        nothing: Sequence[None] = [None] * len(self)
        others = nothing if source is None else self._cut(source)
        edited = []
        for (featurizer, edit), own, other, noise in zip(
            self.pairs, self._cut(z), others, nothing if drawn is None else drawn, strict=True
        ):
            lens = featurizer.lens()
            features = lens.read(own)  # (B, P, K)
            read = lens.read(other) if other is not None and edit.needs_source else None
            edited.append(lens.write(own, edit(features, read, *([] if noise is None else [noise]))))
        return torch.cat(edited)


class Rows(Edit):
    """`edit` on the examples where `where` (B,) is true; the others keep their features exactly.

    A pair that does not interchange a variable must not have it touched, whatever the other variables' edits did.
    """

    def __init__(self, edit: Edit, where: Tensor) -> None:
        super().__init__()
        self.edit = edit
        self.where = where
        for name in ("needs_source", "draws", "tied"):
            vars(self)[name] = getattr(edit, name, False)  # of the class elsewhere

    @property
    def features(self) -> int | None:
        return self.edit.features

    @property
    def rows(self) -> int | None:
        return len(self.where)

    @property
    def slots(self) -> int | None:
        return self.edit.slots

    def draw(self, z: Tensor) -> Tensor:
        drawn: Tensor = self.edit.draw(z)
        return drawn

    def forward(self, z: Tensor, source: Tensor | None, *drawn: Tensor) -> Tensor:
        changed: Tensor = self.edit(z, source, *drawn)
        return torch.where(self.where.to(z.device)[:, None, None], changed, z)
