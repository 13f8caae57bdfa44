"""A row survives the trip through JSON, and refuses to contradict itself."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from alignments.rows import BadRow, Row

ROW = Row(
    task="ioi",
    model="smollm2-135m",
    variable="position",
    site="L14.block_output",
    layer=14,
    component="block_output",
    positions="Marked('subject2')",
    position_label="subject2",
    method="das",
    rank=8,
    seed=0,
    split="test",
    n=300,
    iia=0.81,
    low=0.76,
    high=0.85,
    copy_base=0.5,
    copy_source=0.5,
    majority=0.25,
    task_accuracy=0.97,
    seconds=2.5,
    extra={"flip": 0.5},
)


def test_a_row_survives_json() -> None:
    flat = json.loads(json.dumps(ROW.to_json()))
    assert flat["extra.flip"] == 0.5
    assert not any(isinstance(value, dict) for value in flat.values())
    assert Row.from_json(flat) == ROW


def test_missing_and_unknown_fields_are_named() -> None:
    flat = ROW.to_json()
    del flat["copy_source"]
    flat["chance"] = 0.5
    with pytest.raises(BadRow, match="unknown chance; missing copy_source"):
        Row.from_json(flat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iia": 81.0}, "iia is 81.0, not a share"),
        ({"copy_base": float("nan")}, "copy_base is nan"),
        ({"extra": {"flip": 1.5}}, r"extra.flip is 1.5"),
        ({"iia": 0.9}, "outside its own interval"),
        ({"n": 0}, "n is 0"),
        ({"seed": True}, "seed is True"),
        ({"split": "dev"}, "split 'dev' is unknown. Use one of train, select, test"),
        ({"site": ""}, "site is ''"),
        ({"seconds": float("inf")}, "seconds is inf"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow, match=message):
        replace(ROW, **change)


def test_sites_without_layer_rank_or_task_accuracy_are_rows_too() -> None:
    row = replace(ROW, site="embedding_output", layer=None, rank=None, task_accuracy=None)
    assert Row.from_json(row.to_json()) == row


def test_the_key_tells_seeds_and_splits_apart_and_nothing_that_is_a_result() -> None:
    assert replace(ROW, seed=1).key != ROW.key
    assert replace(ROW, split="select").key != ROW.key
    assert replace(ROW, seed=1).cell == ROW.cell
    assert replace(ROW, rank=4).cell != ROW.cell
    assert replace(ROW, iia=0.8, seconds=9.0).key == ROW.key


def test_baselines_carry_the_extras_and_controls_are_known_by_name() -> None:
    assert ROW.baselines == {"copy-base": 0.5, "copy-source": 0.5, "majority": 0.25, "flip": 0.5}
    assert replace(ROW, method="control:shuffled_labels").is_control
    assert not ROW.is_control


def test_kinds_survive_the_flat_form():
    row = replace(ROW, kinds={"cause": 0.5, "isolate": 1.0})
    flat = row.to_json()
    assert flat["iia.cause"] == 0.5 and "kinds" not in flat
    assert Row.from_json(flat) == row
