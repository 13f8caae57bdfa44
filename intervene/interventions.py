"""`Intervention`: site x positions x featurizer x edit, as a value; a sequence of them is a plan.

`bind(model, plan)` checks everything about a plan that can be known before a forward pass and returns what `run`
needs; no hook exists until it has succeeded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from intervene.conditions import Condition
from intervene.edits import Edit
from intervene.errors import BadPosition, ShapeMismatch, WrongModel
from intervene.families import Tap, fingerprint, resolve, unwrap
from intervene.featurizers import Featurizer, Identity
from intervene.locate import walk
from intervene.positions import AllTokens, Positions
from intervene.sites import Site

Phase = Literal["prompt", "decode", "both"]


@dataclass(frozen=True, eq=False)
class Intervention:
    """One change: at `site`, on `positions`, seen through `featurizer`, do `edit`.

    Args:
        site: a `Site` or its text, "L3.mlp_output".
        edit: what happens to the features.
        positions: which tokens.
        featurizer: which directions.
        phase: "prompt", "decode" (generated tokens) or "both". None: "prompt" if the edit needs a source or is written
            per position, else "both".
        source_positions: which tokens of the source run are read; None: `positions`, resolved on the source.
        when: apply only where this condition on the activation holds.
        elsewhere: name the reason for applying a saved vector at another site or model than it was made for; without
            it that is an error.

    Raises:
        BadPosition: the phase excludes every token the positions can select.
    """

    site: Site
    edit: Edit
    positions: Positions = field(default_factory=AllTokens)
    featurizer: Featurizer = field(default_factory=Identity)
    phase: Phase | None = None
    source_positions: Positions | None = None
    when: Condition | None = None
    elsewhere: str | None = None

    def __init__(
        self,
        site: Site | str,
        edit: Edit,
        positions: Positions | None = None,
        featurizer: Featurizer | None = None,
        phase: Phase | None = None,
        source_positions: Positions | None = None,
        when: Condition | None = None,
        elsewhere: str | None = None,
    ) -> None:
        values = {
            "site": Site.parse(site),
            "edit": edit,
            "positions": AllTokens() if positions is None else positions,
            "featurizer": Identity() if featurizer is None else featurizer,
            "phase": phase,
            "source_positions": source_positions,
            "when": when,
            "elsewhere": elsewhere,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        expected = {"edit": Edit, "positions": Positions, "featurizer": Featurizer}
        for name, kind in expected.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                hint = " Write Add(tensor) or Set(tensor)." if name == "edit" and isinstance(value, Tensor) else ""
                shown = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
                raise ShapeMismatch(
                    f"Intervention at {self.site}: {name} is no {kind.__name__}, found {shown}.{hint} "
                    "See intervene.__all__ for those there are."
                )
        if self.when is not None and not isinstance(self.when, Condition):
            raise ShapeMismatch(
                f"Intervention at {self.site}: when must be a Condition, found {self.when!r}. "
                "Use ProjectionAbove or ProbeAbove."
            )
        if self.phase not in (None, "prompt", "decode", "both"):
            raise BadPosition(f"Intervention at {self.site}: phase {self.phase!r}. Use 'prompt', 'decode' or 'both'.")
        if self.phase == "decode" and not self.positions.can_decode:
            raise BadPosition(
                f"Intervention at {self.site}: {self.positions!r} selects prompt tokens only, but the phase is "
                "'decode'. Use AllTokens, LastToken, Response or DecodeSteps, or another phase."
            )
        if self.phase in ("decode", "both") and (self.edit.needs_source or self.edit.slots is not None):
            raise BadPosition(
                f"Intervention at {self.site}: {type(self.edit).__name__} is written per prompt position and cannot "
                f"act in phase {self.phase!r}. Leave the phase out."
            )

    @property
    def resolved_phase(self) -> Phase:
        """The phase, with None derived."""
        if self.phase is not None:
            return self.phase
        return "prompt" if self.edit.needs_source or self.edit.slots is not None else "both"

    def __str__(self) -> str:
        parts = [type(self.edit).__name__, f"at {self.site}", f"on {self.positions!r}"]
        if not isinstance(self.featurizer, Identity):
            parts.append(f"through {type(self.featurizer).__name__}")
        return " ".join(parts)


Plan = Sequence[Intervention]


@dataclass(frozen=True, eq=False)
class Bound:
    """An intervention with its tap in one model, its widths checked, and its modules where the site computes."""

    intervention: Intervention
    tap: Tap
    edit: Edit
    featurizer: Featurizer
    when: Condition | None


def modules_of(plan: Plan) -> Iterator[nn.Module]:
    """Yield each featurizer, edit and condition of `plan` once, in plan order."""
    seen: set[int] = set()
    for item in plan:
        for module in (item.featurizer, item.edit, item.when):
            if module is not None and id(module) not in seen:
                seen.add(id(module))
                yield module


def trainable_parameters(plan: Plan) -> list[nn.Parameter]:
    """Return the parameters of `plan` that learn, each once, in plan order."""
    found: dict[int, nn.Parameter] = {}
    for module in modules_of(plan):
        found.update({id(p): p for p in module.parameters() if p.requires_grad})
    return list(found.values())


def bind(model: nn.Module, plan: Plan) -> list[Bound]:
    """Return `plan` resolved against `model`, everything checked that needs no forward pass.

    Raises:
        UnknownFamily, UnknownComponent, SiteOutOfRange: from the site. ShapeMismatch: featurizer or edit of another
        width than the site. WrongModel: a saved vector of another model or site. TypeError: not a plan.
    """
    if isinstance(plan, Intervention):
        raise TypeError("A plan is a sequence of interventions: found one Intervention. Write [intervention].")
    for number, item in enumerate(plan):
        if not isinstance(item, Intervention):
            raise TypeError(f"A plan holds Interventions: item {number} is {item!r}. Write Intervention(site, edit).")
    return [_bind_one(model, item) for item in plan]


def _bind_one(model: nn.Module, item: Intervention) -> Bound:
    tap = resolve(model, item.site)
    _check_widths(item, tap)
    _check_origin(model, item, tap)
    device = _device_of(model, tap)
    edit, featurizer = _placed(item.edit, device, item), _placed(item.featurizer, device, item)
    when = None if item.when is None else _placed(item.when, device, item)
    return Bound(item, tap, edit, featurizer, when)  # type: ignore[arg-type]


def _check_widths(item: Intervention, tap: Tap) -> None:
    if tap.width is None:
        return
    if item.featurizer.width not in (None, tap.width):
        raise ShapeMismatch(
            f"{item}: the featurizer is made for width {item.featurizer.width}, but {tap.site} is {tap.width} wide "
            f"in this model. Make it for {tap.width}."
        )
    if item.when is not None and item.when.width not in (None, tap.width):
        raise ShapeMismatch(
            f"{item}: its condition is made for width {item.when.width}, but {tap.site} is {tap.width} wide in this "
            f"model. Make it for {tap.width}."
        )
    features = item.featurizer.features(tap.width)
    if item.edit.features not in (None, 1, features):
        raise ShapeMismatch(
            f"{item}: the edit is {item.edit.features} wide, but {features} features are read there. "
            f"Give it {features}."
        )
    if item.edit.features == 1 and features != 1 and not getattr(item.edit, "tied", False):
        raise ShapeMismatch(f"{item}: the edit is 1 wide, but {features} features are read there. Give it {features}.")


def _check_origin(model: nn.Module, item: Intervention, tap: Tap) -> None:
    origin = item.edit.made_for
    if origin is None or item.elsewhere:
        return
    if origin.fingerprint != fingerprint(model):
        raise WrongModel(
            f"{item}: the vector was made for model {origin.model or '(unnamed)'} ({origin.fingerprint}), "
            f"this one is {fingerprint(model)}. Make it anew, or say elsewhere='<reason>' in the Intervention."
        )
    made_at = resolve(model, origin.site).site
    if made_at != tap.site:
        raise WrongModel(
            f"{item}: the vector was made at {made_at} ({origin.convention}). "
            f"Apply it there, or say elsewhere='<reason>' in the Intervention."
        )


def placed_for(model: nn.Module, plan: Plan) -> Plan:
    """Move each module of `plan` to the device of its site in `model`, in place, and return the plan.

    To be called on a new plan that learns, before its optimiser is made. A module that several sites share goes to the
    first. Layers of one model may lie on different devices.
    """
    seen: set[int] = set()
    for item in plan:
        device = _device_of(model, resolve(model, item.site))
        for module in (item.featurizer, item.edit, item.when):
            if module is not None and device is not None and id(module) not in seen:
                seen.add(id(module))
                module.to(device)
    return plan


def _device_of(model: nn.Module, tap: Tap) -> str | None:
    """Return where the tap's module computes: the device of its weights, or of the nearest module around it."""
    names = tap.path.split(".")
    around = (walk(unwrap(model), ".".join(names[:end])) for end in range(len(names) - 1, 0, -1))
    for module in (tap.module, *around, model):
        tensor = None if module is None else next(module.parameters(), None)
        if tensor is not None:
            return str(tensor.device)
    return None


def _placed(module: nn.Module, device: str | None, item: Intervention) -> nn.Module:
    """Return `module` on `device`: itself, or a copy if it does not learn. The user's own value is never moved."""
    tensors = [*module.parameters(), *module.buffers()]
    if device is None or all(str(tensor.device) == device for tensor in tensors):
        return module
    if any(tensor.requires_grad for tensor in tensors):
        raise ShapeMismatch(
            f"{item}: {type(module).__name__} learns and is on {tensors[0].device}, but the site is on {device}. "
            f"Move it before making its optimiser: .to({device!r})."
        )
    return copy.deepcopy(module).to(device)
