"""Find the Hugging Face model inside whatever was passed, its blocks, and its fingerprint.

`unwrap` takes off the wrappers that are harmless to hooks and refuses the others. `locate` adds the family and the
list of blocks. `fingerprint` says which weights these are, so that a saved vector can refuse another model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from intervene.errors import InterveneError, UnknownFamily, UnsupportedModel, asked_found_do
from intervene.family_table import FAMILIES, Family
from intervene.guess import describe_unknown

# Class name, anywhere among a module's bases -> why its hooks cannot be trusted, what to do. By name, because
# importing torch.distributed.fsdp, torch._dynamo or deepspeed here would cost every user what few of them need.
_REFUSED = {
    "OptimizedModule": (
        "a compiled model has not been shown to honour hooks.",
        "Pass the model as it was before torch.compile.",
    ),
    "FullyShardedDataParallel": (
        "the first FSDP has not been shown to work.",
        "Shard the model with torch.distributed.fsdp.fully_shard (FSDP2).",
    ),
    "PipelineEngine": (
        "a pipeline of DeepSpeed has not been shown to work.",
        "Use an engine without pipeline parallelism.",
    ),
    "DataParallel": (
        "it copies the model on every forward pass, so hooks on the original never fire.",
        "Pass model.module, or use DistributedDataParallel.",
    ),
}
_Found = TypeVar("_Found")
_SAMPLES = 64  # values read from each parameter for the fingerprint


@dataclass(frozen=True)
class Located:
    """A model's parts: `layers[l]` is block l, found at `f"{path}.{family.layers}.{l}"` inside `hf`.

    `hf` is the model without wrappers. `backbone` is the module that owns the blocks and that every forward pass
    calls, at `path` inside `hf` ("" if it is `hf` itself).
    """

    hf: nn.Module
    backbone: nn.Module
    path: str
    family: Family
    model_type: str
    layers: tuple[nn.Module, ...]
    config: Any

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    @property
    def layers_path(self) -> str:
        """Dotted path of the list of blocks inside `hf`."""
        return join_path(self.path, self.family.layers)


def join_path(*parts: str | int) -> str:
    """Return the non-empty parts joined by dots."""
    return ".".join(str(part) for part in parts if part != "")


def walk(root: nn.Module, path: str) -> nn.Module | None:
    """Return the module at dotted `path` below `root`, or None where there is none."""
    module: nn.Module | None = root
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    return module


def _bases(kind: type) -> set[str]:
    return {base.__name__ for base in kind.__mro__}


def _is_engine(model: nn.Module) -> bool:
    bases = _bases(type(model))
    return "DeepSpeedEngine" in bases and not bases & _REFUSED.keys()


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "get_base_model") and any(
        base.__module__.split(".")[0] == "peft" for base in type(model).__mro__
    )


_HELD: ContextVar[dict[tuple[str, int], Any] | None] = ContextVar("_HELD", default=None)


@contextmanager
def located_once() -> Iterator[None]:
    """Look at each model only once inside the block, however many sites are resolved; blocks nest.

    Looking walks every module, which costs milliseconds. The block must be short: nobody may wrap, compile or change a
    model while it lasts.
    """
    token = None if _HELD.get() is not None else _HELD.set({})
    try:
        yield
    finally:
        if token is not None:
            _HELD.reset(token)


def _held(what: str, model: nn.Module, look: Callable[[nn.Module], _Found]) -> _Found:
    """Return `look(model)`, remembered inside a `located_once` block."""
    memory = _HELD.get()
    if memory is None:
        return look(model)
    key = (what, id(model))
    if key not in memory:
        memory[key] = look(model)
    found: _Found = memory[key]
    return found


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DeepSpeed engines and PEFT wrappers.

    A model that `fully_shard` (FSDP2) or ZeRO has cut is its own model still: its modules are called as ever, and their
    activations are whole; only its parameters are not.

    Raises:
        UnsupportedModel: it is, or holds, a compiled, FSDP1, pipelined or DataParallel module, or a PEFT
            prompt-learning adapter, which puts tokens of its own before the user's.
    """
    return _held("unwrap", model, _unwrap)


def _unwrap(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"Model: a torch module is needed, found {type(model).__name__}. Pass the model itself.")
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel) or _is_engine(model):
            model = model.get_submodule("module")
        elif _is_peft(model):
            model = _peft_base(model)
        else:
            break
    classes = {kind: _bases(kind) & _REFUSED.keys() for kind in {type(module) for module in model.modules()}}
    for name, module in model.named_modules():
        named = next(iter(classes[type(module)]), None)
        if named is None and getattr(module, "_compiled_call_impl", None) is not None:
            named = "OptimizedModule"
        if named is not None:
            where = f" (inside, at {name})" if name else ""
            raise UnsupportedModel(asked_found_do(f"Model of class {type(module).__name__}{where}", *_REFUSED[named]))
    return model


def _peft_base(model: Any) -> nn.Module:
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModel(
                asked_found_do(
                    f"PEFT adapter {name!r} of class {type(config).__name__}",
                    "prompt learning puts virtual tokens before the prompt, so positions would point elsewhere.",
                    "Use an adapter of another kind, such as LoRA, or pass the base model.",
                )
            )
    base: nn.Module = model.get_base_model()
    return base


def locate(model: nn.Module) -> Located:
    """Return the family of `model` and where its blocks are.

    Raises:
        UnknownFamily: no family is registered for its `config.model_type`, or the family's paths lead nowhere. The
            message has the line that registers one.
        UnsupportedModel: see `unwrap`; or the family does not handle a value of the configuration.
    """
    return _held("locate", model, _locate)


def _locate(model: nn.Module) -> Located:
    hf = unwrap(model)
    config = getattr(hf, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise UnknownFamily(describe_unknown(hf, model_type, FAMILIES))
    entry = FAMILIES[model_type]
    family = entry if isinstance(entry, Family) else entry(config)
    family.require(config, model_type)
    for path in family.backbones:
        backbone = walk(hf, path)
        blocks = None if backbone is None else walk(backbone, family.layers)
        if backbone is not None and blocks is not None:
            return Located(hf, backbone, path, family, model_type, _each(blocks), config)
    tried = ", ".join(join_path(path, family.layers) for path in family.backbones)
    raise UnknownFamily(
        f"Model of class {type(hf).__name__} with model_type {model_type!r}: its blocks are not where that family "
        f"keeps them (tried {tried}). {describe_unknown(hf, model_type, FAMILIES)}"
    )


def _each(blocks: nn.Module) -> tuple[nn.Module, ...]:
    """Return the blocks in order, one that stands twice twice: `children()` would hide that it is shared."""
    return tuple(block for block in blocks._modules.values() if block is not None)


def _base_parameters(hf: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that the model would have without its adapters, under the names they would have."""
    for name, parameter in hf.named_parameters():
        if "lora_" in name or ".modules_to_save." in name:
            continue
        yield re.sub(r"\.(base_layer|original_module)\b", "", name), parameter


def fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that name these weights: the first of a SHA-256.

    It covers every parameter's name and shape and 64 of its values, evenly spaced from first to last and rounded to
    bfloat16; so it is the same for a float32 and a bfloat16 load of one checkpoint, with or without LoRA adapters or
    DistributedDataParallel, on any device. It differs for quantised weights, and a change of only a few values
    between the 64 goes unseen: this guards against mix-ups, not against forgery.

    Raises:
        InterveneError: a parameter has no values, as on the meta device, or only some, cut by FSDP2 or ZeRO-3.
        UnsupportedModel: see `unwrap`.
    """
    digest = hashlib.sha256()
    samples: dict[torch.device, list[Tensor]] = {}
    named = sorted(_base_parameters(unwrap(model)), key=lambda pair: pair[0])
    for name, parameter in named:
        if hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id"):
            found = f"parameter {name} is cut over the ranks."
            raise InterveneError(asked_found_do("Fingerprint", found, "Take it before the model is sharded."))
        if parameter.is_meta or parameter.numel() == 0:
            raise InterveneError(
                asked_found_do(
                    "Fingerprint",
                    f"parameter {name} holds no values (device {parameter.device}, shape {tuple(parameter.shape)}).",
                    "Load the weights first.",
                )
            )
        flat = parameter.detach().reshape(-1)
        n = flat.numel()
        index = [i * (n - 1) // (_SAMPLES - 1) for i in range(_SAMPLES)]
        where = torch.tensor(index, device=flat.device)
        samples.setdefault(flat.device, []).append(flat[where].to(torch.bfloat16))
        digest.update(f"{name}:{tuple(parameter.shape)};".encode())
    # One transfer per device; the order of devices must not matter, so values are put back in the order of names.
    on_cpu = {device: iter(torch.stack(rows).view(torch.int16).cpu()) for device, rows in samples.items()}
    for _, parameter in named:
        digest.update(next(on_cpu[parameter.device]).numpy().astype("<i2").tobytes())
    return digest.hexdigest()[:16]
