"""pyvene's formats, in and out: configurations, saved folders and intervention modules.

    plan = from_pyvene("folder/written/by/pyvene.save", model=model)      # no pyvene needed
    plan = from_pyvene({"layer": 3, "component": "mlp_output", "low_rank_dimension": 4,
                        "intervention_type": "LowRankRotatedSpaceIntervention"}, model=model)
    representations = to_pyvene(plan)                                     # needs pyvene: holds its modules
    edit = PyveneEdit(any_pyvene_intervention_module)                     # runs as it is, inside our engine

What has no equal here is refused by the name of its kind. Where pyvene 0.1.8 is wrong we do not follow it; the tests
under tests/parity pin each such case. pyvene itself is imported only by `to_pyvene`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from intervene.edits import Add, Edit, Set, Swap, Zero
from intervene.errors import BadVector, InterveneError, UnknownComponent, Unsupported
from intervene.families import resolve
from intervene.featurizers import Coordinates, Featurizer, Identity, Subspace
from intervene.gates import BoundarySwap, GatedSwap
from intervene.interventions import Intervention
from intervene.pyvene_modules import NO_EDIT, WRAP, PyveneEdit, locations_to_pyvene, to_pyvene
from intervene.pyvene_read import UNITS, Entry, Location, entries, positions_from_pyvene
from intervene.sites import COMPONENTS, HEAD_COMPONENTS, PATH_PREFIX, Site

__all__ = ["Location", "PyveneEdit", "from_pyvene", "locations_to_pyvene", "positions_from_pyvene", "to_pyvene"]


@dataclass(frozen=True)
class _Cell:
    """One representation, with the site it means and the columns it swaps (None: all)."""

    entry: Entry
    site: Site
    trainable: bool
    seed: int
    model: nn.Module | None
    columns: tuple[int, ...] | None = None

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The intervention's tensors, empty if it is fresh."""
        return self.entry.state

    def width(self) -> int:
        """Return D of the site in the model."""
        if self.model is None:
            raise InterveneError(f"{self}: its width is not in the configuration. Pass model= to from_pyvene.")
        width = resolve(self.model, self.site).width
        if width is None:
            raise Unsupported(f"{self}: the width of a bare module path is unknown. Name a component instead.")
        return int(width)

    def __str__(self) -> str:
        return f"pyvene {self.entry.kind} at {self.site}"


def _frame(cell: _Cell, rank: int | None) -> Subspace:
    """Return the cell's subspace: pyvene's rotation if its weights are there, else a fresh one of this rank."""
    prefix = "rotate_layer.parametrizations.weight."
    stored = {key.removeprefix(prefix): value for key, value in cell.state.items() if key.startswith(prefix)}
    if not stored:
        chosen = cell.width() if rank is None else rank
        if cell.columns is not None:
            chosen = len(cell.columns)
        return Subspace(cell.width(), chosen, seed=cell.seed, trainable=cell.trainable)
    layer = nn.Module()
    # In fp64: the exponential of a matrix in fp32 is off by more than one rounding, and no two libraries by the same.
    layer.weight = nn.Parameter(torch.empty_like(stored["original"], dtype=torch.float64))
    torch.nn.utils.parametrizations.orthogonal(layer)
    layer.load_state_dict({f"parametrizations.weight.{key}": value.double() for key, value in stored.items()})
    frame = layer.weight.detach()  # (D, K)
    frame = frame if cell.columns is None else frame[:, list(cell.columns)]
    try:
        return Subspace.from_frame(frame, trainable=cell.trainable)
    except BadVector as error:
        raise BadVector(
            f"{cell}: its rotation is not orthonormal any more. Weight decay does that to torch's Householder form: it "
            f"moves the signs kept on the diagonal. Train it with weight_decay=0. ({error})"
        ) from error


def _lens(cell: _Cell) -> Featurizer:
    return Identity() if cell.columns is None else Coordinates(cell.columns)


def _constant(cell: _Cell) -> Tensor | None:
    """Return the static source, as ours is shaped: (K,) or (B, P, K)."""
    vector = cell.state.get("source_representation")
    if vector is None:
        return None
    vector = vector.detach()
    if vector.dim() != 3 or vector.numel() == vector.shape[-1]:
        vector = vector.reshape(-1)  # pyvene broadcasts what holds one vector, in any shape
    return vector if cell.columns is None else vector[..., list(cell.columns)]


def _vanilla(cell: _Cell) -> tuple[Edit, Featurizer]:
    vector = _constant(cell)
    return (Swap() if vector is None else Set(vector)), _lens(cell)


def _zero(cell: _Cell) -> tuple[Edit, Featurizer]:
    return Zero(), _lens(cell)


def _signed(sign: float) -> Callable[[_Cell], tuple[Edit, Featurizer]]:
    def make(cell: _Cell) -> tuple[Edit, Featurizer]:
        vector = _constant(cell)
        if vector is None:
            raise Unsupported(f"{cell}: it has no source_representation, and Add takes none from a run. {WRAP}")
        return Add(sign * vector), _lens(cell)

    return make


def _low_rank(cell: _Cell) -> tuple[Edit, Featurizer]:
    return Swap(), _frame(cell, int(cell.entry.options["low_rank_dimension"] or 1))


def _rotated(cell: _Cell) -> tuple[Edit, Featurizer]:
    return Swap(), _frame(cell, None)


def _gated(cell: _Cell, name: str, logit: float, temperature: float, lens: Featurizer) -> tuple[Edit, Featurizer]:
    logits = cell.state.get(name)
    edit = GatedSwap(
        cell.width() if logits is None else len(logits),
        temperature=float(cell.state.get("temperature", torch.tensor(temperature))),
    )
    edit.logits.data = torch.full_like(edit.logits, logit) if logits is None else logits.detach().double()
    edit.logits.requires_grad_(cell.trainable)
    return edit, lens


def _mask(cell: _Cell) -> tuple[Edit, Featurizer]:
    return _gated(cell, "mask", 0.0, 0.01, Identity())  # pyvene's own starting values


def _rotated_mask(cell: _Cell) -> tuple[Edit, Featurizer]:
    return _gated(cell, "masks", 100.0, 50.0, _frame(cell, None))


def _boundless(cell: _Cell) -> tuple[Edit, Featurizer]:
    warnings.warn(
        f"{cell}: rotation, boundary and temperature are kept, but BoundarySwap's gate is another function: pyvene's "
        f"is sigmoid(i/T) sigmoid((b-i)/T), which never swaps more than half of the first feature. {WRAP}",
        stacklevel=4,
    )
    lens = _frame(cell, None)
    fraction = cell.state.get("intervention_boundaries", torch.tensor([0.5]))
    temperature = cell.state.get("temperature", torch.tensor(50.0))
    edit = BoundarySwap(lens.rank, fraction=float(fraction.clamp(1e-3, 1)), temperature=float(temperature) / lens.rank)
    edit.fraction.requires_grad_(cell.trainable)
    return edit, lens


KINDS: dict[str, Callable[[_Cell], tuple[Edit, Featurizer]]] = {
    "VanillaIntervention": _vanilla,
    "ZeroIntervention": _zero,
    "AdditionIntervention": _signed(1.0),
    "SubtractionIntervention": _signed(-1.0),
    "LowRankRotatedSpaceIntervention": _low_rank,
    "RotatedSpaceIntervention": _rotated,
    "BoundlessRotatedSpaceIntervention": _boundless,
    "SigmoidMaskIntervention": _mask,
    "SigmoidMaskRotatedSpaceIntervention": _rotated_mask,
}
ROTATIONS = frozenset(kind for kind in KINDS if kind.endswith("RotatedSpaceIntervention"))
PARTIAL = frozenset({
    "VanillaIntervention", "ZeroIntervention", "AdditionIntervention", "SubtractionIntervention",
    "RotatedSpaceIntervention", "LowRankRotatedSpaceIntervention",
})  # fmt: skip
NO_EQUAL = {
    "NoiseIntervention": "it adds one fixed table of noise to exactly four positions. Use Noise(scale).",
    "PCARotatedSpaceIntervention": "it rescales by a standard deviation that our PCA does not have.",
    "AutoencoderIntervention": "it keeps no reconstruction error, as our SAE does. Use SAE(...) with Swap().",
    "JumpReLUAutoencoderIntervention": "it keeps no reconstruction error, as our SAE does. Use SAE(...) with Swap().",
}


def from_pyvene(
    config: Any,
    model: nn.Module | None = None,
    *,
    unit_locations: Mapping[str, Any] | None = None,
    subspaces: Any = None,
    trainable: bool = True,
) -> tuple[Intervention, ...]:
    """Return the plan that a pyvene configuration describes, one intervention per representation, in its order.

    Linked representations share one edit and one featurizer. `group_key` has no counterpart: it says which source run
    feeds an intervention, and here every intervention is given its own source. A location left out means every token;
    pyvene then edits padding too, we do not.

    Args:
        config: one representation or a list of them, each a dict or RepresentationConfig; an IntervenableConfig; or
            the folder that pyvene's `save` wrote (read without unpickling code).
        model: needed where a width is not in the weights: fresh rotations, and swaps read from a folder.
        unit_locations: what pyvene's forward would be given; names positions, and heads for the units "h" and "h.pos".
        subspaces: likewise; the same for all examples. trainable: whether rotations and gates learn.

    Raises:
        Unsupported: a kind, unit, component or option without a counterpart, by its name.
        StoreError: the folder lacks a file or cannot be read. InterveneError: `model` is needed.
        BadVector: a rotation's columns are not orthonormal, or a constant is not finite.
    """
    plan, made = [], dict[str, tuple[Edit, Featurizer]]()
    listed = entries(config)
    locations = positions_from_pyvene(unit_locations, [entry.unit for entry in listed])
    for index, (entry, location) in enumerate(zip(listed, locations, strict=True)):
        cell = _Cell(entry, _site(entry, location.heads), trainable, index, model)
        cell = replace(cell, columns=_columns(cell, _chosen(subspaces, index)))
        link = entry.options["intervention_link_key"]
        if link is not None and cell.columns is not None:
            raise Unsupported(f"{cell}: linked interventions on parts of one space. {WRAP}")
        edit, lens = made[link] if link in made else KINDS[entry.kind](cell)
        if link is not None:
            made[link] = (edit, lens)
        plan.append(Intervention(cell.site, edit, location.positions, lens, source_positions=location.source_positions))
    return tuple(plan)


def _site(entry: Entry, heads: tuple[int, ...] | None) -> Site:
    """Return the site of a representation that can be read, or raise Unsupported."""
    component, layer = str(entry.options["component"]), entry.options["layer"]
    name = f"pyvene {entry.kind} at {component!r}"
    _check_kind(entry, name)
    if entry.options["moe_key"] is not None:
        raise Unsupported(f"{name} with moe_key: experts are sites of their own. Use 'L0.expert_output[2]'.")
    if component not in COMPONENTS and component.endswith((".input", ".output")):
        return Site(PATH_PREFIX + re.sub(r"\[(\d+)\]", r".\1", component))
    is_head = component in HEAD_COMPONENTS
    if entry.unit not in UNITS or is_head != (entry.unit != "pos"):
        hint = "Head components take 'h' or 'h.pos', the others 'pos'."
        raise Unsupported(f"{name} with unit {entry.unit!r}: there is nothing like it here. {hint}")
    try:
        return Site(component, int(layer), heads)
    except UnknownComponent as error:
        raise Unsupported(f"{name}: {error}") from error


def _check_kind(entry: Entry, name: str) -> None:
    if entry.kind not in KINDS:
        raise Unsupported(f"{name}: {(NO_EDIT | NO_EQUAL).get(entry.kind, 'its kind is not known here.')} {WRAP}")
    joint = entry.kind in ROTATIONS or entry.kind == "SigmoidMaskIntervention"
    if joint and entry.unit == "pos" and entry.count > 1:
        raise Unsupported(f"{name} over {entry.count} positions: one joint space, not one per position. {WRAP}")


def _chosen(subspaces: Any, index: int) -> list[int] | None:
    """Return the subspaces of one intervention, the same for all examples."""
    if subspaces is None or isinstance(subspaces, int):
        return None if subspaces is None else [subspaces]
    given = list(subspaces)
    if not isinstance(given[0], int):
        given = given[index]
        if given is not None and not isinstance(given[0], int):
            if any(list(row) != list(given[0]) for row in given):
                raise Unsupported("pyvene subspaces that differ between examples. Run those examples apart.")
            given = list(given[0])
    return given


def _columns(cell: _Cell, chosen: list[int] | None) -> tuple[int, ...] | None:
    """Return which coordinates (or rotated coordinates) are swapped; None for all."""
    entry = cell.entry
    partial = _prefix(cell) if chosen is None else chosen
    if partial is None:
        return None
    if entry.kind not in PARTIAL:
        if chosen is None:
            return None  # pyvene ignores the interchange dimension there
        raise Unsupported(f"{cell} with subspaces: pyvene ignores them for this kind. Leave them out.")
    partition = entry.options["subspace_partition"]
    if chosen is not None and partition is not None:
        parts = [list(range(*p)) if len(p) == 2 and isinstance(p[0], int) else list(p) for p in partition]
        partial = [column for part in chosen for column in parts[part]]
    if cell.site.component in HEAD_COMPONENTS and entry.kind not in ROTATIONS and len(cell.site.units or (0, 0)) > 1:
        raise Unsupported(f"{cell} with subspaces within several heads. Give each head its own intervention.")
    return tuple(partial)


def _prefix(cell: _Cell) -> list[int] | None:
    """Return the first `interchange_dim` coordinates where the user set fewer than all, else None.

    pyvene's own default is the configuration's hidden size, also where the component is wider (heads * head_dim): such
    a default means the whole component, which pyvene fails to edit.
    """
    entry = cell.entry
    if entry.swapped is None or entry.kind == "LowRankRotatedSpaceIntervention":
        return None
    whole = entry.whole
    if whole is None and "interchange_dim" not in entry.state and entry.options["intervention"] is None:
        head = cell.site.component in HEAD_COMPONENTS
        one = replace(cell, site=replace(cell.site, units=(0,))) if head else cell
        hidden = getattr(getattr(cell.model, "config", None), "hidden_size", None)
        whole = 0 if hidden and entry.swapped % hidden == 0 else one.width()
    return None if whole is not None and entry.swapped >= whole else list(range(entry.swapped))
