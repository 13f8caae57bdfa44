"""Files that are whole or not there, and JSON and tensors that say when they are damaged. What `store` is built on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from intervene.errors import StoreError


def parsed_json(text: str | bytes, asked: str) -> Any:
    """Return the value of JSON `text`; StoreError, beginning with `asked`, if it is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise StoreError(f"{asked}: cut off or damaged, no JSON ({error}). Save it again.") from error


def as_json(value: Any, path: Path) -> str:
    """Return `value` as JSON to be written to `path`; StoreError if it is not plain."""
    try:
        return json.dumps(_plain(value), indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StoreError(f"Save to {path}: {error}. Notes must be plain: texts, numbers, lists, dicts.") from error


def _plain(value: Any) -> Any:
    """Return `value` as JSON has it: NaN and infinity, which JSON lacks, as text; numpy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(float(value))
    return value.item() if hasattr(value, "item") and not isinstance(value, Tensor) else value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; StoreError if it is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path}: cut off or damaged ({error}). Save it again.") from error


def own_copy(tensor: Tensor) -> Tensor:
    """Return a row-major copy on the CPU."""
    # a copy of its own: safetensors refuses tensors that share memory, as two edits of one steering vector do
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Make a file, or a folder's list of files, survive a power cut."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a free path beside `path`, on its disk so that a move is atomic; what is left there is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield draft
    finally:
        if draft.is_dir():
            shutil.rmtree(draft)
        else:
            draft.unlink(missing_ok=True)
