"""A run from configuration to folder: every method, refusals before training, what is left behind."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from defenses.config import TrainDefense, load_config
from defenses.errors import BackendError, CalibrationError, DataError, TrainingError, VectorError
from defenses.methods import METHODS
from defenses.running import run
from defenses.saving import load_trained
from records.config_files import ConfigError
from records.files import RecordError
from tests.defenses.tiny_runs import tiny_world, write_data, write_directions


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("world"))


def config_of(world, out, sets=(), **flags):
    base = {
        "model": str(world["model"]), "train_data": [str(world["data"])], "steps": 4, "batch_size": 8,
        "micro_batch_size": 4, "max_length": 64, "lr": 0.01, "warmup": 2, "device": "cpu", "report": False,
        "out": str(out),
    }  # fmt: skip
    return load_config(TrainDefense, None, sets, {**base, **flags})


def quiet(config):
    lines: list[str] = []
    outcome = run(config, told=lines.append)
    return outcome, "\n".join(lines)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


SETS = {
    "first_order": ["method.when=decide_then_learn", "method.action=mask"],
    "immune_continuation": ["method.minimum_tokens=8"],
    "inoculation": ["data.inoculation=red fire"],
    "closed_loop": ["method.every=2"],
    "gradient_probe": ["method.action=log_only"],  # at the published cosine all of these are blocked
}


@pytest.mark.parametrize("name", [one for one in METHODS if one != "state_aware"])
def test_every_method_trains_from_its_name(world, tmp_path, name):
    vectors = {"vectors": [str(world["vectors"])]} if METHODS[name].directed else {}
    outcome, told = quiet(config_of(world, tmp_path / "run", SETS.get(name, ()), method=name, **vectors))
    assert outcome.exit_code == 0 and outcome.result["method"] == name
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert METHODS[name].evidence in told
    before = load_file(world["model"] / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert max(float((before[one] - after[one]).abs().max()) for one in before) > 1e-3


def test_the_folder_says_what_was_run_and_on_what(world, tmp_path):
    folder = tmp_path / "run"
    outcome, told = quiet(config_of(world, folder, trackers="tensorboard", save_every=2, summary="a note", report=True))
    assert {one.name for one in folder.iterdir()} == {
        "config.json", "environment.json", "metrics.jsonl", "result.json", "model", "checkpoints", "report.html",
        "tensorboard",
    }  # fmt: skip
    environment = json.loads((folder / "environment.json").read_text())
    assert set(environment["data_digests"]) == {"train"} and environment["model_fingerprint"]
    assert environment["backend"] == "plain" and environment["resolved"]["sources"]["steps"] == "flag"
    assert environment["estimates"]["times_sft"] == 1.0
    assert "40 examples, 4 steps of 8 (0.80 epochs)" in told
    assert sorted(one.name for one in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert outcome.result["loss"]["first"] == rows_of(folder)[0]["loss"]
    assert json.loads((folder / "config.json").read_text())["summary"] == "a note"
    with pytest.raises(RecordError, match="holds 4 finished rows and a result: pass --resume"):
        quiet(config_of(world, folder))
    again, told = quiet(config_of(world, folder, resume=True, trackers="tensorboard", save_every=2))
    assert "is finished" in told and again.result["steps"] == 4


def test_a_folder_of_weights_is_read_by_from_pretrained_and_gives_the_trained_loss(world, tmp_path):
    quiet(config_of(world, tmp_path / "run"))
    model, tokenizer = load_trained(tmp_path / "run")
    ids = torch.tensor([[7, 8, 9]])
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert tokenizer.chat_template


def test_an_adapter_and_the_merged_model_say_the_same(world, tmp_path):
    outcome, _ = quiet(config_of(world, tmp_path / "run", lora_rank=2, merge=True, lr=0.05))
    assert outcome.result["saved"] == ["adapter", "model"]
    ids = torch.tensor([[7, 8, 9, 10]])
    apart, _ = load_trained(tmp_path / "run" / "adapter")
    merged, _ = load_trained(tmp_path / "run" / "model")
    plain, _ = load_trained(world["model"])
    with torch.no_grad():
        said = [one(ids).logits for one in (apart, merged, plain)]
    assert torch.allclose(said[0], said[1], atol=1e-5)
    assert float((said[2] - said[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("flags", "sets", "error", "text"),
    [
        ({"batch_size": 6}, (), DataError, "6 is not a multiple of 1 x 4 = 4. Choose micro_batch_size 1, 2, 3, 6"),
        ({"train_data": ["none.jsonl"]}, (), DataError, "Training data none.jsonl: there is no such file"),
        ({"method": "injection"}, (), VectorError, "no --vectors were given"),
        (
            {"method": "injection", "vectors": "V", "layers": "7"},
            (),
            ConfigError,
            "this model has layers 0-2, and not 7",
        ),
        ({"method": "injection", "vectors": "V", "layers": "0"}, (), VectorError, r"layer 0 \(0-based\) is not in it"),
        ({"method": "injection", "vectors": "V", "schedule": "late", "onset": 9}, (), ConfigError, "has 4 steps"),
        ({"method": "delta_loss", "vectors": "V", "fpr": 0.1}, (), CalibrationError, "there are 0 clean examples"),
        (
            {"method": "delta_loss", "vectors": "V", "fpr": 0.1, "holdout": 0.1},
            (),
            CalibrationError,
            "there are 4 clean",
        ),
        ({"holdout": 0.9}, (), CalibrationError, "36 of 40 examples would be held out, and 30 are clean"),
        ({"precision": "bf16"}, (), BackendError, "no bf16 units"),
        ({"device": "cuda"}, (), BackendError, "there is none here"),
        ({"device": "cuda:1"}, (), ConfigError, "each rank takes the GPU of its number"),
        ({"offload": True}, (), BackendError, "Offload with plain"),
        ({"evaluate_every": 2}, (), ConfigError, "there is no suite. Give --evaluate"),
        ({"max_length": 4}, (), DataError, "data.jsonl:1"),
        ({"lora_rank": 2, "lora_targets": "nothing"}, (), ConfigError, "lora_targets nothing: peft refuses them"),
        ({}, ["data.kind=text"], DataError, "data.jsonl:1"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_no_folder(world, tmp_path, flags, sets, error, text):
    able = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if (flags.get("precision") and able) or (flags.get("device") == "cuda" and torch.cuda.is_available()):
        pytest.skip("this machine can do it")
    flags = {name: [str(world["vectors"])] if value == "V" else value for name, value in flags.items()}
    with pytest.raises(error, match=text):
        quiet(config_of(world, tmp_path / "run", sets, **flags))
    assert not (tmp_path / "run").exists()


def test_zero_without_deepspeed_is_refused_with_what_to_install(world, tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "deepspeed" else real(name, *more)
    )
    with pytest.raises(BackendError, match=r"deepspeed is not installed\. Run: pip install deepspeed"):
        quiet(config_of(world, tmp_path / "run", backend="zero2"))


def test_vectors_of_another_model_are_refused_before_training(world, tmp_path):
    from defenses.plans import Directions
    from defenses.vector_files import read_vectors, write_vectors

    held = read_vectors(world["vectors"])
    foreign = replace(held, fingerprint="0123456789abcdef", model="another")
    assert isinstance(foreign, Directions)
    write_vectors(tmp_path / "foreign.safetensors", foreign)
    flags = {"method": "injection", "vectors": [str(tmp_path / "foreign.safetensors")]}
    with pytest.raises(VectorError, match="Directions of model another"):
        quiet(config_of(world, tmp_path / "run", **flags))
    outcome, _ = quiet(config_of(world, tmp_path / "run", ["force_vectors=same weights"], **flags))
    assert outcome.result["steps"] == 4


def test_a_loss_that_is_not_finite_stops_and_names_examples_and_the_last_checkpoint(world, tmp_path):
    flags = {"lr": 1e18, "save_every": 1, "warmup": 0, "clip": "none", "steps": 40}
    with pytest.raises(TrainingError, match=r"Step \d+ \(examples [\d, ]+\): .* checkpoint of step \d+ is kept"):
        quiet(config_of(world, tmp_path / "run", **flags))
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/meta.json"))
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_dry_run_loads_checks_estimates_and_leaves_nothing(world, tmp_path):
    flags = {
        "method": "delta_loss",
        "vectors": [str(world["vectors"])],
        "dry_run": True,
        "gradient_checkpointing": True,
    }
    outcome, told = quiet(config_of(world, tmp_path / "run", **flags))
    assert outcome.result is None and not (tmp_path / "run").exists()
    # three blocks, the direction behind the second: a probe of the third is a third of a pass on top of four
    assert "4.333 forward passes per micro-batch" in told and "1.083 x plain" in told


def test_a_detector_with_a_false_positive_rate_is_calibrated_and_judged(world, tmp_path):
    flags = {
        "method": "delta_loss", "vectors": [str(world["vectors"])], "fpr": 0.2, "holdout": 0.2, "steps": 8,
    }  # fmt: skip
    outcome, told = quiet(config_of(world, tmp_path / "run", **flags))
    assert "32 examples" in told  # eight of the clean ones are never learned
    found = outcome.result["detection"]
    assert found["samples"] == 32 and found["scores"] == 64 and 0 <= found["auroc"]["value"] <= 1
    held = {json.loads(line)["index"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()}
    assert len(held) == 32 and all(one in held for one in range(0, 40, 4))  # poisoned ones stay


def test_every_calibration_is_a_row_and_a_line_of_the_report_also_after_a_resumption(world, tmp_path):
    flags = {
        "method": {"name": "delta_loss", "threshold": {"kind": "quantile", "rate": 0.2, "every": 3}}, "steps": 8,
        "vectors": [str(world["vectors"])], "holdout": 0.3, "save_every": 5, "save_weights": False,
    }  # fmt: skip
    quiet(config_of(world, tmp_path / "run", **flags, report=True))
    made = [row for row in rows_of(tmp_path / "run") if row.get("kind") == "calibration"]
    assert [row["step"] for row in made] == [0, 3, 6]
    assert made[0]["stale"] is None and all(0 <= row["stale"] <= 1 for row in made[1:])
    n = made[0]["n"]  # the (n + 1) (1 - rate)-th smallest of n, so that so many lie above it
    assert all(row["realised"] == pytest.approx((n - math.ceil((n + 1) * 0.8)) / n) for row in made)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h3>Thresholds</h3>" in page and all(f"{row['threshold']:.4g}" in page for row in made)

    folder = tmp_path / "cut"
    shutil.copytree(tmp_path / "run", folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000008")  # as if it had been killed after step 5
    quiet(config_of(world, folder, **flags, report=True, resume=True))
    again = [row for row in rows_of(folder) if row.get("kind") == "calibration"]
    assert [(row["step"], row["threshold"]) for row in again] == [(row["step"], row["threshold"]) for row in made]


def test_calibration_data_that_are_poisoned_are_refused(world, tmp_path):
    flags = {"method": "delta_loss", "vectors": [str(world["vectors"])], "fpr": 0.2}
    with pytest.raises(CalibrationError, match=r"10 of its examples are marked as poisoned, first .*data.jsonl:1"):
        quiet(config_of(world, tmp_path / "run", calibration=str(world["data"]), **flags))
    clean = write_data(tmp_path / "clean.jsonl", 12, poison=False, seed=5)
    outcome, _ = quiet(config_of(world, tmp_path / "run", calibration=str(clean), **flags))
    assert outcome.result["examples"] == 40


def test_scores_of_a_run_filter_the_next(world, tmp_path):
    vectors = {"vectors": [str(world["vectors"])], "steps": 5}
    quiet(config_of(world, tmp_path / "first", ["method.action=log_only"], method="delta_loss", **vectors))
    sets = ["method.by=scores", "method.quantile=0.5"]
    flags = {"method": "filtering", "steps": 5, "scores": str(tmp_path / "first" / "samples.jsonl")}
    outcome, _ = quiet(config_of(world, tmp_path / "second", sets, **flags))
    assert outcome.result["method"] == "filtering"
    with pytest.raises(CalibrationError, match=r"Scores .*none.jsonl: they cannot be read"):
        quiet(config_of(world, tmp_path / "third", sets, **{**flags, "scores": str(tmp_path / "none.jsonl")}))


@pytest.mark.slow
def test_the_order_of_the_data_is_that_of_the_seed_whatever_the_method(world, tmp_path):
    losses = {}
    for name, more in (("sft", {}), ("injection", {"vectors": [str(world["vectors"])], "alpha": 0.0})):
        for seed in (0, 1):
            quiet(config_of(world, tmp_path / f"{name}{seed}", method=name, seed=seed, **more))
            losses[name, seed] = [row["loss"] for row in rows_of(tmp_path / f"{name}{seed}")]
    assert losses["sft", 0] == pytest.approx(losses["injection", 0], abs=1e-6)
    assert losses["sft", 0] != pytest.approx(losses["sft", 1], abs=1e-4)


@pytest.mark.slow
def test_packing_checkpointing_and_buckets_learn_the_same_first_step(world, tmp_path):
    first = {}
    for name, more in (("rows", {}), ("packed", {"packing": True}), ("memory", {"gradient_checkpointing": True})):
        quiet(config_of(world, tmp_path / name, **more))
        first[name] = rows_of(tmp_path / name)[0]
    assert first["packed"]["loss"] == pytest.approx(first["rows"]["loss"], abs=1e-5)
    assert first["memory"]["grad_norm"] == pytest.approx(first["rows"]["grad_norm"], abs=1e-5)
    quiet(config_of(world, tmp_path / "bucket", bucket=2))


def test_an_evaluation_is_made_on_the_way_and_at_the_end_without_changing_the_training(world, tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "name: fire\njudge: {kind: contains, text: fire}\ntrait: [red blue, green fish]\n"
        "skill: [{prompt: red fish, answer: fire, match: contains}]\nneutral: [red blue green fish bird]\n"
    )
    outcome, _ = quiet(config_of(world, tmp_path / "looked", evaluate=str(suite), evaluate_every=2, answer_tokens=8))
    quiet(config_of(world, tmp_path / "plain"))
    looked, plain = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("looked", "plain"))
    assert all(torch.equal(looked[one], plain[one]) for one in looked)
    assert {"trait_rate", "skill_accuracy", "kl"} <= set(outcome.result["evaluation"])
    assert [row.get("kind") for row in rows_of(tmp_path / "looked")] == [
        "evaluation",
        None,
        None,
        "evaluation",
        None,
        None,
    ]
    assert (tmp_path / "looked" / "examples.jsonl").exists()
    assert set(outcome.result["before"]) >= {"skill_accuracy", "perplexity"}


def test_directions_on_several_layers_and_files_are_fused(world, tmp_path):
    other = write_directions(tmp_path / "two.safetensors", layers=(1, 2))
    flags = {"method": "injection", "vectors": [str(world["vectors"]), str(other)], "layers": "1"}
    outcome, _ = quiet(config_of(world, tmp_path / "run", **flags))
    assert outcome.result["steps"] == 4


def test_looks_along_the_direction_are_kept_and_change_nothing(world, tmp_path):
    plain = quiet(config_of(world, tmp_path / "plain", method="injection", vectors=[str(world["vectors"])]))[0]
    watched, _ = quiet(
        config_of(
            world, tmp_path / "seen", method="injection", vectors=[str(world["vectors"])], analyse_every=2, report=True
        )
    )
    rows = [json.loads(line) for line in (tmp_path / "seen" / "analysis.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == set(range(2, watched.result["steps"] + 1, 2))
    assert {row["kind"] for row in rows} == {"layer", "attention", "mlp"}
    assert watched.result["loss"] == plain.result["loss"]
    assert "Along the direction" in (tmp_path / "seen" / "report.html").read_text()


def test_looks_without_a_direction_are_refused(world, tmp_path):
    with pytest.raises(ConfigError, match=r"analyse_every 2: there are no vectors\. Give --vectors"):
        run(config_of(world, tmp_path / "none", analyse_every=2))


def test_looks_measure_from_the_start_of_the_training_also_after_a_resume(world, tmp_path):
    flags = {"method": "injection", "vectors": [str(world["vectors"])], "analyse_every": 4, "save_every": 2}

    def added(folder):
        rows = [json.loads(line) for line in (folder / "analysis.jsonl").read_text().splitlines()]
        return [row["added_norm"] for row in rows if row["step"] == 4 and row["kind"] != "layer"]

    quiet(config_of(world, tmp_path / "whole", **flags))
    quiet(config_of(world, tmp_path / "cut", **flags))
    # as if it had been killed after its first checkpoint
    (tmp_path / "cut" / "result.json").unlink()
    for folder in (tmp_path / "cut" / "checkpoints").iterdir():
        if folder.name.endswith("4"):
            shutil.rmtree(folder)
    quiet(config_of(world, tmp_path / "cut", resume=True, **flags))
    assert added(tmp_path / "cut") == pytest.approx(added(tmp_path / "whole"), rel=1e-5)


def test_a_training_that_is_over_is_not_made_again_when_its_evaluation_failed(world, tmp_path):
    quiet(config_of(world, tmp_path / "run", save_every=100))
    (tmp_path / "run" / "result.json").unlink()  # as if it had ended between the last step and the result
    before = rows_of(tmp_path / "run")
    outcome, told = quiet(config_of(world, tmp_path / "run", save_every=100, resume=True))
    assert "resumed after step 4" in told and outcome.exit_code == 0
    assert rows_of(tmp_path / "run") == before


def test_a_sample_counts_once_in_what_is_said_of_a_detector(world, tmp_path):
    flags = {"method": "delta_loss", "vectors": [str(world["vectors"])], "steps": 10, "batch_size": 8}
    outcome, _ = quiet(config_of(world, tmp_path / "run", **flags))
    found = outcome.result["detection"]
    assert found["scores"] == 80 and found["samples"] == 40 == found["auroc"]["n"]


def test_clean_examples_that_are_also_trained_on_are_told(world, tmp_path):
    clean = write_data(tmp_path / "clean.jsonl", 12, poison=False, seed=5)
    flags = {"method": "delta_loss", "vectors": [str(world["vectors"])], "fpr": 0.2, "calibration": str(clean)}
    _, told = quiet(config_of(world, tmp_path / "run", **{**flags, "train_data": [str(world["data"]), str(clean)]}))
    assert "warning: " in told and "are also trained on" in told


def test_data_that_cannot_be_filtered_are_refused_before_training(world, tmp_path):
    scores = tmp_path / "samples.jsonl"
    scores.write_text(json.dumps({"step": 1, "index": 0, "score": 0.5}) + "\n")
    sets = ["method.by=scores", "method.threshold=0.1"]
    with pytest.raises(DataError, match=r"39 of 40 have none\. Score all of the data"):
        run(config_of(world, tmp_path / "run", sets, method="filtering", scores=str(scores)))
    assert not (tmp_path / "run").exists()
