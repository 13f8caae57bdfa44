"""What a detector said of each sample: rows for the record, and sums for the loop.

A row is {"index", "score", "blocked", "poison", ...}: `score` is None where a sample could not be scored, `poison` None
where the data does not say. With `log_only` nothing is blocked, and `blocked` says what would have been.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from defenses.batch import UNKNOWN, Batch
from defenses.objectives import learned
from defenses.statistics import Estimate, at_threshold, auroc


class SampleLog:
    """Rows per sample. Tensors are kept until the rows are asked for, so that no micro-batch waits for the device."""

    def __init__(self) -> None:
        self._held: list[tuple[Batch, Mapping[str, Tensor]]] = []

    def add(self, batch: Batch, score: Tensor, blocked: Tensor, **more: Tensor) -> None:
        """Keep a `score`, a decision and any `more` numbers, each (N,), of the samples of `batch`."""
        columns = {"score": score.detach(), "blocked": blocked, **{name: one.detach() for name, one in more.items()}}
        self._held.append((batch, columns))

    def take(self) -> list[dict[str, Any]]:
        """Return the rows since the last call, in order, and forget them."""
        rows: list[dict[str, Any]] = []
        for batch, columns in self._held:
            listed = {name: values.tolist() for name, values in columns.items()}
            for place, (index, poison) in enumerate(zip(batch.indices.tolist(), batch.poison.tolist(), strict=True)):
                row = {name: _number(values[place]) for name, values in listed.items()}
                rows.append({"index": index, **row, "poison": None if poison == UNKNOWN else bool(poison)})
        self._held = []
        return rows


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decision_sums(batch: Batch, blocked: Tensor) -> dict[str, Tensor]:
    """Return what is counted of decisions, as 0-d sums over one micro-batch.

    `samples`, `blocked` (samples with a blocked token), `blocked_tokens`; and where the data says what is poisoned,
    `poisoned` and `clean` samples, and how many of each were blocked: `true_positives`, `false_positives`.

    Args:
        blocked: (N,) bool by sample, or (B, S) bool by token.
    """
    tokens = learned(batch)
    if blocked.shape == tokens.shape and blocked.dim() == 2:
        hit = blocked & tokens  # (B, S)
        of_sample = torch.zeros(len(batch), dtype=torch.bool, device=blocked.device)
        of_sample[batch.sample[hit]] = True
    else:
        of_sample = blocked
        hit = tokens & blocked[batch.sample.clamp_min(0)] & (batch.sample >= 0)
    poisoned, clean = batch.poison == 1, batch.poison == 0
    return {
        "samples": torch.tensor(float(len(batch)), device=blocked.device),
        "blocked": of_sample.sum(),
        "blocked_tokens": hit.sum(),
        "poisoned": poisoned.sum(),
        "clean": clean.sum(),
        "true_positives": (of_sample & poisoned).sum(),
        "false_positives": (of_sample & clean).sum(),
    }


def separation(rows: Iterable[Mapping[str, Any]]) -> Estimate:
    """Return the AUROC of `score` for `poison` over rows that have both; the others are counted as excluded.

    Raises:
        ValueError: no row is poisoned, or none is clean.
    """
    listed = list(rows)
    used = [row for row in listed if row["score"] is not None and row["poison"] is not None]
    scores, poison = [row["score"] for row in used], [row["poison"] for row in used]
    return auroc(scores, poison, excluded=len(listed) - len(used))


def detection(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how well the scores of `rows`, by step, tell poisoned from clean, and what was blocked; {} without any.

    A sample counts once, however many epochs there were: scores of one sample depend on each other, and intervals over
    all of them would be too narrow. Blocked or not is what its last row says. Its score is the last that it has: a
    sample that is blocked by the score of an earlier epoch gets no new one, and AUROC is not to lose it.
    """
    every = [row for row in rows if "score" in row]
    if not every:
        return {}
    last = {row["index"]: row for row in every}
    scored = last | {row["index"]: row for row in every if row["score"] is not None}
    told: dict[str, Any] = {
        "samples": len(last),
        "scores": len(every),
        "blocked": sum(bool(row.get("blocked")) for row in every) / len(every),
    }
    known = [row for row in last.values() if row.get("poison") is not None]
    if {row["poison"] for row in known} == {True, False}:
        told["auroc"] = separation(scored.values()).row()
        made = at_threshold([float(bool(row.get("blocked"))) for row in known], [row["poison"] for row in known], 0.5)
        told |= {name: getattr(made, name).row() for name in ("precision", "recall", "false_positive_rate")}
    return told
