"""What training did to ordinary language: perplexity of neutral texts, and KL divergence from the base model on them.

    damage = on_texts(model, tokenizer, texts)          # a PEFT model: its base is itself with the adapter off
    damage["kl"], damage["perplexity"]                  # Estimates; intervals resample texts, not tokens

Logits are taken to float32 before any softmax, whatever the models compute in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from defenses.errors import DataError
from defenses.generation import device_of, evaluating, token_ids
from defenses.statistics import Estimate, bootstrap_ratio
from intervene.errors import asked_found_do


def on_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    base: nn.Module | None = None,
    batch_size: int = 8,
    max_length: int = 512,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return "perplexity", and where there is a base model "base_perplexity" and "kl".

    perplexity = exp(mean of -ln p(token | those before)); kl = mean over the same tokens of
    sum_v base(v) ln(base(v) / model(v)), in nats per token. `n` is texts; those of fewer than 2 tokens are excluded.
    Texts are judged on their first `max_length` tokens.

    Args:
        base: the model before training, of the same tokenizer. None: the adapter switched off where `model` is a PEFT
            model, else no base.

    Raises:
        DataError: no text has 2 tokens, or the two models have different vocabularies.
    """
    rows = [tokenizer(text)["input_ids"][:max_length] for text in texts]
    rows = sorted((row for row in rows if len(row) > 1), key=len)
    if not rows:
        raise DataError(f"Neutral texts: none of {len(texts)} has 2 tokens. Give longer ones.")
    sums: list[tuple[float, float, float]] = []
    with ExitStack() as stack:
        for one in (model, base):
            if one is not None:
                stack.enter_context(evaluating(one))
        for start in range(0, len(rows), batch_size):
            sums += _sums(model, base, rows[start : start + batch_size])
    counts = [float(len(row) - 1) for row in rows]
    left_out = len(texts) - len(rows)
    own, theirs, divergence = zip(*sums, strict=True)
    named = {"perplexity": _exp(bootstrap_ratio(own, counts, seed=seed))}
    if base is not None or _has_adapter(model):
        named["base_perplexity"] = _exp(bootstrap_ratio(theirs, counts, seed=seed))
        named["kl"] = bootstrap_ratio(divergence, counts, seed=seed)
    return {name: replace(one, excluded=left_out) for name, one in named.items()}


def answer_perplexity(model: nn.Module, tokenizer: Any) -> Callable[[str, str], float]:
    """Return (question, answer) -> perplexity of the answer's tokens under `model`, for `CoherenceGate(perplexity=)`.

    An answer of no tokens has infinite perplexity.
    """

    def perplexity(question: str, answer: str) -> float:
        before = token_ids(tokenizer, question)
        said = [int(one) for one in tokenizer(answer, add_special_tokens=False)["input_ids"]]
        if not said:
            return math.inf
        ids = torch.tensor([[*before, *said]], device=device_of(model))
        with evaluating(model):
            logits = _logits(model, ids, torch.ones_like(ids))[0, len(before) - 1 : -1]
        losses = torch.nn.functional.cross_entropy(logits.float(), ids[0, len(before) :])
        return float(losses.exp())

    return perplexity


@contextmanager
def as_base(model: Any) -> Iterator[nn.Module]:
    """Yield the PEFT model with its adapter switched off inside the block."""
    with model.disable_adapter():
        yield model


def _has_adapter(model: nn.Module) -> bool:
    return callable(getattr(model, "disable_adapter", None))


def _sums(model: nn.Module, base: nn.Module | None, rows: list[list[int]]) -> list[tuple[float, float, float]]:
    """Per text: -ln p under the model, under the base (0 without one), and KL, each summed over tokens."""
    width = max(map(len, rows))
    device = device_of(model)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    own = _logits(model, ids, mask)
    theirs = None
    if base is not None:
        there = device_of(base)
        theirs = _logits(base, ids.to(there), mask.to(there)).to(device)
    elif _has_adapter(model):
        with as_base(model) as bare:
            theirs = _logits(bare, ids, mask)
    if theirs is not None and theirs.shape != own.shape:
        asked = f"KL of a model of {own.shape[-1]} words from a base"
        raise DataError(
            asked_found_do(asked, f"the base has {theirs.shape[-1]}.", "Give the model it was trained from.")
        )
    found = []
    for place, row in enumerate(rows):  # one text at a time: the float32 copies are large
        last = len(row) - 1
        targets = ids[place, 1 : last + 1]
        ours = own[place, :last].float().log_softmax(-1)  # (S - 1, V)
        loss = float(_nll(ours, targets))
        if theirs is None:
            found.append((loss, 0.0, 0.0))
            continue
        before = theirs[place, :last].float().log_softmax(-1)
        divergence = (before.exp() * (before - ours)).sum()
        found.append((loss, float(_nll(before, targets)), float(divergence)))
    return found


def _nll(log_shares: Tensor, targets: Tensor) -> Tensor:
    return -log_shares.gather(-1, targets[:, None]).sum()


def _logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, S, V)
    return logits


def _exp(mean: Estimate) -> Estimate:
    assert mean.value is not None
    return replace(mean, value=_bounded(mean.value), low=_bounded(mean.low), high=_bounded(mean.high))


def _bounded(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
