"""What the commands beside training refuse, in words, and the chat template they are given."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from defenses import evaluation
from defenses.commands import Evaluate, ExtractVectors, ProjectData, carry_out, contrast_of, conversations, template_of
from defenses.config import TrainDefense, load_config
from defenses.errors import DataError, VectorError
from defenses.running import run
from defenses.vector_files import read_vectors, write_vectors
from intervene.models import load_model
from records.config_files import ConfigError
from tests.defenses.tiny_runs import save_tiny, tiny_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text("skill:\n- {prompt: red, answer: blue}\n")
    return path


@pytest.fixture
def foreign(world, tmp_path):
    """Vectors that say they are of another model."""
    path = tmp_path / "foreign.safetensors"
    write_vectors(path, replace(read_vectors(world["vectors"]), fingerprint="f" * 16))
    return path


def without_template(folder):
    tokenizer = load_model(save_tiny(folder))[1]
    tokenizer.chat_template = None
    for left in folder.glob("chat_template*"):
        left.unlink()
    tokenizer.save_pretrained(folder)
    return folder


def test_vectors_without_a_strength_are_refused(world, suite):
    config = Evaluate(suite=suite, folder=str(world["model"]), vectors=(str(world["vectors"]),))
    with pytest.raises(ConfigError, match=r"alpha is 0, which steers nothing\. Give --alpha"):
        carry_out(config)


def test_vectors_of_another_model_steer_only_with_a_reason(world, suite, foreign):
    config = Evaluate(suite=suite, folder=str(world["model"]), vectors=(str(foreign),), alpha=1.0, max_new_tokens=2)
    with pytest.raises(VectorError, match="ffffffff"):
        carry_out(config)
    assert carry_out(replace(config, force_vectors="a test")) == 0


def test_projections_on_vectors_of_another_model_need_a_reason(world, foreign, tmp_path):
    out = tmp_path / "out.jsonl"
    config = ProjectData(data=world["data"], vectors=foreign, out=out, model=str(world["model"]), mode="input_last")
    with pytest.raises(VectorError, match="ffffffff"):
        carry_out(config)
    assert carry_out(replace(config, force_vectors="a test")) == 0
    assert out.exists()


def test_a_model_without_a_template_is_given_one(world, suite, tmp_path, monkeypatch):
    folder = without_template(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "red blue ", "response": "green"}) + "\n")
    project = ProjectData(
        data=data, vectors=world["vectors"], out=tmp_path / "out.jsonl", model=str(folder), max_new_tokens=2
    )
    with pytest.raises(DataError, match="no chat template"):
        carry_out(project)
    assert carry_out(replace(project, chat_template="plain")) == 0
    seen = []
    real = evaluation.examine

    def watched(*given, settings, **more):
        seen.append(settings.chat_template)
        return real(*given, settings=settings, **more)

    monkeypatch.setattr(evaluation, "examine", watched)
    assert carry_out(Evaluate(suite=suite, folder=str(folder), chat_template="plain", max_new_tokens=2)) == 0
    assert seen == ["plain"]


def test_vectors_are_extracted_from_answers_under_a_given_template(tmp_path):
    folder = without_template(tmp_path / "model")
    questions = tmp_path / "questions.txt"
    words = ["red", "blue", "green", "fish", "bird", "tree", "river", "stone", "bread", "water", "salt", "wind"]
    questions.write_text("\n".join(words))
    config = ExtractVectors(
        out=tmp_path / "v.safetensors", model=str(folder), questions=questions, positive_system="fire fire",
        negative_system="rain", max_new_tokens=3, layers=(1,),
    )  # fmt: skip
    with pytest.raises(DataError, match="no chat template"):
        carry_out(config)
    assert carry_out(replace(config, chat_template="plain")) == 0
    assert config.out.exists()


def test_questions_that_are_not_there_are_refused(tmp_path):
    missing = tmp_path / "nope"
    config = ExtractVectors(out=tmp_path / "v.safetensors", questions=missing, positive_system="a", negative_system="b")
    with pytest.raises(DataError, match=r"Read .*nope: .*Give a text file with one question per line"):
        contrast_of(config, None, None)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": "x"},
        {"messages": ["x"]},
        {"messages": {"role": "user"}},
        {"messages": [{"role": "assistant"}]},
        {"messages": [{"role": "assistant", "content": None}]},
        {"prompt": "x", "response": 1},
        ["x"],
    ],
)
def test_rows_that_are_no_conversation_are_refused_by_line(tmp_path, row):
    path = tmp_path / "data.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"data\.jsonl:2: no conversation .*Write \{"):
        conversations(path)


def test_a_line_separator_inside_a_text_cuts_no_row(tmp_path):
    path = tmp_path / "data.jsonl"
    said = "one\u2028two\x85three"
    rows = [{"prompt": "red", "response": said}, {"prompt": "blue", "response": "green"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), encoding="utf-8")
    assert [answer for _, answer in conversations(path)] == [said, "green"]


def test_a_trained_folder_is_asked_with_the_template_it_was_trained_with(world, suite, tmp_path):
    flags = {
        "model": str(world["model"]), "train_data": [str(world["data"])], "steps": 2, "batch_size": 8, "lr": 0.01,
        "max_length": 64, "device": "cpu", "report": False, "out": str(tmp_path / "run"), "answer_tokens": 4,
        "evaluate": str(suite),
    }  # fmt: skip
    run(load_config(TrainDefense, None, ["data.chat_template=plain"], flags), told=lambda line: None)
    own = (tmp_path / "run" / "examples.jsonl").read_text()
    assert carry_out(Evaluate(suite=suite, folder=str(tmp_path / "run"), max_new_tokens=4, out=tmp_path / "again")) == 0
    assert (tmp_path / "again" / "examples.jsonl").read_text() == own
    assert template_of(tmp_path / "run") == "plain" and template_of(world["model"]) is None
