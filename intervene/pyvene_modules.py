"""pyvene's intervention modules: run inside our engine (`PyveneEdit`), and made from a plan (`to_pyvene`).

Names are taken from `pyvene_compat`. pyvene is imported by `to_pyvene` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from intervene.edits import Add, Edit, Set, Swap, Zero
from intervene.errors import ShapeMismatch, Unsupported
from intervene.featurizers import Coordinates, Featurizer, Identity, Subspace
from intervene.gates import GatedSwap
from intervene.interventions import Intervention, Plan
from intervene.sites import HEAD_COMPONENTS, PATH_PREFIX

WRAP = "To run pyvene's own module as it is, make Intervention(site, PyveneEdit(module), ...)."
NO_EDIT = {
    "CollectIntervention": "it edits nothing. Read activations with capture(model, sites, positions).",
    "SkipIntervention": "it writes a module's input over its output. Swap the block's input into its output instead.",
}


class PyveneEdit(Edit):
    """Runs a pyvene intervention module on the features: base and source in, edited base out.

    Hands over what pyvene's engine would: (B, P, D) to localist modules, those with `keep_last_dim` and lambdas;
    (B, P*D) to the others, which see all positions at once; with `heads`, (B, H, P, d) to the former and (B, P, H*d)
    to the latter. The module works on a copy, since pyvene's write in place. Its parameters are the plan's.

    Args:
        module: any pyvene intervention, or another module called as module(base, source, subspaces).
        heads: how many heads the site holds, for a head component. subspaces: columns or partition numbers, the same
            for every example. needs_source: whether a source run is needed; None asks the module (a lambda: yes).
        positions: how many positions the module takes at once. None: one for a module that joins positions, any number
            for the rest, which must then treat every position alike.

    Raises:
        Unsupported: a CollectIntervention, which edits nothing, or a SkipIntervention, which needs a module's input.
        ShapeMismatch: in the forward pass, another number of positions than the module takes.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        heads: int | None = None,
        subspaces: Sequence[int] | None = None,
        needs_source: bool | None = None,
        positions: int | None = None,
    ) -> None:
        super().__init__()
        refused = NO_EDIT.get(type(module).__name__)
        if refused is not None:
            raise Unsupported(f"PyveneEdit({type(module).__name__}): {refused}")
        self.module = module
        self.heads = heads
        self.subspaces = None if subspaces is None else [int(index) for index in subspaces]
        localist = any(cls.__name__ == "LocalistRepresentationIntervention" for cls in type(module).__mro__)
        self.joins = not localist and not getattr(module, "keep_last_dim", True)  # only pyvene's modules say False
        self.positions = 1 if positions is None and self.joins and heads is None else positions
        constant = bool(getattr(module, "is_source_constant", False))
        # a class attribute everywhere else; here the wrapped module decides
        vars(self)["needs_source"] = not constant if needs_source is None else needs_source

    @property
    def slots(self) -> int | None:
        return self.positions

    def forward(self, z: Tensor, source: Tensor | None) -> Tensor:
        if self.positions is not None and z.shape[1] != self.positions:
            raise ShapeMismatch(
                f"PyveneEdit({type(self.module).__name__}): it takes {self.positions} positions at once, and "
                f"{z.shape[1]} were selected. Select as many, or pass positions={z.shape[1]} if it was made for them."
            )
        subspaces = [] if self.subspaces is None else [[self.subspaces] * len(z)]
        base = self._packed(z.clone())
        out = self.module(base, None if source is None else self._packed(source.expand_as(z).clone()), *subspaces)
        out = getattr(out, "output", out)  # pyvene's InterventionOutput
        if out is None:
            return z  # a module that only looks
        if self.heads is not None and not self.joins:
            out = out.transpose(1, 2)  # (B, P, H, d)
        edited: Tensor = out.reshape(z.shape).to(z.dtype)
        return edited

    def _packed(self, tensor: Tensor) -> Tensor:
        if self.heads is not None:
            by_head = tensor.reshape(*tensor.shape[:2], self.heads, -1).transpose(1, 2)  # (B, H, P, d)
            return tensor if self.joins else by_head
        return tensor.reshape(tensor.shape[0], -1) if self.joins else tensor  # (B, P*D) or (B, P, D)


# pyvene's components; those of ours it has no word for are refused
WORDS = HEAD_COMPONENTS | {
    "block_input", "block_output", "attention_input", "attention_output", "attention_value_output", "query_output",
    "key_output", "value_output", "mlp_input", "mlp_activation", "mlp_output",
}  # fmt: skip


def to_pyvene(plan: Plan) -> list[dict[str, Any]]:
    """Return `plan` as pyvene representations, one dict each, holding pyvene modules with the plan's values.

    `pyvene.IntervenableModel(to_pyvene(plan), model=copy.deepcopy(model))` runs them, where `locations_to_pyvene` gives
    the positions and heads that pyvene wants at each call; `from_pyvene` reads both back. Give pyvene a copy of the
    model: it freezes it and removes its hooks. Modules are made without a width, so pyvene swaps the whole component,
    and a plan's shared featurizer becomes one shared module.

    Raises:
        Unsupported: a site, edit, featurizer, phase or condition without a word in pyvene, by its name.
        ImportError: pyvene is not installed (pip install "pyvene==0.1.8").
    """
    import pyvene

    made: dict[tuple[int, int], nn.Module] = {}
    representations = []
    for item in plan:
        _check_words(item)
        key = (id(item.edit), id(item.featurizer) if not isinstance(item.featurizer, Identity) else 0)
        module = made.setdefault(key, _module(pyvene, item)) if key not in made else made[key]
        is_head = item.site.component in HEAD_COMPONENTS
        representations.append({
            "layer": item.site.layer or 0,
            "component": item.site.component.removeprefix(PATH_PREFIX),
            "unit": "h.pos" if is_head else "pos",
            "max_number_of_units": len(item.site.units or (0,)),
            "intervention": module,
        })  # fmt: skip
    return representations


def _check_words(item: Intervention) -> None:
    site = item.site
    is_head = site.component in HEAD_COMPONENTS
    reasons = {
        f"the component {site.component!r}": not site.is_path and site.component not in WORDS,
        "a layer counted from the end": (site.layer or 0) < 0,
        "single columns of a component": site.units is not None and not is_head,
        "all heads without naming them": site.units is None and is_head,
        f"the phase {item.phase!r}": item.phase is not None,
        "a condition": item.when is not None,
    }
    for what, applies in reasons.items():
        if applies:
            raise Unsupported(f"to_pyvene({item}): pyvene has no word for {what}. Run this plan with intervene().")


def _module(pyvene: ModuleType, item: Intervention) -> nn.Module:
    """Return a pyvene module that does what `item`'s edit does through its featurizer."""
    edit, lens = item.edit, item.featurizer
    make = MODULES.get((type(edit), type(lens)))
    if isinstance(edit, PyveneEdit) and isinstance(lens, Identity) and edit.subspaces is None:
        return edit.module
    if make is None:
        raise Unsupported(
            f"to_pyvene({item}): pyvene has no module for {type(edit).__name__} through {type(lens).__name__}. "
            "Run this plan with intervene()."
        )
    module: nn.Module = make(pyvene, item, edit, lens)
    return module


def _vanilla(pyvene: ModuleType, _item: Intervention, _edit: Edit, _lens: Featurizer) -> nn.Module:
    module: nn.Module = pyvene.VanillaIntervention()
    return module


def _zero(pyvene: ModuleType, _item: Intervention, _edit: Edit, _lens: Featurizer) -> nn.Module:
    module: nn.Module = pyvene.ZeroIntervention()
    return module


def _prefix(pyvene: ModuleType, item: Intervention, edit: Edit, lens: Coordinates) -> nn.Module:
    indices = lens.indices.tolist()
    if indices != list(range(len(indices))) or item.site.component in HEAD_COMPONENTS:
        raise Unsupported(f"to_pyvene({item}): pyvene's modules know the first n coordinates only, found {indices}.")
    module = _vanilla(pyvene, item, edit, lens) if isinstance(edit, Swap) else _zero(pyvene, item, edit, lens)
    module.set_interchange_dim(len(indices))  # type: ignore[operator]
    return module


def _constant(pyvene: ModuleType, item: Intervention, edit: Set | Add, _lens: Featurizer) -> nn.Module:
    vector = edit.vector.detach().clone()
    if edit.rows is not None or item.site.component in HEAD_COMPONENTS or (isinstance(edit, Add) and edit.relative):
        raise Unsupported(f"to_pyvene({item}): pyvene has one constant vector for all examples, and none per head.")
    if isinstance(edit, Add):
        module: nn.Module = pyvene.AdditionIntervention(source_representation=vector * (edit.strength or 0.0))
        return module
    module = pyvene.VanillaIntervention(source_representation=vector)
    return module


def _rotated(pyvene: ModuleType, _item: Intervention, _edit: Edit, lens: Subspace) -> nn.Module:
    frame = lens.frame().detach()  # (D, K)
    width, rank = frame.shape
    module: nn.Module
    if rank == width:
        module = pyvene.RotatedSpaceIntervention(embed_dim=width)
    else:
        module = pyvene.LowRankRotatedSpaceIntervention(embed_dim=width, low_rank_dimension=rank)
    module.rotate_layer.weight = frame  # type: ignore[union-attr]
    return module.requires_grad_(lens.weight.requires_grad)


def _gated(pyvene: ModuleType, item: Intervention, edit: GatedSwap, lens: Featurizer) -> nn.Module:
    if edit.tied or edit.groups is not None or not edit.training:
        raise Unsupported(f"to_pyvene({item}): pyvene's gates are soft and one per feature. Call edit.train() first.")
    module: nn.Module
    if isinstance(lens, Subspace):
        if lens.rank != lens.width:
            raise Unsupported(f"to_pyvene({item}): pyvene gates a full rotation, this one has rank {lens.rank}.")
        module = pyvene.SigmoidMaskRotatedSpaceIntervention(embed_dim=lens.width)
        module.rotate_layer.weight = lens.frame().detach()  # type: ignore[union-attr]
        module.masks.data = edit.logits.detach().clone()
    else:
        module = pyvene.SigmoidMaskIntervention(embed_dim=len(edit.logits))
        module.mask.data = edit.logits.detach().clone()
    module.temperature.data = torch.tensor(edit.temperature)
    return module


MODULES: dict[tuple[type[Edit], type[Featurizer]], Any] = {
    (Swap, Identity): _vanilla,
    (Zero, Identity): _zero,
    (Swap, Coordinates): _prefix,
    (Zero, Coordinates): _prefix,
    (Set, Identity): _constant,
    (Add, Identity): _constant,
    (Swap, Subspace): _rotated,
    (GatedSwap, Identity): _gated,
    (GatedSwap, Subspace): _gated,
}


def locations_to_pyvene(
    plan: Plan, inputs: Mapping[str, Any], source_inputs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the `unit_locations` that make pyvene edit `plan`'s positions and heads in this very batch.

    Raises:
        BadPosition: as the positions'. Unsupported: a different number of positions in different examples.
    """
    bases = [_rows(item, item.positions.resolve(inputs)) for item in plan]
    if not any(item.edit.needs_source for item in plan):
        return {"base": bases}
    read = inputs if source_inputs is None else source_inputs
    sources = [_rows(item, (item.source_positions or item.positions).resolve(read)) for item in plan]
    return {"sources->base": (sources, bases)}


def _rows(item: Intervention, columns: Tensor) -> list[Any]:
    if bool((columns < 0).any()):
        raise Unsupported(f"locations_to_pyvene({item}): pyvene wants as many positions in every example.")
    rows: list[Any] = columns.tolist()  # [batch][unit]
    if item.site.component in HEAD_COMPONENTS:
        return [[list(item.site.units or ())] * len(rows), rows]
    return rows
