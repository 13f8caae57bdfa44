"""Files of token ids, searched as they are: interchanges by hand as the oracle, and bad rows named."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from alignments.config import RunDas
from alignments.fit import Budget
from alignments.original_pairs import (
    baselines_of,
    divided,
    is_original,
    language_pairs,
    prepare_original,
    read_original_splits,
    tokens_of,
)
from alignments.scoring import Cell, Job, Scorer
from intervene import BadPosition, Intervention, Site, Subspace, Swap
from intervene.marked import Marked
from records.config_files import ConfigError
from tasks import BadData
from tasks.original import OriginalPairs, read_original, write_original
from tests.tiny import VOCABULARY, tiny_model

SITE = Site("block_output", 1)


def rows_of(n=6, lengths=(7, 9), ranges=True, span=2, variables=1, seed=0):
    """Random rows as a file holds them: bases of the one length and sources of the other, or of both with ranges."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        base, source = (
            draw.integers(3, VOCABULARY, lengths[(number + side) % 2 if ranges else side]).tolist() for side in (0, 1)
        )
        row = {
            "input_ids": base,
            "source_input_ids": source,
            "labels": [-100] * (len(base) - 1) + [int(draw.integers(3, VOCABULARY))],
            "intervention_ids": number % variables,
        }
        if ranges:
            start, other = number % 3 + 1, number % 4
            row |= {"token_range": [start, start + span], "source_token_range": [other, other + span]}
        rows.append(row)
    return rows


def written(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs_of(tmp_path, **how):
    return read_original(written(rows_of(**how), tmp_path / "some.jsonl"))


@torch.no_grad()
def by_hand(model, row, swaps):
    """Logits after the last base token; `swaps` (Q, base columns, source columns) of the output of block 1."""
    held = {}
    layer = model.model.layers[1]
    handle = layer.register_forward_hook(lambda _m, _a, out: held.update(h=out))
    model(torch.tensor([row["source_input_ids"]]))
    handle.remove()

    def patch(_module, _args, out):
        new = out.clone()
        for frame, here, there in swaps:
            for at, other in zip(here, there, strict=True):
                new[0, at] += (held["h"][0, other] - out[0, at]) @ frame @ frame.T
        return new

    handle = layer.register_forward_hook(patch)
    logits = model(torch.tensor([row["input_ids"]])).logits[0, -1]
    handle.remove()
    return logits


@pytest.mark.parametrize("span", [1, 2, 3])
def test_ranges_are_exchanged_as_by_hand_in_rows_of_unequal_length(tmp_path, span):
    model, rows = tiny_model("llama"), rows_of(span=span)
    data = language_pairs(model, read_original(written(rows, tmp_path / "a.jsonl")), [SITE], batch_size=4)
    lens = Subspace(32, 5, seed=2)
    with torch.no_grad():
        found = data.logits([Intervention(SITE, Swap(), Marked("range"), lens)], torch.arange(len(rows)))
    assert data.labels.tolist() == [row["labels"][-1] for row in rows] and data.correct is None
    for row, logits in zip(rows, found, strict=True):
        swap = lens.frame().detach(), range(*row["token_range"]), range(*row["source_token_range"])
        torch.testing.assert_close(logits, by_hand(model, row, [swap]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "columns"), [("2", [2]), ("-1", [-1]), ("1:4", [1, 2, 3]), ("-3:-1", [-3, -2])])
def test_columns_are_counted_in_base_and_source_each(tmp_path, name, columns):
    model, rows = tiny_model("llama"), rows_of(ranges=False)
    original = read_original(written(rows, tmp_path / "a.jsonl"))
    data = language_pairs(model, original, [SITE], positions=[name])
    lens = Subspace(32, 5, seed=2)
    with torch.no_grad():
        found = data.logits([Intervention(SITE, Swap(), Marked(name), lens)], torch.arange(len(rows)))
    for row, logits in zip(rows, found, strict=True):
        expected = by_hand(model, row, [(lens.frame().detach(), columns, columns)])
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_intervention_ids_say_which_block_is_exchanged(tmp_path):
    model, rows = tiny_model("llama"), rows_of(variables=2)
    data = language_pairs(model, read_original(written(rows, tmp_path / "a.jsonl")), [SITE])
    assert data.variables == ("0", "1") and list(data.kinds) == ["variable 0", "variable 1"] * 3
    frame = Subspace(32, 6, seed=1).frame().detach()
    blocks = [frame[:, :3], frame[:, 3:]]
    plan = [Intervention(SITE, Swap(), Marked("range"), Subspace.from_frame(block)) for block in blocks]
    with torch.no_grad():
        found = data.logits(plan, torch.arange(len(rows)))
    for row, logits in zip(rows, found, strict=True):
        swap = blocks[row["intervention_ids"]], range(*row["token_range"]), range(*row["source_token_range"])
        torch.testing.assert_close(logits, by_hand(model, row, [swap]), atol=1e-5, rtol=0)


def test_masks_of_the_file_are_kept_and_ranges_count_pads_as_the_file_does(tmp_path):
    row = rows_of(1)[0]
    plain = language_pairs(tiny_model("llama"), read_original(written([row], tmp_path / "a.jsonl")), [SITE])
    padded = {
        **row,
        "input_ids": [0, 0, *row["input_ids"]],
        "attention_mask": [0, 0] + [1] * len(row["input_ids"]),
        "labels": [-100, -100, *row["labels"]],
        "token_range": [at + 2 for at in row["token_range"]],
    }
    again = language_pairs(tiny_model("llama"), read_original(written([padded], tmp_path / "b.jsonl")), [SITE])
    plan = [Intervention(SITE, Swap(), Marked("range"), Subspace(32, 5, seed=2))]
    with torch.no_grad():
        both = [data.logits(plan, torch.arange(1)) for data in (plain, again)]
    torch.testing.assert_close(*both, atol=1e-5, rtol=0)
    assert again.base.attention_mask.tolist() == [padded["attention_mask"]]


def test_tokens_are_padded_on_the_left_with_their_marks(tmp_path):
    rows = rows_of(2)
    base, source = tokens_of(read_original(written(rows, tmp_path / "a.jsonl")), ["range"])
    assert base.input_ids.tolist() == [[0, 0, *rows[0]["input_ids"]], rows[1]["input_ids"]]
    assert base.marks["range"].tolist() == [[3, 4], [2, 3]]
    assert source.marks["range"].tolist() == [[0, 1], [3, 4]]
    assert base.answers.tolist() == [-1, -1]


def test_baselines_are_the_models_own_answers_and_the_most_frequent_label(tmp_path):
    model, rows = tiny_model("llama"), rows_of(4)
    with torch.no_grad():
        tops = [
            [int(model(torch.tensor([row[key]])).logits[0, -1].argmax()) for key in ("input_ids", "source_input_ids")]
            for row in rows
        ]
    labels = [tops[0][0], tops[1][1], tops[2][1], tops[0][0]]
    for row, label in zip(rows, labels, strict=True):
        row["labels"][-1] = label
    data = language_pairs(model, read_original(written(rows, tmp_path / "a.jsonl")), [SITE])
    assert data.base_answers.tolist() == [base for base, _ in tops]
    assert baselines_of(data) == {
        "copy_base": sum(label == base for label, (base, _) in zip(labels, tops, strict=True)) / 4,
        "copy_source": sum(label == source for label, (_, source) in zip(labels, tops, strict=True)) / 4,
        "majority": max(map(labels.count, labels)) / 4,
    }


def test_one_file_is_divided_by_its_bases_whatever_their_order(tmp_path):
    rows = rows_of(40)
    rows += [{**row, "source_input_ids": rows[3]["source_input_ids"], "source_token_range": [0, 2]} for row in rows]
    found = divided(read_original(written(rows, tmp_path / "a.jsonl")))
    bases = {split: set(pairs.input_ids) for split, pairs in found.items()}
    assert {split: (len(pairs), len(bases[split])) for split, pairs in found.items()} == {
        "train": (48, 24), "select": (16, 8), "test": (16, 8),
    }  # fmt: skip
    assert not bases["train"] & bases["select"] and not (bases["train"] | bases["select"]) & bases["test"]
    turned = divided(read_original(written(rows[::-1], tmp_path / "b.jsonl")))
    assert {split: set(pairs.input_ids) for split, pairs in turned.items()} == bases
    least = divided(read_original(written(rows[:3], tmp_path / "c.jsonl")))
    assert [len(least[split]) for split in ("train", "select", "test")] == [1, 1, 1]
    with pytest.raises(BadData, match=r"2 distinct bases, which cannot be divided into train, select, test"):
        divided(read_original(written(rows[:2], tmp_path / "d.jsonl")))


def three_files(folder, rows):
    for number, split in enumerate(("train", "select", "test")):
        written(rows[number::3], folder / f"{split}.jsonl")
    return folder


def test_a_folder_has_one_file_per_split_and_no_base_twice(tmp_path):
    rows = rows_of(12)
    found = read_original_splits(three_files(tmp_path, rows))
    assert [found["select"].input_ids[0]] == [tuple(rows[1]["input_ids"])] and len(found["test"]) == 4
    rows[5] = {**rows[0], "source_input_ids": rows[5]["source_input_ids"], "source_token_range": [0, 2]}
    with pytest.raises(BadData, match=r"test\.jsonl, row 2: its base stands in train\.jsonl too"):
        read_original_splits(three_files(tmp_path, rows))


def test_such_files_are_known_by_their_first_row(tmp_path):
    assert is_original(str(written(rows_of(2), tmp_path / "a.jsonl")))
    assert not is_original(str(written([{"base": "x"}], tmp_path / "b.jsonl")))
    (tmp_path / "c.jsonl").write_text("no json")
    assert not is_original(str(tmp_path / "c.jsonl"))
    assert not is_original("ioi") and not is_original(str(tmp_path))
    assert is_original(str(three_files(tmp_path, rows_of(6))))


def test_bad_rows_are_named(tmp_path):
    model, rows = tiny_model("llama"), rows_of()
    rows[2]["input_ids"][0] = VOCABULARY
    rows[4]["labels"][-1] = VOCABULARY + 7
    with pytest.raises(BadData, match=r"rows 3, 5: token ids of 96 and above\. The model has 96 tokens"):
        language_pairs(model, read_original(written(rows, tmp_path / "a.jsonl")), [SITE])
    rows = rows_of(variables=2)
    original = read_original(written(rows, tmp_path / "a.jsonl"))
    with pytest.raises(BadData, match=r"rows 2, 4, 6: intervention_ids other than 0"):
        language_pairs(model, original, [SITE], variables=["0"])


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("range", {"ranges": False}, r"position range: its rows name none\. Write token_range"),
        ("last", {}, r"position 'last': token ids have no names\. Use range, a column such as 12"),
        ("2", {}, r"position 2: most rows begin at column 2, rows 2, 4, 6 elsewhere"),
        ("7", {"ranges": False}, r"position 7: the rows have 7 tokens\. Use 0 to 6"),
        ("2:9", {"ranges": False}, r"position 2:9: the rows have 7 tokens"),
    ],
)
def test_positions_that_mean_nothing_are_refused(tmp_path, name, how, message):
    how = {"lengths": (7, 7) if name == "7" else (7, 9), **how}
    with pytest.raises(BadPosition, match=message):
        tokens_of(pairs_of(tmp_path, n=7 if name == "2" else 6, **how), [name])


def test_ranges_of_another_length_name_their_rows(tmp_path):
    rows = rows_of()
    rows[3] |= {"token_range": [1, 2], "source_token_range": [0, 1]}
    with pytest.raises(BadPosition, match=r"position range: 2 tokens in most rows, and another number in row 4"):
        tokens_of(read_original(written(rows, tmp_path / "a.jsonl")), ["range"])


def config_of(task, **values):
    known = {"layers": (1,), "rank": (2,), "methods": ("full_vector", "das"), "cache": None, **values}
    sources = dict.fromkeys(values, "flag")
    return replace(RunDas(task=str(task), **known), sources=sources)


def test_a_file_is_searched_from_end_to_end(tmp_path):
    model, rows = tiny_model("llama"), rows_of(30, variables=2)
    told = []
    problem = prepare_original(config_of(written(rows, tmp_path / "data.jsonl")), model, lambda *now: told.append(now))
    config = problem.config
    assert (config.variable, config.positions, config.n_train, config.n_test) == ("0+1", ("range",), 18, 6)
    assert problem.facts.task == "data" and problem.facts.accuracy == {"train": None, "select": None, "test": None}
    assert told and problem.lint["test"]["distinct bases"] == 6
    scorer = Scorer(
        model, problem.splits, problem.where, problem.facts, budget=Budget(3, 4), variables=2, others=problem.others
    )
    for method, rank in (("das", 2), ("full_vector", None), ("control:random_model", 2)):
        found = scorer.rows(Job(Cell(problem.sites[0], "range", method, rank), (0,)))
        assert [row.split for row in found] == ["select", "test"] and {row.n for row in found} == {6}
        assert found[0].copy_base == baselines_of(problem.splits["select"])["copy_base"]


def test_one_variable_of_several_is_searched_on_its_own_rows(tmp_path):
    rows = rows_of(30, variables=2)
    problem = prepare_original(
        config_of(written(rows, tmp_path / "data.jsonl"), variable="1"), tiny_model("llama"), lambda *now: None
    )
    assert sum(map(len, problem.splits.values())) == 15
    assert all(data.changed is None and not data.kinds for data in problem.splits.values())


def test_what_a_file_does_not_have_is_said(tmp_path):
    model, path = tiny_model("llama"), written(rows_of(30), tmp_path / "data.jsonl")
    for values, message in (
        ({"variable": "2"}, r"it has no variable '2'\. Use one of 0"),
        ({"n_train": 100}, r"n_train 100: its train split has 18 rows of variable 0\. Ask for fewer"),
        ({"positions": ("last",)}, r"it has no position 'last'\. Use one of range"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare_original(config_of(path, **values), model, lambda *now: None)
    bare = written(rows_of(30, ranges=False), tmp_path / "bare.jsonl")
    with pytest.raises(ConfigError, match=r"its rows have no token_range\. Name columns.*--positions 12"):
        prepare_original(config_of(bare), model, lambda *now: None)


def test_rows_are_written_and_read_again(tmp_path):
    original = pairs_of(tmp_path)
    again = read_original(write_original(original, tmp_path / "again.jsonl"))
    assert isinstance(again, OriginalPairs) and again.rows() == original.rows()
