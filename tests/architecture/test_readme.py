"""The README's example prints what the README says."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.architecture.code import ROOT


@pytest.mark.slow
def test_the_example_runs_and_the_answer_moves_from_the_country_to_the_last_token():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    done = subprocess.run(
        [sys.executable, "-c", code[1]], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[-1] for line in lines[:4]] == ["Rome", "Paris", "Paris", "Rome"]
    assert lines[4].startswith("I think that the film was")
    assert lines[5].startswith("Add at L12.block_output: 14 calls, 19 tokens")
