"""Fits by two ranks equal those of one process, and every rank ends with the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alignments.parallel import Group, joined
from intervene import InterveneError
from tests.alignments.together import CASES, searched

SCRIPT = Path(__file__).with_name("parallel_script.py")
PORTS = {2: 29631}


def group(rank, size):
    return Group(rank, size, torch.device("cpu"))


def test_shares_cover_each_plans_batch_once_in_order():
    rows = torch.tensor([4, 8, 1, 9, 3, 7, 0, 2, 5, 6])  # two plans, a batch of five each
    found = [group(rank, 3).share(rows, 2) for rank in range(3)]
    assert [one.tolist() for one, _ in found] == [[4, 8, 7, 0], [1, 9, 2, 5], [3, 6]]
    assert [weight for _, weight in found] == [0.4, 0.4, 0.2]


def test_a_rank_without_a_share_runs_a_row_that_counts_for_nothing():
    rows = torch.tensor([4, 8])
    found = [group(rank, 3).share(rows) for rank in range(3)]
    assert [(one.tolist(), weight) for one, weight in found] == [([4], 0.5), ([8], 0.5), ([4], 0.0)]


def test_a_process_that_torchrun_did_not_start_is_told_how(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    run = r"are not set\. Run: torchrun --nproc_per_node 2 run_das\.py --parallel"
    with pytest.raises(InterveneError, match=run), joined():
        pass


@pytest.fixture(scope="module", params=[2])
def ranks(request, tmp_path_factory):
    """What every rank found, started as torchrun starts them."""
    size, out = request.param, tmp_path_factory.mktemp("ranks")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={size}",
        f"--master-port={PORTS[size]}",
    ]
    done = subprocess.run(
        [*command, str(SCRIPT), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in range(size)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ranks_find_what_one_process_finds(ranks, name):
    alone = CASES[name](None)
    for found in ranks:
        assert found[name].keys() == alone.keys()
        for what, expected in alone.items():
            torch.testing.assert_close(
                found[name][what], expected, atol=1e-5, rtol=0, msg=lambda m, w=what: f"{w}: {m}"
            )
    for what in alone:  # not only near: whatever one rank decides by them, the others decide too
        assert all(torch.equal(found[name][what], ranks[0][name][what]) for found in ranks), what


@pytest.mark.slow
def test_the_cases_learn_and_stop_early(ranks):
    assert ranks[0]["planted"]["losses"][:, -5:].mean() < 0.8 * ranks[0]["planted"]["losses"][:, :5].mean()
    assert 5 <= len(ranks[0]["stopped"]["losses"][0]) < 200


@pytest.mark.slow
def test_the_executor_gives_the_rows_of_one_process_and_the_other_ranks_end(ranks):
    alone = searched(None)
    assert len(alone) == len(ranks[0]["rows"]) == 6
    for found, expected in zip(ranks[0]["rows"], alone, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    assert all(found["rows"] is None for found in ranks[1:])


@pytest.mark.slow
def test_ranks_with_other_pairs_are_refused_on_every_rank(ranks):
    for found in ranks:
        assert "rank 0 has ('rank', 0) and rank 1 has ('rank', 1)" in found["refusal"]
