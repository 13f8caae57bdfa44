"""What the torchrun tests start on every rank: rank 0 prints the rows as JSON, the others work."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # for the processes that do the jobs

if __name__ == "__main__":
    from alignments.config import RunDas
    from alignments.executors_torchrun import Torchrun, rank
    from alignments.pool import JobsFailed
    from tests.alignments import ray_worker
    from tests.alignments.jobs import some_jobs

    task, out, options = sys.argv[1:]
    options = json.loads(options)
    options["bad"] = {int(seed): how for seed, how in options.get("bad", {}).items()}
    config = RunDas(task=task, out=Path(out), options=options, workers=1)
    torch.set_num_threads(1)
    make = partial(ray_worker.scorer, config)
    if rank() > 0:
        print(Torchrun(make, threads=1).work(), file=sys.stderr)
        sys.exit()
    config_here = RunDas(task=task, out=Path(out), options={**options, "sleep": options.get("sleep0", 0.0)}, workers=1)
    executor = Torchrun(make, scorer=ray_worker.scorer(config_here), threads=1, patience=3.0)
    rows = []
    try:
        for jobs in (some_jobs()[:8], some_jobs()[8:]):  # two rounds
            for _, found in executor.run(jobs):
                rows += [row.to_json() for row in found]
    except JobsFailed as error:
        print(error, file=sys.stderr)
    finally:
        executor.close()
    Path(out, "rows.json").write_text(json.dumps(rows))
