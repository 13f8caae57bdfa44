"""Filtering: leave out samples that are known, scored or drawn to be bad; the others are learned as in SFT.

    Filtering(FilteringOptions("oracle"))                                        # what the data say
    Filtering(FilteringOptions("scores", threshold=0.3), scores={0: 0.1, ...})   # Example.index -> score
    Filtering(FilteringOptions("random", rate=0.2), indices=range(1000))         # the control at an equal rate

A sample that is left out is passed through the model and weighted with zero: every rank does the same work.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from defenses.actions import Denominator, learn_weighted
from defenses.backend import Backend
from defenses.batch import UNKNOWN, Batch, Example
from defenses.defense import Defense, Step
from defenses.errors import CalibrationError, DataError
from defenses.objectives import n_tokens, token_losses
from defenses.sample_log import SampleLog, decision_sums
from intervene.errors import asked_found_do
from records.config_files import ConfigError


@dataclass(frozen=True)
class FilteringOptions:
    """Which samples are left out.

    Attributes:
        by: "oracle": those the data call poisoned. "scores": those with score > threshold. "random": a share of all.
        threshold, quantile: of the scores, one of the two: with quantile q, the share q of the table is kept.
        rate: "random": the share that is left out, exactly. seed: "random": which; None: the seed of the run, so that
            the runs of a comparison leave out different samples.
        denominator: as in `actions`: by "all" tokens of the step, or by those that are "kept".

    Raises:
        ConfigError: a missing, doubled or impossible value.
    """

    by: Literal["oracle", "scores", "random"] = "oracle"
    threshold: float | None = None
    quantile: float | None = None
    rate: float | None = None
    seed: int | None = None
    denominator: Denominator = "all"

    def __post_init__(self) -> None:
        if self.by == "scores" and (self.threshold is None) == (self.quantile is None):
            found = f"threshold {self.threshold} and quantile {self.quantile} were given."
            raise ConfigError(asked_found_do("Filter by scores", found, "Give exactly one of the two."))
        if self.by == "random" and self.rate is None:
            found = "no rate was given."
            raise ConfigError(asked_found_do("Filter at random", found, "Give the rate of the filter it is to match."))
        for name, value in (("quantile", self.quantile), ("rate", self.rate)):
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(asked_found_do(f"{name} {value}", "it is a share.", "Give a number from 0 to 1."))


class Filtering(Defense):
    """SFT in which chosen samples weigh nothing."""

    evidence: ClassVar[str] = (
        "By oracle: the best that any detector could do. At random and an equal rate: what a smaller data set does."
    )

    def __init__(
        self,
        options: FilteringOptions,
        *,
        scores: Mapping[int, float] | None = None,
        indices: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        """Decide about every sample that can be decided now.

        Args:
            scores: Example.index -> score, higher more suspicious. indices: of the whole data set, for "random".
            seed: of the run, for "random" where the options have none.

        Raises:
            CalibrationError: the scores or the indices are missing.
        """
        self.options = options
        self.scores = dict(scores or {})
        self.threshold = math.inf
        self.drawn: frozenset[int] = frozenset()
        if options.by == "scores":
            self.threshold = _threshold(options, self.scores)
        if options.by == "random":
            if not indices:
                found = "the indices of the data set are not known."
                raise CalibrationError(asked_found_do("Filter at random", found, "Pass indices=."))
            chosen = seed if options.seed is None else options.seed
            self.drawn = drawn_at_random(indices, options.rate or 0.0, chosen)
        self._log = SampleLog()

    def require(self, examples: Sequence[Example]) -> None:
        """Refuse data that cannot be filtered, before training: later, one rank alone would find out.

        Raises:
            DataError: an example without a label, or without a score.
        """
        if self.options.by == "oracle" and (unknown := [one.index for one in examples if one.poison is None]):
            found = f'example {unknown[0]} does not say whether it is ("poison": true or false).'
            raise DataError(asked_found_do("Filter by oracle", found, "Label all of the data."))
        if self.options.by == "scores" and (
            unscored := [one.index for one in examples if one.index not in self.scores]
        ):
            found = f"example {unscored[0]} has no score, and {len(unscored)} of {len(examples)} have none."
            raise DataError(asked_found_do("Filter by scores", found, "Score all of the data, of every rank."))

    def left_out(self, batch: Batch) -> Tensor:
        """Return (N,) bool: which samples weigh nothing.

        Raises:
            DataError: a sample without a label or a score.
        """
        indices = batch.indices.tolist()
        if self.options.by == "oracle":
            if unknown := [
                one for one, poison in zip(indices, batch.poison.tolist(), strict=True) if poison == UNKNOWN
            ]:
                found = f'example {unknown[0]} does not say whether it is ("poison": true or false).'
                raise DataError(asked_found_do("Filter by oracle", found, "Label all of the data."))
            return batch.poison == 1
        if self.options.by == "random":
            return torch.tensor([one in self.drawn for one in indices], device=batch.labels.device)
        if unscored := [one for one in indices if one not in self.scores]:
            found = f"example {unscored[0]} has no score."
            raise DataError(asked_found_do("Filter by scores", found, "Score all of the data."))
        return torch.tensor([self.scores[one] > self.threshold for one in indices], device=batch.labels.device)

    def accumulate(self, backend: Backend, batch: Batch, step: Step) -> dict[str, Tensor]:
        out = self.left_out(batch)
        losses = token_losses(backend, batch)
        taught = learn_weighted(backend, losses, (~out).float(), batch, step, self.options.denominator)
        scores = [self.scores.get(index, math.nan) for index in batch.indices.tolist()]
        self._log.add(batch, torch.tensor(scores), out)
        return {
            "loss_sum": losses.detach().sum(),
            "trained_sum": taught,
            "tokens": n_tokens(batch),
            **decision_sums(batch, out),
        }

    def told(self) -> list[dict[str, Any]]:
        return self._log.take()


def drawn_at_random(indices: Sequence[int], rate: float, seed: int) -> frozenset[int]:
    """Return round(rate * N) of `indices`, the same for the same seed whatever their order."""
    every = sorted(set(indices))
    return frozenset(random.Random(seed).sample(every, round(rate * len(every))))


def _threshold(options: FilteringOptions, scores: Mapping[int, float]) -> float:
    values = list(scores.values())
    if not values or not all(math.isfinite(one) for one in values):
        found = "there are none." if not values else "some are NaN or infinite."
        raise CalibrationError(asked_found_do("Filter by scores", found, "Pass scores= of index -> number."))
    if options.threshold is not None:
        return options.threshold
    assert options.quantile is not None
    kept = math.ceil(options.quantile * len(values))
    return sorted(values)[kept - 1] if kept else -math.inf


def scores_of(path: Path, digest: str = "") -> dict[int, float]:
    """Return Example.index -> its last score in a samples.jsonl, and in those of the run's other ranks beside it.

    The last is that of the latest step, whatever the order of files and lines. Rows without a step go by their order.

    Args:
        digest: of the data that are to be filtered; where the run beside `path` says of which data its scores are, they
            have to be the same. "": not compared.

    Raises:
        CalibrationError: it cannot be read, holds no scores, or those of other data.
    """
    rows: list[tuple[int, int, float]] = []
    try:
        for one in (path, *sorted(path.parent.glob(f"{path.stem}-rank*{path.suffix}"))):
            for line in one.read_text(encoding="utf-8").split("\n"):
                if line and (row := json.loads(line)).get("score") is not None:
                    rows.append((int(row.get("step", 0)), int(row["index"]), float(row["score"])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        do = "Give the samples.jsonl of a run with a detecting method."
        raise CalibrationError(asked_found_do(f"Scores {path}", f"they cannot be read ({error}).", do)) from error
    if not rows:
        do = "Give that of a run with a detecting method."
        raise CalibrationError(asked_found_do(f"Scores {path}", "it holds none.", do))
    scored = _scored_data(path)
    if digest and scored and scored != digest:
        found = f"they are of data {scored}, and this run's are {digest}: its example numbers mean other examples."
        do = "Score this very data, read with the same tokenizer, max_length and data options."
        raise CalibrationError(asked_found_do(f"Scores {path}", found, do))
    return {index: score for _, index, score in sorted(rows, key=lambda row: row[0])}


def _scored_data(path: Path) -> str:
    """Return the digest of the data that the run beside `path` was trained on, "" where none says so."""
    try:
        held = json.loads((path.parent / "environment.json").read_text(encoding="utf-8"))
        return str(held["data_digests"]["train"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
