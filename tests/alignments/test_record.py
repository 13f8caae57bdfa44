"""A kill costs at most the row being written; finished work is never overwritten; refusals come first."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignments.config import load_config
from alignments.record import RecordError, RunRecord
from alignments.rows import Row

CONFIG = {"task": "ioi", "rank": 8, "layers": [0, 4], "out": "runs/x", "resume": False, "threads": None}
ROW = Row.from_json(
    {
        "task": "ioi",
        "model": "tiny",
        "variable": "position",
        "site": "L0.block_output",
        "layer": 0,
        "component": "block_output",
        "positions": "last",
        "position_label": "last",
        "method": "das",
        "rank": 8,
        "seed": 0,
        "split": "test",
        "n": 10,
        "iia": 0.5,
        "low": 0.2,
        "high": 0.8,
        "copy_base": 0.5,
        "copy_source": 0.5,
        "majority": 0.5,
        "task_accuracy": None,
        "seconds": 1.0,
        "extra.flip": 0.5,
    }
)


def rows(n: int) -> list[Row]:
    return [replace(ROW, seed=seed) for seed in range(n)]


def start(folder: Path, n: int = 0) -> None:
    """Make a run of `n` rows and leave it, as a kill would."""
    with RunRecord.create(folder, CONFIG) as record:
        for row in rows(n):
            record.append(row)


def read(folder: Path, name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / name).read_text())
    return values


def test_a_run_s_folder_holds_what_the_run_was(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    with RunRecord.create(folder, CONFIG) as record:
        record.note_environment(model_fingerprint="abc", device="cpu", seeds=(0, 1))
        for row in rows(2):
            record.append(row)
        path = record.finish({"iia": np.float32(0.5), "report": Path("report.html")})
    assert path == folder / "result.json"
    assert read(folder, "config.json") == CONFIG
    result = read(folder, "result.json")
    assert (result["schema"], result["rows"], result["iia"], result["report"]) == (1, 2, 0.5, "report.html")
    environment = read(folder, "environment.json")
    assert environment["argv"] == sys.argv
    assert environment["versions"]["numpy"] == np.__version__
    assert (environment["model_fingerprint"], environment["device"], environment["seeds"]) == ("abc", "cpu", [0, 1])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [Row.from_json(json.loads(line)) for line in lines] == rows(2)
    assert sorted(one.name for one in folder.iterdir()) == [
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "result.json",
    ]


def test_the_recorded_commit_is_the_code_s(tmp_path: Path) -> None:
    start(tmp_path / "x")
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert read(tmp_path / "x", "environment.json")["commit"] == (done.stdout.strip() if done.returncode == 0 else None)


def test_an_existing_run_is_refused_with_its_number_of_rows(tmp_path: Path) -> None:
    start(tmp_path / "x", 3)
    before = {one.name: one.read_bytes() for one in (tmp_path / "x").iterdir()}
    with pytest.raises(RecordError, match=r"x exists and holds 3 finished rows: pass --resume .* or choose another"):
        RunRecord.create(tmp_path / "x", CONFIG)
    assert {one.name: one.read_bytes() for one in (tmp_path / "x").iterdir()} == before


def test_resume_hands_back_the_rows_and_goes_on(tmp_path: Path) -> None:
    start(tmp_path / "x", 2)
    with RunRecord.create(tmp_path / "x", {**CONFIG, "resume": True, "threads": 1}, resume=True) as record:
        assert record.finished() == tuple(rows(2))
        record.append(rows(3)[2])
        with pytest.raises(RecordError, match="seed 2, test is already there"):
            record.append(rows(3)[2])
    with RunRecord.create(tmp_path / "x", CONFIG, resume=True) as record:
        assert record.finished() == tuple(rows(3))
    environment = read(tmp_path / "x", "environment.json")
    assert [one["rows"] for one in environment["resumed"]] == [2, 3]
    assert read(tmp_path / "x", "config.json") == CONFIG


def test_resume_with_another_configuration_names_the_keys(tmp_path: Path) -> None:
    start(tmp_path / "x", 1)
    other = {**CONFIG, "rank": 4, "lr": 0.1}
    with pytest.raises(RecordError, match=r"lr was None, is 0.1; rank was 8, is 4\."):
        RunRecord.create(tmp_path / "x", other, resume=True)
    with RunRecord.create(tmp_path / "x", {**CONFIG, "out": "elsewhere"}, resume=True):
        pass  # and the refused attempt holds no lock


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_torn_last_line_is_dropped_with_a_note(tmp_path: Path, cut: int) -> None:
    start(tmp_path / "x", 3)
    path = tmp_path / "x" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    with RunRecord.create(tmp_path / "x", CONFIG, resume=True) as record:
        assert record.finished() == tuple(rows(2))
        assert any("torn last line" in note for note in record.notes)
        record.append(rows(3)[2])
    with RunRecord.create(tmp_path / "x", CONFIG, resume=True) as record:
        assert record.finished() == tuple(rows(3))
        assert not any("torn" in note for note in record.notes)


def test_broken_lines_before_the_last_are_not_passed_over(tmp_path: Path) -> None:
    start(tmp_path / "x", 2)
    path = tmp_path / "x" / "metrics.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first[:-5]}\n{second}\n")
    with pytest.raises(RecordError, match=r"metrics.jsonl line 1: is no JSON, and rows follow it"):
        RunRecord.create(tmp_path / "x", CONFIG, resume=True)
    path.write_text(json.dumps({"task": "ioi"}) + "\n")
    with pytest.raises(RecordError, match=r"line 1: Row: missing component"):
        RunRecord.create(tmp_path / "x", CONFIG, resume=True)


def test_a_killed_process_leaves_every_row_it_appended(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("spawn").Process(target=_append_and_die, args=(tmp_path / "x",))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -9
    with RunRecord.create(tmp_path / "x", CONFIG, resume=True) as record:
        assert record.finished() == tuple(rows(2))


def _append_and_die(folder: Path) -> None:
    record = RunRecord.create(folder, CONFIG)
    for row in rows(2):
        record.append(row)
    os.kill(os.getpid(), 9)


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    with (
        RunRecord.create(tmp_path / "x", CONFIG),
        pytest.raises(RecordError, match="another process is writing it"),
    ):
        RunRecord.create(tmp_path / "x", CONFIG, resume=True)


def test_a_finished_run_is_never_overwritten(tmp_path: Path) -> None:
    with RunRecord.create(tmp_path / "x", CONFIG) as record:
        assert record.result is None
        record.finish({"iia": 0.5})
    with pytest.raises(RecordError, match="0 finished rows and a result"):
        RunRecord.create(tmp_path / "x", CONFIG)
    with RunRecord.create(tmp_path / "x", CONFIG, resume=True) as record:
        assert record.result is not None and record.result["iia"] == 0.5
        with pytest.raises(RecordError, match="the run is finished"):
            record.finish({"iia": 0.9})
        with pytest.raises(RecordError, match="after the run was finished"):
            record.append(ROW)
    assert read(tmp_path / "x", "result.json")["iia"] == 0.5


def test_a_result_that_is_no_json_leaves_the_run_unfinished(tmp_path: Path) -> None:
    with RunRecord.create(tmp_path / "x", CONFIG) as record:
        with pytest.raises(RecordError, match="cannot be written as JSON"):
            record.finish({"iia": float("nan")})
        assert record.result is None
        record.finish({"iia": 0.5})


def test_another_model_or_other_data_do_not_join_a_run(tmp_path: Path) -> None:
    with RunRecord.create(tmp_path / "x", CONFIG) as record:
        record.note_environment(model_fingerprint="abc", data_digests={"test": "1"})
    with RunRecord.create(tmp_path / "x", CONFIG, resume=True) as record:
        record.note_environment(model_fingerprint="abc", data_digests={"test": "1"}, device="cuda")
        with pytest.raises(RecordError, match="model_fingerprint abc, now it is def"):
            record.note_environment(model_fingerprint="def")
        with pytest.raises(RecordError, match="data_digests"):
            record.note_environment(data_digests={"test": "2"})
    environment = read(tmp_path / "x", "environment.json")
    assert environment["resumed"][0]["device"] == "cuda"


def test_resuming_nothing_starts_anew_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        with RunRecord.create(tmp_path / name, CONFIG, resume=True) as record:
            assert record.finished() == ()
            assert "held no run to resume" in record.notes[0]


def test_a_start_killed_before_its_configuration_can_be_started_again(tmp_path: Path) -> None:
    start(tmp_path / "x")
    (tmp_path / "x" / "config.json").rename(tmp_path / "x" / "config.json.part")
    start(tmp_path / "x", 1)
    assert read(tmp_path / "x", "config.json") == CONFIG


@pytest.mark.parametrize("resume", [False, True])
def test_places_that_cannot_hold_a_run_are_refused_untouched(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    with pytest.raises(RecordError, match="file: a file of that name exists"):
        RunRecord.create(tmp_path / "file", CONFIG, resume=resume)
    with pytest.raises(RecordError, match=r"file/run: cannot be written \(Not a directory\)"):
        RunRecord.create(tmp_path / "file" / "run", CONFIG, resume=resume)
    with pytest.raises(RecordError, match=r"folder exists and holds no run but thesis\.tex"):
        RunRecord.create(tmp_path / "folder", CONFIG, resume=resume)
    assert [one.name for one in (tmp_path / "folder").iterdir()] == ["thesis.tex"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir(mode=0o500)
    with pytest.raises(RecordError, match="x: cannot be written"):
        RunRecord.create(tmp_path / "x", CONFIG)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write")
def test_a_place_that_nobody_can_write_is_named() -> None:
    with pytest.raises(RecordError, match="/proc/das: cannot be written"):
        RunRecord.create("/proc/das", CONFIG)


def test_a_run_das_configuration_is_its_own_record(tmp_path: Path) -> None:
    config = load_config(flags={"task": "ioi", "layers": "0,4", "out": tmp_path / "x"})
    with RunRecord.create(tmp_path / "x", config):
        pass
    assert load_config(tmp_path / "x" / "config.json") == config
    with RunRecord.create(tmp_path / "x", config, resume=True):
        pass
