"""`ModelState`: how a model computes at a moment, so that activations kept then are not taken for those of another.

    state = ModelState(model)                 # beside what is kept
    state.require_same(inside)                # before it is used: ModelChanged says what is different

Looked at are the modules and their forwards, train or eval mode, adapters, hooks, attention's implementation, autocast,
and of each weight its place, its version and one of its numbers (`.data` writes leave the version as it is). Looking
takes half a millisecond for a model of 400 modules. Gradients that are wanted or not change no activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from intervene.errors import ModelChanged, asked_found_do

_PLAIN = (nn.Parameter, Tensor)


class ModelState:
    """How `model` computes now; it keeps the modules, and views of their weights, alive."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._names = [name for name, _ in model.named_modules()]
        self._modules = list(model.modules())
        self._held = [module.__dict__ for module in self._modules]
        self._ways = list(map(_way, self._modules, self._held))
        self._hooks = [_hooks(held) for held in self._held]
        self._weights = [_weights(held) for held in self._held]
        self._around = _around(model)
        self._views = _views(model)
        self._numbers = _numbers(self._views)

    def require_same(self, inside: Sequence[nn.Module] = ()) -> None:
        """Refuse if the model computes otherwise by now, or if a hook came or went on or inside a module of `inside`.

        Raises:
            ModelChanged: saying what is different.
        """
        found = self.change(inside)
        if found:
            asked = f"Activations that were kept of this {type(self.model).__name__}"
            raise ModelChanged(
                asked_found_do(asked, f"since then {found}.", "Prepare the pairs, or the prefix, again.")
            )

    def change(self, inside: Sequence[nn.Module] = ()) -> str:
        """Return what is different, in words; "" if nothing is."""
        if (now := _around(self.model)) != self._around:
            pairs = zip(self._around, now, strict=True)
            return next(
                f"{name} was {before!r} and is {after!r}" for (name, before), (_, after) in pairs if before != after
            )
        for name, module, held, before in zip(self._names, self._modules, self._held, self._ways, strict=True):
            if before != _way(module, held):
                return f"{_named(name)} {_told(before, _way(module, held))}"
        for name, module, held, hooks in zip(self._names, self._modules, self._held, self._hooks, strict=True):
            if hooks != _hooks(held) and any(module in set(top.modules()) for top in inside):
                return f"a hook came or went on {_named(name)}, of whose work a part is not done again"
        for name, held, weights in zip(self._names, self._held, self._weights, strict=True):
            if weights != (now_weights := _weights(held)):
                which = next((a[0] for a, b in zip(weights, now_weights, strict=False) if a != b), "a weight")
                return f"{_named(name)} had {which} written or replaced"
        return "" if self._numbers == _numbers(self._views) else "a weight was written through .data"


def _way(module: nn.Module, held: dict[str, Any]) -> tuple[Any, ...]:
    """Return the children of a module, its forward, its mode, and what an adapter layer keeps beside its weights."""
    scaling, active = held.get("scaling"), held.get("_active_adapter")
    return (
        tuple(held["_modules"].values()),
        held.get("forward", type(module).forward),
        held["training"],
        held.get("_disable_adapters"),
        tuple(active) if isinstance(active, list) else active,
        tuple(scaling.items()) if isinstance(scaling, dict) else scaling,
    )


_WAYS = ("had a module below it replaced", "got another forward", "was put into train or eval mode",
         "had its adapters switched", "had its adapters switched", "had its scale changed")  # fmt: skip


def _told(before: tuple[Any, ...], now: tuple[Any, ...]) -> str:
    return next(text for text, a, b in zip(_WAYS, before, now, strict=True) if a != b)


def _hooks(held: dict[str, Any]) -> list[int]:
    both = held["_forward_hooks"], held["_forward_pre_hooks"]
    return [number for hooks in both if hooks for number, hook in hooks.items() if not idle(hook)]


def idle(hook: Any) -> bool:
    """Return whether `hook` is transformers' own, which stays after `output_hidden_states` and then does nothing."""
    return getattr(hook, "__name__", "") == "output_capturing_hook" and hook.__module__.startswith("transformers.")


def _weights(held: dict[str, Any]) -> list[tuple[str, int, int, int]]:
    """Return name, identity, version and place of a module's own weights; those that are offloaded come and go."""
    return [
        (name, id(one), -1 if one.is_inference() else one._version, one.data_ptr())
        for name, one in held["_parameters"].items()
        if type(one) in _PLAIN and one.device.type != "meta"
    ]


def _around(model: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Return what lies outside the modules and changes what they compute."""
    config = getattr(model, "config", None)
    return (
        ("the attention implementation", getattr(config, "_attn_implementation", None)),
        ("autocast on the CPU", torch.is_autocast_enabled("cpu")),
        ("autocast on the GPU", torch.is_autocast_enabled("cuda")),
        ("the number of hooks on all modules", len(all_hooks())),
    )


def all_hooks() -> tuple[int, ...]:
    """Return the handles of hooks that run on every module of every model."""
    return (*torch_module._global_forward_hooks, *torch_module._global_forward_pre_hooks)


def _views(model: nn.Module) -> list[Tensor]:
    """Return one number of each weight, where it lies."""
    return [
        one.detach().view(-1)[one.numel() // 2 :][:1]
        for one in model.parameters()
        if type(one) in _PLAIN and one.device.type != "meta" and one.numel() and one.is_contiguous()
    ]


def _numbers(views: Sequence[Tensor]) -> list[list[int]]:
    """Return their bytes, in which a NaN equals itself."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for one in views:
        groups.setdefault((one.device, one.dtype), []).append(one)
    return [torch.cat(group).view(torch.uint8).tolist() for group in groups.values()]


def _named(name: str) -> str:
    return f"module {name}" if name else "the model itself"
