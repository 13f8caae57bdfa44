"""Where prepared activations live: `Memory`, or `Disk`, from which a later run, or a worker beside this one, maps them.

    held = space.find(key)                              # whole and unharmed, or None
    draft = space.begin(key, layout)                    # all of the room at once, before anything is computed
    draft.tensors["logits"][rows] = ...
    held = draft.finish({"exact": True})                # only now can it be found

A cache on disk is one folder with `data.bin`, mapped and not read, and `manifest.json`. It gets its name when it is
finished, so that half of one is never found. `activation_key` names everything that the activations depend on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import re
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alignments.mapped import Layout, allocate, available, ends_checked, lock, locked, mapped, places_of, views
from alignments.tokens import Tokens
from intervene import Site
from intervene.embedded import cache_root

FORMAT = 2
DATA, MANIFEST = "data.bin", "manifest.json"
LIMIT = 20 * 2**30  # bytes that all caches of one folder may take together
SHARE = 0.7  # of the memory that is free, which activations may fill

Devices = Mapping[str, torch.device]  # name -> where a tensor lies


@dataclass(frozen=True, eq=False)
class Held:
    """Finished activations by name, and what is known of them as plain JSON. Not to be written to."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class Draft(Protocol):
    """Room for activations, to be filled and finished, or given up."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors to be filled, by name."""
        ...

    def finish(self, facts: Mapping[str, Any]) -> Held:
        """Return what is held, which from now on can be found."""
        ...

    def abandon(self) -> None:
        """Free the room."""
        ...


class Space(Protocol):
    """Where activations live. `notes` says what was not done as asked; `keeps` whether `find` may ever find."""

    keeps: bool
    notes: list[str]

    def find(self, key: str) -> Held | None:
        """Return what was finished under `key`, if it is there and unharmed."""
        ...

    def begin(self, key: str, layout: Layout, devices: Devices | None = None) -> Draft:
        """Return room for all tensors of `layout`; in memory they lie on `devices`, where one is named."""
        ...


class Memory:
    """Activations in this process's memory; gone with it."""

    keeps = False

    def __init__(self) -> None:
        self.notes: list[str] = []

    def find(self, key: str) -> Held | None:
        """Return None: memory keeps nothing between runs."""
        return None

    def begin(self, key: str, layout: Layout, devices: Devices | None = None) -> Draft:
        """Return uninitialised tensors."""
        on = devices or {}
        return _InMemory(
            {name: torch.empty(shape, dtype=dtype, device=on.get(name)) for name, (shape, dtype) in layout.items()}
        )


@dataclass(frozen=True, eq=False)
class _InMemory:
    tensors: Mapping[str, Tensor]

    def finish(self, facts: Mapping[str, Any]) -> Held:
        return Held(self.tensors, dict(facts))

    def abandon(self) -> None:
        """Do nothing: the tensors go with the last who holds them."""


class Disk:
    """Activations in memory-mapped files under `folder`: they may be larger than memory, and outlive the run.

    Where the disk is full or cannot be written, memory is used instead and `notes` says so. Caches that were used
    longest ago are removed first to keep within `limit`; never one that this object handed out.

    Args:
        folder: default: "activations" beside the converted models.
        limit: bytes of all caches in the folder; None: as many as the disk has.
        only_if_needed: write to disk only what does not fit in memory; what is already there is used anyway.
    """

    keeps = True

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, *, limit: int | None = LIMIT, only_if_needed: bool = False
    ) -> None:
        self.folder = default_folder() if folder is None else Path(folder).expanduser().absolute()
        self.limit = limit
        self.only_if_needed = only_if_needed
        self.notes: list[str] = []
        self.used: set[str] = set()

    def find(self, key: str) -> Held | None:
        """Return the finished cache of `key`, mapped; a damaged one is removed and noted, and None returned."""
        folder = self.folder / key
        if not folder.is_dir():
            return None
        try:
            held = _open(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.notes.append(f"Activations in {folder}: {error}. They are computed again.")
            shutil.rmtree(folder, ignore_errors=True)
            return None
        with suppress(OSError):  # someone else's folder
            os.utime(folder / MANIFEST)  # used just now
        self.used.add(key)
        return held

    def begin(self, key: str, layout: Layout, devices: Devices | None = None) -> Draft:
        """Return mapped room for `layout`, every byte of it allocated; memory where that cannot be."""
        size = places_of(layout)[1]
        if self.only_if_needed and _fit(layout, devices or {}):
            return Memory().begin(key, layout, devices)
        try:
            self._make_room(size)
            return _OnDisk(self, key, layout)
        except OSError as error:
            reason = error.strerror or str(error)
            self.notes.append(
                f"Activations of {_human(size)}: not kept in {self.folder} ({reason}); they are held in memory."
            )
            return Memory().begin(key, layout, devices)

    def _make_room(self, size: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _sweep(self.folder)
        if self.limit is None:
            return
        caches = _caches(self.folder)
        taken = size + sum(caches.values())
        for folder, bytes_ in caches.items():
            if taken > self.limit and folder.name not in self.used:
                shutil.rmtree(folder, ignore_errors=True)
                taken -= bytes_
        if taken > self.limit:
            raise OSError(errno.EDQUOT, f"the limit of this folder is {_human(self.limit)}")


class _OnDisk:
    """A cache that is being written, in a hidden folder that is locked while its writer lives."""

    def __init__(self, space: Disk, key: str, layout: Layout) -> None:
        self.space, self.key, self.layout = space, key, dict(layout)
        self.folder = space.folder / f".{key}.{uuid.uuid4().hex[:8]}.part"
        places, size = places_of(layout)
        self.folder.mkdir(parents=True)
        try:
            with (self.folder / DATA).open("w+b") as file:
                lock(file.fileno())
                allocate(file.fileno(), size)
                self._map = mmap.mmap(file.fileno(), size)  # shared: what is written goes to the file
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        self.tensors: Mapping[str, Tensor] = views(self._map, places, layout)

    def finish(self, facts: Mapping[str, Any]) -> Held:
        mine = Held(self.tensors, dict(facts))  # mapped even where no name leads to it any more
        try:
            self._map.flush()
            manifest = {
                "format": FORMAT,
                "bytes": len(self._map),
                "check": ends_checked(self.tensors),
                "facts": dict(facts),
                "layout": {name: [list(shape), _name(dtype)] for name, (shape, dtype) in self.layout.items()},
            }
            (self.folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
            self.folder.rename(self.space.folder / self.key)
        except OSError as error:
            # ENOTEMPTY: another process was faster with the same activations, and its copy is as good
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                self.space.notes.append(f"Activations: not kept in {self.space.folder} ({error.strerror or error}).")
        self.abandon()  # where it was renamed, there is nothing left to remove
        return self.space.find(self.key) or mine

    def abandon(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def activation_key(
    model: nn.Module,
    base: Tokens,
    source: Tokens,
    sites: Sequence[Site],
    *,
    batch_size: int,
    more: Sequence[object] = (),
) -> str:
    """Return 32 hexadecimal digits that name all that activations depend on, to the last bit.

    That is every weight and buffer (adapters included; `fingerprint` looks at few), the configuration, tokens, masks,
    marks, sites, and what rounding depends on: batch size, device, number of threads, versions. `more` is hashed too.
    Hooks that others have put on the model are not seen.
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    versions = [metadata.version(name) for name in ("torch", "transformers")]
    settings = [
        FORMAT,
        type(model).__qualname__,
        *versions,
        torch.get_num_threads(),
        batch_size,
        sorted(map(str, sites)),
    ]
    settings += [getattr(config, "_attn_implementation", None), [one.training for one in model.modules()], *more]
    digest.update(repr(settings).encode())
    adapters = [(module.scaling, module.active_adapters, module.disable_adapters) for module in _adapted(model)]
    digest.update(repr(adapters).encode())
    if config is not None:
        known = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        _add(digest, name, tensor)
    for tokens in (base, source):
        _add(digest, "ids", tokens.input_ids)
        _add(digest, "mask", tokens.attention_mask)
        for name, columns in sorted(tokens.marks.items()):
            _add(digest, name, columns)
    return digest.hexdigest()[:32]


def _adapted(model: nn.Module) -> list[Any]:
    """Return the layers that adapters have been put on, which can be switched without a weight changing."""
    return [module for module in model.modules() if hasattr(module, "scaling") and hasattr(module, "disable_adapters")]


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:{tensor.device.type};".encode())
    flat = tensor.detach().reshape(-1)
    for part in torch.split(flat, 1 << 24):  # a large table must not be copied whole
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy())


def default_folder() -> Path:
    """Return the folder of activation caches: beside the converted models."""
    root = cache_root()
    return (root.parent if root.name == "models" else root) / "activations"


def space_of(choice: str | os.PathLike[str] | None) -> Space:
    """Return the space that a user names.

    None or "memory"; "auto": the default folder, for what memory cannot hold; "disk": the default one; else a folder.
    """
    if choice is None or str(choice) == "memory":
        return Memory()
    if str(choice) == "auto":
        return Disk(only_if_needed=True)
    return Disk(None if str(choice) == "disk" else choice)


def clear(folder: str | os.PathLike[str] | None = None) -> int:
    """Remove all activation caches of a folder; return how many bytes that freed. Other files there are left alone."""
    root = default_folder() if folder is None else Path(folder).expanduser()
    if not root.is_dir():
        return 0
    _sweep(root)
    caches = _caches(root)
    for path in caches:
        shutil.rmtree(path, ignore_errors=True)
    return sum(caches.values())


def _fit(layout: Layout, devices: Devices) -> bool:
    """Return whether memory holds `layout`, each tensor on its device."""
    parts: dict[torch.device, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
    for name, one in layout.items():
        parts.setdefault(devices.get(name, torch.device("cpu")), {})[name] = one
    return all(fits(places_of(part)[1], device) for device, part in parts.items())


def fits(size: int, device: torch.device | None = None) -> bool:
    """Return whether `size` bytes may be held in memory: at most `SHARE` of what is free on `device`."""
    return size <= SHARE * available(device)


def _open(folder: Path) -> Held:
    """Return a finished cache, mapped; ValueError, or what else goes wrong, if its size or its ends are not right."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']} of another version")
    layout = {name: (tuple(shape), getattr(torch, dtype)) for name, (shape, dtype) in manifest["layout"].items()}
    places, size = places_of(layout)
    with (folder / DATA).open("rb") as file:
        found = os.fstat(file.fileno()).st_size
        if not found == size == manifest["bytes"]:
            raise ValueError(f"{DATA} has {found} bytes and not {size}")
        data = mapped(file.fileno(), size)
    held = Held(views(data, places, layout), manifest["facts"])
    if ends_checked(held.tensors) != manifest["check"]:
        raise ValueError(f"{DATA} is damaged")
    return held


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _caches(folder: Path) -> dict[Path, int]:
    """Return finished cache -> its bytes, those first that were used longest ago."""
    found = [path for path in folder.iterdir() if re.fullmatch(r"[0-9a-f]{32}", path.name) and (path / DATA).is_file()]
    found.sort(key=lambda path: (path / MANIFEST).stat().st_mtime if (path / MANIFEST).is_file() else 0.0)
    return {path: (path / DATA).stat().st_size for path in found}


def _sweep(folder: Path) -> None:
    """Remove what writers that died have left behind."""
    for path in folder.glob(".*.part"):
        with suppress(OSError):
            young = time.time() - path.stat().st_mtime < 60  # its writer may not have come to lock it
            if not young and not locked(path / DATA):
                shutil.rmtree(path, ignore_errors=True)


def _human(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 // 10 else f"{size / 2**20:.1f} MiB"
