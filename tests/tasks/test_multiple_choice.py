from __future__ import annotations

import json

import pytest

from tasks import (
    SPLITS,
    BadModel,
    MultipleChoice,
    NotEnough,
    TaskError,
    check,
    distinguishes,
    leakage,
    read_pairs,
    token_span,
    write_pairs,
)
from tasks.multiple_choice import COLORS, NOUNS
from tests.tasks.words import WordTokenizer


def setting(noun, color, choices, symbols):
    return {
        "noun": noun,
        "color": color,
        **{f"choice{i}": choice for i, choice in enumerate(choices.split(), start=1)},
        **{f"symbol{i}": symbol for i, symbol in enumerate(symbols, start=1)},
    }


HAT = setting("hat", "brown", "red brown", "KD")  # the second: D
BOX = setting("box", "red", "red blue", "PQ")  # the first: P
CUP = setting("cup", "blue", "blue red", "KD")  # the first: K


def test_the_prompt_and_its_spans():
    example = MultipleChoice(n_choices=2).render(HAT)
    assert example.prompt == "The hat is brown. What color is the hat?\nK. red\nD. brown\nAnswer:"
    assert example.answer == " D"
    assert {name: example.prompt[slice(*span)] for name, span in example.spans.items()} == {
        "noun": "hat",
        "color": "brown",
        "correct_symbol": "D",
        "correct_symbol_next": ".",
        "correct_choice": "brown",
        "last": ":",
    }
    assert example.spans["correct_symbol"][0] == example.prompt.index("\nD. ") + 1
    assert example.spans["correct_choice"][0] == example.prompt.rindex("brown")


@pytest.mark.parametrize(
    ("base", "source", "variable", "label"),
    [
        (HAT, BOX, "pointer", " K"),  # the base's letters, the source's first place
        (HAT, CUP, "pointer", " K"),
        (BOX, HAT, "pointer", " Q"),
        (CUP, BOX, "pointer", " K"),
        (HAT, BOX, "symbol", " P"),
        (HAT, CUP, "symbol", " K"),
    ],
)
def test_labels_by_hand(base, source, variable, label):
    assert MultipleChoice(n_choices=2).label(variable, base, source) == label


def test_kinds_and_trivial_answers_by_hand():
    task = MultipleChoice(n_choices=2)
    assert task.kind(task.pair("pointer", HAT, BOX)) == "both"
    assert task.kind(task.pair("pointer", HAT, CUP)) == "answerPosition"
    assert task.kind(task.pair("pointer", CUP, BOX)) == "randomLetter"
    assert task.trivial_answers(task.pair("pointer", HAT, BOX)) == {
        "copy_base": " D",
        "copy_source": " P",
        "first_choice": " K",
    }


@pytest.mark.parametrize("n_choices", [2, 3, 4, 6])
@pytest.mark.parametrize("split", SPLITS)
def test_baselines_of_drawn_sets_are_exact(n_choices, split):
    task = MultipleChoice(n_choices=n_choices)
    pairs = task.pairs(split, variable="pointer", n=150, seed=3)
    report = check(task, pairs)
    assert report.kinds == {"answerPosition": 50, "randomLetter": 50, "both": 50}
    assert report.baselines["copy_base"] == report.baselines["copy_source"] == report.informative == 1 / 3
    assert report.baselines["majority"] < 0.15
    assert abs(report.baselines["first_choice"] - 1 / n_choices) < 0.15
    for pair in pairs:  # read off the prompts, without the causal model
        letters, choices = zip(*(line.split(". ") for line in pair.source.prompt.split("\n")[1:-1]), strict=True)
        place = choices.index(pair.source.prompt.split(".")[0].split()[-1])
        assert pair.source.answer == f" {letters[place]}"
        assert pair.label == f" {pair.base.prompt.split(chr(10))[1 + place][0]}"


def test_each_kind_alone_is_solved_or_not_as_documented():
    task = MultipleChoice()
    found = {
        kind: check(task, task.pairs("train", variable="pointer", n=40, kind=kind)).baselines for kind in task.kinds
    }
    assert {kind: (shares["copy_base"], shares["copy_source"]) for kind, shares in found.items()} == {
        "answerPosition": (0, 1),
        "randomLetter": (1, 0),
        "both": (0, 0),
    }


def test_the_symbol_is_flagged_and_told_apart_from_the_pointer_where_letters_change():
    task = MultipleChoice()
    report = check(task, task.pairs("train", variable="symbol", n=60))
    assert report.baselines["copy_source"] == 1.0 and "copy_source" in report.warnings[0]
    pairs = task.pairs("test", variable="pointer", n=99)
    assert distinguishes(task, pairs, "pointer", "symbol") == 2 / 3


def test_splits_share_no_object_and_no_colour():
    task = MultipleChoice()
    assert leakage(task) == {}
    for kind, words in (("noun", NOUNS), ("color", COLORS)):
        assert len(set(words)) == len(words)
        assert frozenset().union(*(task.entities(split)[kind] for split in SPLITS)) == set(words)
    assert not set(NOUNS) & set(COLORS)
    assert min(len(task.words[split]["color"]) for split in SPLITS) == 6


def test_base_and_source_have_different_objects_and_no_prompt_repeats_a_letter():
    task = MultipleChoice()
    for pair in task.pairs("select", variable="pointer", n=60):
        assert pair.base.setting["noun"] != pair.source.setting["noun"]
        for example in (pair.base, pair.source):
            assert len({example.setting[f"symbol{place}"] for place in (1, 2, 3, 4)}) == 4


def test_the_same_arguments_give_the_same_pairs_and_files_keep_them(tmp_path):
    pairs = MultipleChoice().pairs("train", variable="pointer", n=30, seed=1)
    assert pairs == MultipleChoice().pairs("train", variable="pointer", n=30, seed=1)
    assert list(pairs) != list(MultipleChoice().pairs("train", variable="pointer", n=30, seed=2))
    path = write_pairs(pairs, tmp_path / "pairs.jsonl")
    assert read_pairs(path) == pairs
    assert json.loads(path.read_text().splitlines()[0])["task"] == "multiple_choice"


def test_for_tokenizer_drops_letters_that_are_several_tokens():
    class Tokenizer(WordTokenizer):
        def __call__(self, text, **options):
            read = super().__call__(text, **options)
            return {"input_ids": read["input_ids"] * 2} if text in (" B", " Z") else read

    assert MultipleChoice(n_choices=2).for_tokenizer(Tokenizer()).letters == tuple("ACDEFGHIJKLMNOPQRSTUVWXY")
    with pytest.raises(NotEnough, match=r"8 letters are needed, and 7 are one token .* a smaller number"):
        MultipleChoice(letters=tuple("ABCDEFGH")).for_tokenizer(Tokenizer())


def test_positions_can_be_marked():
    example = MultipleChoice(n_choices=2).render(HAT)
    assert all(token_span(WordTokenizer(), example.prompt, span) for span in example.spans.values())


def test_a_prefix_stands_before_the_prompt_and_moves_its_spans():
    example = MultipleChoice(n_choices=2, prefix="Choose.\n\n").render(HAT)
    assert example.prompt.startswith("Choose.\n\nThe hat is")
    assert example.prompt[slice(*example.spans["correct_choice"])] == "brown"
    assert "prefix" not in example.spans


@pytest.mark.parametrize("n", [1, 7])
def test_numbers_of_choices_out_of_range_are_refused(n):
    with pytest.raises(TaskError, match=f"n_choices={n}: two to 6 can be offered"):
        MultipleChoice(n_choices=n)


def test_refusals():
    with pytest.raises(BadModel, match="'green': it must be one of the choices red, brown, once"):
        MultipleChoice(n_choices=2).render({**HAT, "color": "green"})
    words = {split: {"noun": ("a", "b"), "color": ("red",)} for split in SPLITS}
    with pytest.raises(NotEnough, match="multiple_choice, train: 4 colors are needed, and there are 1"):
        MultipleChoice(words=words).pairs("train", variable="pointer", n=1)
    with pytest.raises(NotEnough, match="8 letters are needed, and there are 4"):
        MultipleChoice(letters=tuple("ABCD")).pairs("train", variable="pointer", n=1)
