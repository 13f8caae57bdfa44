"""Detectors on two ranks learn, block and tell what they do on one, also if one rank blocks all and the other none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.defenses.detector_ranks import CASES, run_case

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero2", "zero3"])
def test_two_ranks_do_what_one_does(kind, tmp_path):
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "tests/defenses/detector_ranks.py", str(tmp_path), kind]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / f"{kind}.json").read_text())
    for name in CASES:
        if kind in ("fsdp", "zero3") and name in ("probe", "loop"):
            assert "is cut over ranks" in facts[name]
            continue
        rows, weights = run_case("plain", name)
        for found, expected in zip(facts[name], rows, strict=True):
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), name
        trained = load_file(tmp_path / f"{kind}-{name}")
        for key, value in weights.items():
            told = f"{name}: {key}"
            torch.testing.assert_close(trained[key].float(), value, rtol=1e-4, atol=2e-6, msg=told)
