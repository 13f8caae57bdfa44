"""Immune continuation: learn under injection first, then inject what the weights have learned to do against it.

Phase A, steps before the boundary: directions v are injected, and the output projections of attention and MLP learn to
write about -v. Calibration: the mean input a of each of them over response tokens turns its change into a vector,
b = Delta a, flipped to the side of +v. Phase C: these b are injected where they were learned, in place of v.

    ImmuneContinuation(directions, ImmuneContinuationOptions(boundary=0.5))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from defenses.backend import Backend
from defenses.batch import Batch
from defenses.defense import Defense, Step, learn
from defenses.errors import DefenseError
from defenses.generation import evaluating
from defenses.objectives import n_tokens, token_losses
from defenses.plans import ABSENT, Directions, Scope, injection, scope_columns, selects
from defenses.protected import WRITERS, Matrix, writing_matrices
from defenses.schedules import Strength, at_step
from defenses.subspaces import randomised_svd, seed_of
from intervene import Add, Intervention, Marked, Plan, Site, capture, intervene
from intervene.errors import asked_found_do
from records.config_files import ConfigError

Part = Literal["attention", "mlp"]


@dataclass(frozen=True)
class ImmuneContinuationOptions:
    """What is injected until when, and how the vectors that follow are estimated.

    Attributes:
        strength, scope: of the injection, in all phases: alpha v, then alpha b.
        boundary: share or number of steps of phase A.
        minimum_tokens: calibration lasts whole steps until all ranks together have seen so many tokens of the scope.
        estimate: "functional_mean": b = Delta a. "svd_u": the first `rank` left singular vectors of Delta, each on
            the side of v, weighted with their singular values; no input is needed.
        scale: "preserve_ratio": the b of a layer share |v| as their norms do. "equal_share": evenly. "raw": as it is.
        parts: whose output projections. layers: 0-based; None: those of the directions.
        point: "output": b is added to what the sub-layer returns, as published. "write": to what it adds to the
            residual stream, behind the norm that Gemma and OLMo 2 put there, which would rescale b.

    Raises:
        ConfigError: a value that means nothing.
    """

    strength: Strength = field(default_factory=lambda: Strength(5.0))
    scope: Scope = Scope.RESPONSE
    boundary: float = 0.5
    minimum_tokens: int = 2048
    estimate: Literal["functional_mean", "svd_u"] = "functional_mean"
    scale: Literal["preserve_ratio", "equal_share", "raw"] = "preserve_ratio"
    rank: int = 4
    parts: tuple[Part, ...] = ("attention", "mlp")
    layers: tuple[int, ...] | None = None
    point: Literal["output", "write"] = "output"

    def __post_init__(self) -> None:
        if self.minimum_tokens < 1 or self.rank < 1 or not self.parts:
            asked = f"Continuation from {self.minimum_tokens} tokens, rank {self.rank}, parts {self.parts}"
            raise ConfigError(asked_found_do(asked, "nothing could be estimated.", "Use at least one of each."))


class ImmuneContinuation(Defense):
    """Injection of v up to the boundary, calibration, then injection of the model's own learned offset.

    While it calibrates, training goes on as in phase A, and each micro-batch is passed once more, without gradient,
    dropout or injection: no data are used up. The published code skips the optimiser on those batches, takes four
    batches for enough whatever they hold, and lets each rank inject a vector of its own.

    The vectors are the same on every rank: inputs are summed over all of them and weights are read whole. Statistics:
    "phase" (0 injects v, 1 calibrates, 2 injects b), "calibration_tokens", "b_norm" (over all vectors).

    Source: the "continuation" mode of Guan et al., EMNLP 2026 Findings, whose negative result is confounded: their
        hooks were gone when gradient checkpointing ran the block again, so its gradients were wrong.
    """

    evidence: ClassVar[str] = (
        "Published as not helping, with gradients that were wrong under checkpointing; open since then."
    )

    def __init__(self, directions: Directions, options: ImmuneContinuationOptions | None = None) -> None:
        """Inject `directions` in phase A."""
        self.options, self.directions = options or ImmuneContinuationOptions(), directions
        self.matrices: list[Matrix] = []
        self.snapshot: dict[str, Tensor] = {}  # W_0 (out, in) on the CPU, until calibration is over
        self.vectors: dict[str, Tensor] = {}  # site -> b (D,)
        self.boundary = 0
        self.tokens = 0  # calibrated on, of all ranks
        self._sums: dict[str, Tensor] = {}  # site -> (d_in,) fp64, of all ranks
        self._own: dict[str, Tensor] = {}  # the same of this rank in this step
        self._own_tokens: Tensor | None = None

    def start(self, backend: Backend, total: int) -> None:
        """Find the output projections and, in a new run, remember their weights.

        Raises:
            DefenseError: as `writing_matrices`, or a layer without a direction. ConfigError: no step before or after
            the boundary.
        """
        self.boundary = at_step(self.options.boundary, total)
        if not 0 < self.boundary < total:
            found = f"the training has {total} steps, so one of the phases would have none."
            raise ConfigError(asked_found_do(f"Boundary {self.options.boundary}", found, "Choose one in between."))
        self.directions = self.directions.to(backend.device)
        self.vectors = {site: vector.to(backend.device) for site, vector in self.vectors.items()}
        layers = self.options.layers or self.directions.layers
        for layer in layers:
            self.directions.at(layer)
        self.matrices = writing_matrices(backend, layers, self.options.parts)
        if not self.snapshot and not self.vectors:
            self.snapshot = {one.name: one.turned(backend.value(one.name)).cpu() for one in self.matrices}

    def accumulate(self, backend: Backend, batch: Batch, step: Step) -> dict[str, Tensor]:
        columns = scope_columns(batch, self.options.scope)
        calibrating = step.number >= self.boundary and not self.vectors
        if calibrating:
            self._require_enough(step)
            self._calibrate(backend, batch, columns)
        strength = self.options.strength.at(step.number, step.total)
        with intervene(backend.model, self.plan(strength, columns), prompt=batch.prompt(columns)):
            losses = token_losses(backend, batch)
            learn(backend, losses, step)  # inside: a checkpointed block is run again with its hooks
        mine = backend.rank == 0 and step.micro == 0
        norm = torch.stack([one.norm() for one in self.vectors.values()]).norm() if self.vectors else 0.0
        told = {
            "phase": 2.0 if self.vectors else float(calibrating),
            "calibration_tokens": float(self.tokens),
            "b_norm": float(norm),
        }
        shown = {name: losses.new_tensor(number if mine else 0.0) for name, number in told.items()}
        return {"loss_sum": losses.detach().sum(), "tokens": n_tokens(batch), **shown}

    def plan(self, strength: float, columns: Tensor) -> Plan:
        """Return what is injected now at `columns` (B, P): v in the stream, or from phase C on b."""
        if not strength or not selects(columns):
            return ()
        if not self.vectors:
            return injection(self.directions, strength, columns=columns)
        return tuple(
            Intervention(Site.parse(site), Add(vector, strength), Marked("scope"))
            for site, vector in self.vectors.items()
        )

    def _require_enough(self, step: Step) -> None:
        """Refuse at once if all steps that are left cannot hold the tokens that were asked for."""
        left = step.tokens * (step.total - self.boundary)
        if step.number == self.boundary and left < self.options.minimum_tokens:
            found = f"the steps from {self.boundary} to {step.total} hold about {left}."
            do = "Ask for fewer, or move the boundary."
            raise DefenseError(asked_found_do(f"Calibrate on {self.options.minimum_tokens} tokens", found, do))

    def _calibrate(self, backend: Backend, batch: Batch, columns: Tensor) -> None:
        mask = torch.zeros(*batch.labels.shape, dtype=torch.bool, device=columns.device)
        rows, slots = (columns != ABSENT).nonzero(as_tuple=True)
        mask[rows, columns[rows, slots]] = True  # (B, S)
        sites = [Site(WRITERS[one.part], one.layer) for one in self.matrices]
        with evaluating(backend.model), capture(backend.model, sites) as acts:
            token_losses(backend, batch, grad=False)  # the whole pass: sharded models are gathered block by block
        for one, site in zip(self.matrices, sites, strict=True):
            chosen = acts[site].detach().double()[mask.to(acts[site].device)]  # (T, d_in)
            self._own[one.name] = self._own.get(one.name, 0) + chosen.sum(0)
        held = mask.sum()
        self._own_tokens = held if self._own_tokens is None else self._own_tokens + held

    def after_step(self, backend: Backend, step: Step) -> None:
        if self._own_tokens is None:
            return
        self.tokens += int(backend.sum(self._own_tokens))
        for name, own in self._own.items():
            total = backend.sum(own.to(backend.device)).cpu()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._own, self._own_tokens = {}, None
        if self.tokens >= self.options.minimum_tokens:
            self.vectors = self._estimated(backend)
            self._sums, self.snapshot = {}, {}

    def _estimated(self, backend: Backend) -> dict[str, Tensor]:
        """Return site -> b (D,), on the device of the backend."""
        raw: dict[int, dict[str, Tensor]] = {}
        for one in self.matrices:
            now = one.turned(backend.value(one.name))
            delta = now - self.snapshot[one.name].to(now.device)
            direction = self.directions.at(one.layer).to(now.device)
            if self.options.estimate == "svd_u":
                found = weighted_singular_vectors(delta, direction, self.options.rank, one.name)
            else:
                mean = (self._sums[one.name] / self.tokens).float().to(now.device)
                found = aligned(delta @ mean, direction)
            if not bool(torch.isfinite(found).all()) or not float(found.norm()) > 0:
                do = "Move the boundary, or raise the rate."
                raise DefenseError(asked_found_do(f"Vector of {one.name}", "it did not move by then.", do))
            raw.setdefault(one.layer, {})[one.part] = found
        made = {}
        for layer, parts in raw.items():
            length = float(self.directions.at(layer).norm())
            for part, vector in shared_out(parts, length, self.options.scale).items():
                made[str(Site(f"{part}_{self.options.point}", layer))] = vector.to(backend.device)
        return made

    def state_dict(self) -> dict[str, Any]:
        return {
            "snapshot": dict(self.snapshot),
            "vectors": {site: vector.cpu() for site, vector in self.vectors.items()},
            "sums": dict(self._sums),
            "tokens": self.tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.snapshot, self.vectors = dict(state["snapshot"]), dict(state["vectors"])
        self._sums, self.tokens = dict(state["sums"]), state["tokens"]


def aligned(vector: Tensor, direction: Tensor) -> Tensor:
    """Return `vector` (D,), turned round if it points away from `direction`."""
    return -vector if float(vector @ direction) < 0 else vector


def weighted_singular_vectors(delta: Tensor, direction: Tensor, rank: int, name: str) -> Tensor:
    """Return sum_i s_i u_i (D,) over the first `rank` singular values of `delta` (out, in), each u_i on the side of
    `direction`; `name` seeds the sketch."""
    left, values, _ = randomised_svd(delta, rank, seed=seed_of(name))
    signs = torch.where(direction @ left < 0, -1.0, 1.0)  # (R,)
    return left @ (signs * values)


def shared_out(
    parts: dict[str, Tensor], length: float, scale: Literal["preserve_ratio", "equal_share", "raw"]
) -> dict[str, Tensor]:
    """Return the vectors of one layer scaled so that their norms add up to `length`, in the ratio they have or evenly;
    "raw": as they are."""
    if scale == "raw":
        return parts
    norms = {part: float(vector.norm()) for part, vector in parts.items()}
    shares = {part: norm / sum(norms.values()) for part, norm in norms.items()}
    if scale == "equal_share":
        shares = dict.fromkeys(parts, 1 / len(parts))
    return {part: vector * (length * shares[part] / norms[part]) for part, vector in parts.items()}
