"""pyvene 0.1.8 as an oracle: one function per way of using it, each on a copy of the model of its own.

pyvene freezes the model it is given, puts it in evaluation mode and removes every hook on it, so it never shares a
model with the engine under test. Importing this file skips the test module where pyvene is not installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .tiny import tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what pyvene's own imports deprecate is not ours to mend
    pyvene = pytest.importorskip("pyvene")
    from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK  # noqa: F401
    from pyvene.models.intervenable_modelcard import type_to_module_mapping
    from pyvene.models.modeling_utils import get_dimension_by_component, get_module_hook

# components that need eager attention weights, which no component here names
NOT_OURS = frozenset({"attention_weight"})


def components(name: str) -> list[str]:
    """Return the components of this family whose module and width pyvene 0.1.8 can find under transformers 5."""
    model, found = tiny(name), []
    for component in type_to_module_mapping[type(model)]:
        try:
            get_module_hook(model, pyvene.RepresentationConfig(0, component))
            get_dimension_by_component(type(model), model.config, component)
        except AttributeError:
            continue
        if component not in NOT_OURS:
            found.append(component)
    return found


def wrapped(model: nn.Module, representations: Any) -> Any:
    """Return pyvene's IntervenableModel around `model`, which it changes."""
    return pyvene.IntervenableModel(representations, model=model)


def run(
    model: nn.Module,
    representations: Any,
    base: Tensor,
    *,
    source: Tensor | None = None,
    locations: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """Return the logits (B, S, V) that pyvene gives for `base`, edited."""
    engine = wrapped(model, representations)
    sources = None if source is None else [{"input_ids": source}]
    with torch.no_grad():
        _, outputs = engine({"input_ids": base}, sources=sources, unit_locations=locations, **options)
    return outputs.logits


def collect(model: nn.Module, component: str, layer: int, base: Tensor, locations: Mapping[str, Any]) -> Tensor:
    """Return what pyvene's CollectIntervention collects at one component."""
    engine = wrapped(model, {"layer": layer, "component": component, "intervention": pyvene.CollectIntervention()})
    with torch.no_grad():
        (_, collected), _ = engine({"input_ids": base}, unit_locations=locations)
    (activations,) = collected  # (B, P, D)
    return activations


def low_rank(width: int, rank: int, seed: int = 0) -> tuple[Any, Tensor]:
    """Return pyvene's low-rank DAS intervention and the (D, K) orthonormal frame that it makes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = pyvene.LowRankRotatedSpaceIntervention(embed_dim=width, low_rank_dimension=rank)
    module.double()  # compared in fp64: in fp32 two orders of the same products differ by up to 1.5e-6 in the logits
    return module, module.rotate_layer.weight.detach()


def positions(base: Sequence[Sequence[int]], source: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
    """Return pyvene's unit locations for one intervention: rows of positions, one row per example."""
    rows = [list(row) for row in base]
    if source is None:
        return {"base": [rows]}
    return {"sources->base": ([[list(row) for row in source]], [rows])}


def heads_at(heads: Sequence[int], base: Sequence[Sequence[int]], source: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return pyvene's `h.pos` unit locations for one intervention: the same heads in every example."""
    rows = [list(heads)] * len(base)
    return {"sources->base": ([[rows, [list(r) for r in source]]], [[rows, [list(r) for r in base]]])}
