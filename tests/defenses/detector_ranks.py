"""What the ranks of `test_detectors_on_ranks.py` run: every detector, on the backends that are named.

    PYTHONPATH=. torchrun --nproc-per-node 2 tests/defenses/detector_ranks.py DIR ddp,fsdp

Rank 0 writes DIR/{kind}.json: per case the rows of every step, or the text of what was refused; and the weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from defenses.actions import Inject, LogOnly, Mask
from defenses.backend import Optimiser
from defenses.batch import collate
from defenses.closed_loop import ClosedLoop, ClosedLoopOptions
from defenses.delta_loss import DeltaLoss, DeltaLossOptions
from defenses.errors import BackendError
from defenses.first_order import FirstOrder, FirstOrderOptions
from defenses.launch import detect, joined, leave, make_backend
from defenses.loop import Training, Watch, train
from defenses.probe import Probe, ProbeOptions
from defenses.schedules import Rate, Strength
from defenses.thresholds import Fixed, Quantile
from tests.defenses.cases import directions, example
from tests.tiny import TINY

PER_STEP = 8


def sample(index):
    return example(index, 2 + index % 3, 4 + index % 5)


class Feed:
    """The same 8 examples in every step but the second, cut over ranks, 2 to a micro-batch."""

    def indices(self, step):
        start = PER_STEP * (step == 1)
        return range(start, start + PER_STEP)

    def batches(self, step, rank, world):
        share = PER_STEP // world
        own = list(self.indices(step))[rank * share : (rank + 1) * share]
        return [collate([sample(own[at]), sample(own[at + 1])], 0) for at in range(0, share, 2)]


class OneSided(DeltaLoss):
    """Everything of the first of two ranks is suspicious, nothing of the second."""

    def scores(self, probed, batch):
        found = super().scores(probed, batch)
        return torch.where(batch.indices % PER_STEP < PER_STEP // 2, 1e9, -1e9).to(found)


def holdout():
    return [collate([sample(100 + 4 * part + place) for place in range(4)], 0) for part in range(3)]


CASES = {
    "delta": lambda: DeltaLoss(directions(1), DeltaLossOptions(0.5, threshold=Quantile(0.3, every=1)), holdout()),
    "one_sided": lambda: OneSided(directions(1), DeltaLossOptions(0.5)),
    "delta_inject": lambda: DeltaLoss(directions(1), DeltaLossOptions(0.5, action=Inject(Strength(1.0)))),
    "monitor": lambda: FirstOrder(
        directions(1), FirstOrderOptions("monitor", Quantile(0.3), action=LogOnly()), holdout()
    ),
    "next_epoch": lambda: FirstOrder(directions(1), FirstOrderOptions("next_epoch", Fixed(0.0), Mask())),
    "decide": lambda: FirstOrder(directions(1), FirstOrderOptions("decide_then_learn", Fixed(0.0), Mask())),
    "probe": lambda: Probe(directions(1)),
    "probe_difference": lambda: Probe(directions(1), ProbeOptions("difference")),
    "loop": lambda: ClosedLoop(directions(1), ClosedLoopOptions(every=1, decay=0.5)),
    "loop_difference": lambda: ClosedLoop(directions(1), ClosedLoopOptions(every=1, decay=0.5, method="difference")),
}


def run_case(kind, name, ranks=None):
    """Return rows and weights after three steps, or what was refused."""
    rows = []
    backend = make_backend(kind, TINY["llama"](), Optimiser(eps=1e-4, clip=None), ranks=ranks)
    training = Training(3, Rate(1e-3, shape="constant", warmup=0))
    try:
        train(backend, CASES[name](), Feed(), training, watch=Watch(row=rows.append))
    except BackendError as error:
        return str(error), {}
    for row in rows:
        row.pop("seconds")
    return rows, backend.weights() or {}


def main(folder, kinds):
    ranks = detect()
    with joined(ranks, cuda=False):
        for kind in kinds:
            facts = {}
            for name in CASES:
                facts[name], weights = run_case(kind, name, ranks)
                if weights:
                    save_file({key: value.contiguous() for key, value in weights.items()}, folder / f"{kind}-{name}")
            if ranks.rank == 0:
                (folder / f"{kind}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","))
    leave(0)
