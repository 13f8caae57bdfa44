"""The folder of one run: `RunRecord` writes it so that a kill at any moment costs at most the row being written.

    config.json        the configuration as it was asked for, null where a value is derived; what --resume compares
    environment.json   commit, versions, device, model fingerprint, argv, and under "resolved" the configuration with
                       every value derived and its source; one entry per resumption
    metrics.jsonl      one row per line, append-only, on disk before `append` returns
    result.json        the numbers, written once, last
    (plan/, report.html and others are written by those who own them, at `record.path(name)`)

Everything that can be refused is refused by `create`, before any work: a folder that holds another run, a path that is
a file, a place that cannot be written, another process that is writing there.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from alignments.rows import BadRow, Row, RowKey

SCHEMA = 1
# These say how a run is carried out, not what it computes, so a resumption may change them.
FREE_KEYS = frozenset(
    {"out", "resume", "dry_run", "threads", "executor", "workers", "cache", "log_every", "trackers", "wandb_entity"}
)
# A resumption that differs in one of these would mix rows of two experiments.
FIXED_FACTS = frozenset({"model_fingerprint", "data_digests"})
_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pydantic", "plotly", "peft", "datasets", "pyvene")


class RecordError(Exception):
    """A run folder that cannot be started, resumed or written as asked."""


class RunRecord:
    """One run's folder, open for rows. Make it with `create`; use it in a `with` block, or `close` it.

    `notes` says what a reader of the log should know (a torn line dropped, nothing to resume).
    """

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Hold an already checked folder; `create` is what makes one."""
        self.directory = directory
        self.config = dict(config)
        self.notes: list[str] = []
        self._rows: dict[RowKey, Row] = {}
        self._stream: IO[bytes] | None = None

    @classmethod
    def create(cls, directory: str | Path, config: Any, *, resume: bool = False) -> RunRecord:
        """Return the record of a new run in `directory`, or with `resume` of the run that is there.

        `config` is what was asked for: a mapping, a dataclass, or anything with `to_json()`. A missing or
        empty folder starts a new run in either case, so that a job that always resumes can be queued again.

        Raises:
            RecordError: the folder holds something and `resume` is not set; it holds no run; the run's configuration
                differs (keys named); rows are corrupt before the last line; the place cannot be written, or another
                process writes it.
        """
        record = cls(Path(directory), _mapping(config))
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

    def finished(self) -> tuple[Row, ...]:
        """Return the rows on disk, in the order in which they were finished."""
        return tuple(self._rows.values())

    @property
    def result(self) -> dict[str, Any] | None:
        """Return what `finish` wrote, or None while the run is unfinished."""
        path = self.path("result.json")
        return _read_json(path) if path.exists() else None

    def append(self, row: Row) -> None:
        """Put one row on disk; when this returns, neither a kill nor a power cut loses it.

        Raises:
            RecordError: the run is finished or closed, or a row of that cell, seed and split is already there.
        """
        if self._stream is None or self.path("result.json").exists():
            state = "closed" if self._stream is None else "finished"
            raise RecordError(f"{self.directory}: a row came after the run was {state}. Start a run in another folder.")
        if row.key in self._rows:
            raise RecordError(
                f"{self.directory}: the row {row.site} @ {row.position_label}, {row.method}, seed {row.seed}, "
                f"{row.split} is already there. Skip the keys of finished()."
            )
        whole = self._rows_size()
        try:
            _write_through(self._stream, (_dump(row.to_json()) + "\n").encode())
        except OSError:
            os.truncate(self.path("metrics.jsonl"), whole)  # a full disk must not tear a line in the middle
            raise
        self._rows[row.key] = row

    def note_environment(self, **facts: Any) -> None:
        """Add what is known only once model and data are loaded: model_fingerprint, data_digests, device, seeds, ...

        Raises:
            RecordError: this is a resumption and `model_fingerprint` or `data_digests` differ from the first start.
        """
        path = self.path("environment.json")
        environment = _read_json(path)
        facts = json.loads(_dump(facts))
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
        _replace(path, environment)

    def finish(self, result: Any) -> Path:
        """Write result.json, once, and return its path: `result` plus schema version, number of rows, time.

        Raises:
            RecordError: the run is already finished, or a value is NaN, infinite or no JSON.
        """
        path = self.path("result.json")
        if path.exists():
            raise RecordError(f"{path} exists: the run is finished. Choose another --out to run it again.")
        own = {"schema": SCHEMA, "rows": len(self._rows), "finished_at": _now()}
        _replace(path, {**_mapping(result), **own})
        return path

    def close(self) -> None:
        """Release the folder to other processes. Safe to call twice."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> RunRecord:
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
        begun = {"metrics.jsonl", "environment.json", "environment.json.part", "config.json.part"}
        others = sorted(entry.name for entry in folder.iterdir() if entry.name not in begun)
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
        _replace(self.path("environment.json"), _environment())
        _replace(self.path("config.json"), self.config)  # last: a folder with a config is a run

    def _continue(self) -> None:
        self._check_config()
        rows, torn = self._read_rows()
        if torn is not None:
            self._drop_tail(torn)
        self._rows = {row.key: row for row in rows}
        environment, now = _read_json(self.path("environment.json")), _environment()
        if environment.get("commit") != now["commit"]:
            self.notes.append(f"started at commit {environment.get('commit')}, resumed at {now['commit']}.")
        environment.setdefault("resumed", []).append({**now, "rows": len(rows), "notes": list(self.notes)})
        _replace(self.path("environment.json"), environment)

    def _check_config(self) -> None:
        before = _read_json(self.path("config.json"))
        keys = sorted((before.keys() | self.config.keys()) - FREE_KEYS)
        absent = object()
        differing = [key for key in keys if before.get(key, absent) != self.config.get(key, absent)]
        if differing:
            named = "; ".join(f"{key} was {before.get(key)!r}, is {self.config.get(key)!r}" for key in differing)
            raise RecordError(
                f"{self.directory} cannot be resumed with another configuration: {named}. "
                "Pass what it was started with (config.json), or choose another --out."
            )

    def _read_rows(self) -> tuple[list[Row], int | None]:
        """Return the whole rows, and the byte at which a torn last line begins (None if there is none)."""
        path = self.path("metrics.jsonl")
        rows: list[Row] = []
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
                rows.append(Row.from_json(values))
            except BadRow as error:
                raise RecordError(f"{path} line {number}: {error}") from None
            offset += len(line)
        return rows, None

    def _drop_tail(self, offset: int) -> None:
        path = self.path("metrics.jsonl")
        lost = self._rows_size() - offset
        os.truncate(path, offset)
        self.notes.append(f"{path}: a torn last line ({lost} bytes, from a kill) was dropped; its cell is run again.")


def _environment() -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain")
    return {
        "schema": SCHEMA,
        "started_at": _now(),
        "argv": list(sys.argv),
        "commit": commit,
        "dirty": None if commit is None or changes is None else bool(changes),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }


def _git(*arguments: str) -> str | None:
    """Return what git says of the code that runs (not of the working folder); None without git or a repository."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _mapping(value: Any) -> dict[str, Any]:
    """Return a configuration or result as the plain JSON that its file will hold."""
    if hasattr(value, "to_json"):
        value = value.to_json()
    elif is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    plain: dict[str, Any] = json.loads(_dump(dict(value)))
    return plain


def _dump(value: object, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False, default=_plain)
    except (ValueError, TypeError) as error:
        do = "Pass finite numbers and texts."
        raise RecordError(f"Record: a value cannot be written as JSON ({error}). {do}") from None


def _plain(value: Any) -> object:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "item"):  # numpy and torch scalars
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read ({error}). Restore it, or choose another --out.") from error
    return values


def _write_through(stream: IO[bytes], data: bytes) -> None:
    left = memoryview(data)
    while left:  # an unbuffered stream may take less than it is given
        left = left[stream.write(left) :]
    stream.flush()
    os.fsync(stream.fileno())


def _replace(path: Path, value: object) -> None:
    """Write a JSON file whole or not at all: a kill leaves the old one."""
    data = (_dump(value, indent=2) + "\n").encode()
    part = path.with_name(path.name + ".part")
    with part.open("wb") as stream:
        _write_through(stream, data)
    os.replace(part, path)


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
