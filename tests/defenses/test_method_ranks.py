"""Methods that read and write whole weights learn on two ranks, sharded or not, what they learn on one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from defenses.launch import Ranks
from tests.architecture.code import ROOT
from tests.defenses.method_ranks import METHODS, run

KINDS = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ["-m", "tests.defenses.method_ranks", str(out), ",".join(KINDS)]
    done = subprocess.run(
        [*start, *script],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_learn_and_tell_what_one_does(on_two_ranks, name):
    alone = run("plain", name, Ranks())
    for kind in KINDS:
        found = on_two_ranks[f"{kind}-{name}"]
        for key, value in alone["weights"].items():
            torch.testing.assert_close(found["weights"][key], value, rtol=0, atol=1e-5)
        for row, expected in zip(found["rows"], alone["rows"], strict=True):
            for key in expected.keys() - {"seconds"}:
                assert row[key] == pytest.approx(expected[key], rel=1e-2, abs=1e-4), (kind, key)
        assert found["leak"] == pytest.approx(alone["leak"], abs=1e-6)
    if name in ("update", "flat", "all_linear"):
        assert alone["leak"] < 1e-6
