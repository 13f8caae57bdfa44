"""A planted failing group is found first; groups, bins and tests are counted by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from alignments.failures import explore, read_examples, variables_of
from alignments.metrics import wilson


def record(right: bool, base: dict[str, Any], source: dict[str, Any], kind: str = "same") -> dict[str, Any]:
    texts = {"base": "b", "source": "s", "label": " x", "answer": " x" if right else " y"}
    return {**texts, "kind": kind, "right": right, "base_setting": base, "source_setting": source}


def planted(n: int = 240) -> list[dict[str, Any]]:
    """Wrong in 3 of 4 pairs whose base has position 2 and source position 1, right in 9 of 10 others."""
    found = []
    for index in range(n):
        base, source = 1 + index % 2, 1 + index // 2 % 2
        fails = index // 4 % 4 != 0 if (base, source) == (2, 1) else index // 4 % 10 == 0
        settings = {"position": base, "place": f"p{index}"}, {"position": source, "place": f"q{index}"}
        found.append(record(not fails, *settings))
    random.Random(0).shuffle(found)
    return found


def test_the_planted_group_comes_first() -> None:
    found = explore(planted())
    first = found.groups[0]
    assert first.name == "base.position = 2, source.position = 1"
    assert (first.n, first.hits, first.worse) == (60, 15, True)
    assert first.interval == wilson(15, 60)
    assert first.rest == pytest.approx((found.hits - 15) / 180)
    assert first.p == pytest.approx(stats.fisher_exact([[15, 45], [162, 18]], alternative="less").pvalue, rel=1e-6)
    assert all(one.adjusted >= one.p for one in found.groups)
    assert "most clearly base.position = 2, source.position = 1: IIA 0.25" in found.sentence


def test_worse_groups_stand_before_others_and_those_by_score() -> None:
    groups = explore(planted()).groups
    flags = [group.worse for group in groups]
    assert flags == sorted(flags, reverse=True) and not all(flags)
    others = [group.iia for group in groups if not group.worse]
    assert others == sorted(others)


def test_a_variable_of_many_values_is_skipped_and_its_agreement_is_not() -> None:
    found = explore(planted())
    assert not any("place" in variable for group in found.groups for variable, _ in group.where)
    assert any("base.place (240 values)" in note and "more than 12 values" in note for note in found.notes)
    assert any(variable == "position on both" for group in found.groups for variable, _ in group.where)


def test_a_numeric_variable_of_many_values_is_cut_into_quarters() -> None:
    records = [record(index >= 25, {"amount": index / 2}, {}) for index in range(100)]
    found = explore(records)
    sizes = {group.where: (group.n, group.hits) for group in found.groups}
    assert sizes == {
        (("base.amount", "0 to 12"),): (25, 0),
        (("base.amount", "12.5 to 24.5"),): (25, 25),
        (("base.amount", "25 to 37"),): (25, 25),
        (("base.amount", "37.5 to 49.5"),): (25, 25),
    }
    assert [group.name for group in found.worse] == ["base.amount = 0 to 12"]
    assert found.notes == ("Cut into quarters, having more than 12 values: base.amount.",)


def test_groups_of_the_same_pairs_stand_once_with_the_fewest_variables() -> None:
    records = [record(index % 3 > 0, {"a": index % 2, "b": index % 2}, {}) for index in range(40)]
    assert {group.where for group in explore(records).groups} == {(("base.a", "0"),), (("base.a", "1"),)}


def test_small_groups_are_counted_and_not_shown() -> None:
    records = [record(index > 0, {"a": index < 3}, {}) for index in range(40)]
    found = explore(records, min_pairs=5)
    assert [group.name for group in found.groups] == ["base.a = False"]
    assert "1 groups of fewer than 5 pairs are not shown." in found.notes


def test_samples_are_failing_pairs_and_seeded() -> None:
    found = explore(planted(), n_samples=7)
    assert len(found.samples) == 7 and not any(one["right"] for one in found.samples)
    assert found.samples == explore(planted(), n_samples=7).samples
    assert len(explore(planted(), n_samples=1000).samples) == found.n - found.hits


def test_records_without_settings_are_grouped_by_kind() -> None:
    records = [
        {"base": "b", "source": "s", "kind": "cause" if index % 2 else "isolate", "right": bool(index % 2)}
        for index in range(40)
    ]
    found = explore(records)
    assert [(group.name, group.hits, group.worse) for group in found.groups] == [
        ("kind = isolate", 0, True),
        ("kind = cause", 20, False),
    ]
    assert variables_of({"right": True}) == {}
    assert explore([{"right": True}] * 9).sentence == (
        "0 of 9 pairs fail; no causal setting has groups large enough to compare."
    )


def test_a_variable_told_for_some_pairs_only_is_named() -> None:
    records = [record(True, {"a": 1} if index else {}, {}) for index in range(9)]
    assert explore(records).notes == ("Skipped, not told for every pair: base.a.",)


def test_chance_alone_makes_no_group_worse() -> None:
    draw = random.Random(1)
    found = 0
    for _ in range(20):
        records = [
            record(draw.random() < 0.8, {name: draw.randrange(3) for name in "abcd"}, {"a": draw.randrange(3)})
            for _ in range(200)
        ]
        found += bool(explore(records).worse)
    assert found <= 3


def test_records_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in planted(8)), encoding="utf-8")
    assert read_examples(path) == planted(8)
    path.write_text('{"right": true}\n{"right": tr', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_examples(path)
    path.write_text("[1]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: list, not an object"):
        read_examples(path)


def test_what_cannot_be_explored_is_refused() -> None:
    with pytest.raises(ValueError, match="each with `right`"):
        explore([])
    with pytest.raises(ValueError, match="each with `right`"):
        explore([{"base": "b"}])
    with pytest.raises(ValueError, match="combine=3"):
        explore(planted(8), combine=3)
