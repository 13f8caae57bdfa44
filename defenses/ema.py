"""EMA: train as another defense does, and evaluate and save an exponential moving average of the weights.

    defense = Ema(EmaOptions(horizon=100))
    with defense.averaged(backend):
        evaluate(backend.model)                 # or backend.weights(), to save

The baseline that every defense has to beat: it costs no data and no knowledge of the trait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from defenses.backend import Backend
from defenses.batch import Batch
from defenses.defense import Defense, Sft, Step
from defenses.errors import DefenseError
from defenses.schedules import at_step
from intervene.errors import asked_found_do
from records.config_files import ConfigError


@dataclass(frozen=True)
class EmaOptions:
    """How far back the average reaches.

    Attributes:
        horizon: in optimiser steps, at least 1: one step forgets 1/horizon, so decay = 1 - 1/horizon (1: no
            averaging). every: steps between two readings of the weights; each then forgets as much as `every` steps
            would, and reading costs a copy of the model to the CPU. onset: share or step from which it averages.

    Raises:
        ConfigError: a horizon or `every` below 1.
    """

    horizon: float = 100.0
    every: int = 1
    onset: float = 0.0

    def __post_init__(self) -> None:
        if not self.horizon >= 1 or self.every < 1:
            asked = f"EMA with a horizon of {self.horizon} steps, read every {self.every}"
            raise ConfigError(asked_found_do(asked, "both count steps.", "Give numbers from 1."))

    @property
    def decay(self) -> float:
        """What one reading keeps of the average."""
        return float((1 - 1 / self.horizon) ** self.every)


class Ema(Defense):
    """Another defense, plain SFT by default, whose result is the average of its weights.

    After n readings w_1..w_n the average is sum_i d^(n-i) w_i / sum_i d^(n-i), d the decay: the starting weights are
    not in it, and there is no bias towards them or towards zero. It is kept in fp32 on the CPU of every rank.
    """

    evidence: ClassVar[str] = (
        "A baseline that costs nothing; averaging alone lowers some traits, so a defense has to beat it."
    )

    def __init__(self, options: EmaOptions | None = None, inner: Defense | None = None) -> None:
        """Average the weights that `inner` trains."""
        self.options = options or EmaOptions()
        self.inner = inner or Sft()
        self.average: dict[str, Tensor] = {}
        self.readings = 0
        self._onset = 0

    def start(self, backend: Backend, total: int) -> None:
        """Begin; a training that ends before the first reading is refused.

        Raises:
            ConfigError: it has fewer than onset + every steps.
        """
        self._onset = at_step(self.options.onset, total)
        if self._onset + self.options.every > total:
            asked = f"EMA from step {self._onset} on, read every {self.options.every}"
            found = f"the training has {total} steps, so that the weights would never be read."
            raise ConfigError(asked_found_do(asked, found, "Choose a smaller onset or `every`, or train longer."))
        self.inner.start(backend, total)

    def accumulate(self, backend: Backend, batch: Batch, step: Step) -> dict[str, Tensor]:
        return self.inner.accumulate(backend, batch, step)

    def before_step(self, backend: Backend, step: Step) -> None:
        self.inner.before_step(backend, step)

    def after_step(self, backend: Backend, step: Step) -> None:
        self.inner.after_step(backend, step)
        done = step.number + 1
        if done > self._onset and (done - self._onset) % self.options.every == 0:
            self._read(backend)

    def _read(self, backend: Backend) -> None:
        self.readings += 1
        decay = self.options.decay
        share = (1 - decay) / (1 - decay**self.readings) if decay else 1.0  # 1 at the first reading
        for name in backend.parameters():
            value = backend.value(name).cpu()
            held = self.average.get(name)
            self.average[name] = value if held is None else torch.lerp(held, value, share)

    @contextmanager
    def averaged(self, backend: Backend, *, early: bool = False) -> Iterator[None]:
        """Let the model have the average weights inside the block; collective. Nothing may be trained inside.

        Args:
            early: before the first reading the weights stay as they are, instead of the error.

        Raises:
            DefenseError: no reading was made yet.
        """
        if not self.readings and not early:
            asked = f"The average weights, from step {self._onset} on and every {self.options.every}"
            raise DefenseError(asked_found_do(asked, "no such step was made yet.", "Train on, or average earlier."))
        trained = {name: backend.value(name).cpu() for name in self.average}
        try:
            for name, value in self.average.items():
                backend.write(name, value.to(backend.device))
            yield
        finally:
            for name, value in trained.items():
                backend.write(name, value.to(backend.device))

    def told(self) -> list[dict[str, Any]]:
        return self.inner.told()

    def state_dict(self) -> dict[str, Any]:
        return {"average": dict(self.average), "readings": self.readings, "inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = {name: value.clone() for name, value in state["average"].items()}
        self.readings = state["readings"]
        self.inner.load_state_dict(state["inner"])
