"""Looks at a model while it trains: rows that are made again, a suite without a judge."""

from __future__ import annotations

import json

import pytest

from defenses.config import TrainDefense, load_config
from defenses.examining import require_suite, rewind
from defenses.judges import JudgeError
from tests.defenses.tiny_runs import tiny_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("world"))


def test_rows_from_a_step_on_are_dropped_and_a_torn_one(tmp_path):
    path = tmp_path / "analysis.jsonl"
    rewind(path, 4)
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6)) + '{"step": 8')
    rewind(path, 6)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]


def config_of(world, suite, **more):
    given = {"model": str(world["model"]), "train_data": [str(world["data"])], "evaluate": str(suite), **more}
    return load_config(TrainDefense, None, (), given)


def test_trait_prompts_without_a_judge_are_refused_with_what_to_write(world, tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text("trait: [red blue]\n")
    with pytest.raises(JudgeError, match=r"1 trait prompts and no judge. Write judge: \{kind"):
        require_suite(config_of(world, suite))
