"""The only file that registers a hook, or puts another forward in a module's place.

One real hook per module and side serves every block that watches it: callbacks run in the order the blocks were
entered (so inner blocks see what outer ones wrote), before any hook of the user's or of transformers', and the real
hook goes when its last callback goes. Nobody else's hook is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from intervene.errors import ShapeMismatch, UnsupportedModel
from intervene.families import Tap

Watcher = Callable[[Tensor], "Tensor | None"]
InputWatcher = Callable[[tuple[Any, ...], dict[str, Any]], None]


@dataclass
class _Call:
    """One call of a hooked module: what went in and, on the output side, what came out."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


class _Dispatcher:
    """The callbacks on one side of one module, behind one real hook."""

    def __init__(self, module: nn.Module, side: str) -> None:
        self.callbacks: list[Callable[[_Call], None]] = []
        if side == "input":
            self.handle = module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
        else:
            self.handle = module.register_forward_hook(self._after, prepend=True, with_kwargs=True)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = _Call(module, args, kwargs)
        for callback in tuple(self.callbacks):
            callback(call)
        return call.args, call.kwargs

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = _Call(module, args, kwargs, output)
        for callback in tuple(self.callbacks):
            callback(call)
        return call.output


_DISPATCHERS: WeakKeyDictionary[nn.Module, dict[str, _Dispatcher]] = WeakKeyDictionary()


def _attach(stack: ExitStack, module: nn.Module, side: str, callback: Callable[[_Call], None]) -> None:
    """Run `callback` on every call of `module` until `stack` closes."""
    sides = _DISPATCHERS.setdefault(module, {})
    if side not in sides:
        sides[side] = _Dispatcher(module, side)
    dispatcher = sides[side]
    dispatcher.callbacks.append(callback)

    def detach() -> None:
        dispatcher.callbacks.remove(callback)
        if not dispatcher.callbacks:
            dispatcher.handle.remove()
            del sides[side]

    stack.callback(detach)


def watch_call(
    stack: ExitStack,
    module: nn.Module,
    before: InputWatcher | None = None,
    after: Callable[[Any], None] | None = None,
) -> None:
    """Call `before(args, kwargs)` ahead of every call of `module`, and `after(output)` behind it, until `stack` closes.

    `after` also runs, with None, when the module's forward raised.
    """
    if before is not None:
        _attach(stack, module, "input", lambda call: before(call.args, call.kwargs))
    if after is not None:
        handle = module.register_forward_hook(lambda _m, _a, output: after(output), always_call=True)
        stack.callback(handle.remove)


def watch_tap(stack: ExitStack, tap: Tap, watcher: Watcher) -> None:
    """Show `watcher` the tensor at `tap` on every call, and put what it returns (if not None) in its place.

    The tensor is the whole one that the module reads or returns, before `tap.columns` are cut, except that for expert
    sites it holds the chosen experts' weighted contributions side by side.
    """

    def callback(call: _Call) -> None:
        if torch.compiler.is_compiling():
            raise UnsupportedModel(
                f"Site {tap.site}: the model is being compiled while an intervention is active, which has not been "
                "shown to work. Use the uncompiled model."
            )
        before = _experts_read(call, tap) if tap.experts is not None else _read(call, tap)
        after = watcher(before)
        if after is None:
            return
        if tap.experts is not None:
            after = _experts_write(_read(call, tap), before, after)
        _write(call, tap, after)

    _attach(stack, tap.module, tap.side, callback)


def _read(call: _Call, tap: Tap) -> Tensor:
    if tap.side == "input":
        value = call.args[0] if call.args else call.kwargs.get("hidden_states", next(iter(call.kwargs.values()), None))
    else:
        value = call.output[tap.element] if isinstance(call.output, (tuple, list)) else call.output
    if not isinstance(value, Tensor):
        raise ShapeMismatch(
            f"Site {tap.site}: the {tap.side} of {tap.path} is a {type(value).__name__}, not a tensor. "
            "Name another module."
        )
    return value


def _write(call: _Call, tap: Tap, value: Tensor) -> None:
    if tap.side == "output":
        if tap.rebuild is not None:
            call.output = tap.rebuild(value, call.output)
        elif isinstance(call.output, (tuple, list)):
            items = list(call.output)
            items[tap.element] = value
            # a NamedTuple (torch's own RNN outputs are plain tuples) is rebuilt field by field
            fields = hasattr(call.output, "_fields")
            call.output = type(call.output)(*items) if fields else type(call.output)(items)
        else:
            call.output = value
    elif call.args:
        call.args = (value, *call.args[1:])
    else:
        name = "hidden_states" if "hidden_states" in call.kwargs else next(iter(call.kwargs))
        call.kwargs = {**call.kwargs, name: value}


def _experts_read(call: _Call, tap: Tap) -> Tensor:
    """Return (..., n*D): contribution of each chosen expert, from the module's own forward with other weights zeroed.

    The module's output is linear in the routing weights, so the contributions of all experts add up to it.
    """
    assert tap.experts is not None
    names = ("hidden_states", "top_k_index", "top_k_weights")
    positional = dict(zip(names, call.args, strict=False))
    values = {**positional, **call.kwargs}
    index, weights = values["top_k_index"], values["top_k_weights"]
    parts: list[Tensor] = []
    for expert in tap.experts:
        only = torch.where(index == expert, weights, torch.zeros_like(weights))
        parts.append(call.module.forward(values["hidden_states"], index, only))  # .forward: our hook must not recur
    return torch.cat(parts, dim=-1)


def _experts_write(output: Tensor, before: Tensor, after: Tensor) -> Tensor:
    width = output.shape[-1]
    change = (after - before).reshape(*output.shape[:-1], -1, width)  # (..., n, D)
    return output + change.sum(-2)


@contextmanager
def replaced(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Give each module another forward until the block ends; its hooks run, its class and tree stay."""
    before = [(module, module.__dict__.get("forward")) for module, _ in forwards]  # accelerate puts one there too
    try:
        for module, forward in forwards:
            module.forward = forward  # an instance attribute
        yield
    finally:
        for module, own in before:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own
