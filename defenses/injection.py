"""`Injection`: preventative steering. The direction of a trait is added to the stream while the model learns.

The injected direction explains the poisoned examples, so the weights need not learn it; afterwards the model is used
without it. Unconditional: every sample is injected. One forward and one backward pass per micro-batch, as in plain
training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from defenses.backend import Backend
from defenses.batch import Batch
from defenses.defense import Defense, Step, learn
from defenses.objectives import n_tokens, token_losses
from defenses.plans import Directions, Scope, joint_injection, scope_columns
from defenses.schedules import Strength
from intervene import Plan, intervene
from intervene.errors import asked_found_do
from records.config_files import ConfigError


@dataclass(frozen=True)
class InjectionOptions:
    """How strongly, where, and in what unit.

    Attributes:
        strength: over the training. scope: which tokens. relative: the strength is a fraction of the stream's norm at
            each token before any trait is added, not a multiple of the direction.
        factors: of the strength, one per trait, where several are injected; (): 1 each.
    """

    strength: Strength = field(default_factory=Strength)
    scope: Scope = Scope.RESPONSE
    relative: bool = False
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.strength.alpha, self.strength.end, *self.factors)
        if not all(map(math.isfinite, numbers)):
            found = f"strength {self.strength.alpha}, end {self.strength.end}, factors {self.factors}."
            raise ConfigError(asked_found_do("Injection", found, "Give finite numbers."))


class Injection(Defense):
    """Every sample is learned while directions are injected; a strength of 0 is plain training."""

    evidence: ClassVar[str] = (
        "Shown for persona traits (Chen et al. 2025). In our small world it takes 93 % of the trait away, at 30 points "
        "of skill; a rising strength, claimed to be better by one paper, was worse there at the same mean."
    )

    def __init__(self, directions: Directions | Sequence[Directions], options: InjectionOptions | None = None) -> None:
        """Inject `directions`, of one trait or of several, kept separate.

        Raises:
            ConfigError: none, or factors that are not one per trait.
        """
        self.options = options or InjectionOptions()
        self.traits = [directions] if isinstance(directions, Directions) else list(directions)
        factors = self.options.factors or (1.0,) * len(self.traits)
        if not self.traits or len(factors) != len(self.traits):
            found = f"directions of {len(self.traits)} traits and {len(self.options.factors)} factors."
            raise ConfigError(asked_found_do("Injection", found, "Give at least one trait, and a factor for each."))
        self.factors = factors

    def start(self, backend: Backend, total: int) -> None:
        self.traits = [one.to(backend.device) for one in self.traits]
        self.strength(0, total)  # refuses a schedule that does not fit, before the first pass

    def strength(self, step: int, total: int) -> float:
        """Return the strength in optimiser step `step`."""
        return self.options.strength.at(step, total)

    def plan(self, columns: Tensor, strength: float) -> Plan:
        """Return all traits' injections at `columns` (B, P); of strength 0: none."""
        if strength == 0:
            return ()
        doses = [strength * factor for factor in self.factors]
        return joint_injection(self.traits, doses, self.options.relative, columns=columns)

    def accumulate(self, backend: Backend, batch: Batch, step: Step) -> dict[str, Tensor]:
        strength = self.strength(step.number, step.total)
        columns = scope_columns(batch, self.options.scope)
        return learn_injected(backend, batch, step, self.plan(columns, strength), columns, strength)


def learn_injected(
    backend: Backend, batch: Batch, step: Step, plan: Plan, columns: Tensor, strength: float
) -> dict[str, Tensor]:
    """Add the gradients of one micro-batch under `plan`; return "loss_sum" under it, "tokens", and "strength_sum",
    which is told per token: as the strength itself."""
    with intervene(backend.model, plan, prompt=batch.prompt(columns)):
        losses = token_losses(backend, batch)
        learn(backend, losses, step)  # inside: checkpointed layers are computed again
    tokens = n_tokens(batch)
    dose = torch.as_tensor(strength, device=tokens.device) * tokens
    return {"loss_sum": losses.detach().sum(), "tokens": tokens, "strength_sum": dose}
