"""A comparison: the same order per seed, runs that are made once, paired differences, a front that is right."""

from __future__ import annotations

import json

import pytest

from defenses.compare import cells_of, compare, compared, metrics_of, text_of
from defenses.config import CompareDefenses, load_config
from defenses.errors import DefenseError
from records.config_files import ConfigError
from records.files import RecordError
from tests.defenses.tiny_runs import tiny_world

# seed -> trait, skill of three variants; worked out by hand below
TABLE = {
    "sft": {0: {"trait_rate": 0.8, "skill_accuracy": 0.9}, 1: {"trait_rate": 0.6, "skill_accuracy": 0.7}},
    "good": {0: {"trait_rate": 0.3, "skill_accuracy": 0.8}, 1: {"trait_rate": 0.3, "skill_accuracy": 0.8}},
    "bad": {0: {"trait_rate": 0.9, "skill_accuracy": 0.5}, 1: {"trait_rate": 0.7, "skill_accuracy": 0.5}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("world"))


def config_of(world, out, sets=(), **flags):
    base = {
        "model": str(world["model"]), "train_data": [str(world["data"])], "steps": 3, "batch_size": 8, "lr": 0.01,
        "micro_batch_size": 4, "max_length": 64, "warmup": 2, "device": "cpu", "report": False, "out": str(out),
        "vectors": [str(world["vectors"])], "methods": "sft,injection", "seeds": "0,1", "alpha": 2,
    }  # fmt: skip
    return load_config(CompareDefenses, None, sets, {**base, **flags})


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def row_of(made, metric, variant):
    return next(row for row in made["rows"] if (row["metric"], row["variant"]) == (metric, variant))


def test_differences_are_taken_seed_by_seed():
    made = compared(TABLE)
    row = row_of(made, "trait_rate", "good")
    assert row["mean"] == pytest.approx(0.3) and row["n"] == 2 and row["good"] == "low"
    assert row["difference"]["value"] == pytest.approx((-0.5 - 0.3) / 2)
    # two seeds: t = 12.706 at 97.5 %, sd of (-0.5, -0.3) is 0.1 sqrt 2, so the half width is 12.706 * 0.1
    assert row["difference"]["t_low"] == pytest.approx(-0.4 - 1.27062, abs=1e-4)
    assert row["difference"]["low"] == pytest.approx(-0.5) and row["difference"]["high"] == pytest.approx(-0.3)
    assert row["difference"]["sign_test_p"] == 0.5
    assert "difference" not in row_of(made, "trait_rate", "sft")


def test_the_front_holds_what_nothing_else_beats():
    pareto = compared(TABLE)["pareto"]
    assert (pareto["trait"], pareto["skill"], pareto["good"]) == ("trait_rate", "skill_accuracy", ["low", "high"])
    # good (.3, .8) beats bad (.8, .5) and sft (.7, .8 on average) is as skilled but shows more of the trait
    assert {one["variant"]: one["front"] for one in pareto["points"]} == {"sft": False, "good": True, "bad": False}
    assert "Pareto front of trait_rate and skill_accuracy: good" in text_of(compared(TABLE))


def test_one_seed_has_no_interval_and_says_so():
    table = {name: {0: seeds[0]} for name, seeds in TABLE.items()}
    assert "one seed: no interval" in text_of(compared(table))


def test_seeds_that_only_one_method_has_are_left_out_of_the_difference():
    table = {**TABLE, "good": {**TABLE["good"], 2: {"trait_rate": 0.0, "skill_accuracy": 1.0}}}
    row = row_of(compared(table), "trait_rate", "good")
    assert row["n"] == 3 and row["difference"]["n"] == 2


def test_names_that_are_none_are_refused():
    with pytest.raises(DefenseError, match="Reference rise: there are sft, good, bad"):
        compared(TABLE, reference="rise")
    with pytest.raises(DefenseError, match="Metric trait: the runs have skill_accuracy, trait_rate"):
        compared(TABLE, trait="trait")


def test_metrics_of_a_result_are_its_numbers():
    one = {"value": 0.5, "low": 0.1, "high": 0.9}
    result = {
        "evaluation": {"trait_rate": one, "kl": {**one, "value": None}}, "loss": {"first": 3.0, "last": 2.0},
        "detection": {"samples": 9, "auroc": {**one, "value": 0.75}},
    }  # fmt: skip
    assert metrics_of(result) == {"trait_rate": 0.5, "loss": 2.0, "detector_auroc": 0.75}


@pytest.mark.slow
def test_a_grid_is_run_once_with_the_same_order_per_seed(world, tmp_path):
    lines: list[str] = []
    config = config_of(world, tmp_path / "grid", ["variants.none.method.name=injection", "variants.none.alpha=0"])
    assert compare(config, told=lines.append) == 0
    grid = tmp_path / "grid"
    for seed in (0, 1):  # an injection of strength 0 is plain training, if the data come in the same order
        plain, none, steered = (losses(grid / name / f"seed{seed}") for name in ("sft", "none", "injection"))
        assert none == pytest.approx(plain, abs=1e-6) and steered != pytest.approx(plain, abs=1e-4)
        assert not (grid / "sft" / f"seed{seed}" / "checkpoints").exists()
    assert losses(grid / "sft" / "seed0") != pytest.approx(losses(grid / "sft" / "seed1"), abs=1e-4)
    made = json.loads((grid / "comparison.json").read_text())
    assert row_of(made, "loss", "none")["difference"]["value"] == pytest.approx(0, abs=1e-6)
    assert len((grid / "rows.jsonl").read_text().splitlines()) == 6

    before = (grid / "sft" / "seed0" / "result.json").stat().st_mtime_ns
    lines.clear()
    more = config_of(world, grid, methods="sft,injection,ema", seeds="0-2")
    assert compare(more, told=lines.append) == 0
    assert sum("is finished" in line for line in lines) == 4  # of nine, and the variant of before is not asked for
    assert (grid / "sft" / "seed0" / "result.json").stat().st_mtime_ns == before
    assert len((grid / "rows.jsonl").read_text().splitlines()) == 9


def test_another_comparison_in_the_folder_is_refused(world, tmp_path):
    compare(config_of(world, tmp_path / "grid", methods="sft", seeds="0"), told=lambda line: None)
    with pytest.raises(RecordError, match=r"made with other values: lr was 0\.01, is 0\.5"):
        compare(config_of(world, tmp_path / "grid", methods="sft", seeds="0", lr=0.5), told=lambda line: None)


@pytest.mark.parametrize(
    ("sets", "flags", "text"),
    [
        ((), {"methods": "sft,rise"}, "Method 'rise': there is none"),
        (["variants.late.schedul=late"], {}, r"variants\.late\.schedul: there is no such key"),
        ((), {"reference": "nothing"}, "Method 'nothing': there is none"),
        (["variants.a/b.method.name=sft"], {}, "Variant 'a/b': it names a folder"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused_before_its_first_run(world, tmp_path, sets, flags, text):
    with pytest.raises(ConfigError, match=text):
        compare(config_of(world, tmp_path / "grid", sets, **flags), told=lambda line: None)
    assert not (tmp_path / "grid").exists()


def test_a_dry_run_of_a_grid_tries_every_cell_and_leaves_nothing(world, tmp_path):
    lines: list[str] = []
    assert compare(config_of(world, tmp_path / "grid", dry_run=True), told=lines.append) == 0
    assert sum(line.startswith("---") for line in lines) == 4 and not (tmp_path / "grid").exists()


def test_a_run_that_fails_is_left_out_and_the_others_are_compared(world, tmp_path):
    lines: list[str] = []
    sets = [
        "variants.wild.method.name=sft",
        "variants.wild.lr=1e18",
        "variants.wild.warmup=0",
        "variants.wild.clip=none",
    ]
    config = config_of(world, tmp_path / "grid", sets, methods="sft", seeds="0", steps=30, save_weights=False)
    assert compare(config, told=lines.append) == 1
    assert any(line.startswith("left out: wild, seed 0: Step") for line in lines)
    made = json.loads((tmp_path / "grid" / "comparison.json").read_text())
    assert [row["variant"] for row in made["rows"]] == ["sft"] and made["failed"][0]["variant"] == "wild"


def test_runs_that_were_begun_keep_their_look_at_the_model_before_training(world, tmp_path):
    def looks(**flags):
        cells = cells_of(config_of(world, tmp_path / "out", **flags))
        return {(name, cell.seed): cell.evaluate_before for name, cell in cells}

    assert [cell for cell, look in looks().items() if look] == [("sft", 0)]
    for name, seed, look in (("sft", 0, True), ("injection", 0, False)):
        place = tmp_path / "out" / name / f"seed{seed}"
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps({"evaluate_before": look}))
    for flags in ({"seeds": "2,0"}, {"reference": "injection"}, {"methods": "ema,injection,sft"}):
        assert [cell for cell, look in looks(**flags).items() if look] == [("sft", 0)], flags


def test_a_metric_that_no_run_can_have_is_refused_before_training(world, tmp_path):
    with pytest.raises(ConfigError, match=r"no metric 'trait_rat'. Did you mean trait_rate\?"):
        cells_of(config_of(world, tmp_path, trait="trait_rat"))
    with pytest.raises(ConfigError, match="Metric trait_rate: nothing is evaluated"):
        cells_of(config_of(world, tmp_path, trait="trait_rate"))
    assert cells_of(config_of(world, tmp_path, skill="loss"))


def test_a_strength_for_all_is_not_asked_of_methods_that_only_block(world, tmp_path):
    flags = {"methods": "sft,injection,delta_loss", "alpha": 1}
    cells = dict(cells_of(config_of(world, tmp_path / "grid", **{**flags, "seeds": "0"})))
    assert cells["injection"].alpha == 1 and cells["delta_loss"].alpha is None
