"""`train`: the loop. It owns the order of the data, the rate, checkpoints, records and the end; nothing about methods.

Every rank calls `train` with the same arguments. A step's batch is cut over the ranks, so what is learned does not
depend on how many there are. Statistics are summed over micro-batches and ranks before anybody reads them.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from defenses.backend import Backend
from defenses.batch import Batch
from defenses.defense import Defense, Step
from defenses.errors import TrainingError
from defenses.objectives import n_tokens
from defenses.schedules import Rate
from intervene.errors import asked_found_do


class Feed(Protocol):
    """Where micro-batches come from: the same for every number of ranks, and known for any step at once."""

    def indices(self, step: int) -> Sequence[int]:
        """Return the examples of a step, of all ranks, for messages."""
        ...

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        """Return the micro-batches of one rank in a step; every rank gets as many."""
        ...


@dataclass(frozen=True)
class Training:
    """How long and how fast.

    Attributes:
        steps: optimiser steps in all. save_every: steps between checkpoints; 0: none. log_every: between rows.
    """

    steps: int
    rate: Rate
    save_every: int = 0
    log_every: int = 1


@dataclass(eq=False)
class Watch:
    """What is called while training goes on; all of it may be left out.

    Attributes:
        row: takes each step's numbers on rank 0. samples: takes rows per sample, on every rank. save: writes a
            checkpoint of the state after so many steps, on every rank. ended: "" or why training should end early.
    """

    row: Callable[[dict[str, float]], None] = lambda row: None
    samples: Callable[[int, list[dict[str, Any]]], None] = lambda step, rows: None
    save: Callable[[int], None] = lambda step: None
    evaluate: Callable[[int], Any] = lambda step: None
    stop: StopRequest | None = None


@dataclass(eq=False)
class StopRequest:
    """Set by a signal; read by every rank after each step, which then all save and end together."""

    reason: str = ""
    _before: dict[int, Any] = field(default_factory=dict)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take SIGTERM and Ctrl-C as requests inside the block; a second Ctrl-C interrupts at once."""

        def asked(number: int, frame: Any) -> None:
            if self.reason and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.reason = signal.Signals(number).name

        for one in (signal.SIGTERM.value, signal.SIGINT.value):
            self._before[one] = signal.signal(one, asked)
        try:
            yield self
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)


@dataclass(frozen=True)
class Ended:
    """How a training ended: after how many steps, and the signal that asked for it ("": it was finished)."""

    steps: int
    reason: str = ""


def train(
    backend: Backend, defense: Defense, feed: Feed, training: Training, *, start: int = 0, watch: Watch | None = None
) -> Ended:
    """Train from step `start` to the end, or until a stop is asked for; a checkpoint is then written first.

    Raises:
        TrainingError: a loss or a gradient norm is not finite: nothing was changed by that step, the last checkpoint
            stays, and the examples of the step are named.
    """
    watch = watch or Watch()
    defense.start(backend, training.steps)
    clock = time.perf_counter()
    for number in range(start, training.steps):
        rate = training.rate.at(number, training.steps)
        sums, step = _gradients(backend, defense, feed, number, training.steps)
        _require_finite(sums, feed, number)
        defense.before_step(backend, step)
        try:
            norm = backend.step(rate)
        except TrainingError as error:
            raise TrainingError(f"{_where(feed, number)}: {error}") from None
        defense.after_step(backend, step)
        watch.samples(number, defense.told())
        done = number + 1
        if backend.rank == 0 and (done % training.log_every == 0 or done == training.steps):
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            watch.row({"step": done, **shown(sums), "grad_norm": norm, "lr": rate, "seconds": seconds})
        watch.evaluate(done)
        reason = _asked_to_stop(backend, watch.stop)
        # The last step too: what follows (weights, evaluation) may fail, and would cost the training.
        if reason or (training.save_every and (done % training.save_every == 0 or done == training.steps)):
            watch.save(done)
        if reason and done < training.steps:
            return Ended(done, reason)
    return Ended(training.steps)


def _gradients(
    backend: Backend, defense: Defense, feed: Feed, number: int, total: int
) -> tuple[dict[str, float], Step]:
    """Leave the gradients of one step; return the sums of its statistics over everything, and its last `Step`."""
    batches = [batch.to(backend.device) for batch in feed.batches(number, backend.rank, backend.world)]
    own = torch.tensor([sum(int(n_tokens(one)) for one in batches), sum(map(len, batches))], device=backend.device)
    tokens, samples = backend.sum(own).tolist()
    sums: dict[str, Tensor] = {}
    for micro, batch in enumerate(batches):
        step = Step(number, total, micro, len(batches), max(1, int(tokens)), int(samples))
        for name, value in defense.accumulate(backend, batch, step).items():
            sums[name] = sums.get(name, 0.0) + value.detach().double()
    names = sorted(sums)
    totals = backend.sum(torch.stack([sums[name].to(backend.device) for name in names])).tolist()
    return dict(zip(names, totals, strict=True)), step


def shown(sums: dict[str, float]) -> dict[str, float]:
    """Return sums as they are told: "loss_sum" as loss per token, all others as they are."""
    tokens = max(1.0, sums.get("tokens", 1.0))
    return {
        (name.removesuffix("_sum") if name.endswith("_sum") else name): value / tokens
        if name.endswith("_sum")
        else value
        for name, value in sums.items()
    }


def _require_finite(sums: dict[str, float], feed: Feed, number: int) -> None:
    if not math.isfinite(sums["loss_sum"]):
        found = f"the loss is {sums['loss_sum']}. Nothing was changed by this step."
        do = "Look at these examples, lower the learning rate, or use fp32; the last checkpoint is as it was."
        raise TrainingError(asked_found_do(_where(feed, number), found, do))


def _where(feed: Feed, number: int) -> str:
    indices = list(feed.indices(number))
    named = ", ".join(map(str, indices[:16])) + (", ..." if len(indices) > 16 else "")
    return f"Step {number + 1} (examples {named})"


def _asked_to_stop(backend: Backend, stop: StopRequest | None) -> str:
    """Return the signal that any rank got, the same on all ranks."""
    if stop is None:
        return ""
    asked = signal.Signals[stop.reason].value if stop.reason else 0
    number = int(backend.max(torch.tensor(asked, device=backend.device)))
    return signal.Signals(number).name if number else ""
