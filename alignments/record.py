"""The folder of one search: a `RunFolder` of `Row`s.

config.json, environment.json, metrics.jsonl, result.json     see `records.folder`
environment.json holds, under "resolved", the configuration with every value derived and its source
(plan/, report.html and others are written by those who own them, at `record.path(name)`)
"""

from __future__ import annotations

from typing import Any, ClassVar

from alignments.rows import BadRow, Row, RowKey
from records.files import RecordError
from records.folder import RunFolder

__all__ = ["FREE_KEYS", "RecordError", "RunRecord"]

# These say how a run is carried out, not what it computes, so a resumption may change them.
FREE_KEYS = frozenset(
    {"out", "resume", "dry_run", "threads", "executor", "workers", "cache", "log_every", "trackers", "wandb_entity"}
)


class RunRecord(RunFolder[Row]):
    """One search's folder, open for rows. Make it with `create`; use it in a `with` block, or `close` it."""

    free_keys: ClassVar[frozenset[str]] = FREE_KEYS
    packages: ClassVar[tuple[str, ...]] = (
        *("torch", "transformers", "safetensors", "numpy", "pydantic", "plotly", "peft", "datasets", "pyvene"),
    )

    def parse(self, values: Any) -> Row:
        """Return the row of a line; ValueError if it holds none."""
        try:
            return Row.from_json(values)
        except BadRow as error:
            raise ValueError(str(error)) from None

    def plain(self, row: Row) -> Any:
        """Return a row as JSON."""
        return row.to_json()

    def key(self, row: Row) -> RowKey:
        """Return cell, seed and split."""
        return row.key

    def text(self, row: Row) -> str:
        """Return how a message names a row."""
        return f"{row.site} @ {row.position_label}, {row.method}, seed {row.seed}, {row.split}"
