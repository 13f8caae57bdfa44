"""CAFT: train while a subspace of the residual stream is projected out, and use the model without that.

Ablation(directions, AblationOptions(layers=(12, 16)))         # h - Q Q^T h, and no gradient along Q
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from defenses.backend import Backend
from defenses.batch import Batch
from defenses.defense import Defense, Step, learn
from defenses.objectives import n_tokens, token_losses
from defenses.plans import Basis, Scope, ablation, scope_columns, selects
from intervene import intervene


@dataclass(frozen=True)
class AblationOptions:
    """Where the subspace is removed.

    Attributes:
        scope: which tokens; the paper removes it from all. layers: 0-based; None: all that the basis has.
    """

    scope: Scope = Scope.ALL
    layers: tuple[int, ...] | None = None


class Ablation(Defense):
    """h' = h - Q Q^T h at one or more blocks' outputs during training: what would use Q cannot be learned there.

    Source: concept ablation fine-tuning, Casademunt et al. 2025 (arXiv 2507.16795), who take Q from interpreted PCA
        or SAE directions of several layers; a sample's first token is left alone here (`Scope`).
    """

    evidence: ClassVar[str] = (
        "Up to ten times fewer misaligned answers with interpreted subspaces at several layers (2507.16795); "
        "with one trait vector at one layer a replication saw no effect. In our small world -51 % at one layer, "
        "-81 % at several, at no cost of skill."
    )

    def __init__(self, basis: Basis, options: AblationOptions | None = None) -> None:
        """Remove the span of `basis`: directions, several of them, layer -> (D, K), or one (D, K) for `layers`.

        Raises:
            VectorError: as `plans.ablation`.
        """
        self.options = options or AblationOptions()
        self.plan = ablation(basis, self.options.layers)

    def accumulate(self, backend: Backend, batch: Batch, step: Step) -> dict[str, Tensor]:
        columns = scope_columns(batch, self.options.scope)
        plan = self.plan if selects(columns) else ()
        with intervene(backend.model, plan, prompt=batch.prompt(columns)):
            losses = token_losses(backend, batch)
            learn(backend, losses, step)
        return {"loss_sum": losses.detach().sum(), "tokens": n_tokens(batch), "ablated": (columns >= 0).sum()}
