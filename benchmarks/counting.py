"""Exact counts: operations dispatched, and which of them the model's own forward made.

Both counts are the same on every machine. `OpCounter` sees each aten operation once, views included. `ForwardMeter`
notes how often embedding, blocks and final norm ran, so that a source run that stops early is charged with the
layers it ran and not with a whole forward.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class OpCounter(TorchDispatchMode):
    """Counts every aten operation dispatched inside its `with` block, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """How many operations were dispatched so far."""
        return self.names.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Parts:
    """The modules whose calls tell forwards apart."""

    embedding: nn.Module
    blocks: Sequence[nn.Module]
    norm: nn.Module


@dataclass
class Passes:
    """How often a run called each part."""

    embedding: int = 0
    blocks: list[int] = field(default_factory=list)
    norm: int = 0


@dataclass(frozen=True)
class ForwardCost:
    """Operations of one plain forward: up to the first block, in each block, after the last."""

    before: int
    blocks: tuple[int, ...]
    after: int

    @property
    def total(self) -> int:
        """Operations of the whole forward."""
        return self.before + sum(self.blocks) + self.after

    def of(self, passes: Passes) -> int:
        """Return how many operations of a run with these `passes` are the model's own."""
        blocks = sum(cost * calls for cost, calls in zip(self.blocks, passes.blocks, strict=True))
        return self.before * passes.embedding + blocks + self.after * passes.norm


class ForwardMeter:
    """Notes calls of a model's parts inside its `with` block, without a hook.

    Several peers remove every hook on a model, so the classes' `forward` is replaced instead and put back on exit.
    """

    def __init__(self, parts: Parts, counter: OpCounter) -> None:
        self.parts, self.counter = parts, counter
        self.passes = Passes(blocks=[0] * len(parts.blocks))
        self._starts: list[int] = []
        self._roles: dict[int, Callable[[], None]] = {
            id(parts.embedding): self._embedding,
            id(parts.norm): self._norm,
            **{id(block): functools.partial(self._block, index) for index, block in enumerate(parts.blocks)},
        }
        self._stack = ExitStack()

    def _embedding(self) -> None:
        self.passes.embedding += 1

    def _block(self, index: int) -> None:
        self.passes.blocks[index] += 1
        self._starts.append(self.counter.total)

    def _norm(self) -> None:
        self.passes.norm += 1
        self._starts.append(self.counter.total)

    def __enter__(self) -> ForwardMeter:
        for kind in {type(module) for module in (self.parts.embedding, *self.parts.blocks, self.parts.norm)}:
            self._watch(kind)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _watch(self, kind: type[Any]) -> None:
        original, own = kind.forward, "forward" in vars(kind)
        roles = self._roles

        @functools.wraps(original)
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            note = roles.get(id(module))
            if note is not None:
                note()
            return original(module, *args, **kwargs)

        def restore() -> None:
            if own:
                kind.forward = original
            else:
                del kind.forward

        kind.forward = forward
        self._stack.callback(restore)

    def cost(self) -> ForwardCost:
        """Return the cost of the one plain forward that ran inside the block, cut at the starts of the parts."""
        calls = len(self.parts.blocks)
        assert self.passes == Passes(1, [1] * calls, 1), f"not one plain forward: {self.passes}"
        starts, total = self._starts, self.counter.total
        blocks = tuple(starts[i + 1] - starts[i] for i in range(calls))
        return ForwardCost(before=starts[0], blocks=blocks, after=total - starts[-1])


@dataclass(frozen=True)
class Count:
    """One run, counted: operations beyond the model's own, forwards begun, blocks run, and the extra operations."""

    extra: int
    forwards: int
    blocks: int
    names: dict[str, int]


def plain_cost(parts: Parts, run: Callable[[], object]) -> tuple[ForwardCost, Counter[str]]:
    """Return the cost of the plain forward that `run` makes, and its operations by name."""
    with torch.no_grad(), OpCounter() as counter, ForwardMeter(parts, counter) as meter:
        run()
    return meter.cost(), counter.names


def count(parts: Parts, plain: ForwardCost, plain_names: Counter[str], run: Callable[[], object]) -> Count:
    """Return what `run` costs beyond the parts of plain forwards it makes.

    `names` are the operations beyond as many whole plain forwards as were begun; those missing from a forward that
    stopped early show as negative.
    """
    with torch.no_grad(), OpCounter() as counter, ForwardMeter(parts, counter) as meter:
        run()
    passes = meter.passes
    names = {
        name: difference
        for name in {*counter.names, *plain_names}
        if (difference := counter.names[name] - passes.embedding * plain_names[name])
    }
    extra = counter.total - plain.of(passes)
    return Count(extra, passes.embedding, sum(passes.blocks), dict(sorted(names.items(), key=lambda item: -item[1])))
