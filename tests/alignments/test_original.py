"""The original command line: each flag's meaning, das_config, and which runs of a grid are finished."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from alignments.original import (
    FLAGS,
    ORIGINAL_TASKS,
    DasConfig,
    GridCell,
    finished_grid,
    original_flags,
    read_das_config,
    run_name,
)
from intervene import Site
from records.config_files import ConfigError
from tests.alignments.test_bundle import row

DOC = Path(__file__).resolve().parents[2] / "docs" / "run_alignment_flags.md"
# As their parser has them.
THEIRS = [
    "train_batch_size", "eval_batch_size", "lr", "encoder_config_path", "decoder_config_path", "max_seq_len",
    "seed", "gradient_accumulation_steps", "output_dir", "local_rank", "epochs", "model_path", "warm_up",
    "is_wandb", "wandb_username", "bf16", "log_step", "valid_steps", "early_stopping", "device", "do_align",
    "do_eval", "do_test", "n_training_examples", "n_eval_examples", "task_name",
]  # fmt: skip


def model_folder(tmp_path, start=80, stop=81):
    folder = tmp_path / "alpaca_7b"
    (folder / "das_config").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / "das_config" / "config.json").write_text(
        json.dumps({"das_layer": 15, "das_token_range": [start, stop], "das_head": None, "model_type": "llama"})
    )
    return folder


def flags(*more, model="nowhere/alpaca", out="out"):
    return original_flags(["--output_dir", str(out), "--model_path", str(model), *more])


def test_all_26_flags_are_known_and_documented():
    assert sorted(FLAGS) == sorted(THEIRS) and len(FLAGS) == 26
    documented = re.findall(r"^\| `--(\w+)`", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(documented) == sorted(THEIRS)


def test_the_defaults_are_the_originals(tmp_path):
    values = flags("--do_align", model=model_folder(tmp_path))
    assert values == {
        "task": "price_tagging", "variable": "left", "task_options": {"form": "alpaca"},
        "model": str(tmp_path / "alpaca_7b"),
        "out": Path("out/LlamaForCausalLM.task.pricing_tag_lb.seed.42.intl.15.intr.80.81"), "resume": True,
        "methods": ("boundless",), "layers": (15,), "positions": ("80",), "batch_size": 128, "eval_batch_size": 128,
        "lr": 0.01, "steps": 790, "accumulate": 1, "warmup": 0.1, "validate_every": 500, "log_every": 10,
        "seeds": (42,), "n_train": 10000, "n_select": 1000, "n_test": 1000, "dtype": "float32",
    }  # fmt: skip


def test_the_readme_command_keeps_every_batch(tmp_path):
    values = flags(
        "--do_align", "--train_batch_size", "16", "--gradient_accumulation_steps", "4", "--epochs", "3", "--bf16",
        "--n_training_examples", "8000", "--lr", "1e-3", "--valid_steps", "500", "--warm_up", "0.1",
    )  # fmt: skip
    # 3 epochs of 500 batches; a step every 4 of them
    assert (values["steps"], values["accumulate"], values["validate_every"]) == (375, 4, 125)
    assert values["dtype"] == "bfloat16" and values["lr"] == 1e-3
    assert "layers" not in values and "positions" not in values  # no das_config there: searched


@pytest.mark.parametrize(
    ("name", "variable", "bracket"),
    [("pricing_tag_lub", "left+right", None), ("pricing_tag_mid_diff", "midpoint", None),
     ("pricing_tag_bracket", "bracket", None), ("pricing_tag_fixed", "left", [5.49, 8.49])],
)  # fmt: skip
def test_tasks(name, variable, bracket):
    values = flags("--task_name", name)
    assert values["task"] == "price_tagging" and values["variable"] == variable
    assert values["task_options"].get("bracket") == bracket


def test_the_tasks_exist_with_those_options():
    from tasks import PriceTagging

    for chosen in ORIGINAL_TASKS.values():
        task = PriceTagging(**chosen["task_options"])
        assert set(chosen["variable"].split("+")) <= set(task.variables)


def test_flags_that_were_dead_mean_something(tmp_path):
    folder = model_folder(tmp_path)
    values = flags(
        "--early_stopping", "3", "--device", "cpu", "--max_seq_len", "256", "--is_wandb", "--wandb_username", "ann",
        "--encoder_config_path", str(folder / "das_config" / "config.json"),
    )  # fmt: skip
    assert (values["patience"], values["device"], values["max_tokens"]) == (3, "cpu", 256)
    assert (values["trackers"], values["wandb_entity"]) == (("wandb",), "ann")
    assert (values["layers"], values["positions"]) == ((15,), ("80",))
    assert flags("--local_rank", "1")["device"] == "cuda:1"
    assert flags()["do_align"] is False and "methods" not in flags()
    assert flags("--do_eval")["methods"] == flags("--do_test")["methods"] == ("full_vector",)
    more = tmp_path / "more.yaml"
    more.write_text("rank: 4\nlr: 5.0\n")
    values = flags("--decoder_config_path", str(more))
    assert values["rank"] == 4 and values["lr"] == 0.01  # flags go before the file


def test_values_that_the_configuration_knows_are_accepted_by_it():
    from alignments.config import KEYS, load_config

    values = {key: value for key, value in flags("--do_align").items() if key in KEYS}
    checked = load_config(flags=values)
    assert checked.steps == 790 and checked.seeds == (42,)


def test_a_range_of_tokens_is_searched_token_by_token(tmp_path):
    assert flags(model=model_folder(tmp_path, 78, 81))["positions"] == ("78", "79", "80")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--train_batchsize", "8"],
            r"flag --train_batchsize: there is none of that name\. Did you mean --train_batch",
        ),
        (["--do_al"], "flag --do_al: there is none"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--task_name", "pricing_tag_left"], r"pricing_tag_left: there is no such task\. Did you mean"),
        (["--encoder_config_path", "none.json"], "cannot be read"),
    ],
)
def test_refusals(argv, message):
    with pytest.raises(ConfigError, match=message):
        flags(*argv)


def test_an_output_folder_is_needed():
    with pytest.raises(ConfigError, match="required: --output_dir"):
        original_flags(["--do_align"])


def test_das_config_by_folder_and_by_file(tmp_path):
    folder = model_folder(tmp_path)
    expected = DasConfig(15, 80, 81)
    for path in (folder, folder / "das_config", folder / "das_config" / "config.json"):
        assert read_das_config(path) == expected
    assert expected.tokens == 1
    file = folder / "das_config" / "config.json"
    for text, message in (
        ("{}", "cannot be read"), ('{"das_layer": 3, "das_token_range": [5, 5]}', "before the end"),
        ('{"das_layer": -1, "das_token_range": [5, 6]}', "whole numbers from 0"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_das_config(folder)


def test_run_names_are_the_originals(tmp_path):
    name = run_name(model_folder(tmp_path), "pricing_tag_lub", 77, DasConfig(5, 75, 76))
    assert name == "LlamaForCausalLM.task.pricing_tag_lub.seed.77.intl.5.intr.75.76"
    assert run_name("some/where/", "pricing_tag_lb", 1, None) == "where.task.pricing_tag_lb.seed.1"


def our_run(folder, rows, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    lines = [json.dumps(one.to_json()) for one in rows]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"torn": ']))


def test_finished_cells_of_both_kinds_of_runs(tmp_path):
    theirs = tmp_path / "LlamaForCausalLM.task.pricing_tag_lb.seed.42.intl.1.intr.80.81"
    theirs.mkdir()
    (theirs / "pytorch-rotate-last.bin").touch()
    (tmp_path / "LlamaForCausalLM.task.pricing_tag_lb.seed.66.intl.1.intr.80.81").mkdir()
    our_run(
        tmp_path / "deep" / "ours",
        [row(), row(split="select", seed=1)],
        task="toy", variable="position", seeds=[0, 1], layers=[0, 1], positions=["subject2"],
    )  # fmt: skip
    grid = finished_grid(tmp_path, layers=[0, 1], positions=["subject2"], seeds=[0, 1, 2], tasks=["position"])
    states = {(cell.seed, cell.layer): cell.state for cell in grid.cells}
    assert states == {
        (0, 0): "started", (0, 1): "finished", (1, 0): "started", (1, 1): "started", (2, 0): "missing",
        (2, 1): "missing",
    }  # fmt: skip
    assert len(grid.missing()) == 5
    old = finished_grid(tmp_path, layers=(1,), positions=(80, 81), seeds=(42, 66), tasks=("pricing_tag_lb",))
    assert old.cells[0] == GridCell("pricing_tag_lb", 42, 1, "80", "finished", theirs)
    assert [cell.state for cell in old.cells] == ["finished", "missing", "started", "missing"]
    assert str(old).splitlines() == [
        "1 of 4 finished",
        "pricing_tag_lb, seed 42; positions 80 81",
        "  layer   1  + .",
        "pricing_tag_lb, seed 66; positions 80 81",
        "  layer   1  ~ .",
        "+ finished, ~ started, . missing",
    ]


def test_our_runs_under_the_originals_name_count_as_its_task(tmp_path):
    folder = tmp_path / "M.task.pricing_tag_lb.seed.0.intl.1.intr.80.81"
    our_run(folder, [row(site=Site("block_output", 1))], task="toy")
    grid = finished_grid(tmp_path, layers=[1], positions=["subject2"], seeds=[0], tasks=["pricing_tag_lb"])
    assert [cell.state for cell in grid.cells] == ["finished"]


def test_a_missing_root_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder"):
        finished_grid(tmp_path / "none", layers=[], positions=[], seeds=[], tasks=[])
