"""Looks at a model while it trains: rows that are made again, the template of the data, a suite without a judge."""

from __future__ import annotations

import json

import pytest
import torch

from defenses import examining
from defenses.backend import PlainBackend
from defenses.batch import Example, collate
from defenses.config import TrainDefense, load_config
from defenses.examining import Dose, Looking, examined, require_suite, rewind
from defenses.judges import JudgeError
from defenses.plans import Scope
from defenses.vector_files import read_vectors
from intervene import capture
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


@pytest.mark.parametrize(
    ("method", "flags", "dose"),
    [
        ({"name": "injection"}, {"alpha": 3.0, "scope": "response_shifted"}, Dose(3.0, Scope.RESPONSE_SHIFTED)),
        ({"name": "injection", "strength": {"alpha": 5.0}, "factors": [2.0]}, {}, Dose(10.0)),
        ({"name": "injection", "scope": "all"}, {"alpha": 0.5, "relative": True}, Dose(0.5, Scope.ALL, True)),
        ({"name": "immune_projection"}, {}, Dose(5.0)),
        ({"name": "immune_continuation"}, {}, Dose(5.0)),
        ({"name": "delta_loss", "detection_alpha": 0.75}, {"relative": True}, Dose(0.75, relative=True)),
        ({"name": "delta_loss"}, {"action": "inject", "alpha": 2.0}, Dose(2.0)),
        ({"name": "ablation"}, {}, Dose(1.0, Scope.ALL)),
        ({"name": "sft"}, {}, Dose()),
    ],
)
def test_what_is_looked_at_is_the_dose_that_is_trained(world, tmp_path, method, flags, dose):
    vectors = str(world["vectors"])
    given = {"model": str(world["model"]), "train_data": [str(world["data"])], "vectors": [vectors], "out": tmp_path}
    config = load_config(TrainDefense, None, (), {**given, "method": method, "analyse_every": 2, **flags})
    backend = PlainBackend(load_model(config.model)[0])
    v = read_vectors(vectors)
    batch = collate([Example((6, 7, 8, 9, 10), (-100, -100, 8, 9, 10), 0)], 0)
    looking = Looking(config, backend, [v], batch)
    assert looking.dose == dose and looking.analyser.scope is dose.scope
    looking.at(backend, 2)
    row = json.loads((tmp_path / "analysis.jsonl").read_text().splitlines()[0])
    added = row["projection_injected"] - row["projection"]
    if dose.relative:
        with capture(backend.model, ["L1.block_output"]) as acts, torch.no_grad():
            backend.model(**batch.inputs())
        length = float(acts["L1.block_output"][0, 2:5].norm(dim=1).mean())
    elif dose.scope is Scope.RESPONSE_SHIFTED:
        length = float(v.at(1).norm()) * 2 / 3  # the last of three learned tokens predicts none
    else:
        length = float(v.at(1).norm())
    assert added == pytest.approx(dose.strength * length, rel=1e-4)
