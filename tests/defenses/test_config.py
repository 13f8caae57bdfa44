"""Layers of configuration, their sources, and refusals that name the key and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from defenses.config import CompareDefenses, TrainDefense, load_config, variant
from records.config_files import ConfigError
from records.layered import describe, keys_of

DATA = {"train_data": ["x.jsonl"]}


def load(sets=(), file=None, kind=TrainDefense, **flags):
    return load_config(kind, file, sets, {**DATA, **flags})


def test_flags_go_over_sets_over_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 0.1\nbatch_size: 4\nclip: none\nmethod:\n  name: injection\n  strength: {alpha: 7}\n")
    config = load(["lr=0.2", "seed=3", "method.scope=all"], file, lr="0.3", layers="1-5:2")
    assert (config.lr, config.seed, config.batch_size, config.clip, config.layers) == (0.3, 3, 4, None, (1, 3, 5))
    assert config.method == {"name": "injection", "strength": {"alpha": 7}, "scope": "all"}
    source = config.sources
    assert (source["lr"], source["seed"], source["batch_size"]) == ("flag", "--set", str(file))
    assert source["method.scope"] == "--set" and source["epochs"] == "derived"
    lines = {line.split()[0]: line.split()[1:] for line in describe(config).splitlines()}
    assert lines["method.strength.alpha"] == ["7", str(file)] and lines["lr"] == ["0.3", "flag"]


def test_a_method_flag_keeps_the_options_that_came_before(tmp_path):
    config = load(["method.detection_alpha=0.5"], method="delta_loss")
    assert config.method == {"name": "delta_loss", "detection_alpha": 0.5}
    assert load().method_name == "sft"


def test_what_follows_is_derived_once():
    full, lora = load(), load(lora_rank="8")
    assert (full.epochs, full.lr, full.out) == (1.0, 5e-6, Path("runs/defense-sft-seed0"))
    assert (lora.lr, lora.lora_alpha) == (1e-4, 16.0)
    assert load(steps="5").epochs is None


def test_a_configuration_is_its_own_file(tmp_path):
    import json

    config = load(["method.strength.alpha=2", "data.truncation=drop"], method="injection", lora_rank="4")
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert load_config(TrainDefense, tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("sets", "flags", "text"),
    [
        (["lrr=1"], {}, r"Configuration lrr \(from --set\): there is no such key. Did you mean lr\?"),
        (["lr.x=1"], {}, "lr has no parts. Write lr itself"),
        ([], {"lr": "fast"}, r"Configuration lr \(from flag\): 'fast'.*Meaning: learning rate"),
        ([], {"lr": "0"}, "greater than 0"),
        ([], {"batch_size": "0"}, "batch_size.*greater than or equal to 1"),
        ([], {"steps": "5", "epochs": "2"}, "steps 5 and epochs 2 were both given. Give one of them"),
        ([], {"merge": True}, "there is no adapter: lora_rank is 0"),
        ([], {"method": "rise"}, "Method 'rise': there is none"),
        ([], {"backend": "zero4"}, "backend.*Input should be 'auto'"),
        ([], {"layers": "5-1"}, "runs nowhere"),
        ([], {"layers": "1,1"}, "named only once"),
        (["data.truncatoin=drop"], {}, r"data\.truncatoin: there is no such option. Did you mean truncation"),
        (["method.detection_alpha=0.1"], {}, "method sft has no options"),
        (["batch_size=true"], {}, "not true or false"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(sets, flags, text):
    with pytest.raises(ConfigError, match=text):
        load(sets, **flags)


def test_missing_data_are_asked_for():
    with pytest.raises(ConfigError, match=r"Configuration train_data: it was not given. Pass --train_data"):
        load_config(TrainDefense)


def test_every_key_has_a_meaning():
    assert all(len(one.metadata["help"]) > 4 for one in keys_of(CompareDefenses).values())


def test_the_runs_of_a_comparison_differ_in_what_they_should(tmp_path):
    sets = ["variants.late.method.name=injection", "variants.late.schedule=late", "variants.late.onset=0.5"]
    config = load(
        sets, kind=CompareDefenses, methods="sft,injection", seeds="0-2", alpha="5", vectors=["v.safetensors"], lr="0.1"
    )
    plain, steered, late = (variant(config, name, 2, tmp_path / name) for name in ("sft", "injection", "late"))
    assert (plain.method_name, plain.alpha, plain.vectors) == ("sft", None, ())
    assert (steered.method_name, steered.alpha, steered.schedule) == ("injection", 5.0, None)
    assert (late.method_name, late.alpha, late.schedule, late.onset) == ("injection", 5.0, "late", 0.5)
    for one in (plain, steered, late):
        assert (one.seed, one.lr, one.resume, one.train_data) == (2, 0.1, True, ("x.jsonl",))
    with pytest.raises(ConfigError, match=r"variants\.late.scheduel: there is no such key. Did you mean schedule"):
        variant(load(["variants.late.scheduel=late"], kind=CompareDefenses), "late", 0, tmp_path)
