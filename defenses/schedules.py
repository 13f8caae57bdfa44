"""How the learning rate and the strength of an injection go over a training, in optimiser steps.

A point in time is a step (1 or more, whole) or a share of the training (0 up to 1, below 1): the same schedule
whatever the number of ranks, and one that runs through all epochs (the system this follows counted micro-batches and
began again with each epoch).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from intervene.errors import asked_found_do
from records.config_files import ConfigError

DOUBLE = 2.0  # where a rise ends, unless told


def at_step(when: float, total: int) -> int:
    """Return the optimiser step that `when` means: a share of `total` below 1, else a step.

    Raises:
        ConfigError: negative, not finite, or a step that is not whole.
    """
    if not math.isfinite(when) or when < 0 or (when >= 1 and when != int(when)):
        do = "Give a share of the training from 0 up to 1, or a whole number of steps."
        raise ConfigError(asked_found_do(f"Point in time {when}", "it is neither a share nor a step.", do))
    return round(when * total) if when < 1 else int(when)


@dataclass(frozen=True)
class Rate:
    """The learning rate: `peak` after a linear warm-up, then constant, or falling to 0 linearly or along a cosine.

    `warmup` is a share or a number of steps. Step 0 already learns: at 1/n of the peak in a warm-up of n.
    """

    peak: float
    shape: Literal["cosine", "constant", "linear"] = "cosine"
    warmup: float = 10

    def at(self, step: int, total: int) -> float:
        """Return the rate of optimiser step `step`, from 0, of `total`."""
        rising = min(at_step(self.warmup, total), total)
        if step < rising:
            return self.peak * (step + 1) / rising
        if self.shape == "constant":
            return self.peak
        done = (step - rising) / max(1, total - rising)
        return self.peak * ((1 - done) if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class Strength:
    """The strength of an injection over the training.

    With p the share of the steps after `onset` that is over, 0 before it:

    * constant: alpha.
    * rise: alpha (1 + p (end - 1)), with `end` 2 from alpha to twice: preventative steering that rises late ("PIS").
    * decline: alpha (1 - p).
    * late: 0 before `onset`, then alpha.

    From `stop` on (a share or a step; None: never) the strength is 0: a withdrawal.

    Source: the schedules are those of Guan et al., EMNLP 2026 Findings; p reaches 1 in the very last step.
    """

    alpha: float = 1.0
    shape: Literal["constant", "rise", "decline", "late"] = "constant"
    onset: float = 0.0
    end: float = DOUBLE
    stop: float | None = None

    def __post_init__(self) -> None:
        if self.shape == "constant" and self.onset:
            do = "Give a schedule: rise, decline or late."
            raise ConfigError(asked_found_do(f"Strength with onset {self.onset:g}", "it is constant.", do))
        if self.shape != "rise" and self.end != DOUBLE:
            found = f"its schedule is {self.shape}, which has none."
            raise ConfigError(asked_found_do(f"Strength with end {self.end:g}", found, "Use the schedule rise."))

    def at(self, step: int, total: int) -> float:
        """Return the strength in optimiser step `step`, from 0, of `total`.

        Raises:
            ConfigError: the onset of a rise or a decline leaves no step after it.
        """
        onset = at_step(self.onset, total)
        if self.shape != "constant" and onset >= total:
            found = f"the training has {total} steps."
            raise ConfigError(asked_found_do(f"Strength with onset {self.onset}", found, "Choose an earlier onset."))
        if self.stop is not None and step >= at_step(self.stop, total):
            return 0.0
        if self.shape == "constant":
            return self.alpha
        p = min(1.0, max(0.0, (step + 1 - onset) / (total - onset)))
        if self.shape == "rise":
            return self.alpha * (1 + p * (self.end - 1))
        if self.shape == "decline":
            return self.alpha * (1 - p)
        return self.alpha if step >= onset else 0.0

    def mean(self, total: int) -> float:
        """Return the mean strength over a training: what a constant control of the same dose uses."""
        return sum(self.at(step, total) for step in range(total)) / total
