"""How a run of the command ends: with ties, with cells that fail, with data that changed, and LoReFT."""

from __future__ import annotations

import json

import pytest

from tests.scripts.test_run_das import quick, rows
from tests.scripts.tiny_llama import save_tiny_llama

SMALL = ["--task", "planted", "--model", "planted", "--n_train", 32, "--n_select", 24, "--n_test", 24, "--lr", 0.05]
QUICK = ["--steps", 2, "--controls", "none", "--seeds", "0,1"]


def result(folder):
    return json.loads((folder / "result.json").read_text())


def one_line(done):
    return " ".join(done.output.split())


@pytest.mark.parametrize("ranks", ["16,12", "12,16"])
def test_a_tie_between_ranks_still_gives_a_verdict(tmp_path, ranks):
    asked = [*SMALL, *QUICK, "--layers", 1, "--positions", "last", "--methods", "das", "--rank", ranks]
    done = quick(*asked, "--set", "grid_splits=select", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    scores = {row["rank"]: row["iia"] for row in rows(tmp_path / "run") if row["split"] == "select" and not row["seed"]}
    assert scores[12] == scores[16]  # the tie that this is about
    told = result(tmp_path / "run")
    assert told["rank"] == 12 and set(told["seeds"]) == {"0", "1"} and "above it" in told["sentence"].lower()


def test_a_cell_that_cannot_be_fitted_does_not_end_the_search(tmp_path):
    asked = [*SMALL, *QUICK, "--layers", 0, "--positions", "every", "--methods", "mean_difference,full_vector"]
    done = quick(*asked, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    told = result(tmp_path / "run")
    assert told["failed"] and "sentence" in told and told["rows"] == len(rows(tmp_path / "run"))
    for one in told["failed"]:
        assert one["method"] == "mean_difference" and one["site"] == "L0.block_output"
        assert "the classes' activations do not differ there" in one["reason"]
    scored = {row["positions"] for row in rows(tmp_path / "run") if row["method"] == "mean_difference"}
    assert scored and scored.isdisjoint(one["positions"] for one in told["failed"])
    assert "1 cell could not be scored and is left out" in one_line(done)
    assert "could not be scored: mean_difference at L0.block_output @ 0: Directions" in one_line(done)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Cells that could not be scored" in page and "activations do not differ there" in page


def test_a_search_of_which_every_cell_fails_is_refused_with_the_reasons(tmp_path):
    asked = [*SMALL, *QUICK, "--layers", 0, "--positions", "start", "--methods", "mean_difference"]
    done = quick(*asked, "--out", tmp_path / "run")
    assert done.exit_code == 2 and "the classes' activations do not differ there" in one_line(done)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_on_data_that_were_edited(tmp_path):
    model = save_tiny_llama(tmp_path / "model", [f"a word of {n}" for n in range(40)])
    file = tmp_path / "pairs.jsonl"
    lines = [
        {
            "input_ids": [3 + n, 4, 5],
            "source_input_ids": [6, 3 + n, 8],
            "labels": [-100, -100, 4 + n],
            "intervention_ids": 0,
        }
        for n in range(20)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["--task", file, "--model", model, "--layers", 0, "--positions", "2", "--force"]
    asked += ["--methods", "full_vector", "--controls", "none", "--n_train", 8, "--n_select", 3, "--n_test", 3]
    asked += ["--out", tmp_path / "run"]
    done = quick(*asked)
    assert done.exit_code == 0, done.output
    (tmp_path / "run" / "result.json").unlink()  # as if it had been stopped before the end
    lines = [{**line, "labels": [-100, -100, 9]} for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = quick(*asked, "--resume")
    assert done.exit_code == 2, done.output
    assert "data_digests" in done.output and "the rows would not belong together" in one_line(done)
    assert not (tmp_path / "run" / "result.json").exists()


def test_loreft_does_not_win_the_search(tmp_path):
    asked = [*SMALL, "--steps", 40, "--controls", "none", "--seeds", "0", "--layers", 0, "--positions", "last"]
    done = quick(*asked, "--methods", "das,loreft", "--rank", 2, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    told = result(tmp_path / "run")
    assert told["method"] == "das" and told["candidates"] == 1
    assert "no interchange" in told["methods"]["loreft"]["sentence"]
    fits = [json.loads(line) for line in (tmp_path / "run" / "fit.jsonl").read_text().splitlines()]
    assert {one["method"] for one in fits} == {"das"}  # what is kept is the interchange
