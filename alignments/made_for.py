"""What a shared alignment was made for: a model by its fingerprint, a tokenizer by how it cuts text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from intervene import fingerprint
from intervene.errors import WrongModel, asked_found_do
from intervene.store import model_name

# Words, digits, signs, blanks, line breaks and letters outside of ASCII: what tokenizers disagree about.
PROBE = "The 2nd café's price is 12.345,67 — isn't it?\n\tYes:  naïve 東京 <s>"


def tokenizer_hash(tokenizer: Any) -> dict[str, Any]:
    """Return what names a tokenizer: hashes of its vocabulary, special tokens and how it cuts up a probe text.

    The padding token is left out: which one stands in for a missing one changes no prompt.
    """
    special = [getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "unk")]
    parts = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special tokens": [None if one is None else str(one) for one in special],
        "probe text": [list(tokenizer(text)["input_ids"]) for text in (PROBE, f" {PROBE}")],
    }
    return {"name": tokenizer_name(tokenizer), **{name: _digest(part) for name, part in parts.items()}}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()[:16]


def tokenizer_name(tokenizer: Any) -> str | None:
    """Return the name a tokenizer was loaded under, else its class; None of None."""
    return None if tokenizer is None else str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def check_made_for(asked: str, manifest: Mapping[str, Any], model: nn.Module | None, tokenizer: Any) -> None:
    """Refuse a model or tokenizer other than the one that `manifest` names; None is not checked.

    Raises:
        WrongModel: naming both, and what of the tokenizer differs.
    """
    do = "Load that one, or give the reason for using another: force='<reason>'."
    made = manifest["model"]
    if model is not None and fingerprint(model) != made["fingerprint"]:
        found = f"it was made for model {made['name']} ({made['fingerprint']}), this one is"
        raise WrongModel(asked_found_do(asked, f"{found} {model_name(model)} ({fingerprint(model)}).", do))
    told = manifest["tokenizer"]
    if tokenizer is None or told is None:
        return
    now = tokenizer_hash(tokenizer)
    differing = [name for name in told if name != "name" and told[name] != now.get(name)]
    if differing:
        found = (
            f"it was made with tokenizer {told['name']}; this one, {now['name']}, differs in {' and '.join(differing)}."
        )
        raise WrongModel(asked_found_do(asked, found, do))
