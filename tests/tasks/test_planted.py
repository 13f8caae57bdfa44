from __future__ import annotations

from collections import Counter

import pytest

from tasks import SPLITS, NotEnough, check, leakage
from tasks.planted import CAUSAL_MODEL, Planted, vocabulary
from tests.tasks.words import WordTokenizer

NOISES = {"noise1": "x00", "noise2": "x01", "noise3": "x02"}


def setting(first, second, third):
    return {**NOISES, "first_word": first, "second_word": second, "third_word": third}


BASE = setting("a2p", "b3q", "c10p")  # key 1, content 1, mark 0: digit 2
SOURCE = setting("a3q", "b3p", "c22q")  # key 2, content 2, mark 2: digit 0


def test_a_prompt_by_hand():
    example = Planted().render(BASE)
    assert example.prompt == "go x00 a2p x01 b3q c10p x02 ="
    assert example.answer == " y20"
    assert {name: example.prompt[slice(*span)] for name, span in example.spans.items()} == {
        "start": "go",
        "noise1": "x00",
        "first": "a2p",
        "noise2": "x01",
        "second": "b3q",
        "third": "c10p",
        "noise3": "x02",
        "last": "=",
    }


@pytest.mark.parametrize(("variable", "label"), [("key", " y30"), ("mark", " y22"), ("content", " y30")])
def test_labels_by_hand(variable, label):
    """Key 2 + content 1 = 3 with the base's mark 0; digit 2 with mark 2; key 1 + content 2 = 3 with mark 0."""
    assert Planted().label(variable, BASE, SOURCE) == label


@pytest.mark.parametrize("variable", ["key", "mark", "content"])
@pytest.mark.parametrize("split", SPLITS)
def test_copying_the_base_is_right_on_half_and_copying_the_source_never(variable, split):
    task = Planted()
    report = check(task, task.pairs(split, variable=variable, n=300))
    assert report.baselines["copy_base"] == 0.5
    assert report.baselines["copy_source"] == 0.0
    assert report.baselines["majority"] < 0.15
    assert report.kinds == {"same": 150, "different": 150}
    assert report.informative == 0.5
    assert report.best_trivial == ("copy_base", 0.5)  # no rule of one variable of one side does better


def test_pairs_of_mark_never_agree_in_what_lives_beside_it():
    for pair in Planted().pairs("train", variable="mark", n=100):
        base, source = (CAUSAL_MODEL.run(example.setting) for example in (pair.base, pair.source))
        assert base["content"] != source["content"] and base["digit"] != source["digit"]


def test_no_word_is_in_two_splits_and_all_are_in_the_vocabulary():
    task = Planted()
    assert leakage(task) == {}
    used = {word for split in SPLITS for words in task.entities(split).values() for word in words}
    assert used < set(vocabulary())
    assert max(Counter(vocabulary()).values()) == 1


def test_a_tokenizer_that_does_not_know_the_words_is_refused():
    assert Planted().for_tokenizer(WordTokenizer()) == Planted()
    with pytest.raises(NotEnough, match=r"1 of its 134 words are no single token .* model planted"):
        Planted().for_tokenizer(WordTokenizer(split_up=("a2p",)))
