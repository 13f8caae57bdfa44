"""`fitted`: one method fitted on planted pairs, as the scorer would do it."""

from __future__ import annotations

from typing import Any

from alignments import FitResult, VectorPairs, fit
from alignments.methods import METHODS, Setup
from alignments.views import training_view
from intervene import AllTokens, Plan
from tests.alignments.planted_methods import SITE


def fitted(
    name: str,
    pairs: VectorPairs,
    *,
    rank: int | None = None,
    seed: int = 0,
    variables: int = 1,
    steps: int = 150,
    lr: float = 0.05,
    **options: Any,
) -> tuple[Plan, FitResult]:
    """Return the plan and, for methods that learn, what its fit went through."""
    method = METHODS[name]
    train = training_view(pairs, method, options)
    setup = Setup(SITE, AllTokens(), pairs.base.shape[1], rank, seed, train, variables, options)
    plan = method.make(setup)
    if not method.learned:
        return plan, FitResult(())
    penalty = method.penalty
    told = fit(
        pairs.model, plan, train, steps=steps, batch_size=64, lr=lr, seed=seed, anneal=method.anneal,
        rates=method.rates, penalties=[None if penalty is None else lambda one: penalty(one, setup)],
    )  # fmt: skip
    return plan, told
