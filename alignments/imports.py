"""Alignments that other tools wrote, as plans: the original `pytorch-rotate-*.bin`, CausalAbstraction, pyvene.

    found = import_original("results/LlamaForCausalLM.task....intr.80.81", positions=Marked("80"))
    found.plan, found.facts                                    # Subspace [0, boundary), what the file says
    plan = import_causalab("ResidualStream(Layer-17,Token-last_token)", "L17.block_output", LastToken())
    plan = import_alignment(path, ...)                         # any of them, or one of ours, by what is there

Files are read with `weights_only=True`: tensors and plain values, no code of theirs is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alignments.bundle import MANIFEST, load_bundle
from alignments.original import DasConfig, read_das_config
from intervene import At, Intervention, Plan, Positions, Site, Swap
from intervene.boundless import FaithfulBoundarySwap, SecondBoundarySwap
from intervene.errors import ShapeMismatch, StoreError, Unsupported, asked_found_do
from intervene.families import resolve
from intervene.featurizers import Coordinates, Featurizer, Identity, Subspace
from intervene.pyvene_compat import from_pyvene
from intervene.store import PLAN_FILE, load_plan

BEST, LAST = "pytorch-rotate-best.bin", "pytorch-rotate-last.bin"
_PARTS = ("rotate_layer", "intervention_boundaries", "temperature")
_WEIGHT = "parametrizations.weight."
FEATURIZER, INVERSE, INDICES = "_featurizer", "_inverse_featurizer", "_indices"

Gate = Literal["hard", "published"]


@dataclass(frozen=True, eq=False)
class Imported:
    """A plan read from another tool's file, and numbers that the file holds besides."""

    plan: tuple[Intervention, ...]
    facts: Mapping[str, float]


def read_state(file: Path) -> Any:
    """Return what `torch.save` wrote to `file`, on the CPU, refusing everything but tensors and plain values.

    Raises:
        StoreError: there is no such file, or it holds more than that or is damaged.
    """
    if not file.is_file():
        raise StoreError(f"{file}: there is no such file. Check the path.")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for what is no file of tensors
        reason = str(error).strip().splitlines()[0]
        raise StoreError(
            f"{file}: it does not hold plain tensors alone ({reason}). It was not run; ask its author for a file that "
            "torch.load reads with weights_only=True."
        ) from error


def rotation(state: Mapping[str, Tensor], prefix: str = _WEIGHT) -> Tensor:
    """Return the orthonormal (D, K) matrix, in fp64, that a layer under torch's `orthogonal` stands for.

    `state` has `<prefix>original` X and, with dynamic trivialisation, `<prefix>0.base` B. A square one is exp(A) or
    B exp(A) with A = tril(X) - tril(X)^T; a tall one is made of Householder reflections. Without a base, X itself is
    free and *not* the rotation, also where it was initialised orthogonal: the original LLaMA class is of that kind.

    Raises:
        StoreError: `state` has no such keys, or others besides.
    """
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if set(own) not in ({"original"}, {"original", "0.base"}):
        raise StoreError(
            f"Rotation: the state has keys {', '.join(sorted(state)) or '(none)'}. Needs {prefix}original, alone or "
            f"with {prefix}0.base."
        )
    shape = own["original"].shape
    if len(shape) != 2 or shape[0] < shape[1]:
        raise StoreError(f"Rotation: its weight has shape {tuple(shape)}. Needs (D, K) with K at most D.")
    layer = nn.Module()
    # In fp64: the exponential of a matrix in fp32 is off by more than rounding. torch's own code reads its own files.
    layer.weight = nn.Parameter(torch.eye(*shape, dtype=torch.float64))
    torch.nn.utils.parametrizations.orthogonal(layer, use_trivialization="0.base" in own)
    layer.load_state_dict({_WEIGHT + key: value.double() for key, value in own.items()})
    made: Tensor = layer.weight.detach()
    return made


def import_original(
    path: str | Path,
    *,
    site: Site | str | None = None,
    positions: Positions | None = None,
    variable: int = 0,
    boundaries: Literal[1, 2] | None = None,
    gate: Gate = "hard",
    model: nn.Module | None = None,
) -> Imported:
    """Return the alignment in an original align-transformers checkpoint: rotation, boundary and temperature.

    With n the rotation's width and beta = clamp(boundary, 0.001, 1), the released LLaMA class swaps the rotated
    coordinates 0 to beta floor(n / 2) for the first variable and from there to twice that for the second. Its analysis
    notebook draws n beta instead, twice as much; facts name both: `boundary` is what the class used.

    Args:
        path: the .bin file, or the run's folder (the best checkpoint, else the last one).
        site, positions: None: from the `das_config` beside the file: block_output of its layer, `At` its token.
        variable: 0 or 1, whose columns are taken.
        boundaries: 2 for the half-width form above, 1 for beta n (pyvene, and the one-variable GPT-2 class); None: 2
            if the file holds two boundaries, as both original classes write, else 1.
        gate: "hard": a Subspace of the columns inside the boundary, swapped whole. "published": the whole rotation
            with the soft gate at the stored temperature, as its authors scored it.
        model: if given, the rotation must have the width of its site.

    Raises:
        StoreError: not such a file. Unsupported: a rotation over several tokens at once. ShapeMismatch: a variable
            that is neither 0 nor 1, or 1 of one.
    """
    file = _checkpoint(Path(path))
    state = _original_state(file)
    config = _das_config(file.parent)
    site, positions = _place(file, site, positions, config)
    frame = rotation(state["rotate_layer"])
    width = len(frame)
    _check_width(file, width, site, 1 if config is None else config.tokens, model)
    raw = state["intervention_boundaries"].detach().double().flatten()
    many = boundaries or (2 if len(raw) > 1 else 1)
    if variable not in range(many):
        raise ShapeMismatch(f"{file}: variable {variable} of {many}. Use {' or '.join(map(str, range(many)))}.")
    temperature = float(state["temperature"].detach())
    swap = FaithfulBoundarySwap(width, variables=many, fraction=float(raw[0]), temperature=temperature)
    edge = round(float(swap.boundary().detach()))
    facts = {
        "boundary_fraction": float(raw[0]),
        "temperature": temperature,
        "width": float(width),
        "boundary": float(edge),
        "boundary_as_plotted": float(raw[0].clamp(1e-3, 1)) * width,
    }
    if gate == "published":
        edit = swap if variable == 0 else SecondBoundarySwap(swap)
        return Imported((Intervention(site, edit, positions, Subspace.from_frame(frame.float())),), facts)
    columns = frame[:, variable * edge : (variable + 1) * edge]
    if not columns.shape[1]:
        raise StoreError(
            f"{file}: its boundary {float(raw[0]):.4f} leaves no dimension of {width}. Use gate='published'."
        )
    return Imported((Intervention(site, Swap(), positions, Subspace.from_frame(columns.float())),), facts)


def _original_state(file: Path) -> Mapping[str, Any]:
    state = read_state(file)
    if not isinstance(state, Mapping) or set(state) != set(_PARTS):
        found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise StoreError(f"{file}: holds {found}, an original checkpoint holds {', '.join(_PARTS)}. Name one of those.")
    return state


def _check_width(file: Path, width: int, site: Site, tokens: int, model: nn.Module | None) -> None:
    known = None if model is None else resolve(model, site).width
    if tokens != 1 or known not in (None, width):
        at = f"{tokens} tokens" if tokens != 1 else f"{site}, which is {known} wide"
        raise Unsupported(
            f"{file}: a rotation of {width} dimensions over {at}. A range of tokens is one joint space there; fit one "
            "token at a time here."
        )


def read_featurizer(base: str | Path) -> Featurizer:
    """Return the featurizer that CausalAbstraction's (causalab's) `save_modules(base)` wrote, with its indices if any.

    `base` may also be one file that holds what causalab's newer `to_dict()` returns.

    Raises:
        StoreError: a file is missing or of another kind. Unsupported: a class that is no subspace or identity.
    """
    file = Path(base) if Path(base).is_file() else Path(f"{base}{FEATURIZER}")
    told = read_state(file)
    states = [told[name] for name in ("state_dict", "featurizer_state_dict") if name in told] if _is_dict(told) else []
    if not states or not _is_dict(told.get("model_info")):
        raise StoreError(f"{file}: no model_info and state_dict in it. Name what save_modules was given.")
    kind = told["model_info"].get("featurizer_class")
    chosen = _indices(Path(f"{base}{INDICES}"))
    if kind == "IdentityFeaturizerModule":
        return Identity() if chosen is None else Coordinates(chosen)
    if kind != "SubspaceFeaturizerModule":
        raise Unsupported(f"{file}: a featurizer of class {kind!r}. Only subspaces and the identity are read here.")
    frame = rotation(states[0], f"rotate.{_WEIGHT}")
    return Subspace.from_frame((frame if chosen is None else frame[:, chosen]).float())


def import_causalab(base: str | Path, site: Site | str, positions: Positions) -> tuple[Intervention, ...]:
    """Return the plan that swaps, at `site`, the features of a saved featurizer; see `read_featurizer`."""
    return (Intervention(site, Swap(), positions, read_featurizer(base)),)


def import_alignment(
    path: str | Path,
    *,
    site: Site | str | None = None,
    positions: Positions | None = None,
    model: nn.Module | None = None,
    tokenizer: Any = None,
) -> Plan:
    """Return the plan in `path`, whoever wrote it: our bundle or plan, pyvene, CausalAbstraction, the original.

    Raises:
        StoreError: nothing there is known. And what the reader of that kind raises.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return load_bundle(path, model, tokenizer).plan
    if (path / PLAN_FILE).is_file():
        return load_plan(path, model=model, tokenizer=tokenizer)
    if _is_pyvene(path):
        return from_pyvene(str(path), model)
    base = str(path).removesuffix(INVERSE).removesuffix(FEATURIZER)
    if Path(base + FEATURIZER).is_file():
        if site is None or positions is None:
            do = "Pass site= and positions=."
            raise StoreError(asked_found_do(f"Import {path}", "a saved featurizer says nothing of its place.", do))
        return import_causalab(base, site, positions)
    if path.suffix == ".bin" or any((path / name).is_file() for name in (BEST, LAST)):
        return import_original(path, site=site, positions=positions, model=model).plan
    raise StoreError(
        f"Import {path}: no alignment is known there. Name a bundle, a plan, pyvene's folder, what save_modules was "
        f"given, or a folder with {BEST}."
    )


def _checkpoint(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    raise StoreError(f"{path}: holds neither {BEST} nor {LAST}. Name the folder of one run.")


def _das_config(folder: Path) -> DasConfig | None:
    return read_das_config(folder) if (folder / "das_config" / "config.json").is_file() else None


def _place(
    file: Path, site: Site | str | None, positions: Positions | None, config: DasConfig | None
) -> tuple[Site, Positions]:
    if config is None and (site is None or positions is None):
        raise StoreError(f"{file}: no das_config beside it says where it belongs. Pass site= and positions=.")
    if site is None:
        assert config is not None
        site = Site("block_output", config.layer)
    if positions is None:
        assert config is not None
        positions = At(config.start)
    return Site.parse(site), positions


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping)


def _indices(file: Path) -> list[int] | None:
    if not file.is_file():
        return None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{file}: no JSON ({error}). It must be null or a list of feature numbers.") from error
    if told is not None and not (isinstance(told, list) and all(type(one) is int for one in told)):
        raise StoreError(f"{file}: {told!r} is neither null nor a list of feature numbers. Mend it.")
    return told


def _is_pyvene(path: Path) -> bool:
    try:
        told = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and "intervention_types" in told
