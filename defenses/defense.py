"""What a defense is: in charge between `zero_grad` and the optimiser's step, on every rank alike.

`Step` says where training is. A defense leaves the gradients of one micro-batch at a time; every rank makes the same
number of forward and backward passes whatever it decides about its samples: a blocked sample is weighted with zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from defenses.backend import Backend
from defenses.batch import Batch
from defenses.objectives import n_tokens, token_losses


@dataclass(frozen=True)
class Step:
    """Where training is.

    Attributes:
        number: optimiser step, from 0. total: of the whole training. micro, micros: which micro-batch of this step on
            this rank, of how many.
        tokens: learned tokens of the whole step: all ranks, all micro-batches; at least 1. samples: its samples.
    """

    number: int
    total: int
    micro: int
    micros: int
    tokens: int
    samples: int

    @property
    def last(self) -> bool:
        """Whether this is the last micro-batch before the optimiser's step."""
        return self.micro == self.micros - 1

    @property
    def progress(self) -> float:
        """Share of the training that is done when this step begins."""
        return self.number / self.total


class Defense(ABC):
    """One way to train on data that may be poisoned. Subclasses are final.

    `evidence` says in a sentence what is known about it, and is shown wherever the method is named.
    """

    evidence: ClassVar[str] = ""

    def start(self, backend: Backend, total: int) -> None:
        """Prepare for `total` steps; called once, after `load_state_dict` where a run is resumed."""
        return None

    @abstractmethod
    def accumulate(self, backend: Backend, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Leave the gradients of one micro-batch and return sums of what is to be told of it.

        Keys are the same in every call and on every rank. The loop adds them up over micro-batches and ranks;
        "loss_sum" and "tokens" are required, and "X_sum" is shown as X per token.
        """

    def before_step(self, backend: Backend, step: Step) -> None:
        """Change the gradients of the step, before clipping; `step` is that of its last micro-batch."""
        return None

    def after_step(self, backend: Backend, step: Step) -> None:
        """Change the weights, after the optimiser has."""
        return None

    def told(self) -> list[dict[str, Any]]:
        """Return rows per sample since the last call (scores, decisions) of this rank's samples."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumption needs: thresholds, anchors, counters; tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` left off."""
        return None


def learn(backend: Backend, losses: Tensor, step: Step) -> None:
    """Add the gradient of `losses` (B, S), summed and divided by the step's tokens."""
    backend.backward(losses.sum() / step.tokens, last=step.last)


class Sft(Defense):
    """Plain supervised fine-tuning: mean cross-entropy over all response tokens of the step."""

    evidence = "The attack itself, and the reference of every comparison."

    def accumulate(self, backend: Backend, batch: Batch, step: Step) -> dict[str, Tensor]:
        losses = token_losses(backend, batch)
        learn(backend, losses, step)
        return {"loss_sum": losses.detach().sum(), "tokens": n_tokens(batch)}
