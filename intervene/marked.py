"""Which tokens, by a name that travels with the batch: `Marked("subject2")`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from intervene.errors import BadPosition, close_names
from intervene.positions import Inputs, Positions, real_tokens


@dataclass(frozen=True)
class Marked(Positions):
    """The columns that the batch itself names: `inputs["marks"][name]`, (B, P) int64, -1 where absent.

    A data set that knows where its tokens are ("subject2", "last") hands them over with each batch, as
    `intervene(..., prompt={**batch, "marks": {...}})`; the plan stays one value for all batches.

    Raises:
        BadPosition: the batch marks no such name, for another number of examples, or a column that is padding.
    """

    name: str

    def resolve(self, inputs: Inputs) -> Tensor:
        marks = inputs.get("marks")
        if not isinstance(marks, Mapping) or self.name not in marks:
            known = list(marks) if isinstance(marks, Mapping) else []
            hint = close_names(self.name, known) if known else "Pass prompt={**batch, 'marks': {...}}."
            raise BadPosition(f"Marked({self.name!r}): the batch marks no such position. {hint}")
        columns: Tensor = marks[self.name].detach().to("cpu")
        real = real_tokens(inputs)
        if len(columns) != len(real):
            raise BadPosition(
                f"Marked({self.name!r}): {len(columns)} rows for {len(real)} examples. Mark each example once."
            )
        outside = (columns >= real.shape[1]) | ((columns >= 0) & ~real.gather(1, columns.clamp(0, real.shape[1] - 1)))
        if bool(outside.any()):
            row = int(outside.any(1).nonzero()[0])
            raise BadPosition(
                f"Marked({self.name!r}): column {int(columns[row][outside[row]][0])} of example {row} is padding or "
                "beyond the batch. Recompute the marks for the padded batch."
            )
        return columns
