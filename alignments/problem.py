"""`prepare`: from a configuration to a model, prepared pairs and a grid of cells; what `run_das.py` searches.

What text tasks (`text_problem`) and vector tasks (`vector_problem`) share: `Problem`, and how a configuration's
variable, layers, positions and device are resolved and checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from alignments.config import RunDas, resolve_layers, with_derived
from alignments.methods import METHODS
from alignments.pairs import PairData
from alignments.scoring import Facts, Other
from alignments.tokens import WHOLE, is_column
from intervene import Positions, Site
from intervene.errors import asked_found_do
from intervene.families import resolve
from records.config_files import ConfigError

OUTSIDE = ("embedding_output", "final_norm_output")  # components that belong to no block
SPLITS = ("train", "select", "test")
SAMPLE = 32  # examples on which a dry run measures task accuracy and speed

Report = Callable[[str, int, int], None]  # what is being done, how many of how many


@dataclass(frozen=True, eq=False)
class Problem:
    """A model with prepared pairs: everything a `Search` needs."""

    config: RunDas
    model: nn.Module
    splits: Mapping[str, PairData]
    where: Callable[[str], Positions]
    sites: Sequence[Site]
    facts: Facts
    lint: Mapping[str, Any]
    fingerprint: str
    others: Mapping[str, Other] = field(default_factory=dict)
    examples: Sequence[Mapping[str, Any]] = ()  # one per test pair, for people to read; empty for vectors
    tokenizer: Any = None
    digests: Mapping[str, str] = field(default_factory=dict)  # split -> `digest` of its pairs as they were drawn


def digest(parts: Iterable[object]) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of texts, numbers, tuples of these, or bytes, in order."""
    found = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        found.update(len(data).to_bytes(8, "big") + data)  # with its length: no two lists of parts read the same
    return found.hexdigest()[:16]


def sizes(config: RunDas) -> dict[str, int]:
    """Return split -> number of pairs."""
    return {"train": config.n_train, "select": config.n_select, "test": config.n_test}


def resolve_config(config: RunDas, n_layers: int, variables: Sequence[str], positions: Sequence[str]) -> RunDas:
    """Return `config` with variable, layers and positions derived where they were left open, and checked.

    Raises:
        ConfigError: the task has no such variable or position; see `resolve_layers`.
    """
    config = resolve_layers(config, n_layers)
    derived: dict[str, Any] = {}
    if config.variable is None:
        derived["variable"] = variables[0]
    if config.positions is None:
        derived["positions"] = tuple(positions)
    config = with_derived(config, **derived)
    for kind, asked, known in (
        ("variable", variables_of(config), variables),
        ("position", [name.removesuffix(WHOLE) for name in config.positions or ()], positions),
    ):
        unknown = [name for name in asked if name not in known and not (kind == "position" and is_column(name))]
        if unknown:
            raise ConfigError(f"Task {config.task}: it has no {kind} {unknown[0]!r}. Use one of {', '.join(known)}.")
    return config


def check_rivals(config: RunDas, known: Sequence[str]) -> None:
    """Refuse a control of a rival variable that the task does not have, or that is the searched one.

    Raises:
        ConfigError: naming the first such, and those there are.
    """
    for control in config.controls:
        name = control.removeprefix("rival:")
        if name != control and name not in known:
            found = f"{config.task} has no such other variable."
            do = f"Use rival: with one of {', '.join(known)}." if known else "Leave it out."
            raise ConfigError(asked_found_do(f"control {control}", found, do))


def resolve_device(config: RunDas) -> RunDas:
    """Return `config` with a device that this machine has: the given one, else cuda where there is one, else cpu.

    Raises:
        ConfigError: torch cannot use the given one here.
    """
    if config.device is None:
        return with_derived(config, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:  # no such kind of device; torch built without it
        reason = str(error).splitlines()[0].rstrip(".")
        do = "Use cpu, or cuda where there is one."
        raise ConfigError(asked_found_do(f"device {config.device}", f"{reason}.", do)) from None
    return config


def variables_of(config: RunDas) -> tuple[str, ...]:
    """Return the searched variables: "left+right" are two, each with a block of its own."""
    return tuple((config.variable or "").split("+"))


def sites_of(config: RunDas) -> list[Site]:
    """Return the sites of the search, one per layer; a component outside the blocks has no layer."""
    assert isinstance(config.layers, tuple)
    if config.component in OUTSIDE:
        return [Site.parse(config.component)]
    return [Site.parse(f"L{layer}.{config.component}") for layer in config.layers]


def check_rank(config: RunDas, model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse a rank above the width of some site, before any work.

    Raises:
        ConfigError: naming the first such site.
    """
    if not any(METHODS[name].ranked for name in config.methods):
        return
    for site in sites:
        width = resolve(model, site).width
        blocks = len(variables_of(config))
        if width is not None and max(config.rank) * blocks > width:
            do = f"Choose 1 to {width // blocks}."
            asked = f"rank {max(config.rank)}" + (f" for each of {blocks} variables" if blocks > 1 else "")
            raise ConfigError(asked_found_do(asked, f"{site} is {width} wide.", do))
