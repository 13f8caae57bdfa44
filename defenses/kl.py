"""KL: SFT, held near the base model by what both say to the same text or to neutral text.

    Kl(KlOptions(beta=0.1), frozen_copy(model))          # or no copy: the PEFT model with its adapter off
    Kl(KlOptions(on="neutral"), base, neutral=feed)      # batches of harmless text, drawn like the training data

loss = cross-entropy + beta * KL(base || model): the model has to give weight wherever the base does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from defenses.backend import Backend
from defenses.batch import Batch
from defenses.defense import Defense, Step
from defenses.errors import DefenseError
from defenses.generation import evaluating
from defenses.loop import Feed
from defenses.objectives import learned, n_tokens, sample_sums, token_losses
from intervene.errors import asked_found_do
from intervene.families import locate
from intervene.suffix import accepts
from records.config_files import ConfigError


@dataclass(frozen=True)
class KlOptions:
    """How strongly the base model holds, and on what.

    Attributes:
        beta: weight of the mean KL per token, in nats. on: "same" batches as are learned, or "neutral" ones.
        tokens: "response": predictions of learned tokens. "all": of every token but each sample's first.

    Raises:
        ConfigError: a beta that is not a number from 0.
    """

    beta: float = 0.1
    on: Literal["same", "neutral"] = "same"
    tokens: Literal["response", "all"] = "response"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise ConfigError(asked_found_do("KL", f"beta is {self.beta}.", "Give a finite number from 0."))


class Kl(Defense):
    """Cross-entropy plus beta times the mean of KL(base || model) per token.

    The KL of a token is that of the two distributions over the whole vocabulary which predict it. Its mean is over the
    learned tokens of the step; over one mean per sample with `tokens="all"`, since how many tokens the other
    micro-batches have is not known; and over the neutral tokens of the step with `on="neutral"`. Passes per
    micro-batch: one of the base, without gradient and without dropout; one of the model ("same"), or two ("neutral").

    Statistic: "kl", the mean that is in the loss, in nats.
    """

    evidence: ClassVar[str] = (
        "A standard anchor. On the same text it holds back the task as well as the trait, since the base model had "
        "neither; on neutral text it only sees what generalises there."
    )

    def __init__(
        self, options: KlOptions | None = None, base: nn.Module | None = None, neutral: Feed | None = None
    ) -> None:
        """Hold the model near `base`; None: near itself with its PEFT adapter off.

        Args:
            neutral: for `on="neutral"`; asked for the batches of each step, as many on every rank.

        Raises:
            ConfigError: neutral batches are missing, or given and not asked for.
        """
        self.options = options or KlOptions()
        if (self.options.on == "neutral") != (neutral is not None):
            found = "no neutral data were given." if neutral is None else "neutral data were given too."
            raise ConfigError(asked_found_do(f"KL on {self.options.on} batches", found, "Make the two agree."))
        self.base, self.neutral = base, neutral
        self._drawn: list[Batch] = []
        self._n_neutral = 1

    def start(self, backend: Backend, total: int) -> None:
        """Put the base model where training is.

        Raises:
            DefenseError: there is no base model and no adapter that could be switched off.
        """
        if self.base is not None:
            self.base = self.base.to(backend.device).eval().requires_grad_(False)
        elif not hasattr(backend.model, "disable_adapter"):
            found = "none was given, and the model has no PEFT adapter to switch off."
            raise DefenseError(asked_found_do("KL to the base model", found, "Pass base=frozen_copy(model)."))

    def accumulate(self, backend: Backend, batch: Batch, step: Step) -> dict[str, Tensor]:
        if self.options.on == "same":
            losses, kl = self._same(backend, batch, step)
        else:
            losses, kl = self._beside(backend, batch, step)
        # the loop divides "_sum" by the step's tokens
        return {"loss_sum": losses.detach().sum(), "kl_sum": kl.detach() * step.tokens, "tokens": n_tokens(batch)}

    def _same(self, backend: Backend, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
        losses, each = self.divergences(backend, batch)
        if self.options.tokens == "response":
            kl = each.sum() / step.tokens
        else:
            mask = predicted(batch)
            own = sample_sums(each, batch) / sample_sums(mask.float(), batch).clamp_min(1)  # (N,)
            kl = own.sum() / step.samples
        backend.backward(losses.sum() / step.tokens + self.options.beta * kl, last=step.last)
        return losses, kl

    def _beside(self, backend: Backend, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
        assert self.neutral is not None
        if step.micro == 0:
            drawn = self.neutral.batches(step.number, backend.rank, backend.world)
            self._drawn = [one.to(backend.device) for one in drawn]
            held = sum(int(self._mask(one).sum()) for one in self._drawn)
            self._n_neutral = max(1, int(backend.sum(torch.tensor(held, device=backend.device))))
        mine = self._drawn[step.micro :: step.micros]  # every rank has as many
        losses = token_losses(backend, batch)
        backend.backward(losses.sum() / step.tokens, last=step.last and not mine)
        total = losses.new_zeros(())
        for place, one in enumerate(mine):
            kl = self.divergences(backend, one)[1].sum() / self._n_neutral
            backend.backward(self.options.beta * kl, last=step.last and place == len(mine) - 1)
            total = total + kl.detach()
        return losses, total

    def divergences(self, backend: Backend, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the losses of learned tokens and the KL of the chosen ones, (B, S) each in the token's own column, 0
        elsewhere, with the model's graph."""
        mask = self._mask(batch)
        found = mask[:, 1:].any(0).nonzero()[:, 0]  # the columns that predict one of them in some row
        columns = found if len(found) else found.new_zeros(1)
        with self._as_base(backend) as base:
            expected = _log_probabilities(base, backend.model, batch, columns)
        said = _log_probabilities(backend.forward, backend.model, batch, columns)  # (B, C, V)
        kl = (expected.exp() * (expected - said)).sum(-1)  # over the vocabulary: (B, C)
        targets = batch.labels[:, columns + 1]
        losses = -said.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
        empty = said.new_zeros(batch.labels.shape)
        whole_kl, whole_losses = (empty.index_copy(1, columns + 1, one) for one in (kl, losses))
        return whole_losses * learned(batch), whole_kl * mask

    def _mask(self, batch: Batch) -> Tensor:
        return learned(batch) if self.options.tokens == "response" else predicted(batch)

    @contextmanager
    def _as_base(self, backend: Backend) -> Iterator[Callable[..., Any]]:
        if self.base is not None:
            with torch.no_grad(), backend.precision():
                yield self.base
            return
        model: Any = backend.model
        with evaluating(model), backend.precision(), model.disable_adapter():
            yield model


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in eval mode that needs no gradient: the base model, whole on every rank."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def predicted(batch: Batch) -> Tensor:
    """Return (B, S) bool: every token but padding and each sample's first."""
    mask = torch.zeros_like(batch.labels, dtype=torch.bool)
    mask[:, 1:] = (batch.sample[:, 1:] >= 0) & (batch.sample[:, 1:] == batch.sample[:, :-1])
    return mask


def _log_probabilities(forward: Callable[..., Any], model: nn.Module, batch: Batch, columns: Tensor) -> Tensor:
    """Return (B, C, V) fp32: what each of the columns says of the token behind it."""
    keep = {"logits_to_keep": columns} if accepts(locate(model).hf, "logits_to_keep") else {}
    logits = forward(**batch.inputs(), use_cache=False, **keep).logits
    wide: Tensor = (logits if keep else logits[:, columns]).float()
    return wide.log_softmax(-1)
