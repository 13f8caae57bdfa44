"""pyvene's files and locations as plain values: `entries` of a configuration, `positions_from_pyvene` of a call.

Needs no pyvene: a saved folder is JSON and tensors, and classes are known by name. Used by `pyvene_compat`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intervene.errors import BadPosition, StoreError, Unsupported
from intervene.positions import AllTokens, At, Positions, real_tokens

# pyvene's RepresentationConfig, in the order in which a saved config.json lists the values
FIELDS = (
    "layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_type", "intervention",
    "subspace_partition", "group_key", "intervention_link_key", "moe_key", "source_representation",
    "hidden_source_representation", "latent_dim",
)  # fmt: skip
DEFAULTS = {"layer": 0, "component": "block_output", "unit": "pos", "max_number_of_units": 1}
UNITS = ("pos", "h", "h.pos")


@dataclass(frozen=True)
class Entry:
    """One pyvene representation, whatever it was read from.

    `options` are RepresentationConfig's values; `kind` is the class's name; `state` its tensors, if it has any yet;
    `swapped` its interchange_dim and `whole` its embed_dim, where they are known.
    """

    options: Mapping[str, Any]
    kind: str
    state: Mapping[str, Tensor] = field(default_factory=dict)
    swapped: int | None = None
    whole: int | None = None

    @property
    def unit(self) -> str:
        """What the locations count: "pos", "h" or "h.pos"."""
        return str(self.options["unit"])

    @property
    def count(self) -> int:
        """How many units one intervention was made for."""
        return int(self.options["max_number_of_units"] or 1)


def entries(config: Any) -> list[Entry]:
    """Return the representations of a folder, a dict, a list of either, or one of pyvene's configuration objects.

    Raises:
        StoreError: a folder lacks a file or cannot be read. Unsupported: mode "serial", or an unknown field.
    """
    if isinstance(config, (str, Path)):
        return _from_folder(Path(config))
    if isinstance(config, Mapping) and "representations" in config:
        return _from_lists(config["representations"], config.get("intervention_types"), config.get("mode"))
    if hasattr(config, "representations"):
        return _from_lists(config.representations, config.intervention_types, config.mode)
    several = isinstance(config, list) or (isinstance(config, tuple) and not hasattr(config, "_asdict"))
    return _from_lists(config if several else [config], None, None)


def _from_lists(representations: Any, types: Any, mode: Any) -> list[Entry]:
    _check_mode(mode)
    listed = representations if isinstance(representations, (list, tuple)) else [representations]
    if hasattr(listed, "_asdict"):  # a lone namedtuple
        listed = [listed]
    made = []
    for index, representation in enumerate(listed):
        options = _options(representation)
        default = types[index] if isinstance(types, (list, tuple)) else types
        made.append(_from_options(options, default))
    return made


def _check_mode(mode: Any) -> None:
    if mode not in (None, "parallel"):
        raise Unsupported(
            f"pyvene mode {mode!r}: a chain of sources, each edited by the one before. Run it step by step: "
            "capture under intervene(), then intervene with what was captured."
        )


def _options(representation: Any) -> dict[str, Any]:
    if hasattr(representation, "_asdict"):
        representation = representation._asdict()
    elif isinstance(representation, (list, tuple)):
        representation = dict(zip(FIELDS, representation, strict=False))
    elif not isinstance(representation, Mapping):
        raise Unsupported(f"pyvene representation {representation!r}: not understood. Give a dict with {FIELDS[:4]}.")
    unknown = sorted(set(representation) - set(FIELDS))
    if unknown:
        raise Unsupported(f"pyvene representation with {unknown}: pyvene 0.1.8 has {list(FIELDS)}. Remove the others.")
    return dict.fromkeys(FIELDS) | DEFAULTS | dict(representation)


def kind_name(value: Any) -> str:
    """Return a class's bare name from the class, an instance, or the text that pyvene saves for it."""
    if isinstance(value, str):
        return value.removeprefix("<class '").removesuffix("'>").rsplit(".", 1)[-1]
    if isinstance(value, type):
        return value.__name__
    return type(value).__name__ if isinstance(value, nn.Module) else "LambdaIntervention"


def _from_options(options: dict[str, Any], default: Any) -> Entry:
    instance = options["intervention"]
    if instance is None:
        kind = kind_name(options["intervention_type"] or default or "VanillaIntervention")
        source = options["source_representation"]
        return Entry(options, kind, {} if source is None else {"source_representation": torch.as_tensor(source)})
    if not isinstance(instance, nn.Module):
        return Entry(options, kind_name(instance))
    return Entry(
        options,
        kind_name(instance),
        instance.state_dict(),
        _number(getattr(instance, "interchange_dim", None)),
        _number(getattr(instance, "embed_dim", None)),
    )


def _number(value: Any) -> int | None:
    return None if value is None else int(value)


def _from_folder(folder: Path) -> list[Entry]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        listed, types = config["representations"], config["intervention_types"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"pyvene folder {folder}: its config.json cannot be read ({type(error).__name__}: {error}). "
            "Name the folder that IntervenableModel.save wrote."
        ) from error
    _check_mode(config.get("mode"))
    dimensions = config.get("intervention_dimensions") or [None] * len(listed)
    constant = config.get("intervention_constant_sources") or [False] * len(listed)
    if not len(listed) == len(types) == len(dimensions) == len(constant):
        raise StoreError(f"pyvene folder {folder}: config.json lists of different lengths. Save it again with pyvene.")
    seen: Counter[str] = Counter()
    made = []
    for representation, kind, dimension, static in zip(listed, types, dimensions, constant, strict=True):
        options, name = _options(representation), kind_name(kind)
        state = _tensors(folder, _key(options, seen))
        if not state and ("Rotated" in name or "Mask" in name or (static and name != "ZeroIntervention")):
            name_and_why = f"{name} needs intkey_*.bin for {options['component']} of layer {options['layer']}"
            if name not in ("CollectIntervention", "NoiseIntervention", "PCARotatedSpaceIntervention"):
                raise StoreError(f"pyvene folder {folder}: {name_and_why}, and it is not there. Save it again.")
        made.append(Entry(options, name, state, _number(dimension), _number(state.get("embed_dim"))))
    return made


def _key(options: Mapping[str, Any], seen: Counter[str]) -> str:
    """Return the name under which pyvene files this representation's tensors; equal ones are numbered."""
    layer, component = options["layer"], str(options["component"])
    place = f"comp_{component.replace('.', '_')}" if "." in component else f"layer_{layer}_comp_{component}"
    name = f"{place}_unit_{str(options['unit']).replace('.', '_')}_nunit_{options['max_number_of_units']}"
    seen[name] += 1
    return f"{name}#{seen[name] - 1}"


def _tensors(folder: Path, key: str) -> dict[str, Tensor]:
    file = folder / f"intkey_{key}.bin"
    if file.parent != folder:
        raise StoreError(f"pyvene folder {folder}: a component's name leads out of it ({key}). Do not trust this file.")
    if not file.exists():
        return {}
    try:
        state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for what is no tensor file
        raise StoreError(f"pyvene folder {folder}: {file.name} holds no plain tensors ({error}).") from error
    return state


# --- locations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Location:
    """Where pyvene edits: base and source positions, and the heads if the unit names heads (None: all of them)."""

    positions: Positions = field(default_factory=AllTokens)
    source_positions: Positions | None = None
    heads: tuple[int, ...] | None = None


def positions_from_pyvene(
    unit_locations: Mapping[str, Any] | None,
    units: Sequence[str] = ("pos",),
    *,
    inputs: Mapping[str, Any] | None = None,
    source_inputs: Mapping[str, Any] | None = None,
) -> tuple[Location, ...]:
    """Return one `Location` per intervention of what pyvene's forward takes as `unit_locations`.

    pyvene numbers columns of the padded batch, `At` numbers real tokens: for a padded batch pass it as `inputs` (and
    the sources' as `source_inputs`), so that columns become tokens and a column of padding is refused. A flat list
    under "base" means all of its positions (pyvene takes two of them for a source and a base, and edits one).

    Args:
        unit_locations: {"base": ...} or {"sources->base": (sources, bases)}, nested [intervention][batch][unit], for
            the unit "h.pos" [intervention][2][batch][unit]; or a number, a (source, base) pair, or a flat list.
        units: each intervention's unit.

    Raises:
        Unsupported: serial keys; heads that differ between examples or between source and base. BadPosition: padding.
    """
    if unit_locations is None:
        return tuple(Location() for _ in units)
    if len(unit_locations) != 1 or next(iter(unit_locations)) not in ("base", "sources->base"):
        raise Unsupported(f"pyvene unit_locations with {sorted(unit_locations)}: only 'base' or 'sources->base'.")
    key, value = next(iter(unit_locations.items()))
    source, base = (None, value) if key == "base" else _pair(value)
    made = []
    for index, unit in enumerate(units):
        rows, source_rows = (_of_intervention(given, index, len(units)) for given in (base, source))
        heads = None
        if unit in ("h", "h.pos"):
            heads, rows = _heads(rows, unit)
            source_heads, source_rows = _heads(source_rows, unit)
            if source_heads not in (None, heads):
                raise Unsupported(f"pyvene heads {source_heads} read into {heads}: one site has one set of heads.")
        at, source_at = _at(rows, inputs), _at(source_rows, source_inputs if source_inputs is not None else inputs)
        made.append(Location(at or AllTokens(), source_at, heads))
    return tuple(made)


def _pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, int):
        return value, value
    flat = all(isinstance(item, int) for item in value)
    return (value, value) if flat and len(value) != 2 else (value[0], value[1])


def _of_intervention(given: Any, index: int, n: int) -> Any:
    """Return what is given for one intervention: rows [batch][unit], or a flat row that stands for every example."""
    if given is None or isinstance(given, int):
        return given if given is None else [given]
    if all(isinstance(item, int) for item in given):
        return list(given)
    if len(given) != n:
        raise BadPosition(f"pyvene locations for {len(given)} interventions: there are {n}. Give each its own.")
    return given[index]


def _heads(rows: Any, unit: str) -> tuple[tuple[int, ...] | None, Any]:
    """Return the heads that `rows` name, the same in every example, and the rows of positions left."""
    if rows is None:
        return None, None
    if unit == "h.pos" and not (len(rows) == 2 and not isinstance(rows[0], int)):
        raise BadPosition("pyvene locations for unit 'h.pos': need [heads, positions], each [batch][unit].")
    heads, positions = (rows[0], rows[1]) if unit == "h.pos" else (rows, None)
    found = {tuple(heads)} if isinstance(heads[0], int) else {tuple(row) for row in heads}
    if len(found) != 1:
        raise Unsupported(f"pyvene heads that differ between examples ({sorted(found)}). Run those examples apart.")
    return found.pop(), positions


def _at(rows: Any, inputs: Mapping[str, Any] | None) -> At | None:
    if rows is None:
        return None
    if inputs is None:
        same = isinstance(rows[0], int) or all(list(row) == list(rows[0]) for row in rows)
        return At(rows if isinstance(rows[0], int) else rows[0]) if same else At(rows)
    real = real_tokens(inputs)
    columns = torch.tensor(rows)
    columns = columns.expand(len(real), -1) if columns.dim() == 1 else columns
    if not bool(real.gather(1, columns).all()):
        raise BadPosition(f"pyvene locations {columns.tolist()}: some are padding in this batch. Name real tokens.")
    return At((real.cumsum(1) - 1).gather(1, columns))
