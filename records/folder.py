"""`RunFolder`: the folder of one run, written so that a kill at any moment costs at most the row being written.

    config.json        the configuration as it was asked for, null where a value is derived; what --resume compares
    environment.json   commit, versions, argv, and what `note_environment` adds; one entry per resumption
    metrics.jsonl      one row per line, append-only, on disk before `append` returns
    result.json        the numbers, written once, last
    (reports, plans, checkpoints are written by those who own them, at `folder.path(name)`)

Everything that can be refused is refused by `create`, before any work: a folder that holds another run, a path that is
a file, a place that cannot be written, another process that is writing there. What a row is, and which keys of the
configuration a resumption may change, is said by the commands' own subclasses.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar, Generic, TypeVar

from records.environment import SCHEMA, environment_now, now
from records.files import RecordError, dump, plain_mapping, read_json, replace_json, write_through

R = TypeVar("R")
# A resumption that differs in one of these would mix rows of two experiments.
FIXED_FACTS = frozenset({"model_fingerprint", "data_digests"})


class RunFolder(ABC, Generic[R]):
    """One run's folder, open for rows. Make it with `create`; use it in a `with` block, or `close` it.

    `notes` says what a reader of the log should know (a torn line dropped, nothing to resume).

    Attributes:
        free_keys: of the configuration; they say how a run is carried out, not what it computes, so a resumption may
            change them. begun: files that a start which was killed before its config.json leaves behind.
    """

    free_keys: ClassVar[frozenset[str]] = frozenset()
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "safetensors", "numpy", "pydantic")
    begun: ClassVar[frozenset[str]] = frozenset(
        {"metrics.jsonl", "environment.json", "environment.json.part", "config.json.part"}
    )

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Hold an already checked folder; `create` is what makes one."""
        self.directory = directory
        self.config = dict(config)
        self.notes: list[str] = []
        self._rows: dict[Hashable, R] = {}
        self._stream: IO[bytes] | None = None

    @abstractmethod
    def parse(self, values: Any) -> R:
        """Return the row that a line's JSON holds; ValueError if it holds none."""

    @abstractmethod
    def plain(self, row: R) -> Any:
        """Return a row as JSON."""

    @abstractmethod
    def key(self, row: R) -> Hashable:
        """Return what no two rows share."""

    @abstractmethod
    def text(self, row: R) -> str:
        """Return how a message names a row."""

    @classmethod
    def create(cls: type[F], directory: str | Path, config: Any, *, resume: bool = False) -> F:
        """Return the record of a new run in `directory`, or with `resume` of the run that is there.

        `config` is what was asked for: a mapping, a dataclass, or anything with `to_json()`. A missing or
        empty folder starts a new run in either case, so that a job that always resumes can be queued again.

        Raises:
            RecordError: the folder holds something and `resume` is not set; it holds no run; the run's configuration
                differs (keys named); rows are corrupt before the last line; the place cannot be written, or another
                process writes it.
        """
        record = cls(Path(directory), plain_mapping(config))
        record._refuse(resume)  # before anything is touched
        record._claim()
        try:
            record._refuse(resume)  # another process may have started here in between
            if record.path("config.json").exists():
                record._continue()
            else:
                if resume:
                    record.notes.append(f"{record.directory} held no run to resume: a new one was started.")
                record._start()
        except BaseException:
            record.close()
            raise
        return record

    def path(self, name: str) -> Path:
        """Return where a file of that name belongs in this run."""
        return self.directory / name

    def finished(self) -> tuple[R, ...]:
        """Return the rows on disk, in the order in which they were finished."""
        return tuple(self._rows.values())

    @property
    def result(self) -> dict[str, Any] | None:
        """Return what `finish` wrote, or None while the run is unfinished."""
        path = self.path("result.json")
        return read_json(path) if path.exists() else None

    def append(self, row: R) -> None:
        """Put one row on disk; when this returns, neither a kill nor a power cut loses it.

        Raises:
            RecordError: the run is finished or closed, or a row of that key is already there.
        """
        if self._stream is None or self.path("result.json").exists():
            state = "closed" if self._stream is None else "finished"
            raise RecordError(f"{self.directory}: a row came after the run was {state}. Start a run in another folder.")
        key = self.key(row)
        if key in self._rows:
            do = "Skip the keys of finished()."
            raise RecordError(f"{self.directory}: the row {self.text(row)} is already there. {do}")
        whole = self._rows_size()
        try:
            write_through(self._stream, (dump(self.plain(row)) + "\n").encode())
        except OSError:
            os.truncate(self.path("metrics.jsonl"), whole)  # a full disk must not tear a line in the middle
            raise
        self._rows[key] = row

    def rewind(self, n: int) -> None:
        """Keep the first `n` rows: those after the checkpoint that a run goes on from are made again.

        Raises:
            RecordError: the run is finished or closed.
        """
        if self._stream is None or self.path("result.json").exists():
            raise RecordError(f"{self.directory}: its rows are final. Start a run in another folder.")
        if n >= len(self._rows):
            return
        path = self.path("metrics.jsonl")
        os.truncate(path, sum(map(len, path.read_bytes().splitlines(keepends=True)[:n])))
        os.fsync(self._stream.fileno())
        self._rows = dict(list(self._rows.items())[:n])

    def note_environment(self, **facts: Any) -> None:
        """Add what is known only once model and data are loaded: model_fingerprint, data_digests, device, seeds, ...

        Raises:
            RecordError: this is a resumption and `model_fingerprint` or `data_digests` differ from the first start.
        """
        path = self.path("environment.json")
        environment = read_json(path)
        facts = json.loads(dump(facts))
        for name in sorted(FIXED_FACTS & facts.keys() & environment.keys()):
            if environment[name] != facts[name]:
                raise RecordError(
                    f"{self.directory}: this run has {name} {environment[name]}, now it is {facts[name]}; the rows "
                    "would not belong together. Restore what it was made with, or choose another --out."
                )
        resumed = environment.get("resumed")
        target = resumed[-1] if resumed else environment
        target.update(facts)
        for name in FIXED_FACTS & facts.keys():  # a run killed before it knew them learns them now
            environment.setdefault(name, facts[name])
        replace_json(path, environment)

    def finish(self, result: Any) -> Path:
        """Write result.json, once, and return its path: `result` plus schema version, number of rows, time.

        Raises:
            RecordError: the run is already finished, or a value is NaN, infinite or no JSON.
        """
        path = self.path("result.json")
        if path.exists():
            raise RecordError(f"{path} exists: the run is finished. Choose another --out to run it again.")
        own = {"schema": SCHEMA, "rows": len(self._rows), "finished_at": now()}
        replace_json(path, {**plain_mapping(result), **own})
        return path

    def close(self) -> None:
        """Release the folder to other processes. Safe to call twice."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self: F) -> F:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _refuse(self, resume: bool) -> None:
        """Raise if the folder is a file, holds something that is no run, or holds a run and `resume` is not set."""
        folder = self.directory
        if not folder.exists():
            return
        if not folder.is_dir():
            raise RecordError(f"Run folder {folder}: a file of that name exists. Choose another --out.")
        if self.path("config.json").exists():
            if not resume:
                do = "pass --resume to go on, or choose another --out."
                raise RecordError(f"{folder} exists and {self._holds()}: {do}")
            return
        # What a start that was killed before its config.json leaves behind; no row can exist by then.
        others = sorted(entry.name for entry in folder.iterdir() if entry.name not in self.begun)
        others += ["rows without a config.json"] if self._rows_size() else []
        if others:
            shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise RecordError(f"{folder} exists and holds no run but {shown}. Choose another --out.")

    def _holds(self) -> str:
        rows, _ = self._read_rows()
        result = " and a result" if self.path("result.json").exists() else ""
        return f"holds {len(rows)} finished row{'' if len(rows) == 1 else 's'}{result}"

    def _claim(self) -> None:
        """Make the folder, prove that it can be written, and lock its rows against other processes."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a failed write must not linger in a buffer and come out in front of the next row.
            self._stream = self.path("metrics.jsonl").open("ab", buffering=0)
            with tempfile.TemporaryFile(dir=self.directory):
                pass
        except OSError as error:
            self.close()
            reason = error.strerror or str(error)
            raise RecordError(
                f"Run folder {self.directory}: cannot be written ({reason}). "
                "Choose another --out, or mend its permissions."
            ) from error
        if not _lock(self._stream):
            self.close()
            do = "Wait for it, or choose another --out."
            raise RecordError(f"Run folder {self.directory}: another process is writing it. {do}")

    def _rows_size(self) -> int:
        path = self.path("metrics.jsonl")
        return path.stat().st_size if path.exists() else 0

    def _start(self) -> None:
        replace_json(self.path("environment.json"), environment_now(self.packages))
        replace_json(self.path("config.json"), self.config)  # last: a folder with a config is a run

    def _continue(self) -> None:
        self._check_config()
        rows, torn = self._read_rows()
        if torn is not None:
            self._drop_tail(torn)
        self._rows = {self.key(row): row for row in rows}
        environment, today = read_json(self.path("environment.json")), environment_now(self.packages)
        if environment.get("commit") != today["commit"]:
            self.notes.append(f"started at commit {environment.get('commit')}, resumed at {today['commit']}.")
        environment.setdefault("resumed", []).append({**today, "rows": len(rows), "notes": list(self.notes)})
        replace_json(self.path("environment.json"), environment)

    def _check_config(self) -> None:
        before = read_json(self.path("config.json"))
        keys = sorted((before.keys() | self.config.keys()) - self.free_keys)
        absent = object()
        differing = [key for key in keys if before.get(key, absent) != self.config.get(key, absent)]
        if differing:
            named = "; ".join(f"{key} was {before.get(key)!r}, is {self.config.get(key)!r}" for key in differing)
            raise RecordError(
                f"{self.directory} cannot be resumed with another configuration: {named}. "
                "Pass what it was started with (config.json), or choose another --out."
            )

    def _read_rows(self) -> tuple[list[R], int | None]:
        """Return the whole rows, and the byte at which a torn last line begins (None if there is none)."""
        path = self.path("metrics.jsonl")
        rows: list[R] = []
        offset = 0
        lines = path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                values = json.loads(line)
                complete = line.endswith(b"\n")
            except ValueError:
                complete = False
            if not complete:
                if number == len(lines):
                    return rows, offset
                raise RecordError(f"{path} line {number}: is no JSON, and rows follow it. Restore or delete that line.")
            try:
                rows.append(self.parse(values))
            except ValueError as error:
                raise RecordError(f"{path} line {number}: {error}") from None
            offset += len(line)
        return rows, None

    def _drop_tail(self, offset: int) -> None:
        path = self.path("metrics.jsonl")
        lost = self._rows_size() - offset
        os.truncate(path, offset)
        self.notes.append(f"{path}: a torn last line ({lost} bytes, from a kill) was dropped; it is made again.")


F = TypeVar("F", bound="RunFolder[Any]")


def _lock(stream: IO[bytes]) -> bool:
    """Return whether this process now holds the only lock on the rows; where there is no fcntl, trust the user."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # file systems without locks (some network mounts): a lock is a courtesy, not a condition
    return True
