"""The command on the model that was built by hand: strategies, executors, refusals, and the original's line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import run_das
from alignments.bundle import load_bundle
from tasks import PriceTagging
from tests.scripts.test_run_das import das, quick, rows
from tests.scripts.tiny_llama import save_tiny_llama

SMALL = ["--task", "planted", "--model", "planted", "--n_train", 64, "--n_select", 48, "--n_test", 48, "--lr", 0.05]
PLACES = ["--layers", "1,3", "--positions", "second,last"]


def result(folder):
    return json.loads((folder / "result.json").read_text())


def one_line(done):
    return " ".join(done.output.split())


def test_the_planted_variable_is_found_and_told_once(tmp_path):
    asked = [*SMALL, *PLACES, "--steps", 20, "--seeds", "0,1", "--controls", "complement", "--log_every", 10]
    done = quick(*asked, "--trackers", "tensorboard", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    found, lines = result(tmp_path / "run"), done.output.splitlines()
    assert found["methods"]["das"]["iia"] > 0.9 and found["task_accuracy_by_split"]["test"]["value"] == 1.0
    assert sum("best trivial" in line and "DAS" in line for line in lines) == 1
    assert any(
        line.startswith("task accuracy of the unedited model") and "[0.926, 1.000] (n=48)" in line for line in lines
    )
    assert any("step 20, loss" in line for line in lines)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    fit = [json.loads(line) for line in (tmp_path / "run" / "fit.jsonl").read_text().splitlines()]
    assert [one["step"] for one in fit if one["seed"] == 0] == list(range(1, 21))
    bundle = load_bundle(tmp_path / "run" / "bundle")
    assert bundle.variable == "key" and {one["split"] for one in bundle.manifest["scores"]} >= {"select", "test"}
    assert "with pin(model, bundle, value=" in done.output


def test_many_places_are_shown_as_one_map_per_method_with_the_chosen_cell_marked(tmp_path):
    asked = [
        *SMALL,
        "--layers",
        "0-4",
        "--methods",
        "full_vector",
        "--grid_splits",
        "select",
        "--out",
        tmp_path / "run",
    ]
    done = quick(*asked)
    assert done.exit_code == 0, done.output
    assert "IIA of full vector on select" in done.output  # not every cell has test rows
    (line,) = [line for line in done.output.splitlines() if "*" in line and "│" in line]
    assert line.split("│")[1].strip() == "L1.block_output" and line.split("│")[6].strip() == "1.00*"
    assert "* chosen on select" in done.output
    assert result(tmp_path / "run")["split"] == "test"  # the best cell has them


@pytest.mark.parametrize("strategy", ["grid", "halving"])
def test_a_dry_run_tells_the_cost_and_leaves_nothing(tmp_path, strategy):
    done = quick(*SMALL, *PLACES, "--dry_run", "--strategy", strategy, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "plan: 8 cells, 4 of them learned" in done.output and "pair-passes" in done.output
    assert ("halving: rungs of 11, 33, 100 steps" in done.output) == (strategy == "halving")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_vectors_trains_nothing(tmp_path):
    done = quick("--task", "hierarchical_equality", "--dry_run", "--out", tmp_path / "run")
    assert done.exit_code == 0 and "plan: 6 cells, 3 of them learned" in done.output and "cost: about" in done.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--lyaers", 1], "No such option: --lyaers"),
        (["--component", "block_outptu"], "Did you mean block_output"),
        (["--positions", "seconds"], "it has no position 'seconds'. Use one of start"),
        (["--positions", "99"], "the prompts have 8 tokens. Use 0 to 7"),
        (["--rank", "65"], "rank 65: L1.block_output is 64 wide. Choose 1 to 64."),
        (["--component", "head_output[9]"], "has 4 query heads. Use a head below 4"),
        (["--controls", "rival:nope"], "has no such other variable. Use rival: with one of mark, content."),
        (["--controls", "rival:key"], "has no such other variable"),
        (["--methods", "dsa"], "Did you mean lda, das, mdas? Meaning"),
        (["--methods", "mask_sae"], "no sparse autoencoder was given"),
        (["--methods", "mask_heads"], "is not made of heads. Use L1.attention_value_output"),
        (["--methods", "pca", "--strategy", "halving"], "no method of this search learns anything"),
        (["--strategy", "halving", "--budget_forwards", 10], "Give at least that many"),
        (["--set", "max_tokens=5"], "320 of 320 prompts are longer, first train pair 0 with 8 tokens. Allow 8"),
        (["--set", "task_options.form=x"], "unexpected keyword argument 'form'"),
        (["--executor", "torchrun"], "Run: torchrun --nproc-per-node 2"),
        (["--parallel", "data"], "Run: torchrun --nproc_per_node 2"),
        (["--parallel", "data", "--executor", "processes"], "all ranks work on one job at a time"),
        (["--trackers", "wanb"], "Input should be 'tensorboard' or 'wandb'"),
        (["--model", "smolm2"], "Did you mean smollm2-135m?"),
        (["--task", "absent.jsonl"], "absent.jsonl: there is no such file"),
        (["--task", "absent.py"], "absent.py"),
    ],
)
def test_refusals_say_what_to_do_and_leave_no_folder(tmp_path, arguments, text, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    done = CliRunner(env={"COLUMNS": "200"}).invoke(
        run_das.app,
        [str(one) for one in (*SMALL, "--layers", 1, "--positions", "second", *arguments, "--out", tmp_path / "run")],
    )
    assert done.exit_code == 2, done.output
    assert text in one_line(done), done.output
    assert not (tmp_path / "run").exists()


def test_several_variables_need_room_for_all_their_ranks(tmp_path):
    asked = ["--task", "hierarchical_equality", "--variable", "left_equal+right_equal", "--rank", 9]
    done = quick(*asked, "--out", tmp_path / "run")
    assert done.exit_code == 2
    assert "rank 9 for each of 2 variables: L0.block_output is 16 wide. Choose 1 to 8." in one_line(done)


def test_files_that_are_wrong_are_named_with_their_row_or_line(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"input_ids": [1, 2]\n')
    done = quick("--task", tmp_path / "pairs.jsonl", "--out", tmp_path / "run")
    assert done.exit_code == 2 and "1" in done.output and "Traceback" not in done.output
    (tmp_path / "task.py").write_text("def broken(:\n")
    done = quick("--task", tmp_path / "task.py", "--out", tmp_path / "run")
    assert done.exit_code == 2 and "line 1" in one_line(done)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_with_another_configuration(tmp_path):
    asked = [*SMALL, "--layers", 1, "--positions", "second", "--methods", "full_vector", "--out", tmp_path / "run"]
    assert quick(*asked).exit_code == 0
    done = quick(*asked, "--resume", "--n_test", 40)
    assert done.exit_code == 2 and "n_test was 48, is 40" in one_line(done)
    assert quick(*asked, "--resume", "--executor", "processes").exit_code == 0  # how, not what


def test_the_accuracy_alone_is_recorded_and_makes_way_for_a_run(tmp_path):
    asked = [*SMALL, "--layers", 1, "--positions", "second", "--methods", "full_vector", "--out", tmp_path / "run"]
    done = quick(*asked, "--set", "do_align=false")
    assert done.exit_code == 0, done.output
    assert result(tmp_path / "run")["task_accuracy"]["test"]["n"] == 48 and not rows(tmp_path / "run")
    done = quick(*asked, "--resume")
    assert done.exit_code == 0 and rows(tmp_path / "run"), done.output


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    """A folder as the original's --model_path: a model with its das_config, at token 60 of its 74."""
    prompts = [pair.base.prompt for pair in PriceTagging(form="alpaca").pairs("train", variable="left", n=50)]
    texts = [prompt + answer for prompt in prompts for answer in ("Yes", "No")]
    folder = tmp_path_factory.mktemp("alpaca")
    return save_tiny_llama(folder, texts, das_config={"das_layer": 1, "das_token_range": [60, 61]})


@pytest.mark.slow
def test_the_originals_line_runs_here(tmp_path, alpaca):
    (tmp_path / "more.yaml").write_text("force: true\n")
    line = ["original", "--task_name", "pricing_tag_lb", "--model_path", alpaca, "--output_dir", tmp_path / "results"]
    line += ["--n_training_examples", 64, "--n_eval_examples", 32, "--train_batch_size", 32, "--epochs", 2]
    folder = tmp_path / "results" / "LlamaForCausalLM.task.pricing_tag_lb.seed.42.intl.1.intr.60.61"
    before = das(*line)
    assert before.returncode == 0, before.stdout + before.stderr
    assert result(folder)["do_align"] is False and result(folder)["task_accuracy"]["test"]["n"] == 1000
    refused = das(*line, "--do_align")
    assert refused.returncode == 2 and "with min_accuracy 0.5: the model answers" in refused.stdout
    done = das(*line, "--do_align", "--decoder_config_path", tmp_path / "more.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["method"] for row in rows(folder)} >= {"boundless"} and (folder / "report.html").exists()


@pytest.mark.slow
def test_every_method_and_control_on_the_planted_model(tmp_path):
    methods = "full_vector,das,boundless,mask_pca,pca,mean_difference"
    controls = "random_subspace,random_model,shuffled_labels,complement,rival:mark,rival:content"
    asked = [*SMALL, *PLACES, "--rank", "2,4", "--seeds", "0,1", "--steps", 20, "--methods", methods]
    done = das(*asked, "--controls", controls, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["method"].removeprefix("control:").partition("/")[0] for row in rows(tmp_path / "run")}
    assert found == {*methods.split(","), *controls.split(",")}
    assert result(tmp_path / "run")["methods"]["das"]["iia"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--strategy", "halving", "--steps", 60, "--controls", "random_subspace,complement,rival:mark"],
        ["--strategy", "full", "--grid_splits", "select", *PLACES, "--steps", 20],
    ],
    ids=["halving", "full"],
)
def test_every_strategy_finds_the_planted_variable(tmp_path, more):
    done = das(*SMALL, *more, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    found = result(tmp_path / "run")["methods"]
    assert found["das"]["iia"] > 0.9 and len(found["das"]["seeds"]) == 3
    assert found["full_vector"]["split"] == "test"


@pytest.mark.slow
def test_processes_choose_the_same_cells(tmp_path):
    asked = [*SMALL, *PLACES, "--steps", 20, "--controls", "none"]
    for name in ("local", "processes"):
        done = das(*asked, "--executor", name, "--out", tmp_path / name)
        assert done.returncode == 0, done.stdout + done.stderr
    local, others = result(tmp_path / "local"), result(tmp_path / "processes")
    assert [local["methods"][name]["site"] for name in local["methods"]] == [
        others["methods"][name]["site"] for name in local["methods"]
    ]
