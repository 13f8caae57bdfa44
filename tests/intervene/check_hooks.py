"""Raw torch hooks on taps, so that the families are tested without the hook layer that is built on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from intervene.families import Tap, resolve


def columns_of(tap: Tap) -> Any:
    """Return the tap's columns as an index of the last axis."""
    if tap.columns is None:
        return slice(None)
    return tap.columns if isinstance(tap.columns, slice) else list(tap.columns)


@contextmanager
def hooked(tap: Tap, visit: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Show the tap's whole tensor to `visit` in every forward pass; what it returns, if anything, takes its place."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = visit(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        new = visit(output if isinstance(output, Tensor) else output[tap.element])
        if new is None or isinstance(output, Tensor):
            return new
        if tap.rebuild is not None:
            return tap.rebuild(new, output)
        return (*output[: tap.element], new, *output[tap.element + 1 :])

    if tap.side == "input":
        handle = tap.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = tap.module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def changed(tap: Tap, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the tap's columns x by change(x) in every forward pass."""

    def edit(whole: Tensor) -> Tensor:
        new = whole.clone()
        new[..., columns_of(tap)] = change(whole[..., columns_of(tap)])
        return new

    with hooked(tap, edit):
        yield


@torch.no_grad()
def read(model: nn.Module, sites: Sequence[str], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the value of each site, (B, S, width), in one forward pass; each must be computed exactly once."""
    values: dict[str, Tensor] = {}
    shape = batch["input_ids"].shape

    def keeper(name: str, tap: Tap) -> Callable[[Tensor], None]:
        def keep(whole: Tensor) -> None:
            assert name not in values, f"{name} was computed twice in one forward pass"
            values[name] = tap.scale * whole.clone().view(*shape, -1)[..., columns_of(tap)]

        return keep

    with ExitStack() as stack:
        for name in sites:
            tap = resolve(model, name)
            stack.enter_context(hooked(tap, keeper(name, tap)))
        model(**batch)
    assert set(values) == set(sites), f"never computed: {set(sites) - set(values)}"
    return values


@torch.no_grad()
def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the model's logits, (B, S, V)."""
    result: Tensor = model(**batch).logits
    return result
