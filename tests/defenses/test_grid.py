"""Cells in several processes: the rows of one; a death, a signal or a refusal costs what it must and no more."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from defenses.compare import cells_of, compare, compared
from defenses.errors import DefenseError
from defenses.grid import at_once, visible_gpus
from records.config_files import ConfigError
from records.files import RecordError
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


# --- what is compared is one thing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["data", "suite"])
def test_files_that_have_changed_since_the_first_runs_are_refused(world, tmp_path, which):
    data = tmp_path / "data.jsonl"
    data.write_text(world["data"].read_text())
    suite = tmp_path / "suite.yaml"
    suite.write_text("skill:\n- {prompt: red, answer: blue}\n")
    flags = {"train_data": [str(data)], "methods": "sft", "seeds": "0", "evaluate": str(suite), "save_weights": False}
    flags["answer_tokens"] = 2
    assert compare(asked(world, tmp_path / "grid", **flags), told=lambda line: None) == 0
    assert compare(asked(world, tmp_path / "grid", **flags), told=lambda line: None) == 0
    (data if which == "data" else suite).write_text(
        data.read_text().replace("red", "blue") if which == "data" else "skill:\n- {prompt: red, answer: fish}\n"
    )
    with pytest.raises(RecordError, match=rf"{'data.jsonl' if which == 'data' else 'suite.yaml'} changed since"):
        compare(asked(world, tmp_path / "grid", **{**flags, "methods": "sft,ema"}), told=lambda line: None)


def test_a_variant_that_learns_other_batches_is_told(world, tmp_path):
    lines: list[str] = []
    sets = ["variants.held.method.name=sft", "variants.held.holdout=0.2", "variants.same.method.name=sft"]
    sets += ["variants.same.lr=0.1"]
    compare(asked(world, tmp_path / "grid", sets, seeds="0,1", methods="sft", dry_run=True), told=lines.append)
    warned = [line for line in lines if line.startswith("warning: ") and "same batches" in line]
    assert len(warned) == 1 and warned[0].startswith("warning: held has another holdout than sft: ")


def test_only_inoculation_inoculates_unless_a_variant_says_so(world, tmp_path):
    sets = ["data.inoculation=Be red.", "data.truncation=drop", "variants.both.method.name=ema"]
    sets += [
        "variants.both.data.inoculation=Be blue.",
        "variants.own.method.name=sft",
        "variants.own.data.chat_template=plain",
    ]
    config = asked(world, tmp_path / "grid", sets, methods="sft,inoculation", seeds="0")
    read = {name: cell.data for name, cell in cells_of(config)}
    assert read == {
        "sft": {"truncation": "drop"},
        "inoculation": {"truncation": "drop", "inoculation": "Be red."},
        "both": {"truncation": "drop", "inoculation": "Be blue."},
        "own": {"truncation": "drop", "chat_template": "plain"},
    }


def test_a_training_loss_is_no_skill_unless_it_is_asked_for():
    table = {name: {0: {"trait_rate": rate, "loss": 1.0}} for name, rate in (("sft", 0.5), ("injection", 0.1))}
    assert compared(table)["pareto"] is None
    assert compared(table, skill="loss")["pareto"]["skill"] == "loss"
