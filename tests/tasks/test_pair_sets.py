from __future__ import annotations

import dataclasses

import pytest

from tasks import (
    IOI,
    SPLITS,
    TASKS,
    BadData,
    PairSet,
    TaskError,
    UnknownName,
    baselines,
    check,
    distinguishes,
    inspect,
    leakage,
    task_named,
    token_span,
)
from tasks.base import fill, split_in_order
from tests.tasks.words import WordTokenizer


@pytest.fixture(params=sorted(TASKS))
def task(request):
    return task_named(request.param)


def test_a_pair_set_behaves_as_a_list(task):
    pairs = task.pairs("train", variable=task.variables[0], n=12)
    listed = list(pairs)
    assert len(pairs) == len(listed) == 12
    assert [pairs[i] for i in range(12)] == listed
    assert pairs[-1] == listed[11]
    assert list(reversed(pairs)) == listed[::-1]
    assert listed[3] in pairs
    assert pairs.index(listed[3]) == 3
    assert pairs.count(listed[3]) == 1
    with pytest.raises(IndexError):
        pairs[12]
    with pytest.raises(dataclasses.FrozenInstanceError):
        pairs.items = ()


def test_a_slice_is_a_pair_set_that_knows_where_it_came_from(task):
    pairs = task.pairs("select", variable=task.variables[0], n=12, seed=5)
    part = pairs[2:9:3]
    assert isinstance(part, PairSet)
    assert list(part) == list(pairs)[2:9:3]
    assert (part.task, part.split, part.variable, part.seed) == (task.name, "select", task.variables[0], 5)


def test_the_same_arguments_give_the_same_pairs_and_others_do_not(task):
    name = task.variables[0]
    pairs = task.pairs("train", variable=name, n=30, seed=1)
    assert pairs == task_named(task.name).pairs("train", variable=name, n=30, seed=1)
    assert list(pairs) != list(task.pairs("train", variable=name, n=30, seed=2))
    assert list(pairs) != list(task.pairs("test", variable=name, n=30, seed=1))
    assert task.examples("train", n=20, seed=1) == task.examples("train", n=20, seed=1)
    assert task.examples("train", n=20, seed=1) != task.examples("train", n=20, seed=2)


def test_more_pairs_only_add_to_fewer(task):
    few = task.pairs("train", variable=task.variables[0], n=7)
    many = task.pairs("train", variable=task.variables[0], n=40)
    assert list(many[:7]) == list(few)


def test_pairs_of_all_splits_pass_the_check_and_splits_share_nothing(task):
    assert leakage(task) == {}
    for split in SPLITS:
        for name in task.variables:
            report = check(task, task.pairs(split, variable=name, n=40))
            assert report.n == 40
            assert sum(report.labels.values()) == 40
            assert max(report.kinds.values()) - min(report.kinds.values()) <= 1


def test_a_drawn_set_never_repeats_a_pair(task):
    pairs = task.pairs("train", variable=task.variables[0], n=300)
    assert len({(pair.base.prompt, pair.source.prompt) for pair in pairs}) == 300


def test_a_wrong_label_is_caught(task):
    pairs = task.pairs("train", variable=task.variables[0], n=10)
    planted = list(pairs)
    planted[6] = dataclasses.replace(planted[6], label=" nobody")
    report = inspect(task, planted)
    assert len(report.problems) == 1
    assert report.problems[0] == f"pair 6: label ' nobody', and the causal model gives {pairs[6].label!r}. Use that."
    assert "WRONG: pair 6" in str(report)
    with pytest.raises(BadData, match=r"1 problems in 10 pairs\. First: pair 6: label ' nobody'"):
        check(task, planted)


def test_a_wrong_answer_prompt_or_span_is_caught(task):
    pair = task.pairs("train", variable=task.variables[0], n=1)[0]
    for change, text in (
        ({"answer": " nobody"}, "pair 0, base: answer ' nobody'"),
        ({"prompt": pair.base.prompt + " not"}, "pair 0, base: prompt"),
        ({"spans": {"last": (0, 1)}}, "pair 0, base: its spans"),
    ):
        broken = dataclasses.replace(pair, base=dataclasses.replace(pair.base, **change))
        with pytest.raises(BadData, match=text):
            check(task, [broken])


def test_entities_of_another_split_are_caught(task):
    pairs = task.pairs("test", variable=task.variables[0], n=4)
    check(task, list(pairs))  # a plain list says nothing of its split, so none is checked
    with pytest.raises(BadData, match=r"is not of split 'train'. Draw the pair from that split"):
        check(task, list(pairs), split="train")
    with pytest.raises(UnknownName, match=r"split 'trian'.*Did you mean train"):
        check(task, list(pairs), split="trian")


def test_a_setting_that_cannot_be_run_is_refused_by_number(task):
    pairs = list(task.pairs("train", variable=task.variables[0], n=3))
    pairs[1] = dataclasses.replace(pairs[1], base=dataclasses.replace(pairs[1].base, setting={}))
    with pytest.raises(BadData, match=r"pair 1: its setting cannot be run .* Remove the pair"):
        inspect(task, pairs)


def test_baselines_by_hand():
    shares = baselines(["a", "a", "b", "c"], {"first": ["a", "b", "b", "b"], "second": ["c", "c", "c", "c"]})
    assert shares == {"first": 0.5, "second": 0.25, "majority": 0.5}


def test_refusals_of_checks():
    task = IOI()
    with pytest.raises(BadData, match="there are no pairs"):
        check(task, [])
    with pytest.raises(BadData, match="there are no pairs"):
        distinguishes(task, [], "position", "token")
    with pytest.raises(BadData, match="'x': 1 answers for 2 labels"):
        baselines(["a", "b"], {"x": ["a"]})
    with pytest.raises(UnknownName, match=r"'positions'.*Did you mean position"):
        distinguishes(task, task.pairs("train", variable="position", n=2), "positions", "token")


def test_task_named_refuses_with_the_nearest_name():
    with pytest.raises(UnknownName, match=r"Task 'citys': there is none of that name\. Did you mean cities"):
        task_named("citys")


@pytest.mark.parametrize("n", [0, -3])
def test_sets_of_no_pairs_are_refused(task, n):
    with pytest.raises(TaskError, match=f"n={n}: at least one is needed"):
        task.pairs("train", variable=task.variables[0], n=n)
    with pytest.raises(TaskError, match=f"n={n}: at least one is needed"):
        task.examples("train", n=n)


def test_split_in_order_deals_round_and_round():
    assert split_in_order("abcdefg", {"train": 2, "select": 1}) == {
        "train": ("a", "b", "d", "e", "g"),
        "select": ("c", "f"),
    }


def test_fill_returns_the_text_and_where_each_field_went():
    assert fill("{a} and {b}.", {"a": "x", "b": "yz", "unused": 1}) == ("x and yz.", {"a": (0, 1), "b": (6, 8)})


def test_token_span_counts_special_tokens_and_covers_words_of_several():
    prompt = "The city of Paris"
    assert token_span(WordTokenizer(), prompt, (12, 17)) == (3,)
    assert token_span(WordTokenizer(special=True), prompt, (12, 17)) == (4,)
    assert token_span(WordTokenizer(split_up=("Paris",)), prompt, (12, 17)) == (3, 4)
    assert token_span(WordTokenizer(), prompt, (4, 11)) == (1, 2)


@pytest.mark.parametrize("span", [(3, 3), (-1, 2), (0, 99), (5, 4)])
def test_spans_outside_the_prompt_are_refused(span):
    with pytest.raises(BadData, match="Give a non-empty part of it"):
        token_span(WordTokenizer(), "The city", span)
