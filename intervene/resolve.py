"""`resolve(model, site)`: which module, which side of it, which columns. Registers nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from intervene.columns import Columns, Side, as_columns, features, full_shape, head_table, measured
from intervene.errors import SiteOutOfRange, UnknownComponent, UnsupportedModel, asked_found_do
from intervene.family_table import Family
from intervene.locate import Located, join_path, locate, unwrap, walk
from intervene.sites import COMPONENTS, HEAD_COMPONENTS, LAYERLESS, PATH_PREFIX, Site

Rebuild = Callable[[Tensor, "tuple[Any, ...]"], "tuple[Any, ...]"]


@dataclass(frozen=True)
class Tap:
    """The tensor that a site means: one side of one module, some columns of its last axis.

    The site's value is `scale` times those columns. Where the module returns a tuple, the tensor is its `element`.
    """

    site: Site  # with its layer made non-negative
    module: nn.Module
    path: str  # dotted path of `module` in the unwrapped model, for messages
    side: Side
    columns: Columns  # None = all
    width: int | None  # number of those columns; None where a path's module does not say
    scale: float = 1.0  # granite's residual_multiplier
    experts: tuple[int, ...] | None = None  # expert_output only
    element: int = 0
    overwritten: bool = False  # the model later changes this tensor in place: whoever keeps it must copy it
    rebuild: Rebuild | None = None  # (edited element, whole output) -> output to return; router_output only


# --- what a family has ------------------------------------------------------------------------------------------


def _module_and_side(family: Family) -> dict[str, tuple[str | None, Side]]:
    """Return, for each component inside a block, the path of its module relative to the block, and the side."""
    f = family
    attention_output = f.attention_output or f.attention
    mlp_output = f.mlp_output or f.mlp
    q, k, v = (f.qkv_proj,) * 3 if f.qkv_proj else (f.q_proj, f.k_proj, f.v_proj)
    return {
        "block_input": ("", "input"),
        "block_output": ("", "output"),
        "attention_input": (f.attention, "input"),
        "attention_output": (attention_output, "output"),
        "attention_write": (f.attention_write or attention_output, "output"),
        "attention_value_output": (f.o_proj, "input"),
        "head_attention_value_output": (f.o_proj, "input"),
        "query_output": (q, "output"),
        "key_output": (k, "output"),
        "value_output": (v, "output"),
        "head_query_output": (q, "output"),
        "head_key_output": (k, "output"),
        "head_value_output": (v, "output"),
        "mlp_input": (f.mlp_input or f.mlp, "input"),
        "mlp_activation": (f.act, "output"),
        "mlp_neurons": (f.down_proj, "input"),
        "mlp_output": (mlp_output, "output"),
        "mlp_write": (f.mlp_write or mlp_output, "output"),
        "router_output": (f.router, "output"),
        "expert_output": (f.experts, "output"),
    }


def components_of(family: Family) -> tuple[str, ...]:
    """Return the names of the components that models of this family have, in the order of `COMPONENTS`."""
    inside = _module_and_side(family)
    absent = {name for name, (path, _) in inside.items() if path is None}
    if family.final_norm is None:
        absent.add("final_norm_output")
    return tuple(name for name in COMPONENTS if name not in absent)


_LACKING = {
    "router_output": "no mixture of experts, so no router",
    "expert_output": "no experts",
    "mlp_activation": "no single activation module",
    "mlp_neurons": "no single down projection",
}


def _lacks(site: Site, place: Located) -> UnknownComponent:
    lacking = _LACKING.get(site.component, "no such module")
    if place.family.experts and site.component in ("mlp_activation", "mlp_neurons"):
        lacking += " (its experts are fused in one tensor)"
    return UnknownComponent(
        f"Site {site}: {place.model_type} has {lacking}. It has {', '.join(components_of(place.family))}."
    )


# --- columns ---------------------------------------------------------------------------------------------------------


def _check_units(site: Site, place: Located, n: int, what: str, of: str) -> None:
    if site.units is not None and max(site.units) >= n:
        raise SiteOutOfRange(
            asked_found_do(
                f"Site {site}",
                f"{of} of this {place.model_type} has {n} {what}s.",
                f"Use {'an' if what == 'expert' else 'a'} {what.split()[-1]} below {n}.",
            )
        )


def _select(site: Site, place: Located, module: nn.Module, side: Side, path: str) -> tuple[Columns, int]:
    """Return the columns and the width of a site inside a block."""
    name = site.component
    bare = name.removeprefix("head_")
    if bare in ("query_output", "key_output", "value_output") or name in HEAD_COMPONENTS:
        total = measured(module, side, path)
        table = head_table(place, name, total)
        if name in HEAD_COMPONENTS:
            kv = bare in ("key_output", "value_output")
            _check_units(site, place, len(table), "key/value head" if kv else "query head", "a block")
            chosen = table if site.units is None else table[list(site.units)]
            columns = chosen.flatten().tolist()
            return as_columns(columns, total), len(columns)
        every: list[int] = table.flatten().tolist()
    else:
        total = _width(name, place, module, path)
        every = list(range(total))
    _check_units(site, place, len(every), "column", name)
    columns = every if site.units is None else [every[unit] for unit in site.units]
    return as_columns(columns, total), len(columns)


def _width(component: str, place: Located, module: nn.Module, path: str) -> int:
    """Return the number of columns of a component that is neither a projection of heads nor a set of experts."""
    if component == "attention_value_output":
        return measured(module, "input", path)
    if component in ("mlp_activation", "mlp_neurons"):
        down = walk(place.layers[0], place.family.down_proj or "")
        return measured(down, "input", f"{place.family.down_proj}") if down is not None else 0
    if component == "router_output":
        return full_shape(module.get_parameter("weight"))[0]  # (E, D)
    return _residual_width(place)


def _residual_width(place: Located) -> int:
    """Return D, measured on a module that writes to the residual stream."""
    for path in (place.family.o_proj, place.family.down_proj):
        module = None if path is None else walk(place.layers[0], path)
        size = None if module is None else features(module, "output")
        if size is not None:
            return size
    return int(place.config.hidden_size)


# --- resolving --------------------------------------------------------------------------------------------------


def _reroute(logits: Tensor, output: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a router's output for edited logits: the block reads only the weights and indices made from them.

    Softmax over the chosen logits; for Mixtral, which takes the softmax over all and renormalises, that is the same.
    """
    _, scores, indices = output
    top, chosen = logits.topk(indices.shape[-1], dim=-1)  # (B*S, top_k)
    return logits, torch.softmax(top, dim=-1, dtype=scores.dtype), chosen


def resolve(model: nn.Module, site: Site | str) -> Tap:
    """Return where `site` is in `model`.

    Raises:
        UnknownFamily, UnsupportedModel: as `locate`; or the site's module is shared by several layers or names.
        UnknownComponent: the family has no such component; the path leads nowhere.
        SiteOutOfRange: the layer, head, column or expert does not exist.
    """
    site = Site.parse(site)
    if site.is_path:
        return _resolve_path(model, site)
    place = locate(model)
    if site.component in LAYERLESS:
        return _resolve_layerless(place, site)
    site = replace(site, layer=_layer_number(place, site))
    relative, side = _module_and_side(place.family)[site.component]
    module, path = _block_module(place, site, relative)
    if site.component == "expert_output":
        return _resolve_experts(place, site, module, path)
    columns, width = _select(site, place, module, side, path)
    scaled = place.family.write_scale and site.component in ("attention_write", "mlp_write")
    return Tap(
        site,
        module,
        path,
        side,
        columns,
        width,
        scale=float(getattr(place.config, place.family.write_scale or "", 1.0)) if scaled else 1.0,
        overwritten=site.component in place.family.overwritten,
        rebuild=_reroute if site.component == "router_output" else None,
    )


def _layer_number(place: Located, site: Site) -> int:
    n = place.n_layers
    layer = 0 if site.layer is None else site.layer
    if not -n <= layer < n:
        do = f"Use a layer below {n}." if layer >= 0 else f"Use a layer from {-n} to {n - 1}."
        raise SiteOutOfRange(asked_found_do(f"Site {site}", f"this {place.model_type} has layers 0-{n - 1}.", do))
    return layer % n


def _block_module(place: Located, site: Site, relative: str | None) -> tuple[nn.Module, str]:
    """Return the module at `relative` in the site's block, and its path; refuse one that other blocks use too."""
    layer = site.layer or 0
    module = None if relative is None else walk(place.layers[layer], relative)
    if module is None or relative is None:
        raise _lacks(site, place)
    path = join_path(place.layers_path, layer, relative)
    sharing = [number for number, block in enumerate(place.layers) if walk(block, relative) is module]
    if len(sharing) > 1:
        raise UnsupportedModel(
            asked_found_do(
                f"Site {site}",
                f"{path} is one module that serves layers {', '.join(map(str, sharing))}, so a hook acts on them all.",
                "Choose another component, or give each layer a module of its own.",
            )
        )
    return module, path


def _resolve_layerless(place: Located, site: Site) -> Tap:
    module: nn.Module | None
    if site.component == "embedding_output":  # the residual stream, so also with positions, scaling and norms
        block_site = Site("block_input", 0)
        module, path = _block_module(place, block_site, "")
        side: Side = "input"
    else:
        module = None if place.family.final_norm is None else walk(place.backbone, place.family.final_norm)
        path = join_path(place.path, place.family.final_norm or "")
        side = "output"
        if module is None:
            raise _lacks(site, place)
    columns, width = _select(site, place, module, side, path)
    return Tap(site, module, path, side, columns, width)


def _resolve_experts(place: Located, site: Site, module: nn.Module, path: str) -> Tap:
    n = getattr(module, "num_experts", None)
    if not isinstance(n, int):
        raise UnsupportedModel(
            asked_found_do(f"Site {site}", f"{path} does not say its num_experts.", "Use mlp_output instead.")
        )
    _check_units(site, place, n, "expert", "a block")
    experts = tuple(range(n)) if site.units is None else site.units
    return Tap(site, module, path, "output", None, _residual_width(place) * len(experts), experts=experts)


def _resolve_path(model: nn.Module, site: Site) -> Tap:
    """Resolve a 'path:' site in the model without wrappers, or failing that in the model as it was passed."""
    text, _, side_text = site.component.removeprefix(PATH_PREFIX).rpartition(".")
    side: Side = "input" if side_text == "input" else "output"
    inner = unwrap(model)
    root = inner if walk(inner, text) is not None else model
    module = walk(root, text)
    if module is None:
        raise _no_such_path(site, inner, text)
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        raise UnknownComponent(
            asked_found_do(
                f"Site {site}",
                f"{text} is a {type(module).__name__}, which is never called.",
                "Name one of its children.",
            )
        )
    names = [name for name, other in root.named_modules(remove_duplicate=False) if other is module]
    if len(names) > 1:
        raise UnsupportedModel(
            asked_found_do(
                f"Site {site}",
                f"that is one module with {len(names)} names ({', '.join(names)}), so a hook acts on them all.",
                "Choose a module that is used in one place.",
            )
        )
    total = features(module, side)
    if site.units is None:
        return Tap(site, module, text, side, None, total)
    if total is not None and max(site.units) >= total:
        raise SiteOutOfRange(
            asked_found_do(f"Site {site}", f"the {side} of {text} has {total} columns.", f"Use a column below {total}.")
        )
    columns = as_columns(site.units, -1 if total is None else total)
    return Tap(site, module, text, side, columns, len(site.units))


def _no_such_path(site: Site, root: nn.Module, text: str) -> UnknownComponent:
    good: list[str] = []
    for name in text.split("."):
        if walk(root, ".".join([*good, name])) is None:
            break
        good.append(name)
    parent = walk(root, ".".join(good))
    children = [] if parent is None else [name for name, _ in parent.named_children()]
    return UnknownComponent(
        asked_found_do(
            f"Site {site}",
            f"{'.'.join(good) or 'the model'} has no child {text.split('.')[len(good)]!r}.",
            f"Its children: {', '.join(children) or 'none'}.",
        )
    )
