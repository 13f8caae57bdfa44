"""What a training leaves and says while it goes on: rows, samples, TensorBoard, and a line now and then.

The folder is the truth. A disk that is full costs rows until there is room again, and never the training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from defenses.config import FREE_KEYS
from defenses.defense import Defense
from defenses.thresholds import Threshold
from records.files import RecordError
from records.folder import RunFolder
from records.trackers import Trackers

LINE_SECONDS = 5.0
console = Console(width=None, soft_wrap=True)

Row = Mapping[str, Any]


def say(text: str) -> None:
    """Print a line as it is: no wrapping, no colours for numbers, no square brackets read as markup."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


class TrainingFolder(RunFolder[Row]):
    """One training's folder: a row per logged step."""

    free_keys: ClassVar[frozenset[str]] = FREE_KEYS
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "safetensors", "numpy", "peft", "deepspeed")

    def parse(self, values: Any) -> Row:
        """Return the row of a line; ValueError if it holds none."""
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            raise ValueError("it is no row of a training: it has no step.")
        return values

    def plain(self, row: Row) -> Any:
        """Return a row as JSON, with None in place of what is not finite."""
        return {name: _finite(value) for name, value in row.items()}

    def key(self, row: Row) -> Hashable:
        """Return the step, and what kind of row it is."""
        return row["step"], row.get("kind", "train")

    def text(self, row: Row) -> str:
        """Return how a message names a row."""
        return f"step {row['step']} ({row.get('kind', 'train')})"


class Journal:
    """Rows of one rank. `record` is None on ranks other than 0, which keep only their samples.

    Args:
        total: steps of the training. samples: the file of rows per sample, None: none are kept.
    """

    def __init__(
        self,
        record: TrainingFolder | None,
        total: int,
        *,
        samples: Path | None = None,
        trackers: Trackers | None = None,
        say: Callable[[str], None] = say,
    ) -> None:
        self.record, self.total, self.samples_path, self.say = record, total, samples, say
        self.waiting: list[Row] = []  # rows that found no room
        self.trackers = trackers
        self._told_at, self._started, self._warned = -1e9, time.monotonic(), False
        self._first: int | None = None

    def rewind(self, rows: int, step: int) -> None:
        """Forget what came after a checkpoint: all but the first `rows`, and samples of `step` and later."""
        if self.record is not None:
            self.record.rewind(rows)
        if self.samples_path is not None and self.samples_path.exists():
            kept = []
            for line in self.samples_path.read_bytes().splitlines(keepends=True):
                try:
                    if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                        break
                except ValueError:
                    break
                kept.append(line)
            self.samples_path.write_bytes(b"".join(kept))

    @property
    def rows(self) -> int:
        """Number of rows on disk."""
        return 0 if self.record is None else len(self.record.finished())

    def row(self, row: Row) -> None:
        """Keep a row, mirror it, and say it if nothing was said for a while."""
        self.waiting.append(row)
        self._write()
        step = int(row["step"])
        if self.trackers is not None:
            kind = row.get("kind", "train")
            numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
            finite = {f"{kind}/{name}": value for name, value in numbers.items() if _finite(value) is not None}
            self.trackers.log(finite, step)
        self._first = step if self._first is None else self._first
        if time.monotonic() - self._told_at > LINE_SECONDS or step == self.total or row.get("kind"):
            self._told_at = time.monotonic()
            self.say(self.line(row))

    def line(self, row: Row) -> str:
        """Return a row as a line: step, what is shown of it, and how long it will take."""
        step = int(row["step"])
        names = [name for name in row if name not in ("step", "kind", "seconds", "tokens", "lr")]
        shown = ", ".join(f"{name} {row[name]:.4g}" for name in names[:8] if isinstance(row[name], int | float))
        done = step - (self._first or step)
        left = (time.monotonic() - self._started) / done * (self.total - step) if done else 0.0
        after = f", about {_duration(left)} left" if done and step < self.total else ""
        return f"step {step}/{self.total}: {shown}{after}"

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep rows per sample of optimiser step `step`, from 0."""
        if self.samples_path is None or not rows:
            return
        lines = "".join(json.dumps({"step": step + 1, **row}, default=_plain) + "\n" for row in rows)
        try:
            with self.samples_path.open("a", encoding="utf-8") as stream:
                stream.write(lines)
        except OSError as error:
            self._warn(error)

    def watching(self, defense: Defense) -> Callable[[int, Sequence[Mapping[str, Any]]], None]:
        """Return what keeps a step's samples, and as rows the calibrations that `defense` has made from now on."""
        threshold = getattr(defense, "threshold", None)
        history = threshold.history if isinstance(threshold, Threshold) else []
        seen = len(history)  # the last one before a resumption is in the rows already

        def kept(step: int, rows: Sequence[Mapping[str, Any]]) -> None:
            nonlocal seen
            self.samples(step, rows)
            for made in history[seen:]:
                self.row({"kind": "calibration", **made.row()})
            seen = len(history)

        return kept

    def close(self) -> None:
        """Write what waits, and end the trackers."""
        self._write()
        if self.waiting:
            self.say(f"WARNING: {len(self.waiting)} rows of metrics.jsonl found no room on the disk and are lost.")
        if self.trackers is not None:
            self.trackers.close()

    def _write(self) -> None:
        try:
            while self.waiting:
                if self.record is not None:
                    self.record.append(self.waiting[0])
                self.waiting.pop(0)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            self.say(
                f"WARNING: a row could not be written ({error.strerror or error}); training goes on. Free some space."
            )


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Return the rows per sample of all ranks of a run, by step.

    Raises:
        RecordError: a line is no JSON.
    """
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("samples*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise RecordError(f"{path} line {number}: is no JSON ({error}). Delete that line.") from error
    return sorted(found, key=lambda row: row["step"])


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and value - value != 0 else value


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
