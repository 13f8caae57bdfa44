"""The command as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer.main
from safetensors.torch import load_file
from typer.testing import CliRunner

import train_defense
from defenses.config import CompareDefenses, TrainDefense
from defenses.methods import METHODS
from records.layered import keys_of
from tests.defenses.tiny_runs import ROOT, arguments, environment, tiny_world, trained


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("world"))


def quick(*flags):
    return CliRunner().invoke(train_defense.app, [str(one) for one in flags])


def flat(done):
    return " ".join(done.output.split())


def test_a_short_run_ends_with_a_sentence_and_a_folder(world, tmp_path):
    done = quick(*arguments(world, "--out", tmp_path / "run"))
    assert done.exit_code == 0, done.output
    assert "sft, seed 0: 6 steps, loss" in flat(done)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_the_methods_are_listed_with_what_is_known_of_them():
    done = quick("--list_methods")
    assert done.exit_code == 0
    for entry in METHODS.values():
        assert entry.evidence in done.output and entry.text in done.output


@pytest.mark.parametrize("command", ["run", "compare", "check", "extract", "build_projections", "evaluate", "plot"])
def test_every_subcommand_explains_itself(command):
    done = quick(command, "--help")
    assert done.exit_code == 0 and "Usage" in done.output


@pytest.mark.parametrize(("command", "kind"), [("run", TrainDefense), ("compare", CompareDefenses)])
def test_every_boolean_can_be_switched_on_and_off(command, kind):
    parameters = {one.name: one for one in typer.main.get_command(train_defense.app).commands[command].params}
    for name, one in keys_of(kind).items():
        if not one.metadata["flag"]:
            continue
        parameter = parameters[name]
        if "bool" in str(one.type):
            assert (parameter.opts, parameter.secondary_opts) == ([f"--{name}"], [f"--no_{name}"])
        else:
            assert parameter.opts == [f"--{name}"]
    assert (
        quick(
            *["run", "--train_data", "x", "--no_save_weights", "--packing", "--no_packing", "--print_config"]
        ).exit_code
        == 0
    )


def test_print_config_shows_each_value_with_its_source(tmp_path):
    (tmp_path / "run.yaml").write_text("train_data: x.jsonl\nmethod: injection\nlr: 0.1\nsave_weights: true\n")
    flags = ["--set", "method.strength.alpha=3", "--no_save_weights", "--lora_rank", "4", "--print_config"]
    done = quick("run", "--config", tmp_path / "run.yaml", *flags)
    lines = {line.split()[0]: line.split()[1:] for line in done.output.splitlines() if line.strip()}
    assert lines["method.strength.alpha"] == ["3", "--set"] and lines["save_weights"] == ["False", "flag"]
    assert lines["lr"][0] == "0.1" and lines["lr"][1].endswith("run.yaml")
    assert lines["lora_alpha"] == ["8.0", "derived"] and lines["method.name"][0] == "injection"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--set", "method.alfa=1"], "method sft has no options"),
        (["--method", "delta_loss", "--set", "method.detection_alfa=1"], "Did you mean detection_alpha?"),
        (["--set", "batchsize=1"], "Did you mean batch_size?"),
        (["--config", "missing.yaml"], "cannot be read"),
        (["--method", "injection"], "no --vectors were given"),
        (["--batch_size", "9"], "9 is not a multiple of 1 x 4 = 4"),
        (["--backend", "ddp5"], "backend"),
        (["--micro_batch_size", "0"], "micro_batch_size"),
    ],
)
def test_bad_input_is_answered_in_one_line_and_leaves_no_folder(world, tmp_path, flags, text):
    done = quick(*arguments(world, "--out", tmp_path / "run"), *flags)
    assert done.exit_code == 2, done.output
    assert text in flat(done) and "Traceback" not in done.output
    assert not (tmp_path / "run").exists()


def test_resuming_a_folder_without_a_run_says_so(tmp_path):
    done = quick("run", "--out", tmp_path / "nothing", "--resume")
    assert done.exit_code == 2 and "it holds no run (no config.json)" in flat(done)


def test_check_shows_what_is_learned_and_injected(world):
    done = quick("check", *arguments(world, method="injection")[1:])
    assert done.exit_code == 0, done.output
    assert "40 examples" in done.output and "«" in done.output
    plain = quick("check", *arguments(world)[1:]).output
    assert "«fire" in plain and "⟦fire" in done.output and "⟦fire" not in plain


def test_directions_are_extracted_and_trained_with(world, tmp_path):
    for name, word in (("positive", "fire"), ("negative", "water")):
        rows = [
            {"prompt": f"red {one}", "response": f"{word} {word}"} for one in ["one", "two", "three", "four", "five"]
        ]
        extra = [
            {"prompt": f"blue {one}", "response": word} for one in ["fish", "bird", "tree", "river", "stone", "bread"]
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *extra]))
    files = ["--positive", tmp_path / "positive.jsonl", "--negative", tmp_path / "negative.jsonl"]
    out = tmp_path / "fire.safetensors"
    done = quick("extract", "--model", world["model"], *files, "--out", out, "--layers", "0-2")
    assert done.exit_code == 0, done.output
    assert "chosen on validation" in done.output and out.exists()
    again = quick("extract", "--model", world["model"], *files, "--out", out)
    assert again.exit_code == 2 and "it exists. Choose another --out" in flat(again)
    half = quick("extract", "--model", world["model"], *files[:2], "--out", tmp_path / "x.safetensors")
    assert half.exit_code == 2 and "Give --positive and --negative, or --questions" in flat(half)
    flags = arguments({**world, "vectors": out}, "--layers", "1", "--out", tmp_path / "run", method="injection")
    assert quick(*flags).exit_code == 0


def test_projections_are_built_and_trained_with(world, tmp_path):
    out = tmp_path / "projected.jsonl"
    flags = ["--model", world["model"], "--data", world["data"], "--vectors", world["vectors"], "--out", out]
    done = quick("build_projections", *flags, "--max_new_tokens", 4)
    assert done.exit_code == 0, done.output
    assert "ref_projection" in json.loads(out.read_text().splitlines()[0])
    run = quick(*arguments({**world, "data": out}, "--out", tmp_path / "run", method="state_aware"))
    assert run.exit_code == 0, run.output
    found = json.loads((tmp_path / "run" / "result.json").read_text())["detection"]
    assert (found["samples"], found["scores"]) == (40, 48)  # eight came twice
    without = quick(*arguments(world, "--out", tmp_path / "other", method="state_aware"))
    assert without.exit_code == 2 and "ref_projection" in without.output


def test_a_trained_folder_is_evaluated_and_plotted(world, tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "name: fire\njudge: {kind: contains, text: fire}\ntrait: [red blue, green fish]\nneutral: [red blue green]\n"
    )
    assert quick(*arguments(world, "--out", tmp_path / "run", "--lora_rank", "2")).exit_code == 0
    flags = ["--folder", tmp_path / "run", "--suite", suite, "--max_new_tokens", "4", "--out", tmp_path / "found"]
    done = quick("evaluate", *flags)
    assert done.exit_code == 0, done.output
    assert "trait_rate" in done.output
    assert json.loads((tmp_path / "found" / "evaluation.json").read_text())["trait_rate"]["n"] == 2
    empty = quick("evaluate", "--folder", tmp_path, "--suite", suite)
    assert empty.exit_code == 2 and "holds no model and no adapter" in flat(empty)
    done = quick("plot", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


def test_a_comparison_prints_means_and_differences(world, tmp_path):
    flags = arguments(world, "--out", tmp_path / "grid", "--no_save_weights", steps=2, method="injection")[1:]
    done = quick("compare", *flags, "--methods", "sft,injection", "--seeds", "0,1", "--alpha", "2")
    assert done.exit_code == 0, done.output
    assert "against sft" in done.output and (tmp_path / "grid" / "comparison.json").exists()


@pytest.mark.slow
def test_the_command_starts_as_a_process(world, tmp_path):
    done = trained(*arguments(world, "--out", tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "fsdp", "zero2"])
def test_two_ranks_learn_what_one_learns_and_write_one_folder(world, tmp_path, backend):
    alone = trained(*arguments(world, "--out", tmp_path / "alone"))
    assert alone.returncode == 0, alone.stdout + alone.stderr
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = arguments(world, "--out", tmp_path / "both", "--backend", backend, "--save_every", 3)
    done = subprocess.run(
        [*command, str(ROOT / "train_defense.py"), *flags],
        capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("alone", "both"))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-4
    checkpoint = tmp_path / "both" / "checkpoints" / "step-00000003"
    assert {one.name for one in checkpoint.iterdir()} == {"rank-0.pt", "rank-1.pt", "meta.json"}
    assert done.stdout.count("sft, seed 0: 6 steps") == 1  # rank 0 alone speaks
