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
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree
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
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs, out))):
            self.names[str(func)] += 1  # what only compares dtypes is no work
        return out


@dataclass(frozen=True)
class Parts:
    """The modules whose calls tell forwards apart."""

    embedding: nn.Module
    blocks: Sequence[nn.Module]
    norm: nn.Module


class HasTotal(Protocol):
    """A counter that can be read at any moment."""

    @property
    def total(self) -> int:
        """What was counted so far."""
        ...


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

    Several peers remove every hook on a model, so the modules' `forward` is replaced instead and put back on exit.
    """

    def __init__(self, parts: Parts, counter: HasTotal) -> None:
        self.parts, self.counter = parts, counter
        self.passes = Passes(blocks=[0] * len(parts.blocks))
        self._starts: list[int] = []
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
        self._watch(self.parts.embedding, self._embedding)
        for index, block in enumerate(self.parts.blocks):
            self._watch(block, functools.partial(self._block, index))
        self._watch(self.parts.norm, self._norm)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _watch(self, module: nn.Module, note: Callable[[], None]) -> None:
        original, own = module.forward, vars(module).get("forward")

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            note()
            return original(*args, **kwargs)

        def restore() -> None:
            del vars(module)["forward"]
            if own is not None:
                vars(module)["forward"] = own

        vars(module)["forward"] = forward  # not by attribute: wrappers redirect those
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

    Raises:
        ValueError: the run did not use the model whose parts these are; every number would be wrong.
    """
    with torch.no_grad(), OpCounter() as counter, ForwardMeter(parts, counter) as meter:
        run()
    passes = meter.passes
    if not passes.embedding:
        raise ValueError("Count of a run: it never called the model that is watched. Run that model, not a copy of it.")
    names = {
        name: difference
        for name in {*counter.names, *plain_names}
        if (difference := counter.names[name] - passes.embedding * plain_names[name])
    }
    extra = counter.total - plain.of(passes)
    return Count(extra, passes.embedding, sum(passes.blocks), dict(sorted(names.items(), key=lambda item: -item[1])))
