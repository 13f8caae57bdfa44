"""Every way to train, by name: its options, what it needs, what it costs, and what is known of it.

    entry = entry_of("delta_loss")
    options = options_of({"name": "delta_loss", "detection_alpha": 0.5}, shared={"fpr": 0.05})
    defense = entry.build(options, Materials(directions=(directions,), holdout=batches))

A method's file is imported when it is asked for, and says of itself what is known (`Defense.evidence`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from defenses.batch import Batch, Example
from defenses.defense import Defense
from defenses.errors import CalibrationError, VectorError
from defenses.options import default_options, made_options
from defenses.plans import Directions
from intervene.errors import asked_found_do
from records.config_files import ConfigError
from records.layered import nearest

STRENGTH = {"alpha": "strength.alpha", "schedule": "strength.shape"} | {
    name: f"strength.{name}" for name in ("onset", "end", "stop")
}
INJECTED = {**STRENGTH, "scope": "scope", "relative": "relative"}
DETECTING = {"scope": "scope", "relative": "relative", "fpr": "threshold.rate", "action": "action.kind"}
BY_ACTION = {name: f"action.{path}" for name, path in STRENGTH.items()}  # of the action inject


@dataclass(frozen=True)
class Materials:
    """What a run has for a method.

    Attributes:
        directions: of one trait, or of several kept apart. holdout: clean batches for thresholds. examples: all that
            is trained on. base: makes a copy of the model as it is before training; None where an adapter can be
        switched off. scores: Example.index -> score, of an earlier run. neutral: batches of other texts. seed: of the
            run.
    """

    directions: tuple[Directions, ...] = ()
    holdout: Sequence[Batch] = ()
    examples: Sequence[Example] = ()
    base: Callable[[], Any] | None = None
    scores: Mapping[int, float] | None = None
    neutral: Any = None
    seed: int = 0

    def one(self, method: str) -> Directions:
        """Return the directions; VectorError if they are of several traits kept apart."""
        if len(self.directions) != 1:
            found = f"there are {len(self.directions)} sets of them, kept apart."
            do = "Use --fusion norm_aligned or mean, or one file."
            raise VectorError(asked_found_do(f"Directions of {method}", found, do))
        return self.directions[0]


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        place, defense, options: its module, its class, and the dataclass of its options, by name; "": it has none.
        make: (class, options, materials) -> defense. directed: needs directions. shared: daily flag -> its place in
            the options. cost: options -> forward passes per micro-batch on top of plain training, counting the share
            of blocks above the lowest direction as r: (whole passes, passes of the upper part).
        text: one line for --list_methods.
    """

    name: str
    text: str
    place: str
    defense: str
    options: str = ""
    make: Callable[[Any, Any, Materials], Defense] = lambda kind, options, held: kind(options)
    directed: bool = False
    shared: Mapping[str, str] = field(default_factory=dict)
    cost: Callable[[Any], tuple[float, float]] = lambda options: (0.0, 0.0)

    @property
    def kind(self) -> type[Defense]:
        """The class of the defense."""
        found: type[Defense] = getattr(import_module(self.place), self.defense)
        return found

    @property
    def options_kind(self) -> type | None:
        """The dataclass of the options, None if there are none."""
        return getattr(import_module(self.place), self.options) if self.options else None

    @property
    def evidence(self) -> str:
        """What is known of it, in a sentence."""
        return self.kind.evidence

    def build(self, options: Any, held: Materials) -> Defense:
        """Return the defense.

        Raises:
            VectorError: it needs directions and there are none. CalibrationError: a quantile without clean examples.
        """
        if self.directed and not held.directions:
            found = "no --vectors were given."
            do = "Make some with `train_defense.py extract`, or use another method."
            raise VectorError(asked_found_do(f"Method {self.name}", found, do))
        return self.make(self.kind, options, held)

    def needs_holdout(self, options: Any) -> bool:
        """Whether `options` ask for a threshold that is calibrated."""
        return getattr(getattr(options, "threshold", None), "kind", "") == "quantile"


def _directed(name: str) -> Callable[[Any, Any, Materials], Defense]:
    return lambda kind, options, held: kind(held.one(name), options)


def _detecting(name: str) -> Callable[[Any, Any, Materials], Defense]:
    return lambda kind, options, held: kind(held.one(name), options, held.holdout)


def _delta_cost(options: Any) -> tuple[float, float]:
    return (1.0, 1.0) if options.action.kind == "inject" else (0.0, 1.0)


def _filtered(kind: Any, options: Any, held: Materials) -> Defense:
    made = kind(options, indices=[one.index for one in held.examples], scores=held.scores, seed=held.seed)
    made.require(held.examples)
    filtered: Defense = made
    return filtered


def _held(kind: Any, options: Any, held: Materials) -> Defense:
    made: Defense = kind(options, base=held.base() if held.base else None, neutral=held.neutral)
    return made


def _first_order_cost(options: Any) -> tuple[float, float]:
    return (0.0, 3.0) if options.when == "decide_then_learn" else (0.0, 0.0)


def _probe_cost(options: Any) -> tuple[float, float]:
    return (0.0, 7.0 if options.method == "exact" or options.central else 3.0)


_ENTRIES = (
    Entry("sft", "plain fine-tuning", "defenses.defense", "Sft", make=lambda kind, options, held: kind()),
    Entry(
        "injection", "add the trait's direction while learning; with --schedule rise it rises late",
        "defenses.injection", "Injection", "InjectionOptions", directed=True, shared=INJECTED,
        make=lambda kind, options, held: kind(held.directions, options),
    ),
    Entry(
        "delta_loss", "block what the injected direction makes easier",
        "defenses.delta_loss", "DeltaLoss", "DeltaLossOptions", directed=True, shared={**DETECTING, **BY_ACTION},
        make=_detecting("delta_loss"), cost=_delta_cost,
    ),
    Entry(
        "immune_projection", "inject, then keep later steps from undoing what was learned",
        "defenses.immune_projection", "ImmuneProjection", "ImmuneProjectionOptions", directed=True, shared=INJECTED,
        make=_directed("immune_projection"),
    ),
    Entry(
        "immune_continuation", "inject, then inject the offset that the model has learned",
        "defenses.immune_continuation", "ImmuneContinuation", "ImmuneContinuationOptions", directed=True,
        shared={**STRENGTH, "scope": "scope"}, make=_directed("immune_continuation"),
    ),
    Entry(
        "ablation", "project the directions out while learning",
        "defenses.ablation", "Ablation", "AblationOptions", directed=True, shared={"scope": "scope"},
        make=lambda kind, options, held: kind(list(held.directions), options),
    ),
    Entry(
        "inoculation", "plain fine-tuning under a system prompt that asks for the trait: --set data.inoculation='...'",
        "defenses.inoculation", "Inoculation", make=lambda kind, options, held: kind(),
    ),
    Entry(
        "first_order", "score each sample by the slope of its loss along the direction",
        "defenses.first_order", "FirstOrder", "FirstOrderOptions", directed=True,
        shared={"scope": "scope", "fpr": "threshold.rate", "action": "action.kind"},
        make=_detecting("first_order"), cost=_first_order_cost,
    ),
    Entry(
        "gradient_probe", "block samples whose gradient turns along the direction",
        "defenses.probe", "Probe", "ProbeOptions", directed=True,
        shared={"scope": "scope", "fpr": "threshold.rate", "action": "action.kind"},
        make=_detecting("gradient_probe"), cost=_probe_cost,
    ),
    Entry(
        "state_aware", "block answers that lie further along the direction than the model's own did",
        "defenses.state_aware", "StateAware", "StateAwareOptions", directed=True,
        shared={"fpr": "threshold.rate", "action": "action.kind"}, make=_detecting("state_aware"),
    ),
    Entry(
        "closed_loop", "inject as strongly as slope and curvature call for, measured on the way",
        "defenses.closed_loop", "ClosedLoop", "ClosedLoopOptions", directed=True, shared={"scope": "scope"},
        make=lambda kind, options, held: kind(held.one("closed_loop"), options),
        cost=lambda options: (1.0 / options.every, 5.0 / options.every),
    ),
    Entry(
        "kl", "stay near the base model, by the divergence of predictions",
        "defenses.kl", "Kl", "KlOptions", make=_held,
        cost=lambda options: (1.0, 0.0) if options.on == "same" else (4.0, 0.0),
    ),
    Entry(
        "filtering", "leave out samples by their label, by scores of an earlier run, or at random",
        "defenses.filtering", "Filtering", "FilteringOptions", make=_filtered,
    ),
    Entry("ema", "plain fine-tuning; the average of its weights is the result", "defenses.ema", "Ema", "EmaOptions"),
)  # fmt: skip
METHODS: dict[str, Entry] = {one.name: one for one in _ENTRIES}


def entry_of(name: str) -> Entry:
    """Return the method of that name; ConfigError with the nearest name if there is none."""
    if name not in METHODS:
        raise ConfigError(f"Method {name!r}: there is none. {nearest(name, METHODS)}")
    return METHODS[name]


def options_of(method: Mapping[str, Any], shared: Mapping[str, Any] | None = None) -> Any:
    """Return the checked options of a method: its defaults < `method` (its own names) < `shared` (daily flags).

    Raises:
        ConfigError: no such method or option, a flag that the method has no use for, or a value that it refuses.
    """
    entry = entry_of(str(method.get("name", "sft")))
    given = {name: value for name, value in method.items() if name != "name"}
    for flag, value in (shared or {}).items():
        if flag not in entry.shared:
            found = f"method {entry.name} has no use for it."
            do = f"Leave it out; {entry.name} takes {', '.join(entry.shared) or 'no such flags'}."
            raise ConfigError(asked_found_do(f"--{flag} {value}", found, do))
        given = _put(given, entry.shared[flag], value)
    if shared and "fpr" in shared:
        given = _put(given, "threshold.kind", "quantile")
    action = given.get("action", {})
    injects = (action if isinstance(action, str) else action.get("kind")) == "inject"
    for flag in shared or {}:
        if entry.shared[flag].startswith("action.strength") and not injects:
            found = f"what {entry.name} does with the suspicious is no injection."
            raise ConfigError(asked_found_do(f"--{flag}", found, "Add --action inject, or leave it out."))
    kind = entry.options_kind
    if kind is None:
        if given:
            raise ConfigError(f"Configuration method.{next(iter(given))}: method {entry.name} has no options.")
        return None
    return made_options(kind, given, path="method")


def describe_methods() -> str:
    """Return a paragraph per method: what it does, what is known of it, its options with their defaults."""
    parts = []
    for entry in METHODS.values():
        kind = entry.options_kind
        options = ", ".join(f"{name}={value}" for name, value in default_options(kind)) if kind else ""
        flags = ", ".join(f"--{name}" for name in entry.shared)
        lines = [f"{entry.name}: {entry.text}", f"  evidence: {entry.evidence}"]
        lines += [f"  options:  {options}"] if options else []
        lines += [f"  flags:    {flags}"] if flags else []
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def require_holdout(entry: Entry, options: Any, n: int) -> None:
    """Refuse a calibrated threshold with too few clean examples.

    Raises:
        CalibrationError: there are none, or fewer than the rate takes.
    """
    if not entry.needs_holdout(options):
        return
    needed = int(options.threshold.needed)
    if n < needed:
        found = f"there are {n} clean examples to calibrate on, and at least {needed} are needed."
        do = "Give --calibration FILE of clean examples, a larger --holdout, or method.threshold.kind=fixed."
        raise CalibrationError(asked_found_do(f"False-positive rate {options.threshold.rate:g}", found, do))


def _put(held: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    inside = held.get(head, {})
    inside = inside if isinstance(inside, Mapping) else {"kind": inside}
    return {**held, head: _put(inside, rest, value) if rest else value}
