"""One adapter a peer: how that peer is asked for each case of `benchmarks.workload`.

An adapter has `name`, `distribution` (what to look up the version of), `__init__(work)`, which does what a user does
once per model; `prepare(case, work)`, which does what a user does once per plan and returns a function that does the
rest for one batch and returns its logits (B, S, V) or, for "collect", activations (L, B, S, D); `plain()`, the peer's
forward with nothing to do; and `steer(on)`, which returns a function that generates (B, S + new) token ids.

The model an adapter is given is its own to change: some peers do, for good. Each adapter is written as its peer's
documentation advises, in the fastest form where there are several.
"""

from __future__ import annotations

import importlib
from typing import Any

# name on the command line -> (module to import to know whether it is installed, adapter module, class)
PEERS = {
    "hooks": ("torch", "benchmarks.peers.raw_hooks", "RawHooks"),
    "intervene": ("intervene.run", "benchmarks.peers.ours", "Ours"),
    "pyvene": ("pyvene", "benchmarks.peers.pyvene_peer", "Pyvene"),
    "nnsight": ("nnsight", "benchmarks.peers.nnsight_peer", "Nnsight"),
    "transformer_lens": ("transformer_lens", "benchmarks.peers.lens_peer", "Lens"),
}
NOT_INSTALLED = "not installed"


def load(name: str) -> tuple[type[Any] | None, str]:
    """Return the adapter class of `name` and its peer's version, or None and why not."""
    module, adapter, cls = PEERS[name]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return None, f"{NOT_INSTALLED} ({error})"
    kind = getattr(importlib.import_module(adapter), cls)
    return kind, version(kind.distribution)


def version(distribution: str) -> str:
    """Return the installed version of `distribution`, or "" where it has none."""
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
