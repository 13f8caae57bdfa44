from __future__ import annotations

import json

import pytest

from tasks import BadData, PairSet, check, read_pairs, task_named, write_pairs
from tasks.base import Example, Pair


@pytest.fixture
def rows(tmp_path):
    """Eight good rows, as dicts, to spoil."""
    pairs = task_named("ioi").pairs("test", variable="position", n=8, seed=4)
    path = write_pairs(pairs, tmp_path / "good.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def written(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["ioi", "cities", "countries"])
def test_a_written_file_reads_back_as_the_same_pairs(tmp_path, name):
    task = task_named(name)
    pairs = task.pairs("select", variable=task.variables[0], n=20, seed=9)
    back = read_pairs(write_pairs(pairs, tmp_path / "pairs.jsonl"))
    assert back == pairs
    check(task, back)


def test_letters_beyond_ascii_and_unusual_line_ends_survive(tmp_path):
    example = Example("Où \u2028 \u0085 est\nLomé", " à", {"n": 1, "yes": True}, {"last": (0, 2)})
    pairs = PairSet((Pair(example, example, "v", " à"),), "mine", "test", "v", None)
    assert read_pairs(write_pairs(pairs, tmp_path / "p.jsonl")) == pairs


def test_a_missing_field_is_named_with_its_line(tmp_path, rows):
    del rows[6]["label"]
    with pytest.raises(BadData, match=r"data row missing a field \(line 7\): label\. Add it"):
        read_pairs(written(tmp_path, rows))
    rows[6]["label"] = " x"
    del rows[2]["base"]["prompt"], rows[2]["base"]["answer"]
    with pytest.raises(BadData, match=r"data row missing a field \(line 3\): base.prompt, base.answer"):
        read_pairs(written(tmp_path, rows))


def test_blank_lines_are_skipped_but_counted(tmp_path, rows):
    del rows[1]["variable"]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows[0]) + "\n\n\n" + json.dumps(rows[1]) + "\n", encoding="utf-8")
    with pytest.raises(BadData, match=r"\(line 4\): variable"):
        read_pairs(path)


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_an_empty_file_is_refused(tmp_path, text):
    path = tmp_path / "empty.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadData, match=r"empty\.jsonl: the file is empty\. Write at least one row"):
        read_pairs(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadData, match=r"nothing\.jsonl: there is no such file"):
        read_pairs(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda row: row.update(label=3), r"label is int, not text \(line 2\)"),
        (lambda row: row.update(base="When"), r"base is no object \(line 2\)"),
        (lambda row: row["source"].update(prompt=None), r"source.prompt is NoneType, not text \(line 2\)"),
        (lambda row: row["source"].update(setting=[1]), r"source.setting is no object \(line 2\)"),
        (lambda row: row["base"]["spans"].update(last=[5]), r"base.spans.last is \[5\] \(line 2\)"),
        (lambda row: row["base"]["spans"].update(last=[0, 999]), r"base.spans.last is \[0, 999\] \(line 2\)"),
        (lambda row: row.update(split="train"), r"split 'train' \(line 2\) and 'test' \(line 1\) are in one file"),
        (lambda row: row.update(variable="token"), r"variable 'token' \(line 2\) and 'position' \(line 1\)"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named_with_its_line(tmp_path, rows, spoil, text):
    spoil(rows[1])
    with pytest.raises(BadData, match=text):
        read_pairs(written(tmp_path, rows))


def test_a_seed_that_is_no_whole_number_is_refused(tmp_path, rows):
    for row in rows:
        row["seed"] = "four"
    with pytest.raises(BadData, match=r"seed is 'four' \(line 1\)"):
        read_pairs(written(tmp_path, rows))


def test_lines_that_are_not_json_objects_are_refused(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows[0]) + "\n{'label': 1}\n", encoding="utf-8")
    with pytest.raises(BadData, match=r"data row is not JSON \(line 2\)"):
        read_pairs(path)
    path.write_text(json.dumps(rows[0]) + "\n[1, 2]\n", encoding="utf-8")
    with pytest.raises(BadData, match=r"data row is no object \(line 2\)"):
        read_pairs(path)


def test_only_the_needed_fields_are_needed(tmp_path):
    bare = {"prompt": "a b", "answer": " c"}
    path = written(tmp_path, [{"base": bare, "source": bare, "variable": "v", "label": " c"}])
    (pair,) = read_pairs(path)
    assert (pair.base.prompt, pair.label, pair.base.setting, pair.base.spans) == ("a b", " c", {}, {})


def test_writing_refuses_to_overwrite_unless_told(tmp_path):
    task = task_named("ioi")
    path = write_pairs(task.pairs("train", variable="position", n=2), tmp_path / "p.jsonl")
    more = task.pairs("train", variable="position", n=3)
    with pytest.raises(BadData, match=r"the file exists. Pass overwrite=True"):
        write_pairs(more, path)
    assert len(read_pairs(path)) == 2
    write_pairs(more, path, overwrite=True)
    assert len(read_pairs(path)) == 3


def test_writing_refuses_what_json_cannot_hold_and_leaves_no_file(tmp_path):
    example = Example("a", " b", {"x": {1, 2}})
    with pytest.raises(BadData, match="a setting does not fit into JSON"):
        write_pairs(PairSet((Pair(example, example, "v", " b"),), "t", "test", "v"), tmp_path / "p.jsonl")
    with pytest.raises(BadData, match="there are no pairs to write"):
        write_pairs(PairSet((), "t", "test", "v"), tmp_path / "p.jsonl")
    assert list(tmp_path.iterdir()) == []
