"""`Checkpoints`: what a training needs to go on exactly, in a folder per step that is whole or absent.

    checkpoints/step-00000200/rank-0.pt     parameters, optimiser, random state, and the defense's state, of each rank
    checkpoints/step-00000200/meta.json     written last: step, rows, ranks, and what the run is, to compare with

A checkpoint is written beside its place and renamed, so a kill or a full disk leaves the previous one. Files are read
with `weights_only`: nothing in them is run.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from defenses.backend import Backend
from defenses.defense import Defense
from defenses.errors import CheckpointError
from intervene.errors import asked_found_do
from records.files import RecordError, dump, read_json, replace_json

SCHEMA = 1
META = "meta.json"
PART = ".part"


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself.

    Attributes:
        step: optimiser steps that are done. rows: rows of metrics.jsonl that belong to them. world: number of ranks.
        identity: name -> digest or text of what the run is (method, config, data, ...); all must agree to go on.
        sizes: file -> bytes. state: what the command itself wants to know again.
    """

    step: int
    rows: int
    world: int
    identity: Mapping[str, str]
    sizes: Mapping[str, int]
    state: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA


@dataclass(eq=False)
class Checkpoints:
    """The checkpoints of one run, in `folder`.

    Attributes:
        identity: of the run as it is now. keep: how many are kept, the newest. say: is told of what went wrong.
    """

    folder: Path
    identity: Mapping[str, str]
    keep: int = 2
    say: Callable[[str], None] = print

    def save(
        self, backend: Backend, defense: Defense, step: int, *, rows: int = 0, state: Mapping[str, Any] | None = None
    ) -> bool:
        """Write the state after `step` steps and drop the oldest; collective. Return whether it was written.

        A disk that is full or gone is told and costs this checkpoint only: the previous ones stay, training may go on.
        """
        place = self.folder / f"step-{step:08d}"
        part = place.with_name(place.name + PART)
        held = {"backend": backend.state(), "defense": defense.state_dict()}
        trouble = _attempt(lambda: _fresh(part)) if backend.rank == 0 else ""
        _together(backend, trouble)  # nobody writes before the folder is there
        if not trouble:
            trouble = _attempt(lambda: _write_state(part / f"rank-{backend.rank}.pt", held))
        failed = _together(backend, trouble)
        if backend.rank == 0 and not failed:
            trouble = _attempt(lambda: self._complete(place, part, backend.world, Meta(
                step, rows, backend.world, dict(self.identity), {}, dict(state or {})
            )))  # fmt: skip
        failed = _together(backend, trouble)
        if failed and backend.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            before = self.latest()
            kept = "there is none before it" if before is None else f"that of step {before.step} is kept"
            self.say(
                f"WARNING: the checkpoint of step {step} could not be written "
                f"({trouble or 'on another rank'}); {kept}, and training goes on. Free some space."
            )
        return not failed

    def latest(self) -> Meta | None:
        """Return what the newest whole checkpoint says, None if there is none."""
        for place in sorted(self.folder.glob("step-*"), reverse=True):
            if (meta := _meta(place)) is not None:
                return meta
        return None

    def load(self, backend: Backend, defense: Defense) -> Meta | None:
        """Put `backend` and `defense` where the newest whole checkpoint left them; None if there is none.

        Raises:
            CheckpointError: it is of another run (what differs is named) or another number of ranks, or cannot be read.
        """
        meta = self.latest()
        if meta is None:
            return None
        place = self.folder / f"step-{meta.step:08d}"
        self.require_same(meta, place)
        if meta.world != backend.world:
            found = f"it was written by {meta.world} rank{'s' * (meta.world > 1)}, now there are {backend.world}."
            raise CheckpointError(asked_found_do(f"Resuming {place}", found, f"Start {meta.world} of them."))
        path = place / f"rank-{backend.rank}.pt"
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
            backend.load_state(held["backend"])
            defense.load_state_dict(held["defense"])
        except pickle.UnpicklingError as error:
            found = "it cannot be read: it is damaged, or holds more than tensors and plain values, which is never run."
            do = f"Delete {place} to go on from the one before it."
            raise CheckpointError(asked_found_do(f"Checkpoint {path}", found, do)) from error
        except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
            reason = (str(error).splitlines() or [""])[0]
            do = f"Delete {place} to go on from the one before it."
            raise CheckpointError(asked_found_do(f"Checkpoint {path}", f"it cannot be read ({reason}).", do)) from error
        return meta

    def require_same(self, meta: Meta, place: Path) -> None:
        """Raise a CheckpointError that names what differs between the run in `meta` and this one."""
        names = sorted(meta.identity.keys() | self.identity.keys())
        pairs = {name: (meta.identity.get(name, "absent"), self.identity.get(name, "absent")) for name in names}
        if changed := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
            found = "; ".join(f"{name} was {before}, is {now}" for name, (before, now) in changed.items())
            do = "Restore what it was started with, or choose another --out."
            raise CheckpointError(asked_found_do(f"Resuming {place}", f"{found}.", do))

    def clear(self) -> None:
        """Delete all of them: a finished run of a comparison needs none."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _complete(self, place: Path, part: Path, world: int, meta: Meta) -> None:
        """Write the meta file, rename the folder, and drop what is older than the newest `keep`."""
        sizes = {f"rank-{rank}.pt": (part / f"rank-{rank}.pt").stat().st_size for rank in range(world)}
        replace_json(part / META, {**vars(meta), "sizes": sizes})
        shutil.rmtree(place, ignore_errors=True)  # one of the same step, from before a resumption
        os.replace(part, place)
        _sync(self.folder)
        whole = [one for one in sorted(self.folder.glob("step-*")) if _meta(one) is not None]
        for old in whole[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        for torn in self.folder.glob(f"step-*{PART}"):
            shutil.rmtree(torn, ignore_errors=True)


def digest(value: object) -> str:
    """Return 12 hexadecimal digits of the SHA-256 of `value` as JSON."""
    return hashlib.sha256(dump(value).encode()).hexdigest()[:12]


def file_digest(path: Path) -> str:
    """Return 12 hexadecimal digits of the SHA-256 of a file, or of a folder's files in order of their names."""
    hasher = hashlib.sha256()
    for one in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if one.is_file():
            hasher.update(one.name.encode() if path.is_dir() else b"")
            with one.open("rb") as stream:
                while block := stream.read(1 << 20):
                    hasher.update(block)
    return hasher.hexdigest()[:12]


class _Sink:
    """A stream that remembers the first failure and swallows what follows: torch's writer, which is C++, ends the
    process where a stream of its raises at the wrong moment."""

    def __init__(self, path: Path) -> None:
        self.stream = path.open("wb")
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        """Take `data`, on disk or nowhere."""
        if self.failed is None:
            try:
                self.stream.write(data)
            except OSError as error:
                self.failed = error
        return len(data)

    def flush(self) -> None:
        """Do nothing: `close` does."""

    def close(self) -> None:
        """Wait until all is on disk; OSError if some of it is not."""
        try:
            if self.failed is None:
                self.stream.flush()
                os.fsync(self.stream.fileno())
        except OSError as error:
            self.failed = error
        try:
            self.stream.close()
        except OSError as error:
            self.failed = self.failed or error
        if self.failed is not None:
            raise self.failed


def _write_state(path: Path, held: Mapping[str, Any]) -> None:
    sink = _Sink(path)
    try:
        torch.save(dict(held), sink)  # type: ignore[arg-type]  # it needs write and flush only
    finally:
        sink.close()


def _fresh(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _attempt(act: Callable[[], None]) -> str:
    """Return "" or why the disk refused."""
    try:
        act()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _together(backend: Backend, trouble: str) -> bool:
    """Return whether any rank had trouble, the same on all; also a barrier."""
    return bool(int(backend.max(torch.tensor(int(bool(trouble)), device=backend.device))))


def _meta(place: Path) -> Meta | None:
    """Return what a whole checkpoint says; None for one that is not: no meta file, or a file of another size."""
    if place.name.endswith(PART) or not (place / META).is_file():
        return None
    try:
        meta = Meta(**read_json(place / META))
    except (RecordError, TypeError):
        return None
    if meta.schema > SCHEMA:
        found = f"its schema is {meta.schema}, this version reads up to {SCHEMA}."
        raise CheckpointError(asked_found_do(f"Checkpoint {place}", found, "Upgrade."))
    sizes = {name: (place / name).stat().st_size if (place / name).is_file() else -1 for name in meta.sizes}
    return meta if sizes == dict(meta.sizes) else None


def _sync(folder: Path) -> None:
    """Wait until a rename in `folder` is on disk, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
