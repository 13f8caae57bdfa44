"""What the ranks of `test_method_ranks.py` run: methods that read and write whole weights, on real backends.

    torchrun --nproc-per-node 2 -m tests.defenses.method_ranks OUT ddp,fsdp

Rank 0 writes OUT: per backend and method the rows that were told, the trained weights, and what leaked.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from defenses.ablation import Ablation
from defenses.backend import Optimiser
from defenses.ema import Ema, EmaOptions
from defenses.filtering import Filtering, FilteringOptions
from defenses.immune_continuation import ImmuneContinuation, ImmuneContinuationOptions
from defenses.immune_projection import ImmuneProjection, ImmuneProjectionOptions
from defenses.kl import Kl, KlOptions, frozen_copy
from defenses.launch import detect, joined, leave, make_backend
from defenses.loop import Training, Watch, train
from defenses.schedules import Rate, Strength
from defenses.state_aware import StateAware
from tests.defenses.small_training import Rotating, directions, examples
from tests.tiny import TINY

STEPS, STRENGTH = 6, Strength(2.0)


def projecting(**options):
    chosen = ImmuneProjectionOptions(strength=STRENGTH, boundary=3, rank=3, **options)
    return ImmuneProjection(directions(1, length=2.0), chosen)


def continuing():
    chosen = ImmuneContinuationOptions(strength=STRENGTH, boundary=3, minimum_tokens=20)
    return ImmuneContinuation(directions(1, length=2.0), chosen)


def near_neutral():
    neutral = Rotating(examples(8, seed=9))
    return Kl(KlOptions(beta=1.0, on="neutral"), frozen_copy(TINY["llama"]()), neutral)


METHODS = {
    "ema": lambda: Ema(EmaOptions(horizon=3)),
    "kl": lambda: Kl(KlOptions(beta=1.0), frozen_copy(TINY["llama"]())),
    "kl_neutral": near_neutral,
    "ablation": lambda: Ablation(directions(1)),
    "filtering": lambda: Filtering(FilteringOptions("oracle")),
    "state_aware": lambda: StateAware(directions(1)),
    "update": lambda: projecting(protect="update"),
    "gradient": lambda: projecting(protect="gradient"),
    "flat": lambda: projecting(mode="flat", sided="two"),
    "all_linear": lambda: projecting(targets="all_linear", all_layers=True),
    "continuation": continuing,
}


def run(kind: str, name: str, ranks: Any) -> dict[str, Any]:
    """Train one method; collective."""
    # the first two of each four are poisoned: all that rank 0 has of a step, and nothing of rank 1
    data = examples(8, poison=lambda index: index % 4 < 2, ref_projection=lambda index: 0.0)
    backend = make_backend(kind, TINY["llama"](), Optimiser(weight_decay=0.1), ranks=ranks)
    defense, rows = METHODS[name](), []
    training = Training(STEPS, Rate(1e-3, "constant", warmup=0))
    train(backend, defense, Rotating(data), training, watch=Watch(row=rows.append))
    leak = defense.leak(backend) if isinstance(defense, ImmuneProjection) else 0.0
    if isinstance(defense, Ema):
        with defense.averaged(backend):
            return {"rows": rows, "weights": backend.weights(), "leak": leak}
    return {"rows": rows, "weights": backend.weights(), "leak": leak}


def main() -> None:
    """Run all methods on the backends that are named."""
    torch.set_num_threads(1)
    ranks = detect()
    with joined(ranks, cuda=False):
        found = {f"{kind}-{name}": run(kind, name, ranks) for kind in sys.argv[2].split(",") for name in METHODS}
        if ranks.rank == 0:
            torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
    leave(0)
