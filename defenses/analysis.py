"""What training does along a direction: activations, gradients and weights, layer by layer, on one fixed batch.

    analyser = Analyser(directions, layers=range(10, 20), scope=Scope.RESPONSE)
    analyser.begin(backend)                                     # before training: the weights that it starts from
    rows = analyser.rows(backend, batch, strength=5.0)          # as often as wanted; nothing is learned by it

Every rank calls it alike. A direction that is given for one layer only stands for all: the residual stream is one
space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from defenses.backend import Backend
from defenses.batch import Batch
from defenses.derivatives import gradient_leaves, named
from defenses.errors import BackendError
from defenses.objectives import learned, n_tokens
from defenses.plans import Directions, Scope, injection, scope_columns
from defenses.protected import WRITERS
from defenses.shared_passes import Inside
from intervene import Plan, Site, capture, intervene
from intervene.errors import asked_found_do
from intervene.families import resolve

TINY = 1e-12


@dataclass(eq=False)
class Analyser:
    """Measures on request; keeps the weights that training started from.

    Attributes:
        directions: v per layer, or one for all. layers: where activations and gradients are read (block outputs), and
            whose output projections are compared. scope: where v would be injected.
    """

    directions: Directions
    layers: Sequence[int]
    scope: Scope = Scope.RESPONSE
    _anchors: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def along(self, layer: int) -> Tensor:
        """Return the unit direction (D,) that stands for `layer`: its own, or that of the nearest layer with one."""
        nearest = min(self.directions.layers, key=lambda one: (abs(one - layer), one))
        vector = self.directions.at(nearest)
        unit: Tensor = vector / vector.norm()
        return unit

    def begin(self, backend: Backend) -> None:
        """Keep the output projections as they are now, in fp32; a LoRA starts from nothing and needs no copy."""
        for layer, part, module in self._projections(backend):
            name = _trained_name(backend, module)
            if name is not None:
                self._anchors[layer, part] = backend.value(name)

    def rows(self, backend: Backend, batch: Batch, *, strength: float, relative: bool = False) -> list[dict[str, Any]]:
        """Return one row per layer, and one per output projection that has moved.

        Per layer: mean response activation without and with the injection (cosine, ratio of norms, both projections on
        the direction), and the gradient of the mean loss per token with respect to the stream at the tokens in scope,
        without injection (norm, projection of its sum over tokens, mean cosine with the direction). A negative
        projection of the gradient means that learning wants to move along +v.

        Per projection: what its displacement D = W - W_0 adds on the mean response input a, f = D a: |f|, its cosine
        with -v (1: the model learns to undo the injection), and the share of D's energy along v (chance: 1 / width).

        Args:
            strength: of the injection, in multiples of the direction; `relative`: of the stream's norm at each token.
        """
        was = backend.model.training
        backend.model.eval()
        try:
            columns = scope_columns(batch, self.scope)
            natural = self._activations(backend, batch, (), columns)
            plan = injection(self.directions, strength, relative, columns=columns) if strength else ()
            injected = self._activations(backend, batch, plan, columns) if plan else natural
            gradients = self._gradients(backend, batch, columns)
            told = [self._layer_row(layer, natural, injected, gradients[layer]) for layer in self.layers]
            told += self._projection_rows(backend, natural)
        finally:
            backend.model.train(was)
        return told

    def _activations(self, backend: Backend, batch: Batch, plan: Plan, columns: Tensor) -> dict[str, Tensor]:
        """Return site -> (D,) mean activation over learned tokens, in one pass; without a plan of inner sites too."""
        sites = [str(Site("block_output", layer)) for layer in self.layers]
        if not plan:
            sites += [str(Site(WRITERS[part], layer)) for layer, part, _ in self._projections(backend)]
        mask = learned(batch)
        edits = intervene(backend.model, plan, prompt=batch.prompt(columns))
        with torch.no_grad(), backend.precision(), edits, capture(backend.model, sites) as acts:
            backend.model(**batch.inputs(), use_cache=False)
        return {site: acts[site].float()[mask].mean(0) for site in sites}

    def _gradients(self, backend: Backend, batch: Batch, columns: Tensor) -> dict[int, Tensor]:
        at = Directions({layer: self.along(layer) for layer in self.layers}).to(batch.input_ids.device)
        leaves, plan, marked = gradient_leaves(at, columns)
        with intervene(backend.model, plan, prompt=batch.prompt(marked)):
            total = Inside(backend).token_losses(batch).sum() / n_tokens(batch).clamp_min(1)
            found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        return named(leaves, found, columns)

    def _layer_row(
        self, layer: int, natural: dict[str, Tensor], injected: dict[str, Tensor], gradient: Tensor
    ) -> dict[str, Any]:
        site, v = str(Site("block_output", layer)), self.along(layer).to(gradient.device)
        before, after = natural[site], injected[site]
        tokens = gradient.flatten(0, 1)
        tokens = tokens[tokens.norm(dim=1) > 0]
        cosines = nn.functional.cosine_similarity(tokens, v[None], dim=1) if len(tokens) else tokens.new_zeros(1)
        return {
            "kind": "layer",
            "layer": layer,
            "cosine": float(nn.functional.cosine_similarity(before, after, dim=0)),
            "norm_ratio": float(after.norm() / before.norm().clamp_min(TINY)),
            "projection": float(before @ v),
            "projection_injected": float(after @ v),
            "gradient_norm": float(tokens.norm()),
            "gradient_projection": float(tokens.sum(0) @ v),
            "gradient_cosine": float(cosines.mean()),
        }

    def _projection_rows(self, backend: Backend, natural: dict[str, Tensor]) -> list[dict[str, Any]]:
        told = []
        for layer, part, module in self._projections(backend):
            moved = self._displacement(backend, layer, part, module)
            if moved is None:
                continue
            v = self.along(layer).to(moved.device)
            added = moved @ natural[str(Site(WRITERS[part], layer))]
            energy = float(moved.square().sum())
            told.append(
                {
                    "kind": part,
                    "layer": layer,
                    "added_norm": float(added.norm()),
                    "added_cosine_with_minus_v": float(nn.functional.cosine_similarity(added, -v, dim=0)),
                    "energy_along_v": float((v @ moved).square().sum()) / max(energy, TINY),
                }
            )
        return told

    def _displacement(self, backend: Backend, layer: int, part: str, module: nn.Module) -> Tensor | None:
        """Return W - W_0 (out, in) in fp32; None where it is not trained."""
        if hasattr(module, "get_delta_weight"):
            adapter = next(iter(cast(Any, module).lora_A), None)
            if adapter is None:
                return None
            thin: Tensor = cast(Any, module).lora_A[adapter].weight
            if thin.dim() != 2:  # a shard that is empty between passes
                asked, do = f"Displacement of {part} in layer {layer}", "Analyse on plain, DDP or FSDP2."
                raise BackendError(asked_found_do(asked, "its LoRA is cut over ranks.", do))
            delta: Tensor = cast(Any, module).get_delta_weight(adapter)
            return _turned(delta.detach().float(), cast(Any, module).get_base_layer())
        if (layer, part) not in self._anchors:
            return None
        name = _trained_name(backend, module)
        assert name is not None
        return _turned(backend.value(name) - self._anchors[layer, part], module)

    def _projections(self, backend: Backend) -> list[tuple[int, str, nn.Module]]:
        return [
            (layer, part, resolve(backend.model, Site(site, layer)).module)
            for layer in self.layers
            for part, site in WRITERS.items()
        ]


def _turned(moved: Tensor, module: nn.Module) -> Tensor:
    """Return `moved` as (out, in): GPT-2's own kind of linear layer keeps its weight the other way round."""
    return moved.T if type(module).__name__ == "Conv1D" else moved


def _trained_name(backend: Backend, module: nn.Module) -> str | None:
    weight = getattr(module, "weight", None)
    return next((name for name, one in backend.parameters().items() if one is weight), None)
