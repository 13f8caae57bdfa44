"""Defaults < file < --set < flags; every refusal names the key and where its value came from."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from alignments.config import (
    HELP,
    KEYS,
    ConfigError,
    RunDas,
    describe,
    load_config,
    resolve_layers,
    with_derived,
)
from alignments.config_values import parse_numbers

IOI = {"task": "ioi"}


def test_later_sources_win_and_siblings_stay(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("task: ioi\nrank: 2\nlr: 1e-3\nsteps: 7\nn_test: 50\n")
    config = load_config(file, ["rank=4", "steps=8"], {"steps": 9, "seeds": None})
    assert (config.task, config.lr, config.n_test, config.rank, config.steps) == ("ioi", 0.001, 50, (4,), 9)
    assert config.seeds == (0, 1, 2)
    sources = [config.sources[key] for key in ("n_test", "rank", "steps", "seeds", "out")]
    assert sources == [str(file), "--set", "flag", "default", "derived"]


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    values = {"task": "ioi", "layers": [0, 4], "methods": ["das"], "positions": ["last"]}
    (tmp_path / "a.json").write_text(json.dumps(values))
    (tmp_path / "a.yml").write_text("task: ioi\nlayers: 0,4\nmethods: das\npositions: last\n")
    assert load_config(tmp_path / "a.json") == load_config(tmp_path / "a.yml")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0,4,8", (0, 4, 8)),
        ("0-29:4", (0, 4, 8, 12, 16, 20, 24, 28)),
        ("3-5", (3, 4, 5)),
        ("0-8:4, 29", (0, 4, 8, 29)),
        ("-1", (-1,)),
        ("7", (7,)),
    ],
)
def test_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_numbers(text) == numbers
    assert load_config(flags=IOI | {"layers": text}).layers == numbers


@pytest.mark.parametrize("text", ["4-1", "0-4:0", "a", "0,,1", "1,1", "", "0-4,2", "1.5"])
def test_numbers_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="Numbers"):
        parse_numbers(text)


def test_positions_are_split_outside_brackets_only() -> None:
    assert load_config(flags=IOI | {"positions": "Span(1,3), last"}).positions == ("Span(1,3)", "last")


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("rnak=3", r"Configuration rnak \(from --set\): there is no such key. Did you mean rank"),
        ("rank.of=3", r"Configuration rank.of .*rank has no parts"),
        ("train.lr=3", r"Configuration train.lr .*Did you mean lr"),
        ("sources={a: b}", r"Configuration sources.a"),
        ("rank", "holds no key=value"),
        ("layers=[1, 2", "broken YAML"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_name(key: str, found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        load_config(sets=[key], flags=IOI)


def test_every_refused_value_is_named_at_once_with_its_source() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(sets=["lr=-1", "methods=[das, dsa]", "n_test=3.5"], flags=IOI | {"rank": 0, "seeds": "0,x"})
    text = str(caught.value)
    for part in ("lr (from --set): -1", "methods (from --set): 'dsa'", "n_test (from --set): 3.5"):
        assert part in text
    assert "rank (from flag): 0" in text and "seeds (from flag): '0,x'" in text
    assert len(text.splitlines()) == 5


@pytest.mark.parametrize(
    "one", ["rank=true", "lr=.nan", "lr=.inf", "seeds=[]", "seeds=[0,0]", "seeds=-1", "methods=''"]
)
def test_values_that_would_be_bent_into_something_else_are_refused(one: str) -> None:
    with pytest.raises(ConfigError, match=one.split("=")[0]):
        load_config(sets=[one], flags=IOI)


def test_a_missing_task_says_how_to_give_it() -> None:
    with pytest.raises(ConfigError, match=r"Configuration task: it was not given\. Pass --task"):
        load_config()


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.toml", "", "the ending '.toml' is unknown"),
        ("a.yaml", "rank: 1\nrank: 2\n", "rank is given twice"),
        ("a.json", '{"rank": 1, "rank": 2}', "rank is given twice"),
        ("a.yaml", "- 1\n", "holds a list"),
        ("a.yaml", "task: [", "syntax is broken"),
        ("a.json", "{", "syntax is broken"),
    ],
)
def test_files_that_cannot_be_meant_are_refused(tmp_path: Path, name: str, text: str, found: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=found):
        load_config(tmp_path / name, flags=IOI)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot be read"):
        load_config(tmp_path / "absent.yaml")


def test_layers_are_resolved_against_the_model() -> None:
    config = load_config(flags=IOI)
    spread = resolve_layers(config, 30)
    assert spread.layers is not None
    assert (spread.layers[0], spread.layers[-1], len(spread.layers)) == (0, 29, 8)
    assert spread.sources["layers"] == "derived"
    assert resolve_layers(config, 2).layers == (0, 1)
    assert resolve_layers(config, 1).layers == (0,)
    assert resolve_layers(load_config(flags=IOI | {"layers": "all"}), 3).layers == (0, 1, 2)
    assert resolve_layers(load_config(flags=IOI | {"layers": "0,-1"}), 3).layers == (0, 2)
    with pytest.raises(ConfigError, match="this model has layers 0-2, and not 3"):
        resolve_layers(load_config(flags=IOI | {"layers": "0,3"}), 3)
    with pytest.raises(ConfigError, match="the same block"):
        resolve_layers(load_config(flags=IOI | {"layers": "2,-1"}), 3)


def test_only_what_is_none_is_derived() -> None:
    config = with_derived(load_config(flags=IOI), variable="position", device="cpu")
    assert (config.variable, config.sources["variable"]) == ("position", "derived")
    with pytest.raises(ConfigError, match=r"Deriving rank: it was given as \[8\] \(default\)"):
        with_derived(config, rank=4)


def test_describe_prints_every_value_with_its_source() -> None:
    lines = [line.split() for line in describe(load_config(sets=["seeds=0,1"], flags=IOI)).splitlines()]
    assert [line[0] for line in lines] == list(KEYS)
    assert ["seeds", "0,1", "--set"] in lines
    assert ["variable", "to", "be", "derived", "default"] in lines
    assert ["out", "runs/ioi", "derived"] in lines


def test_the_plain_form_loads_again_to_the_same_run(tmp_path: Path) -> None:
    config = load_config(flags=IOI | {"layers": "0,4", "variable": "position"})
    assert config.out == Path("runs/ioi-position")
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert load_config(tmp_path / "config.json") == config


def test_every_key_is_explained() -> None:
    assert set(HELP) == {one.name for one in fields(RunDas)} - {"sources"}


def test_trackers_are_named_or_none() -> None:
    assert load_config(flags=IOI).trackers == ()
    assert load_config(flags=IOI | {"trackers": "tensorboard, wandb"}).trackers == ("tensorboard", "wandb")
    assert load_config(flags=IOI | {"trackers": "none"}).trackers == ()
    with pytest.raises(ConfigError, match="Input should be 'tensorboard' or 'wandb'"):
        load_config(flags=IOI | {"trackers": "wanb"})


def test_a_hint_that_asks_does_not_end_in_a_full_stop() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean lda, das, mdas\? Meaning"):
        load_config(flags=IOI | {"methods": "dsa"})
