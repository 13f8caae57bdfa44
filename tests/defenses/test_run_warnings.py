"""What a run says, refuses or scores where a plain training would pass for a defended one."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from defenses.errors import CalibrationError
from defenses.filtering import scores_of
from defenses.launch import detect
from defenses.preparing import neutral_feed, prepare
from defenses.sample_log import detection
from intervene.models import load_model
from records.config_files import ConfigError
from tests.defenses.test_running import config_of, quiet
from tests.defenses.tiny_runs import tiny_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("world"))


def row(step, index, score, *, blocked=False, poison=False):
    return {"step": step, "index": index, "score": score, "blocked": blocked, "poison": poison}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def unlabelled(world, folder):
    lines = [json.loads(line) for line in world["data"].read_text().splitlines()]
    return write_rows(folder / "unlabelled.jsonl", [{"messages": one["messages"]} for one in lines])


def test_the_area_counts_blocked_samples_by_the_score_they_were_blocked_for():
    first = [row(1, 0, 5.0, poison=True), row(1, 1, 1.0), row(2, 2, 0.5, poison=True), row(2, 3, 4.0)]
    second = [row(3, 0, None, blocked=True, poison=True), row(3, 1, 0.2), row(4, 2, 0.1, poison=True)]
    second.append(row(4, 3, None, blocked=True))
    found = detection([*first, *second])
    assert (found["samples"], found["scores"], found["blocked"]) == (4, 8, 0.25)
    # poisoned 5.0 and 0.1 against clean 0.2 and 4.0: two of four pairs; without the blocked ones it would be 0 of 1
    assert (found["auroc"]["value"], found["auroc"]["n"]) == (0.5, 4)
    assert found["precision"]["value"] == found["recall"]["value"] == 0.5  # decisions are those of the last rows
    never = detection([*first, row(1, 4, None, poison=True)])
    assert (never["auroc"]["n"], never["auroc"]["excluded"]) == (4, 1)
    assert detection([{"step": 1, "index": 0}]) == {}


def test_a_run_that_blocks_by_the_last_epoch_judges_all_of_its_samples(world, tmp_path):
    flags = {"method": "first_order", "vectors": [str(world["vectors"])], "steps": 15, "save_weights": False}
    sets = ["method.when=next_epoch", "method.action=mask"]
    outcome, told = quiet(config_of(world, tmp_path / "run", sets, **flags))
    found = outcome.result["detection"]
    assert found["blocked"] > 0 and found["auroc"]["n"] == 40 and "warning" not in told


def test_a_quantile_of_examples_that_may_be_poisoned_is_told(world, tmp_path):
    flags = {"method": "delta_loss", "vectors": [str(world["vectors"])], "holdout": 0.3, "dry_run": True}
    other = str(unlabelled(world, tmp_path))
    _, told = quiet(config_of(world, tmp_path / "run", fpr=0.2, **{**flags, "train_data": [other]}))
    assert "warning: the data do not say what is poisoned, so that the 12 examples held out" in told
    for more in ({"fpr": 0.2}, {"train_data": [other]}):  # labelled; or a fixed threshold
        assert "warning" not in quiet(config_of(world, tmp_path / "run", **{**flags, **more}))[1]


def test_inoculation_without_a_prompt_is_refused_before_a_model_is_loaded(world, tmp_path):
    for sets in ((), ["data.inoculation="]):
        with pytest.raises(ConfigError, match=r"no prompt was given: it would be plain sft\. Give --set data.inocul"):
            quiet(config_of({**world, "model": "none"}, tmp_path / "run", sets, method="inoculation"))
    for name in ("inoculation", "system"):
        quiet(config_of(world, tmp_path / "run", [f"data.{name}=red fire"], method="inoculation", dry_run=True))


def test_the_last_score_is_that_of_the_latest_step_whatever_the_file(tmp_path):
    path = write_rows(tmp_path / "samples.jsonl", [row(9, 0, 0.9), row(2, 1, 0.2), row(8, 2, 0.8), row(9, 2, None)])
    write_rows(tmp_path / "samples-rank1.jsonl", [row(1, 0, 0.1), row(3, 1, 0.3)])
    assert scores_of(path) == {0: 0.9, 1: 0.3, 2: 0.8}
    plain = write_rows(tmp_path / "own.jsonl", [{"index": 0, "score": 1}, {"index": 0, "score": 2}])
    assert scores_of(plain) == {0: 2.0}


def test_scores_of_other_data_are_refused_by_both_digests(world, tmp_path):
    write_rows(tmp_path / "samples.jsonl", [row(1, index, float(index)) for index in range(40)])
    sets = ["method.by=scores", "method.quantile=0.5"]
    flags = {"method": "filtering", "scores": str(tmp_path / "samples.jsonl"), "dry_run": True}
    quiet(config_of(world, tmp_path / "run", sets, **flags))  # nothing says which data they are of
    environment = tmp_path / "environment.json"
    environment.write_text(json.dumps({"data_digests": {"train": "0123456789ab"}}))
    with pytest.raises(CalibrationError, match=r"they are of data 0123456789ab, and this run's are [0-9a-f]{12}: "):
        quiet(config_of(world, tmp_path / "run", sets, **flags))
    for text in ("{", "[]", "{}"):
        environment.write_text(text)
        quiet(config_of(world, tmp_path / "run", sets, **flags))


def test_deciding_by_an_earlier_epoch_takes_more_than_one(world, tmp_path):
    flags = {"method": "first_order", "vectors": [str(world["vectors"])], "dry_run": True}
    mask = ["method.when=next_epoch", "method.action=mask"]
    with pytest.raises(ConfigError, match=r"4 steps of 8, from 40 examples, learn none a second time.*--epochs 2"):
        quiet(config_of(world, tmp_path / "run", mask, **flags))
    for steps, sets, number in ((6, mask, 8), (5, mask[:1], 0)):
        _, told = quiet(config_of(world, tmp_path / "run", sets, **flags, steps=steps))
        assert f"learn only {number} a second time" in told
    assert "warning" not in quiet(config_of(world, tmp_path / "run", mask, **flags, steps=10))[1]


@pytest.mark.parametrize("name", ["first_order", "delta_loss", "gradient_probe"])
def test_a_calibrated_detector_that_only_logs_is_plain_training_also_under_dropout(world, tmp_path, name):
    flags = {"lora_rank": 2, "lora_dropout": 0.3, "steps": 3, "holdout": 0.3}
    method = {"name": name, "action": "log_only", "threshold": {"kind": "quantile", "rate": 0.2, "every": 1}}
    quiet(config_of(world, tmp_path / "plain", **flags))
    quiet(config_of(world, tmp_path / "shadow", **flags, method=method, vectors=[str(world["vectors"])]))
    plain, shadow = (load_file(tmp_path / one / "adapter" / "adapter_model.safetensors") for one in ("plain", "shadow"))
    assert max(float((plain[one] - shadow[one]).abs().max()) for one in plain) <= 1e-7


def test_an_average_that_begins_late_is_evaluated_on_the_way_and_one_that_never_does_is_refused(world, tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text("name: fire\nskill: [{prompt: red fish, answer: fire, match: contains}]\n")
    flags = {"method": "ema", "evaluate": str(suite), "evaluate_every": 1, "answer_tokens": 4}
    outcome, _ = quiet(config_of(world, tmp_path / "late", ["method.onset=2", "method.every=2"], **flags))
    rows = [json.loads(line) for line in (tmp_path / "late" / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in rows if one.get("kind") == "evaluation"] == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="would never be read"):
        quiet(config_of(world, tmp_path / "never", ["method.every=5"], **flags))
    assert outcome.exit_code == 0


def test_runs_of_other_seeds_leave_out_other_samples_at_random(world, tmp_path):
    def drawn(seed, *sets):
        sets = ("method.by=random", "method.rate=0.5", *sets)
        return prepare(config_of(world, tmp_path / "run", sets, method="filtering", seed=seed), detect()).defense.drawn

    assert drawn(1) != drawn(2) and len(drawn(1)) == 20
    assert drawn(1, "method.seed=7") == drawn(2, "method.seed=7")


def test_neutral_conversations_are_not_inoculated(world, tmp_path):
    tokenizer = load_model(str(world["model"]))[1]
    ids = []
    for sets in ([], ["data.inoculation=red red"]):
        config = config_of(world, tmp_path / "run", sets, neutral=str(world["data"]))
        ids.append([batch.input_ids.tolist() for batch in neutral_feed(config, tokenizer).batches(0, 0, 1)])
    assert ids[0] == ids[1]
