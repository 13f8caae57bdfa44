from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tasks import (
    IOI,
    BadData,
    MultipleChoice,
    Pair,
    UnknownName,
    as_original,
    read_original,
    write_original,
)
from tests.tasks.words import WordTokenizer

ROW = {
    "input_ids": [5, 6, 7, 8],
    "source_input_ids": [9, 6, 7],
    "labels": [-100, -100, -100, 42],
    "intervention_ids": 1,
}
RANGES = {"token_range": [1, 3], "source_token_range": [0, 2]}


def written(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_by_hand(tmp_path):
    padded = {**ROW, "attention_mask": [0, 1, 1, 1], "labels": [-100, -100, -100, 7], "intervention_ids": 0}
    pairs = read_original(written(tmp_path, {**ROW, **RANGES}, {**padded, **RANGES}))
    assert len(pairs) == 2
    assert pairs.input_ids == ((5, 6, 7, 8), (5, 6, 7, 8)) and pairs.source_input_ids == ((9, 6, 7), (9, 6, 7))
    np.testing.assert_array_equal(pairs.labels, [42, 7])
    np.testing.assert_array_equal(pairs.intervention_ids, [1, 0])
    assert pairs.token_ranges == ((1, 3), (1, 3)) and pairs.source_token_ranges == ((0, 2), (0, 2))
    assert pairs.attention_masks == ((1, 1, 1, 1), (0, 1, 1, 1)) and pairs.source_attention_masks == ((1, 1, 1),) * 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        pairs.labels = None


@pytest.mark.parametrize("extra", [{}, RANGES, {"attention_mask": [0, 0, 1, 1]}])
def test_a_written_file_has_the_same_rows(tmp_path, extra):
    rows = [{**ROW, **extra}, {**ROW, "labels": [-100, -100, -100, 3], **extra}]
    path = write_original(read_original(written(tmp_path, *rows)), tmp_path / "again.jsonl")
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    with pytest.raises(BadData, match=r"again\.jsonl: the file exists"):
        write_original(read_original(path), path)


def test_rows_of_other_lengths_need_ranges(tmp_path):
    short = {**ROW, "input_ids": [5, 6, 7], "labels": [-100, -100, 42]}
    with pytest.raises(BadData, match=r"input_ids has 4 tokens in most rows, and another number in rows 2, 4\. A posi"):
        read_original(written(tmp_path, ROW, short, ROW, short, ROW))
    source = {**ROW, "source_input_ids": [1, 2]}
    with pytest.raises(BadData, match=r"source_input_ids has 3 tokens in most rows, and another number in row 3\."):
        read_original(written(tmp_path, ROW, ROW, source))
    pairs = read_original(written(tmp_path, {**ROW, **RANGES}, {**short, **RANGES}))
    assert [len(ids) for ids in pairs.input_ids] == [4, 3]
    many = [ROW] * 8 + [short] * 7
    with pytest.raises(BadData, match=r"in rows 9, 10, 11, 12, 13 and 2 more"):
        read_original(written(tmp_path, *many))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"labels": [-100, -100, 3, 42]},
            r"row 2: labels: one id is needed, at the last position 3, .* positions 2, 3",
        ),
        ({"labels": [-100, -100, 42, -100]}, r"row 2: labels: .* and ids stand at positions 2\."),
        ({"labels": [-100] * 4}, r"row 2: labels: .* and ids stand nowhere"),
        ({"labels": [-100, -100, -100, -5]}, r"row 2: labels: one id is needed"),
        ({"labels": [-100, 42]}, r"row 2: labels: there are 2 for 4 input_ids\. Write one for each"),
        ({"labels": 42}, r"row 2: labels: it is not a list of whole numbers"),
        ({"input_ids": [5, 6, 7, 8.0]}, r"row 2: input_ids: it is not a list of token ids"),
        ({"input_ids": [5, True, 7, 8]}, r"row 2: input_ids: it is not a list of token ids"),
        ({"input_ids": [5, -6, 7, 8]}, r"row 2: input_ids: it is not a list of token ids"),
        ({"source_input_ids": []}, r"row 2: source_input_ids: it is empty"),
        ({"intervention_ids": "left"}, r"row 2: intervention_ids: it is 'left'\. Write the variable's number"),
        ({"intervention_ids": -1}, r"row 2: intervention_ids: it is -1"),
        ({"token_range": [2, 2], "source_token_range": [0, 1]}, r"row 2: token_range: it is \[2, 2\]\. Write .* <= 4"),
        ({"token_range": [0, 2], "source_token_range": [2, 4]}, r"row 2: source_token_range: .* end <= 3"),
        ({"token_range": [0, 2]}, r"row 2: token_range: one of base and source has a range and the other none"),
        ({"token_range": [0, 2], "source_token_range": [0, 1]}, r"row 2: .* 2 tokens in the base and 1 in the source"),
        ({"attention_mask": [1, 1, 1]}, r"row 2: attention_mask: it is no list of 4 zeros and ones"),
        ({"attention_mask": [1, 1, 1, 2]}, r"row 2: attention_mask: it is no list"),
        ({"attention_mask": [1, 1, 1, 0]}, r"row 2: attention_mask: there are pads after a token\. Pad on the left"),
        (RANGES, r"row 1 have no token_range and others do\. Write it in all rows or in none"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, text):
    with pytest.raises(BadData, match=text):
        read_original(written(tmp_path, ROW, {**ROW, **change}))


def test_missing_fields_files_and_json_are_named(tmp_path):
    with pytest.raises(BadData, match=r"row 1: missing: labels, intervention_ids\. Add it"):
        read_original(written(tmp_path, {name: ROW[name] for name in ("input_ids", "source_input_ids")}))
    with pytest.raises(BadData, match=r"row 1: it is no object"):
        read_original(written(tmp_path, [1]))
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n{oops\n")
    with pytest.raises(BadData, match=r"row 3: it is not JSON"):
        read_original(path)
    path.write_text("\n")
    with pytest.raises(BadData, match="the file is empty"):
        read_original(path)
    with pytest.raises(BadData, match="there is no such file"):
        read_original(tmp_path / "none.jsonl")


def test_pairs_become_token_ids(tmp_path):
    tokenizer = WordTokenizer()
    task = IOI().for_tokenizer(tokenizer)
    drawn = task.pairs("train", variable="position", n=10)
    pairs = as_original(drawn, tokenizer)
    assert pairs.token_ranges is None
    for i, pair in enumerate(drawn):
        assert list(pairs.input_ids[i]) == tokenizer(pair.base.prompt)["input_ids"]
        assert list(pairs.source_input_ids[i]) == tokenizer(pair.source.prompt)["input_ids"]
        assert pairs.labels[i] == tokenizer(pair.label)["input_ids"][0]
    assert read_original(write_original(pairs, tmp_path / "ioi.jsonl")).rows() == pairs.rows()
    marked = as_original(drawn, tokenizer, position="subject2")
    assert marked.token_ranges == marked.source_token_ranges == ((9, 10),) * 10


def test_variables_are_numbered_in_order():
    task, tokenizer = IOI(), WordTokenizer()
    both = [*task.pairs("train", variable="token", n=2), *task.pairs("train", variable="position", n=2)]
    assert as_original(both, tokenizer).intervention_ids.tolist() == [0, 0, 1, 1]
    assert as_original(both, tokenizer, variables=task.variables).intervention_ids.tolist() == [1, 1, 0, 0]
    with pytest.raises(UnknownName, match=r"Variable 'token'.*Known: position"):
        as_original(both, tokenizer, variables=["position"])


def test_pairs_that_do_not_fit_are_refused():
    task, tokenizer = MultipleChoice(n_choices=2), WordTokenizer(split_up=("hat",))
    setting = {"noun": "hat", "color": "red", "choice1": "red", "choice2": "blue", "symbol1": "A", "symbol2": "B"}
    pairs = [task.pair("pointer", {**setting, "noun": noun}, setting) for noun in ("cup", "cup", "hat")]
    with pytest.raises(BadData, match=r"as_original: input_ids has \d+ tokens in most rows, and another .* row 3"):
        as_original(pairs, tokenizer)
    assert as_original(pairs, tokenizer, position="last").token_ranges is not None
    with pytest.raises(BadData, match=r"row 1: token_range: it has 1 tokens in the base and 2 in the source"):
        as_original(pairs, tokenizer, position="noun")
    with pytest.raises(BadData, match=r"Position 'end': .* marks only noun, color"):
        as_original(pairs, tokenizer, position="end")
    with pytest.raises(BadData, match="there are no pairs"):
        as_original([], tokenizer)
    assert isinstance(pairs[0], Pair)
