"""Submission folders of MIB's causal-variable track, written and read.

    export_mib("submission", plans, task="ioi_task", model="Qwen2ForCausalLM", variable="output_position")
    found = read_mib("submission/ioi_task_Qwen2ForCausalLM_output_position", {"last_token": LastToken()})

A folder `{TASK}_{MODEL}_{VARIABLE}` holds three files per place: `{Unit}_featurizer`, `{Unit}_inverse_featurizer` and
`{Unit}_indices`, Unit being `ResidualStream(Layer-l,Token-id)`. Layer l is the output of block l there, and -1 the
input of the first block.

Source: Mueller et al. 2025, "MIB: A Mechanistic Interpretability Benchmark" (arXiv 2504.13151), and the loader of the
CausalAbstraction library that its evaluation uses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignments.imports import FEATURIZER, INDICES, INVERSE, read_featurizer
from alignments.steer import held_features
from intervene import Intervention, Plan, Positions, Site, Swap
from intervene.errors import BadPosition, StoreError, Unsupported, asked_found_do, close_names
from intervene.featurizers import Coordinates, Featurizer, Identity, Subspace
from intervene.files import beside
from intervene.marked import Marked

# What the benchmark accepts.
MIB_TASKS: dict[str, tuple[str, ...]] = {
    "ioi_task": ("output_token", "output_position"),
    "4_answer_MCQA": ("answer_pointer", "answer"),
    "ARC_easy": ("answer_pointer", "answer"),
    "arithmetic": ("ones_carry",),
    "ravel_task": ("Country", "Continent", "Language"),
}
MIB_MODELS = ("GPT2LMHeadModel", "Qwen2ForCausalLM", "Gemma2ForCausalLM", "LlamaForCausalLM")
TOKENS = {"last": "last_token"}  # our position -> theirs, where the names differ

_UNIT = re.compile(
    r"^(?P<kind>ResidualStream|AttentionHead)\(Layer[-:_](?P<layer>-?\d+)(?:,Head[-:_](?P<head>\d+))?"
    r"(?:,(?P<side>block_input|block_output))?,Token[-:_](?P<token>[^()]+)\)$"
)
_FOLDER = re.compile(r"^(?P<task>.+?)_(?P<model>[A-Z]\w*?(?:LMHeadModel|ForCausalLM))_(?P<variable>.+)$")


@dataclass(frozen=True, eq=False)
class Submission:
    """A read submission: `plans` maps the name of each unit to its plan."""

    task: str
    model: str
    variable: str
    plans: Mapping[str, tuple[Intervention, ...]]


def export_mib(
    folder: str | Path,
    plans: Iterable[Plan],
    *,
    task: str,
    model: str,
    variable: str,
    tokens: Mapping[str, str] = TOKENS,
) -> Path:
    """Write one triplet of files per plan under `folder`, whole or not at all, and return the folder written.

    What a gate or a block takes is written as a subspace of its own, with no indices: the benchmark's loader loses
    indices (it calls a method that does not exist, inside a try).

    Args:
        plans: one per place, each of one intervention at a block_output, or a head's attention_value_output.
        task, model, variable: as the benchmark names them; `MIB_TASKS`, `MIB_MODELS`.
        tokens: our position's name -> the `id` of theirs; a name that is not in it stays as it is.

    Raises:
        StoreError: an unknown task, model or variable, no plan, a place given twice, or the folder exists.
        Unsupported: a site or a featurizer that the benchmark's loader cannot rebuild.
    """
    _check_names(task, model, variable)
    frames: dict[str, Tensor | None] = {}
    for plan in plans:
        unit, lens = _unit_of(plan, tokens)
        if unit in frames:
            raise StoreError(f"Export to MIB: two plans are at {unit}. Give one for each place.")
        frames[unit] = lens.frame().detach() if isinstance(lens, Subspace) else None
    if not frames:
        raise StoreError("Export to MIB: no plan was given. Give at least one.")
    target = Path(folder) / f"{task}_{model}_{variable}"
    if target.exists():
        raise StoreError(f"Export to {target}: it exists. Choose another folder.")
    with beside(target) as draft:
        draft.mkdir()
        for unit, frame in frames.items():
            _write(draft / unit, frame)
        draft.rename(target)
    return target


def read_mib(folder: str | Path, positions: Mapping[str, Positions]) -> Submission:
    """Return the submission in `folder`, whose token ids `positions` says how to find.

    Raises:
        StoreError: the folder's or a file's name is not of that form, a file is missing, or holds more than tensors.
        BadPosition: `positions` lacks a token id. Unsupported: a featurizer of a class of its own.
    """
    folder = Path(folder)
    named = _FOLDER.match(folder.name)
    if named is None:
        raise StoreError(f"MIB folder {folder.name!r}: is not <task>_<model>_<variable>. Rename it.")
    if not folder.is_dir():
        raise StoreError(f"MIB folder {folder}: there is no such folder. Name one of a submission.")
    plans = {}
    for file in sorted(folder.glob(f"*{FEATURIZER}")):
        unit = file.name.removesuffix(INVERSE).removesuffix(FEATURIZER)
        missing = [end for end in (FEATURIZER, INVERSE) if not (folder / f"{unit}{end}").is_file()]
        if missing:
            raise StoreError(f"MIB folder {folder}: {unit}{missing[0]} is missing. Copy all three files.")
        if unit not in plans:
            site, token = _read_unit(unit)
            if token not in positions:
                hint = (
                    close_names(token, positions) if positions else "Pass {'" + token + "': LastToken()} or the like."
                )
                raise BadPosition(f"MIB unit {unit}: positions say nothing of token {token!r}. {hint}")
            plans[unit] = (Intervention(site, Swap(), positions[token], read_featurizer(folder / unit)),)
    if not plans:
        raise StoreError(f"MIB folder {folder}: no file ends in {FEATURIZER}. Name the folder of one task.")
    return Submission(named["task"], named["model"], named["variable"], plans)


def _check_names(task: str, model: str, variable: str) -> None:
    for what, name, known in (
        ("task", task, tuple(MIB_TASKS)),
        ("model", model, MIB_MODELS),
        ("variable", variable, MIB_TASKS.get(task, ())),
    ):
        if name not in known:
            raise StoreError(f"Export to MIB: it has no {what} {name!r}. {close_names(name, known)}")


def _unit_of(plan: Plan, tokens: Mapping[str, str]) -> tuple[str, Featurizer]:
    if len(plan) != 1:
        raise Unsupported(f"Export to MIB: a plan of {len(plan)} interventions. Export each place by itself.")
    item = plan[0]
    where = item.positions
    if not isinstance(where, Marked):
        raise Unsupported(f"Export to MIB: {where!r} has no name there. Use Marked('<name>').")
    token = tokens.get(where.name, where.name)
    if not re.fullmatch(r"[\w.-]+", token):
        raise Unsupported(
            f"Export to MIB: {token!r} cannot stand in a file's name. Pass tokens={{{where.name!r}: ...}}."
        )
    site, lens = item.site, held_features(item)
    heads = site.units
    if site.component == "head_attention_value_output" and heads is not None and len(heads) == 1:
        unit = f"AttentionHead(Layer-{site.layer},Head-{heads[0]},Token-{token})"
    elif str(site) == "L0.block_input":
        unit = f"ResidualStream(Layer--1,Token-{token})"
    elif site.component == "block_output" and heads is None and (site.layer or 0) >= 0:
        unit = f"ResidualStream(Layer-{site.layer},Token-{token})"
    else:
        do = "Use L<n>.block_output with n from 0, or one head of head_attention_value_output."
        raise Unsupported(asked_found_do(f"Export to MIB of {site}", "its loader has no such unit.", do))
    if isinstance(lens, Coordinates):
        raise Unsupported(f"Export to MIB of {item}: single coordinates would be lost by its loader. Use a Subspace.")
    if not isinstance(lens, Subspace | Identity):
        raise Unsupported(f"Export to MIB of {item}: its loader rebuilds only subspaces and the identity.")
    return unit, lens


def _read_unit(unit: str) -> tuple[Site, str]:
    found = _UNIT.match(unit)
    if found is None or (found["kind"] == "AttentionHead") != (found["head"] is not None):
        raise StoreError(
            f"MIB unit {unit!r}: is not ResidualStream(Layer-<l>,Token-<id>) or AttentionHead(...). Rename."
        )
    layer = int(found["layer"])
    if found["head"] is not None:
        return Site("head_attention_value_output", layer, (int(found["head"]),)), found["token"]
    if layer == -1:
        return Site("block_input", 0), found["token"]
    return Site(found["side"] or "block_output", layer), found["token"]


def _write(base: Path, frame: Tensor | None) -> None:
    """Write the three files of one unit: a subspace of orthonormal columns `frame` (D, K), or the identity."""
    name = "Identity" if frame is None else "Subspace"
    config: dict[str, Any] = {}
    if frame is not None:
        config = {"rotation_matrix": frame.float().cpu().clone(), "requires_grad": False}
    told = {
        "featurizer_class": f"{name}FeaturizerModule",
        "inverse_featurizer_class": f"{name}InverseFeaturizerModule",
        "n_features": None if frame is None else frame.shape[1],
        "additional_config": config,
    }
    state = {} if frame is None else rotate_state(frame.float().cpu())
    for end in (FEATURIZER, INVERSE):
        torch.save({"model_info": told, "state_dict": state}, f"{base}{end}")
    Path(f"{base}{INDICES}").write_text(json.dumps(None), encoding="utf-8")


def rotate_state(frame: Tensor) -> dict[str, Tensor]:
    """Return the state of a module whose `rotate.weight` (D, K) is `frame`, under torch's `orthogonal`."""
    module = nn.Module()
    module.rotate = nn.Module()
    module.rotate.weight = nn.Parameter(frame.clone(), requires_grad=False)
    torch.nn.utils.parametrizations.orthogonal(module.rotate)
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
