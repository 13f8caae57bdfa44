"""Every storable value as plain JSON and named tensors, and back: tables, one line per class. No file is touched here.

A record says its `kind`, which is looked up in these tables and never imported. What a class does not list here cannot
be stored, and a key that a record does not need is refused: a file means exactly what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from intervene.boundless import FaithfulBoundarySwap, SecondBoundarySwap
from intervene.conditions import ProbeAbove, ProjectionAbove
from intervene.content import Match, Prompt, Response
from intervene.dictionaries import SAE
from intervene.edits import Add, Affine, Noise, Project, Scale, Set, StopGradient, Swap, Zero
from intervene.errors import InterveneError, StoreError, close_names
from intervene.featurizers import PCA, Block, Coordinates, Identity, Subspace
from intervene.gates import BoundarySwap, BudgetSwap, GatedSwap, HardConcreteSwap
from intervene.marked import Marked
from intervene.positions import AllTokens, At, DecodeSteps, First, LastToken, Mask, Positions, Span
from intervene.reft import LowRankAffine
from intervene.vectors import SteeringVector

Record = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Stored:
    """What a value is rebuilt from: its record's options, its tensors, and the tokenizer given on loading."""

    options: Record
    tensors: dict[str, Any]
    tokenizer: Any = None


@dataclass(frozen=True)
class Codec:
    """How one class is written down: `options` are its attributes to keep, `make` builds it from its parts.

    `tensors` names what is kept besides a module's parameters and buffers. `defaults` are options that are not written
    down where they have this value, so that versions which do not know them read the rest. `holds` are attributes that
    are modules of the same table, stored once however many share them; `make` finds them among its options.
    """

    kind: type[Any]
    make: Callable[[Stored], Any]
    options: tuple[str, ...] = ()
    tensors: Callable[[Any], Tensors] = lambda value: {}
    defaults: Mapping[str, Any] = field(default_factory=dict)
    holds: tuple[str, ...] = ()


def _table(*codecs: Codec) -> dict[str, Codec]:
    return {codec.kind.__name__: codec for codec in codecs}


def _subspace(parts: Stored) -> Subspace:
    return Subspace.from_weight(**parts.tensors, frame=parts.options["parametrisation"])


def _sae(parts: Stored) -> SAE:
    tensors = dict(parts.tensors)
    if parts.options["activation"] != "jumprelu":
        tensors.pop("threshold")  # unused zeros, which SAE would refuse
    return SAE(**tensors, **parts.options)


def _constant(kind: type[Any]) -> Callable[[Stored], Any]:
    # trainable here so that a vector that has learned to be zero can be read back; the flags follow
    return lambda parts: kind(parts.tensors["vector"], trainable=True)


def _gated(kind: type[Any]) -> Callable[[Stored], Any]:
    def make(parts: Stored) -> Any:
        options = dict(parts.options)
        if parts.tensors.get("groups") is not None:
            options["groups"] = parts.tensors["groups"]
        return kind(options.pop("count"), **options)

    return make


def _add(parts: Stored) -> Add:
    strength, strengths = parts.options["strength"], parts.tensors.get("strengths")
    if (strength is None) == (strengths is None):
        raise ValueError("needs either one strength or a tensor of strengths")
    return Add(
        parts.tensors["vector"],
        float(strength) if strengths is None else strengths,
        relative=parts.options["relative"],
        trainable=True,
    )


def _hard_concrete(parts: Stored) -> HardConcreteSwap:
    made: HardConcreteSwap = _gated(HardConcreteSwap)(parts)
    made.generator.set_state(parts.tensors["generator"])
    return made


def _noise(parts: Stored) -> Noise:
    made = Noise(parts.options["scale"], seed=parts.options["seed"])
    made.generator.set_state(parts.tensors["generator"])
    return made


def _match(parts: Stored) -> Match:
    target = parts.options["target"]
    if isinstance(target, str) and parts.tokenizer is None:
        raise StoreError(f"Match({target!r}) looks for text, and a tokenizer is not stored. Pass tokenizer=.")
    return Match(**{**parts.options, "target": _tuples(target)}, tokenizer=parts.tokenizer)


def _tuples(value: Any) -> Any:
    """Return JSON's lists as the tuples they were."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


FEATURIZER_CODECS = _table(
    Codec(Identity, lambda parts: Identity()),
    Codec(Coordinates, lambda parts: Coordinates(parts.tensors["indices"].tolist())),
    Codec(Subspace, _subspace, defaults={"parametrisation": "qr"}),
    Codec(Block, lambda parts: Block(**parts.options), ("start", "stop"), holds=("subspace",)),
    Codec(PCA, lambda parts: PCA(**parts.tensors)),
    Codec(SAE, _sae, ("activation", "centred")),
)
EDIT_CODECS = _table(
    Codec(Swap, lambda parts: Swap()),
    Codec(Zero, lambda parts: Zero()),
    Codec(Add, _add, ("strength", "relative")),
    Codec(Set, _constant(Set)),
    Codec(Project, _constant(Project)),
    Codec(Scale, lambda parts: Scale(**parts.options), ("factor",)),
    Codec(GatedSwap, _gated(GatedSwap), ("count", "temperature", "tied")),
    Codec(
        HardConcreteSwap,
        _hard_concrete,
        ("count", "temperature", "stretch", "seed"),
        lambda edit: {"generator": edit.generator.get_state()},
    ),
    Codec(BudgetSwap, _gated(BudgetSwap), ("count", "temperature", "budget")),
    Codec(BoundarySwap, _gated(BoundarySwap), ("count", "temperature")),
    Codec(FaithfulBoundarySwap, _gated(FaithfulBoundarySwap), ("count", "temperature", "variables", "hard_eval")),
    Codec(SecondBoundarySwap, lambda parts: SecondBoundarySwap(**parts.options), holds=("first",)),
    Codec(LowRankAffine, lambda parts: LowRankAffine(*parts.tensors["weight"].shape)),
    Codec(Affine, lambda parts: Affine(len(parts.tensors["weight"]))),
    Codec(StopGradient, lambda parts: StopGradient(**parts.tensors)),
    # the generator's state, so that the next draw is the one the stored edit would have made
    Codec(Noise, _noise, ("scale", "seed"), lambda edit: {"generator": edit.generator.get_state()}),
)
CONDITION_CODECS = _table(
    Codec(
        ProjectionAbove, lambda parts: ProjectionAbove(**parts.tensors, **parts.options), ("threshold", "cosine", "per")
    ),
    Codec(ProbeAbove, lambda parts: ProbeAbove(**parts.tensors, **parts.options), ("bias", "threshold", "per")),
)
POSITION_CODECS = _table(
    Codec(AllTokens, lambda parts: AllTokens()),
    Codec(LastToken, lambda parts: LastToken()),
    Codec(First, lambda parts: First(**parts.options), ("count",)),
    Codec(At, lambda parts: At(_tuples(parts.options["indices"])), ("indices",)),
    Codec(Span, lambda parts: Span(**parts.options), ("start", "stop")),
    Codec(Mask, lambda parts: Mask(**parts.tensors), tensors=lambda positions: {"selected": positions.selected}),
    Codec(DecodeSteps, lambda parts: DecodeSteps(**parts.options), ("start", "stop")),
    Codec(Prompt, lambda parts: Prompt(_tuples(parts.options["marker"])), ("marker",)),
    Codec(Response, lambda parts: Response(_tuples(parts.options["marker"])), ("marker",)),
    Codec(Match, _match, ("target", "occurrence", "token")),
    Codec(Marked, lambda parts: Marked(**parts.options), ("name",)),
)
# why a class that exists is in no table
REFUSED = {
    "PyveneEdit": "it holds a pyvene module, which only pyvene can rebuild. Save it with pyvene's own save(), or "
    "translate it with from_pyvene() and store that plan.",
    "Rows": "it belongs to one batch of pairs. Store the edit that it holds.",
    "Parts": "it belongs to one batch of a fit. Store the plan of one part: its featurizer and its edit.",
}


def codec_of(table: Mapping[str, Codec], value: Any, asked: str) -> Codec:
    """Return the codec of `value`'s class. `asked` begins the error's message.

    Raises:
        StoreError: its class is in no table.
    """
    name = type(value).__name__
    codec = table.get(name)
    if codec is None or codec.kind is not type(value):
        why = REFUSED.get(name, f"it is not one of those that can be stored: {', '.join(sorted(table))}.")
        raise StoreError(f"{asked}: {name} cannot be stored, {why}")
    return codec


def _named(table: Mapping[str, Codec], record: Any, keys: Collection[str], asked: str) -> Codec:
    exact_keys(record, {"kind", "options", *keys}, asked)
    kind = record["kind"]
    if kind not in table:
        raise StoreError(
            f"{asked}: unknown kind {kind!r}. {close_names(str(kind), table)} "
            "A newer version may have written it: upgrade."
        )
    codec = table[kind]
    unwritten = set(codec.defaults) - set(record["options"] if isinstance(record["options"], dict) else ())
    exact_keys(record["options"], {*codec.options, *codec.holds, *codec.defaults} - unwritten, f"{asked} ({kind})")
    return codec


def exact_keys(record: Any, keys: Collection[str], asked: str) -> None:
    """Raise StoreError unless `record` is a dict with exactly these keys."""
    found = set(record) if isinstance(record, dict) else set()
    if not isinstance(record, dict) or found != set(keys):
        wrong = [f"unknown {', '.join(sorted(found - set(keys)))}"] if found - set(keys) else []
        wrong += [f"missing {', '.join(sorted(set(keys) - found))}"] if set(keys) - found else []
        raise StoreError(f"{asked}: keys {'; '.join(wrong) or 'missing'}. Save the plan again instead of editing it.")


def _options(codec: Codec, value: Any) -> Record:
    special = {name: getattr(value, name) for name, usual in codec.defaults.items() if getattr(value, name) != usual}
    return {**{name: getattr(value, name) for name in codec.options}, **special}


def held_by(table: Mapping[str, Codec], module: nn.Module) -> list[nn.Module]:
    """Return the modules of the same table that `module` is written in terms of."""
    codec = table.get(type(module).__name__)
    return [] if codec is None else [getattr(module, name) for name in codec.holds]


def parameters_of(module: nn.Module, codec: Codec) -> dict[str, nn.Parameter]:
    """Return the parameters of `module` by name, without those of modules that it holds."""
    return {name: each for name, each in module.named_parameters() if name.split(".")[0] not in codec.holds}


def _tensors_of(module: nn.Module, codec: Codec) -> Tensors:
    buffers = {name: each for name, each in module.named_buffers() if name.split(".")[0] not in codec.holds}
    return {**parameters_of(module, codec), **buffers, **codec.tensors(module)}


def encode_positions(positions: Positions, asked: str) -> tuple[Record, Tensors]:
    """Return `positions` as a record and its tensors."""
    codec = codec_of(POSITION_CODECS, positions, asked)
    return {"kind": codec.kind.__name__, "options": _options(codec, positions)}, codec.tensors(positions)


def decode_positions(record: Any, tensors: Tensors, tokenizer: Any, asked: str) -> Positions:
    """Return the positions that `encode_positions` described; StoreError as in `decode_module`."""

    def decode() -> Positions:
        codec = _named(POSITION_CODECS, record, (), asked)
        made: Positions = codec.make(Stored(record["options"], tensors, tokenizer))
        _exact_tensors(tensors, codec.tensors(made), asked)
        return made

    decoded: Positions = guarded(decode, asked)
    return decoded


def encode_module(
    table: Mapping[str, Codec], module: nn.Module, asked: str, earlier: Sequence[nn.Module] = ()
) -> tuple[Record, Tensors]:
    """Return a featurizer, edit or condition as a record and its tensors, a saved vector's provenance included.

    `earlier` are the modules stored before it, among them those that it holds, which are written as their numbers.

    Raises:
        StoreError: its class cannot be stored, or it could not be read back (NaN after a diverged fit, say).
    """
    codec = codec_of(table, module, asked)
    origin: SteeringVector | None = getattr(module, "made_for", None)
    places = {id(each): number for number, each in enumerate(earlier)}
    record = {
        "kind": codec.kind.__name__,
        "options": {**_options(codec, module), **{name: places[id(getattr(module, name))] for name in codec.holds}},
        "trainable": [name for name, parameter in parameters_of(module, codec).items() if parameter.requires_grad],
        "training": module.training,
        "origin": None if origin is None else origin.provenance(),
    }
    vector = {} if origin is None else {"origin": origin.vector}
    tensors = {**_tensors_of(module, codec), **vector}
    decode_module(table, record, tensors, asked, earlier)  # better to hear of it now than when the original is gone
    return record, tensors


def decode_module(
    table: Mapping[str, Codec], record: Any, tensors: Tensors, asked: str, earlier: Sequence[nn.Module] = ()
) -> Any:
    """Return the module that `encode_module` described: every bit, every flag.

    Raises:
        StoreError: an unknown kind, key or tensor, or a value the class refuses.
    """

    def decode() -> nn.Module:
        codec = _named(table, record, ("trainable", "training", "origin"), asked)
        own = {name: tensor.detach() for name, tensor in tensors.items() if name != "origin"}
        _check_finite(tensors, asked)
        held = {name: _earlier(earlier, record["options"][name], asked) for name in codec.holds}
        module: nn.Module = codec.make(Stored({**codec.defaults, **record["options"], **held}, own))
        _exact_tensors(own, _tensors_of(module, codec), asked)
        _restore(module, codec, own, record)
        if ("origin" in tensors) != (record["origin"] is not None):
            raise ValueError("a saved vector without its provenance")
        if record["origin"] is not None:
            module.origin = decode_vector(tensors["origin"], record["origin"], asked)  # type: ignore[assignment]
        return module

    return guarded(decode, asked)


def _earlier(earlier: Sequence[nn.Module], number: Any, asked: str) -> nn.Module:
    if type(number) is not int or not 0 <= number < len(earlier):
        raise StoreError(f"{asked}: it is part of number {number!r}, of {len(earlier)} before it. Save the plan again.")
    return earlier[number]


def _restore(module: nn.Module, codec: Codec, tensors: Tensors, record: Record) -> None:
    parameters = parameters_of(module, codec)
    if not set(record["trainable"]) <= set(parameters):
        raise ValueError(f"trainable {record['trainable']}, of {sorted(parameters)}")
    for name, parameter in parameters.items():
        parameter.data = tensors[name]  # as it was stored, whatever the constructor rounds or normalises
        parameter.requires_grad_(name in record["trainable"])
    for name, _ in list(module.named_buffers(recurse=False)):
        setattr(module, name, tensors[name])
    held = {id(part) for name in codec.holds for part in getattr(module, name).modules()}
    for part in module.modules():
        if id(part) not in held:  # those have flags of their own
            part.training = bool(record["training"])


def decode_vector(vector: Tensor, provenance: Any, asked: str) -> SteeringVector:
    """Return the steering vector of `provenance`, as its `provenance()` wrote it."""
    exact_keys(provenance, set(SteeringVector.__dataclass_fields__) - {"vector"}, f"{asked}, provenance")
    kept = {**provenance, "stream_norm": float(provenance["stream_norm"])}  # NaN is stored as text
    made: SteeringVector = guarded(lambda: SteeringVector.from_provenance(vector, kept), asked)
    return made


def guarded(make: Callable[[], Any], asked: str) -> Any:
    """Return make(), whatever it refuses as a StoreError that says where in the file it was."""
    try:
        return make()
    except StoreError:
        raise
    except InterveneError as error:
        raise StoreError(f"{asked}: {error}") from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise StoreError(f"{asked}: its values do not fit together ({error}). Save the plan again.") from error


def _check_finite(tensors: Tensors, asked: str) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise StoreError(f"{asked}: its {name} has NaN or infinite entries. Fit it again, at a lower rate perhaps.")


def _exact_tensors(found: Tensors, wanted: Tensors, asked: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    asks = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    if shapes != asks:
        raise StoreError(f"{asked}: tensors {shapes} were stored, {asks} are needed. Save the plan again.")
