"""The command as a user runs it: real processes, real folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import run_das

ROOT = Path(__file__).parents[2]
QUICK = ["--n_train", "512", "--n_select", "64", "--n_test", "64", "--steps", "20", "--batch_size", "64"]
EQUALITY = ["--task", "hierarchical_equality", *QUICK]


def das(*arguments, cwd=ROOT, timeout=240):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, str(ROOT / "run_das.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=environment,
    )


def quick(*arguments):
    """The same command inside this process: for refusals, which must come before any long work."""
    return CliRunner().invoke(run_das.app, [str(argument) for argument in arguments])


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_leaves_one_folder_with_everything(tmp_path):
    done = das(*EQUALITY, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "environment.json", "metrics.jsonl", "result.json", "report.html", "plan"}
    result = json.loads((folder / "result.json").read_text())
    assert f"{result['site']} @ {result['positions']}, chosen among" in done.stdout
    assert result["split"] == "test" and result["selected_on"] == "select"
    assert {row["method"] for row in rows(folder)} == {
        "full_vector",
        "das",
        "control:random_subspace",
        "control:random_model",
    }
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["device"] == "cpu"
    resolved = environment["resolved"]
    assert resolved["layers"] == [0, 1, 2] and resolved["sources"]["layers"] == "derived"
    assert resolved["n_train"] == 512 and resolved["sources"]["n_train"] == "flag"
    refused = das(*EQUALITY, "--out", folder)
    assert refused.returncode == 2 and "--resume" in refused.stdout
    again = das(*EQUALITY, "--out", folder, "--resume")
    assert again.returncode == 0 and "is finished" in again.stdout


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    folder = tmp_path / "run"
    arguments = [*EQUALITY, "--steps", "500", "--out", folder]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_das.py"), *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` has it ignored in all below
    )
    deadline = time.monotonic() + 200
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < 7:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    kept = rows(folder)
    assert not (folder / "result.json").exists()
    done = das(*arguments, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(folder)[: len(kept)] == kept
    whole = tmp_path / "whole"
    das(*EQUALITY, "--steps", "500", "--out", whole)
    key = ("site", "method", "seed", "split", "iia")
    assert [[row[k] for k in key] for row in rows(folder)] == [[row[k] for k in key] for row in rows(whole)]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--task", "iol"], "Did you mean"),
        (["--task", "hierarchical_equality", "--layers", "7"], "this model has layers 0-2"),
        (["--task", "hierarchical_equality", "--variable", "left"], "it has no variable 'left'"),
        (["--task", "hierarchical_equality", "--set", "rnak=4"], "rank"),
        (["--task", "hierarchical_equality", "--config", "missing.yaml"], "cannot be read"),
        (["--task", "hierarchical_equality", "--rank", "17"], "rank 17: L0.block_output is 16 wide"),
        (["--task", "hierarchical_equality", "--model", "gpt2"], "model gpt2: hierarchical_equality trains a small"),
        (["--task", "hierarchical_equality", "--device", "cuda"], "Leave device out"),
        (["--task", "ioi", "--device", "foo"], "Use cpu, or cuda where there is one"),
    ],
)
def test_bad_input_is_answered_in_one_line_and_leaves_no_folder(arguments, text, tmp_path):
    done = quick(*arguments, *QUICK, "--out", tmp_path / "run")
    assert done.exit_code == 2
    assert text in " ".join(done.output.split()), done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "run").exists()  # else the mended command would be refused


def test_a_refused_start_leaves_a_folder_of_the_users_empty(tmp_path):
    (tmp_path / "run").mkdir()
    assert quick(*EQUALITY, "--layers", "7", "--out", tmp_path / "run").exit_code == 2
    assert not list((tmp_path / "run").iterdir())


def test_a_dry_run_checks_what_the_run_would_refuse(tmp_path):
    done = quick(*EQUALITY, "--layers", "7", "--dry_run", "--out", tmp_path / "run")
    assert done.exit_code == 2 and "this model has layers 0-2" in " ".join(done.output.split())


def test_an_output_path_that_is_a_file_is_refused_before_any_work(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    done = quick(*EQUALITY, "--out", blocked)
    assert done.exit_code == 2 and "RecordError" in done.output
    assert "training" not in done.output and blocked.read_text() == "mine"


def test_print_config_shows_each_value_with_its_source(tmp_path):
    (tmp_path / "run.yaml").write_text("task: hierarchical_equality\nrank: 4\nsteps: 50\n")
    done = quick("--config", tmp_path / "run.yaml", "--set", "steps=60", "--lr", "0.02", "--print_config")
    lines = {line.split()[0]: line.split()[1:] for line in done.output.splitlines() if line.strip()}
    assert lines["rank"][0] == "4" and lines["rank"][-1].endswith("run.yaml")
    assert lines["steps"] == ["60", "--set"] and lines["lr"] == ["0.02", "flag"]
    assert lines["n_train"][0] == "61440"


def test_help_names_every_flag():
    done = quick("--help")
    assert done.exit_code == 0
    for flag in (
        "--task",
        "--model",
        "--methods",
        "--layers",
        "--positions",
        "--rank",
        "--seeds",
        "--out",
        "--dry_run",
    ):
        assert flag in done.output


@pytest.mark.slow
def test_hierarchical_equality_is_found_in_the_first_layer_and_not_by_its_controls(tmp_path):
    """The paper's result (Geiger et al. 2023): both equalities in layer 0; random frames and networks near chance.

    Each has 4 of 16 directions. Of one equality at rank 8, half of the width, random frames find .58 (up to .73).
    """
    both = ("--variable", "left_equal+right_equal", "--rank", "4")
    done = das("--task", "hierarchical_equality", *both, "--layers", "0", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    test = [row for row in rows(tmp_path / "run") if row["split"] == "test"]

    def mean(method):
        found = [row["iia"] for row in test if row["method"] == method]
        assert len(found) == 3
        return sum(found) / 3

    assert mean("das") >= 0.95
    assert mean("control:random_subspace") <= 0.60
    assert mean("control:random_model") <= 0.60


@pytest.mark.slow
def test_ioi_on_the_real_model_dry_and_small(tmp_path):
    few = ["--task", "ioi", "--layers", "20", "--positions", "last", "--n_train", "32", "--n_select", "32"]
    few += ["--n_test", "32", "--steps", "4", "--seeds", "0", "--batch_size", "16", "--out", tmp_path / "run"]
    dry = das(*few, "--dry_run")
    assert dry.returncode == 0, dry.stdout + dry.stderr
    for text in ("2 cells, 1 of them learned", "task accuracy on 32 training examples", "cost: about"):
        assert text in " ".join(dry.stdout.split())
    assert not (tmp_path / "run").exists()
    done = das(*few)
    assert done.returncode == 0, done.stdout + done.stderr
    test = [row for row in rows(tmp_path / "run") if row["split"] == "test" and row["method"] == "full_vector"]
    assert test[0]["copy_base"] == 0.5 and test[0]["extra.flip"] == 0.5 and test[0]["copy_source"] == 0.0
    assert test[0]["task_accuracy"] > 0.8


@pytest.mark.slow
def test_resume_needs_only_the_folder(tmp_path):
    folder = tmp_path / "run"
    few = ["--layers", "0", "--seeds", "0", "--controls", "none", "--out", folder]
    assert das(*EQUALITY, *few).returncode == 0
    kept = rows(folder)
    assert {row["method"] for row in kept} == {"full_vector", "das"}
    (folder / "result.json").unlink()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept[:2]))
    done = das("--resume", "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(row["method"], row["iia"]) for row in rows(folder)] == [(row["method"], row["iia"]) for row in kept]


def test_resuming_where_nothing_ran_says_so(tmp_path):
    done = quick("--resume", "--out", tmp_path / "none")
    assert done.exit_code == 2 and "it holds no run (no config.json). Name a run's folder" in done.output
    assert not (tmp_path / "none").exists()
