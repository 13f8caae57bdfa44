"""Looks at a model while it trains: rows that are made again, the template of the data, a suite without a judge."""

from __future__ import annotations

import json

import pytest

from defenses import examining
from defenses.backend import PlainBackend
from defenses.config import TrainDefense, load_config
from defenses.examining import examined, require_suite, rewind
from defenses.judges import JudgeError
from intervene.models import load_model
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


def test_prompts_are_written_with_the_template_of_the_data(world, tmp_path, monkeypatch):
    suite = tmp_path / "suite.yaml"
    suite.write_text("skill:\n- {prompt: red, answer: blue}\n")
    config = config_of(world, suite, data={"chat_template": "plain"}, answer_tokens=2, answer_batch=3)
    model, tokenizer = load_model(str(world["model"]))
    seen = []
    real = examining.examine

    def watched(*given, settings, **more):
        seen.append(settings)
        return real(*given, settings=settings, **more)

    monkeypatch.setattr(examining, "examine", watched)
    assert examined(config, PlainBackend(model), tokenizer) is not None
    assert seen[0].chat_template == "plain" and (seen[0].max_new_tokens, seen[0].batch_size) == (2, 3)


def test_trait_prompts_without_a_judge_are_refused_with_what_to_write(world, tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text("trait: [red blue]\n")
    with pytest.raises(JudgeError, match=r"1 trait prompts and no judge. Write judge: \{kind"):
        require_suite(config_of(world, suite))
