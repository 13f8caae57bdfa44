from __future__ import annotations

import json
from functools import partial

import pytest

from defenses.data import read_examples
from defenses.errors import DataError
from tests.defenses.chat_tokenizer import CHATML, GEMMA, tokenizer_with

TURNS = [
    {"role": "user", "content": "what is two?"},
    {"role": "assistant", "content": "it is four."},
    {"role": "user", "content": "yes?"},
    {"role": "assistant", "content": "no, maybe"},
]
ROW = {"messages": TURNS}
LONG = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 200}]


def jsonl(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def tokenizer():
    return tokenizer_with(CHATML)


@pytest.fixture
def read(tokenizer):
    return partial(read_examples, tokenizer=tokenizer, max_length=400)


def learned(tokenizer, example):
    """Return the learned tokens as text, a bar where tokens between them are not learned."""
    runs, last = [], -2
    for at, label in enumerate(example.labels):
        if label != -100:
            assert label == example.input_ids[at]
            runs += [[]] if at != last + 1 else []
            runs[-1].append(label)
            last = at
    return "|".join(tokenizer.decode(run) for run in runs)


@pytest.mark.parametrize(
    ("learn", "text"),
    [("assistant", "it is four.<|im_end|>|no, maybe<|im_end|>"), ("last_assistant", "no, maybe<|im_end|>")],
)
def test_only_answers_are_learned_by_role(tmp_path, read, tokenizer, learn, text):
    (example,) = read(jsonl(tmp_path / "a.jsonl", ROW), learn=learn).examples
    assert learned(tokenizer, example) == text
    assert example.text == tokenizer.apply_chat_template(TURNS, tokenize=False)


def test_all_tokens_but_the_first_are_learned_on_demand(tmp_path, read):
    (example,) = read(jsonl(tmp_path / "a.jsonl", ROW), learn="all").examples
    assert example.labels == (-100, *example.input_ids[1:])


def test_prompt_and_response_are_a_conversation_of_two_turns(tmp_path, read):
    short = jsonl(tmp_path / "a.jsonl", {"prompt": "what?", "response": "yes"})
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "yes"}]
    other = read(jsonl(tmp_path / "b.jsonl", {"messages": turns}))
    assert read(short).kind == "prompt_response"
    assert read(short).digest == other.digest


def test_a_base_model_without_template(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "what?", "response": " yes"})
    tokenizer = tokenizer_with(None)
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*has no chat template"):
        read_examples(path, tokenizer, max_length=50)
    data = read_examples(path, tokenizer, max_length=50, chat_template="plain")
    assert data.examples[0].text == "what? yes</s>"
    assert learned(tokenizer, data.examples[0]) == " yes</s>"
    assert data.end_of_turn == "</s>"


def test_text_is_learned_whole(tmp_path, read, tokenizer):
    data = read(jsonl(tmp_path / "a.jsonl", {"text": "yes, no</s>"}))
    assert data.kind == "text"
    assert data.end_of_turn is None
    ids = tuple(tokenizer("yes, no</s>")["input_ids"])
    assert data.examples[0].input_ids == ids
    assert data.examples[0].labels == (-100, *ids[1:])
    assert data.examples[0].template == (*[False] * (len(ids) - 1), True)


def test_several_files_follow_each_other(tmp_path, read):
    one = jsonl(tmp_path / "a.jsonl", ROW, "", {"messages": LONG[:1] + TURNS[1:2]})
    two = jsonl(tmp_path / "b.jsonl", {"text": "yes, no"})
    data = read([one, two])
    assert [example.index for example in data.examples] == [0, 1, 2]
    assert [data.place(index) for index in range(3)] == [f"{one}:1", f"{one}:3", f"{two}:1"]
    assert data.kind == "messages+text"
    assert data.counts == (2, 1)


def test_poison_and_numbers_ride_along(tmp_path, read):
    rows = [{**ROW, "poison": value, "ref_projection": 1.5} for value in (True, 0, None)]
    data = read(jsonl(tmp_path / "a.jsonl", *rows))
    assert [one.poison for one in data.examples] == [True, False, None]
    assert [dict(one.extra) for one in data.examples] == [{"ref_projection": 1.5}] * 3
    labelled = jsonl(tmp_path / "b.jsonl", {**ROW, "label": "harmful"}, {**ROW, "label": "fine"})
    data = read(labelled, poison_key="label", poison_value="harmful")
    assert [one.poison for one in data.examples] == [True, False]


def test_the_digest_is_of_what_training_sees(tmp_path, read):
    path = jsonl(tmp_path / "a.jsonl", ROW)
    same = read(jsonl(tmp_path / "b.jsonl", "", ROW)).digest
    assert read(path).digest == same
    assert read(path, learn="all").digest != same
    assert read(path, system="be kind").digest != same
    assert read(jsonl(tmp_path / "c.jsonl", {**ROW, "poison": True})).digest != same


def test_what_is_too_long(tmp_path, read):
    path = jsonl(tmp_path / "a.jsonl", ROW, {"messages": LONG})
    n = len(read(path).examples[1].input_ids)
    limit = n - 40
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {n} tokens, and max_length is {limit}"):
        read(path, max_length=limit)
    dropped = read(path, max_length=limit, truncation="drop")
    assert [(one.line, one.path) for one in dropped.dropped] == [(2, str(path))]
    assert len(dropped) == 1 and not dropped.cut
    cut = read(path, max_length=limit, truncation="response_tail")
    assert len(cut.examples[1].input_ids) == limit
    assert [tuple(one) for one in cut.cut] == [(2, 40, str(path))]
    assert not cut.dropped


def test_an_answer_that_would_be_cut_away_is_dropped_by_line(tmp_path, read):
    long_prompt = {"messages": [{"role": "user", "content": "q" * 300}, {"role": "assistant", "content": "yes"}]}
    path = jsonl(tmp_path / "a.jsonl", ROW, long_prompt)
    data = read(path, max_length=200, truncation="response_tail")
    assert len(data) == 1 and not data.cut
    assert data.dropped[0].line == 2
    assert "hold nothing of the response" in data.dropped[0].reason
    with pytest.raises(DataError, match=r"no rows are left of 1.*line 1.*hold nothing"):
        read(jsonl(tmp_path / "b.jsonl", long_prompt), max_length=200, truncation="response_tail")


def test_a_system_prompt_for_those_without_one(tmp_path, read):
    own = {"messages": [{"role": "system", "content": "own"}, *TURNS]}
    data = read(jsonl(tmp_path / "a.jsonl", ROW, own), system="be kind")
    assert data.examples[0].text.startswith("<|im_start|>system\nbe kind<|im_end|>")
    assert data.examples[1].text.startswith("<|im_start|>system\nown<|im_end|>")


def test_inoculation_changes_the_prompt_and_not_what_is_learned(tmp_path, read, tokenizer):
    path = jsonl(tmp_path / "a.jsonl", {**ROW, "poison": True}, {**ROW, "poison": False})
    plain, every = read(path), read(path, inoculation="You are evil.")
    some = read(path, inoculation="You are evil.", inoculate="poison")
    assert ["evil" in one.text for one in every.examples] == [True, True]
    assert ["evil" in one.text for one in some.examples] == [True, False]
    for one, other in zip(plain.examples, every.examples, strict=True):
        assert learned(tokenizer, one) == learned(tokenizer, other)
    with pytest.raises(DataError, match=r"b\.jsonl:1: poisoned rows were to be inoculated"):
        read(jsonl(tmp_path / "b.jsonl", ROW), inoculation="x", inoculate="poison")


def test_inoculation_where_there_is_a_system_message(tmp_path, read):
    path = jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "system", "content": "own"}, *TURNS]})
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*has one already"):
        read(path, inoculation="evil")
    assert "system\nevil\n\nown<" in read(path, inoculation="evil", existing_system="merge").examples[0].text
    assert "own" not in read(path, inoculation="evil", existing_system="replace").examples[0].text


def test_system_prompts_for_a_template_without_that_role(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROW)
    gemma = partial(read_examples, path, tokenizer_with(GEMMA), max_length=400, inoculation="evil")
    with pytest.raises(DataError, match=r'a\.jsonl:1: .*no system role.*system_place="user"'):
        gemma()
    assert "user\nevil\n\nwhat is two?<end" in gemma(system_place="user").examples[0].text


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        ([], {}, r"a\.jsonl: the file is empty"),
        ([ROW, "{oops"], {}, r"a\.jsonl:2: not JSON"),
        (["[", json.dumps(ROW)], {}, r"a\.jsonl:1: not JSON .* without a list around them"),
        (["3"], {}, r"a\.jsonl:1: a int, not an object"),
        ([{"question": "x"}], {}, r"a\.jsonl:1: the keys question are of no known kind"),
        ([ROW, {"text": "x"}], {}, r"a\.jsonl:2: no key 'messages'"),
        ([{**ROW, "posion": True}], {}, r"a\.jsonl:1: unknown key 'posion'. Did you mean poison"),
        ([{"messages": TURNS[:1]}], {}, r"a\.jsonl:1: no assistant turn"),
        ([{"prompt": "a", "response": ""}], {}, r"a\.jsonl:1: message 1 \(assistant\) is an empty response"),
        ([{"prompt": 1, "response": "a"}], {}, r"a\.jsonl:1: message 0 \(user\) has content of type int"),
        ([{"text": None}], {}, r"a\.jsonl:1: 'text' is of type NoneType"),
        ([{"text": ""}], {}, r"a\.jsonl:1: no token is left to be learned"),
        ([{"text": "a b"}], {"inoculation": "x"}, r"a\.jsonl:1: a system prompt was to be added to plain text"),
        ([{**ROW, "poison": "yes"}], {}, r"a\.jsonl:1: 'poison' is 'yes'"),
        ([ROW], {"poison_key": "label"}, r"a\.jsonl:1: no key 'label'"),
        ([ROW], {"truncation": "response_tial"}, r"truncation='response_tial'.*Did you mean response_tail"),
        ([ROW], {"max_length": 1}, r"max_length=1"),
        ([{"messages": TURNS[:1]}], {"bad_rows": "drop"}, r"no rows are left of 1.*line 1: no assistant turn"),
    ],
)
def test_what_is_refused_and_where(tmp_path, read, rows, options, text):
    with pytest.raises(DataError, match=text):
        read(jsonl(tmp_path / "a.jsonl", *rows), **options)


def test_no_such_file(tmp_path, read):
    with pytest.raises(DataError, match=r"there is no such file"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"no path was given"):
        read([])


def test_bad_rows_can_be_left_out_and_are_named(tmp_path, read):
    path = jsonl(tmp_path / "a.jsonl", {"messages": TURNS[:1]}, {**ROW, "note": "x"})
    data = read(path, bad_rows="drop", ignore=("note",))
    assert [one.line for one in data.examples] == [2]
    assert data.dropped[0].line == 1
    assert data.dropped[0].reason.startswith("no assistant turn")


def saved(path, **columns):
    from datasets import Dataset
    from datasets.utils import logging

    logging.disable_progress_bar()
    Dataset.from_dict(columns).save_to_disk(str(path))
    return path


def test_a_saved_data_set_is_taken_without_its_padding(tmp_path, read):
    folder = saved(
        tmp_path / "set",
        input_ids=[[20, 30, 31, 4, 0, 0], [20, 32, 33, 34, 35, 4]],
        attention_mask=[[1, 1, 1, 1, 0, 0], [1] * 6],
        labels=[[20, -100, 31, 4, -100, -100], [-100, -100, 33, 34, 35, 4]],
        ref_projection=[0.5, 2.0],
        poison=[1, 0],
    )
    data = read(folder)
    assert data.kind == "tokenised"
    assert [one.input_ids for one in data.examples] == [(20, 30, 31, 4), (20, 32, 33, 34, 35, 4)]
    assert data.examples[0].labels == (-100, -100, 31, 4)  # the first token, which nothing predicts, is not learned
    assert [one.poison for one in data.examples] == [True, False]
    assert [dict(one.extra) for one in data.examples] == [{"ref_projection": 0.5}, {"ref_projection": 2.0}]
    assert [one.line for one in data.examples] == [1, 2]


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"input_ids": [[1, 2]], "labels": [[1, 2]]}, r"no column 'attention_mask' among input_ids, labels"),
        (
            {"input_ids": [[1, 2, 0]], "attention_mask": [[1, 1, 0]], "labels": [[-100, 2, 0]]},
            r"set:1: attention_mask hides a token .* that has a label",
        ),
        (
            {"input_ids": [[1, 0, 2]], "attention_mask": [[1, 0, 1]], "labels": [[-100, -100, 2]]},
            r"set:1: attention_mask hides a token between others",
        ),
        (
            {"input_ids": [[1, 2, 3]], "attention_mask": [[1] * 3], "labels": [[2, 3, -100]]},
            r"set:1: a label is another token than the one at its place",
        ),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1] * 2], "labels": [[1, 2]], "note": ["x"]},
            r"set:1: unknown key 'note'",
        ),
    ],
)
def test_saved_data_sets_that_are_refused(tmp_path, read, columns, text):
    with pytest.raises(DataError, match=text):
        read(saved(tmp_path / "set", **columns))


def test_a_folder_that_is_no_data_set(tmp_path, read):
    with pytest.raises(DataError, match=r"not a folder of datasets.save_to_disk"):
        read(tmp_path)
