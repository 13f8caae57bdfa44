"""What workers of the executor tests prepare: a planted network, some of whose jobs end or break their worker.

Workers are other processes, so that what they are to do stands in the configuration: `out` is a folder of marker files,
`options` names the seed that is bad and how.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from alignments import Budget, Facts, Scorer
from intervene import AllTokens
from tests.alignments.planted import planted_mlp, planted_pairs

BASELINES = {split: {"copy_base": 0.5, "copy_source": 1.0, "majority": 0.5} for split in ("train", "select", "test")}


class Mortal(Scorer):
    """A scorer that writes down who did what, and meets with accidents."""

    def rows(self, job):
        folder, bad = Path(self.options["folder"]), self.options.get("bad", {})
        with (folder / "who").open("a") as file:
            file.write(f"{os.getpid()} {job.seeds[0]}\n")
        how = bad.get(job.seeds[0])
        if how == "raises":
            raise ValueError("bad on purpose")
        if how == "kills" or (how == "kills once" and _first(folder / f"killed {job.seeds[0]}")):
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("RANK") == "1" and "rank_1" in self.options and _first(folder / "dead"):
            if self.options["rank_1"] == "ends its rank":
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.options.get("sleep", 0.0))
        return super().rows(job)


def _first(path):
    if path.exists():
        return False
    path.touch()
    return True


def scorer(config):
    """Return a scorer on planted pairs; `config.task` "unprepared" cannot be prepared."""
    if config.task == "unprepared" and os.environ.get("RANK") != "0":
        raise ValueError("no model on purpose")
    model = planted_mlp()
    sizes = {"train": 64, "select": 48, "test": 48}
    splits = {split: planted_pairs(model, n, i) for i, (split, n) in enumerate(sizes.items())}
    facts = Facts("planted", "mlp", "sign", BASELINES, {})
    return Mortal(
        model,
        splits,
        lambda name: AllTokens(),
        facts,
        budget=Budget(steps=12, batch_size=32, lr=0.05),
        options={"folder": str(config.out), **config.options},
    )
