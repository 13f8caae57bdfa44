"""Cells in several processes: the rows of one; a death, a signal or a refusal costs what it must and no more."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from defenses.compare import cells_of, compare
from defenses.errors import DefenseError
from defenses.grid import at_once, visible_gpus
from records.config_files import ConfigError
from tests.defenses.test_compare import config_of, losses
from tests.defenses.tiny_runs import tiny_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("world"))


def asked(world, out, sets=(), **flags):
    return config_of(world, out, sets, threads=1, **flags)


def compared_in(folder):
    made = json.loads((folder / "comparison.json").read_text())
    return made["rows"], (folder / "rows.jsonl").read_text()


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(world, tmp_path):
    assert compare(asked(world, tmp_path / "one"), told=lambda line: None) == 0
    lines: list[str] = []
    assert compare(asked(world, tmp_path / "two", workers=2), told=lines.append) == 0
    assert compared_in(tmp_path / "two") == compared_in(tmp_path / "one")
    for cell in ("sft/seed0", "sft/seed1", "injection/seed0", "injection/seed1"):
        assert losses(tmp_path / "two" / cell) == losses(tmp_path / "one" / cell)
    assert sum(line.startswith("---") for line in lines) == 4
    assert any(line.startswith("injection, seed 1: step 3/3") for line in lines)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_process_that_is_killed_costs_what_its_cell_had_not_saved(world, tmp_path):
    flags = {"methods": "sft", "seeds": "0", "steps": 300, "save_every": 10, "save_weights": False}
    assert compare(asked(world, tmp_path / "whole", **flags), told=lambda line: None) == 0
    cell = tmp_path / "cut" / "sft" / "seed0"

    def kill_after_a_checkpoint():
        while not list((cell / "checkpoints").glob("step-????????")):
            time.sleep(0.01)
        for one in multiprocessing.active_children():
            one.kill()

    killer = threading.Thread(target=kill_after_a_checkpoint)
    killer.start()
    lines: list[str] = []
    assert compare(asked(world, tmp_path / "cut", workers=2, **flags), told=lines.append) == 0
    killer.join()
    assert any("resumed after step" in line for line in lines)
    assert losses(cell) == losses(tmp_path / "whole" / "sft" / "seed0")


@pytest.mark.slow
def test_a_cell_whose_process_always_dies_is_begun_again_once_behind_the_others(world, tmp_path):
    def kill(text):
        lines.append(text)
        if text.startswith("sft, seed 0: "):
            multiprocessing.active_children()[0].kill()

    lines: list[str] = []
    cells = cells_of(asked(world, tmp_path / "grid", methods="sft"))
    done = list(at_once(cells, 1, kill))
    assert [(one.cell.seed, bool(one.outcome.result)) for one in done] == [(1, True), (0, False)]
    assert done[1].reason == "its process died 2 times: signal 9 (out of memory?)"
    assert [line[:22] for line in lines if line.startswith("---")] == [
        "--- 1/2: sft, seed 0",
        "--- 2/2: sft, seed 1",
        "--- 1/2: sft, seed 0",
    ]


@pytest.mark.slow
def test_a_signal_stops_all_cells_at_a_checkpoint_and_the_same_command_goes_on(world, tmp_path):
    flags = {"methods": "sft,injection", "seeds": "0", "steps": 2000, "log_every": 1, "save_weights": False}
    lines: list[str] = []

    def stop(text):
        lines.append(text)
        if ": step 1/" in text:
            os.kill(os.getpid(), signal.SIGTERM)

    grid = tmp_path / "grid"
    assert compare(asked(world, grid, workers=2, **flags), told=stop) == 143
    assert "SIGTERM: stopped. The same command goes on with sft, seed 0." in lines
    assert not multiprocessing.active_children()
    begun = [one for one in ("sft", "injection") if list((grid / one / "seed0" / "checkpoints").glob("step-????????"))]
    assert begun and not list(grid.glob("*/seed0/result.json"))
    assert all(len(losses(grid / one / "seed0")) < 2000 for one in begun)


@pytest.mark.slow
def test_a_cell_that_cannot_be_run_ends_the_comparison_with_its_own_words(world, tmp_path):
    config = asked(world, tmp_path / "grid", ["variants.far.method.name=injection", "variants.far.layers=9"], workers=2)
    with pytest.raises(DefenseError, match=r"far, seed 0: .*[Ll]ayer"):
        compare(config, told=lambda line: None)
    assert not multiprocessing.active_children()


def test_ranks_are_not_told_to_start_processes(world, tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"workers 2: this is rank 0 of 2 .*ranks train one cell together"):
        compare(asked(world, tmp_path / "grid", workers=2), told=lambda line: None)


def test_workers_take_the_gpus_that_this_process_sees_in_turn():
    assert visible_gpus({}, 2) == ["0", "1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "4, GPU-8932"}, 2) == ["4", "GPU-8932"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, 0) == []
