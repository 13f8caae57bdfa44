"""What the tests of data-parallel fitting start on every rank: rank r writes what came out to rank<r>.pt."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from alignments.parallel import joined
    from intervene import InterveneError
    from tests.alignments.together import CASES, searched

    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    found = {}
    with joined(backend="gloo", timeout=30.0) as group:
        for name, case in CASES.items():
            torch.manual_seed(rank)  # what a rank draws outside of the plans must not matter
            found[name] = case(group)
        found["rows"] = searched(group)
        try:
            group.require_alike("Fit", ("rank", group.rank // 1))
        except InterveneError as error:
            found["refusal"] = str(error)
    torch.save(found, out / f"rank{rank}.pt")
