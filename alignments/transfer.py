"""`transfer`: a saved alignment on other prompts, without fitting it again; `heatmap_correlation` of two searches.

rows = transfer({"seed 0": plan, "other bracket": bundle.plan}, {"test": data, "sibling instruction": other})
print(transfer_text(rows))
consistency(plan, data)                           # where the model is right without the edit, and where it is not
heatmap_correlation(rows_of_one_search, rows_of_another).r
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alignments.answers import predict, score
from alignments.bundle import Bundle
from alignments.metrics import mean_over_seeds
from alignments.pairs import LanguagePairs, PairData
from alignments.rows import Row
from intervene import Intervention, Plan
from intervene.errors import InterveneError, ShapeMismatch


@dataclass(frozen=True)
class Transfer:
    """One cell of the matrix: the alignment `fitted_on` scored on `scored_on`, with the baselines of those pairs.

    `low` and `high` are the Wilson 95 % interval. `copy_source` is None where the pairs do not know their sources'
    answers.
    """

    fitted_on: str
    scored_on: str
    n: int
    iia: float
    low: float
    high: float
    copy_base: float
    majority: float
    copy_source: float | None = None

    @property
    def best_baseline(self) -> float:
        """Return the highest of the trivial baselines."""
        return max(self.copy_base, self.majority, self.copy_source or 0.0)


def transfer(
    alignments: Plan | Bundle | Mapping[str, Plan | Bundle], datasets: Mapping[str, PairData]
) -> tuple[Transfer, ...]:
    """Return each alignment's score on each dataset, as it is: nothing is fitted.

    The datasets have to be prepared at the alignments' sites and positions.

    Raises:
        ShapeMismatch: no alignment or no dataset. BadPosition: a dataset was prepared elsewhere.
    """
    named = alignments if isinstance(alignments, Mapping) else {"alignment": alignments}
    if not named or not datasets:
        raise ShapeMismatch(f"Transfer of {len(named)} alignments to {len(datasets)} datasets: give one of each.")
    return tuple(
        _scored(name, plan.plan if isinstance(plan, Bundle) else plan, where, pairs, None)
        for name, plan in named.items()
        for where, pairs in datasets.items()
    )


def consistency(plan: Plan | Bundle, pairs: LanguagePairs, name: str = "alignment") -> tuple[Transfer, ...]:
    """Return the score on pairs whose base and source the model itself answers rightly, and on the others.

    A subset without pairs is left out.

    Source: the "correct only" and "incorrect only" sets of Wu et al. 2023 (arXiv 2305.08809).
    """
    base, source = pairs.task_correct()
    items = plan.plan if isinstance(plan, Bundle) else plan
    subsets = {"right on base and source": base & source, "wrong on one of them": ~(base & source)}
    return tuple(
        _scored(name, items, where, pairs, chosen.nonzero().flatten().cpu())
        for where, chosen in subsets.items()
        if bool(chosen.any())
    )


def _scored(name: str, plan: Iterable[Intervention], where: str, pairs: PairData, rows: Tensor | None) -> Transfer:
    found = score(predict(tuple(plan), pairs), pairs, rows)
    chosen = slice(None) if rows is None else rows.to(pairs.labels.device)
    labels = pairs.labels[chosen]
    sources = getattr(pairs, "source_answers", None)
    return Transfer(
        fitted_on=name,
        scored_on=where,
        n=found.n,
        iia=found.iia,
        low=found.low,
        high=found.high,
        copy_base=_share(labels == pairs.base_answers[chosen]),
        majority=max(Counter(labels.tolist()).values()) / len(labels),
        copy_source=_share(labels == sources[chosen]) if isinstance(sources, torch.Tensor) else None,
    )


def _share(hits: Tensor) -> float:
    return float(hits.float().mean())


def transfer_text(rows: Iterable[Transfer]) -> str:
    """Return the matrix as text: alignments down, datasets across, the best trivial baseline of each below."""
    listed = list(rows)
    columns = list(dict.fromkeys(row.scored_on for row in listed))
    wide = max(24, *(len(name) for name in columns)) + 2
    first = max(len(name) for name in ("best trivial baseline", *(row.fitted_on for row in listed))) + 2
    lines = [" " * first + "".join(f"{name:>{wide}}" for name in columns)]
    for name in dict.fromkeys(row.fitted_on for row in listed):
        own = {
            row.scored_on: f"{row.iia:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in listed if row.fitted_on == name
        }
        lines.append(f"{name:<{first}}" + "".join(f"{own.get(column, '-'):>{wide}}" for column in columns))
    best = {row.scored_on: f"{row.best_baseline:.3f}, n={row.n}" for row in listed}
    lines.append(f"{'best trivial baseline':<{first}}" + "".join(f"{best[column]:>{wide}}" for column in columns))
    return "\n".join(lines)


@dataclass(frozen=True)
class Correlation:
    """Pearson's `r` of two heatmaps over the `n` cells that both have."""

    r: float
    n: int


def heatmap_correlation(
    first: Iterable[Row], second: Iterable[Row], *, method: str | None = None, split: str = "test"
) -> Correlation:
    """Return the correlation of IIA over the (site, position, method, rank) that two searches share, seeds averaged.

    Neighbouring cells are not independent, so no interval is given.

    Args:
        method: only its cells; None: those of all methods. Controls are left out.

    Raises:
        InterveneError: fewer than three common cells, or a heatmap in which all of them are equal.

    Source: Wu et al. 2023 (arXiv 2305.08809), who compare the heatmaps of brackets and instructions in this way.
    """
    maps = [_heatmap(rows, method, split) for rows in (first, second)]
    common = [key for key in maps[0] if key in maps[1]]
    if len(common) < 3:
        raise InterveneError(
            f"Heatmaps of {len(maps[0])} and {len(maps[1])} cells on {split}: {len(common)} in common. "
            "Needs at least 3 of one site, position, method and rank."
        )
    values = np.array([[one[key] for key in common] for one in maps])  # (2, n)
    if bool((values.max(1) - values.min(1) < 1e-12).any()):
        raise InterveneError("Heatmaps: in one of them all common cells are equal, so that nothing correlates with it.")
    return Correlation(float(np.corrcoef(values)[0, 1]), len(common))


def _heatmap(rows: Iterable[Row], method: str | None, split: str) -> dict[tuple[str, str, str, int | None], float]:
    means = mean_over_seeds(row for row in rows if not row.is_control and row.split == split)
    return {
        (mean.cell.site, mean.cell.positions, mean.cell.method, mean.cell.rank): mean.iia
        for mean in means
        if method in (None, mean.cell.method)
    }
