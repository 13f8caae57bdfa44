"""The trained weights as folders that `from_pretrained` reads: `model`, or `adapter` and, merged, `model` beside it.

A folder is written beside its place and renamed when it is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from defenses.backend import Backend
from defenses.errors import CheckpointError
from intervene.embedded import quiet_bars
from intervene.errors import asked_found_do


def save_trained(backend: Backend, tokenizer: Any, folder: Path, *, base: str, merge: bool = False) -> list[str]:
    """Write what was trained into `folder` and return the names of what was written there; collective.

    Args:
        base: where the model came from, which an adapter is merged into. merge: also the merged model.

    Raises:
        CheckpointError: the disk is full, or cannot be written; what was there before stays.
    """
    weights = backend.weights()
    if weights is None:
        return []
    model: Any = backend.model
    adapted = hasattr(model, "peft_config")
    name = "adapter" if adapted else "model"

    def write(part: Path) -> None:
        model.save_pretrained(str(part), state_dict=weights)
        tokenizer.save_pretrained(str(part))

    _whole(folder / name, write)
    if adapted and merge:
        _whole(folder / "model", lambda part: _write_merged(folder / "adapter", base, tokenizer, part))
        return [name, "model"]
    return [name]


def load_trained(folder: Path, *, base: str | None = None) -> tuple[nn.Module, Any]:
    """Return the model that a run left in `folder`, in eval mode, and its tokenizer.

    `folder` is a run's, or that of a model or an adapter.

    Raises:
        CheckpointError: it holds no trained weights.
    """
    from intervene.models import load_model

    places = [folder, folder / "model", folder / "adapter"]
    for place in places:
        if (place / "adapter_config.json").is_file():
            return _with_adapter(place, base)
        if (place / "config.json").is_file() and any(place.glob("*.safetensors*")):
            return load_model(place)
    found = "it holds no model and no adapter."
    raise CheckpointError(asked_found_do(f"Trained weights in {folder}", found, "Name the folder of a finished run."))


def _with_adapter(place: Path, base: str | None) -> tuple[nn.Module, Any]:
    from peft import PeftConfig, PeftModel

    from intervene.models import load_model

    model, tokenizer = load_model(base or str(PeftConfig.from_pretrained(str(place)).base_model_name_or_path))
    wrapped: nn.Module = PeftModel.from_pretrained(model, str(place)).eval()
    return wrapped, tokenizer


def _write_merged(adapter: Path, base: str, tokenizer: Any, part: Path) -> None:
    """Write `base` with the adapter added to its weights; a fresh copy, since the trained one may be in pieces."""
    model: Any = _with_adapter(adapter, base)[0]
    model.merge_and_unload().save_pretrained(str(part))
    tokenizer.save_pretrained(str(part))


def _whole(place: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `place`, and put it there when it is whole."""
    part = place.with_name(place.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with quiet_bars():
            write(part)
        shutil.rmtree(place, ignore_errors=True)
        part.rename(place)
    except Exception as error:  # safetensors and tokenizers each have errors of their own for a full disk
        shutil.rmtree(part, ignore_errors=True)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        do = "Free some space and start the same command with --resume: it goes on from the last checkpoint."
        raise CheckpointError(asked_found_do(f"Save {place}", f"it cannot be written ({reason}).", do)) from error
