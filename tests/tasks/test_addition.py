from __future__ import annotations

import itertools
import re

import pytest

from tasks import SPLITS, Addition, BadData, BadModel, UnknownName, check, distinguishes, leakage, token_span
from tests.tasks.words import WordTokenizer


class DigitTokenizer(WordTokenizer):
    """One token per word with its space, but a space before a number, and each digit, alone: as SmolLM2 reads them."""

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        spans = [found.span() for found in re.finditer(r"\d| (?=\d)| $| ?[^ ,:\d]+|[,:]", text)]
        ids = [self.ids.setdefault(text[a:b], len(self.ids)) for a, b in spans]
        return {"input_ids": ids, **({"offset_mapping": spans} if return_offsets_mapping else {})}


class PlaceholderTokenizer(WordTokenizer):
    """Marks the start of every text by a token of its own, so that all answers begin alike."""

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        return {"input_ids": [0, *super().__call__(f"_ {text}")["input_ids"]]}


def numbers(op1, op2):
    return {"op1": op1, "op2": op2}


@pytest.mark.parametrize(
    ("form", "base", "prompt", "answer"),
    [
        ("whole", (27, 45), "Q: How much is 27 plus 45? A:", " 72"),
        ("whole", (99, 99), "Q: How much is 99 plus 99? A:", " 198"),
        ("tens", (27, 45), "Q: How much is 27 plus 45? A: ", "7"),
        ("tens", (87, 45), "Q: How much is 87 plus 45? A: 1", "3"),
        ("ones", (27, 45), "Q: How much is 27 plus 45? A: 7", "2"),
        ("ones", (87, 45), "Q: How much is 87 plus 45? A: 13", "2"),
    ],
)
def test_prompts_and_answers_by_hand(form, base, prompt, answer):
    example = Addition(form=form).render(numbers(*base))
    assert (example.prompt, example.answer) == (prompt, answer)
    said = {name: example.prompt[slice(*span)] for name, span in example.spans.items()}
    assert said == {
        "op1": str(base[0]),
        "op1_tens": str(base[0])[0],
        "op1_ones": str(base[0])[1],
        "plus": "plus",
        "op2": "45" if base[1] == 45 else "99",
        "op2_tens": str(base[1])[0],
        "op2_ones": str(base[1])[1],
        "last": prompt[-1],
    }


@pytest.mark.parametrize(
    ("form", "base", "source", "variable", "label"),
    [
        ("whole", (27, 45), (31, 12), "ones_carry", " 62"),  # 72 without its carry
        ("whole", (21, 45), (38, 14), "ones_carry", " 76"),  # 66 with one
        ("whole", (27, 45), (38, 24), "ones_carry", " 72"),
        ("whole", (51, 45), (38, 14), "ones_carry", " 106"),  # 9 and a carry make a hundred
        ("whole", (27, 45), (11, 12), "tens_sum", " 32"),  # 1 + 1 and the base's own carry
        ("whole", (27, 45), (91, 93), "tens_out", " 82"),
        ("whole", (27, 45), (13, 15), "ones_out", " 78"),
        ("tens", (27, 45), (31, 12), "ones_carry", "6"),
        ("tens", (27, 45), (31, 12), "tens_sum", "5"),
        ("tens", (27, 45), (31, 12), "tens_out", "4"),
        ("ones", (27, 45), (31, 12), "ones_out", "3"),
    ],
)
def test_labels_by_hand(form, base, source, variable, label):
    assert Addition(form=form).label(variable, numbers(*base), numbers(*source)) == label


def test_the_model_adds_as_python_does():
    task = Addition(form="whole")
    for op1, op2 in itertools.product(range(10, 100, 7), range(10, 100)):
        values = task.causal_model.run(numbers(op1, op2))
        assert values["answer"] == f" {op1 + op2}"
        assert values["ones_carry"] == (str(op1 + op2)[-1] < str(op1)[-1])


@pytest.mark.parametrize("form", ["whole", "tens"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_carrys_baselines_are_exact(form, split):
    task = Addition(form=form)
    pairs = task.pairs(split, variable="ones_carry", n=200, seed=3)
    report = check(task, pairs)
    assert report.kinds == {"same": 100, "different": 100}
    assert report.baselines["copy_base"] == report.baselines["flip"] == 0.5
    assert report.baselines["copy_source"] == 0.0
    assert report.informative == 0.5
    for pair in pairs:  # without the causal model: the sum of the base, ten more or less
        base, source = (example.setting for example in (pair.base, pair.source))
        carries = [str(one["op1"] + one["op2"])[-1] < str(one["op1"])[-1] for one in (base, source)]
        total = base["op1"] + base["op2"] + 10 * (carries[1] - carries[0])
        assert pair.label == (f" {total}" if form == "whole" else str(total)[-2])


def test_in_form_tens_the_prompts_hundreds_hold_for_the_counterfactual_too():
    task = Addition(form="tens")
    for variable in task.variables:
        for pair in task.pairs("train", variable=variable, n=100):
            given = [example.prompt.rpartition("A: ")[2] for example in (pair.base, pair.source)]
            assert given in (["", ""], ["1", "1"])
            held = task.causal_model.interchange(pair.base.setting, {variable: pair.source.setting})
            if variable != "tens_out":
                assert str(held["hundreds_out"] or "") == given[0]


def test_an_answer_that_is_the_digit_itself_is_flagged():
    report = check(Addition(form="tens"), Addition(form="tens").pairs("train", variable="tens_out", n=40))
    assert report.baselines["copy_source"] == 1.0 and "copy_source is right on 100%" in report.warnings[0]


def test_the_carry_is_told_apart_from_the_digits():
    task = Addition(form="tens")
    pairs = task.pairs("test", variable="ones_carry", n=100)
    assert distinguishes(task, pairs, "ones_carry", "tens_out") == 1.0
    assert distinguishes(task, pairs, "ones_carry", "tens_sum") > 0.8


def test_splits_share_no_operands_in_either_order():
    task = Addition()
    assert leakage(task) == {}
    everything = [frozenset(pair) for split in SPLITS for pair in task.operands[split]]
    assert len(everything) == len(set(everything)) == 90 * 91 // 2
    orders = {
        pair.base.setting["op1"] < pair.base.setting["op2"] for pair in task.pairs("train", variable="ones_out", n=50)
    }
    assert orders == {True, False}


@pytest.mark.parametrize("form", ["whole", "tens", "ones"])
def test_the_same_arguments_give_the_same_pairs(form):
    variable = Addition(form=form).variables[0]
    pairs = Addition(form=form).pairs("train", variable=variable, n=40, seed=1)
    assert pairs == Addition(form=form).pairs("train", variable=variable, n=40, seed=1)
    assert list(pairs) != list(Addition(form=form).pairs("train", variable=variable, n=40, seed=2))


def test_for_tokenizer_takes_whole_sums_where_each_is_a_token():
    task = Addition().for_tokenizer(WordTokenizer())
    assert (task.form, task.space_in_answer) == ("whole", True)
    assert task.variables == ("ones_carry", "tens_sum", "tens_out", "ones_out")


def test_for_tokenizer_takes_one_digit_where_digits_are_tokens():
    tokenizer = DigitTokenizer()
    task = Addition().for_tokenizer(tokenizer)
    assert task.form == "tens" and task.variables == ("ones_carry", "tens_sum", "tens_out")
    example = task.render(numbers(27, 45))
    assert len(tokenizer(example.answer)["input_ids"]) == 1
    assert (
        token_span(tokenizer, example.prompt, example.spans["op1_ones"])[0]
        == (token_span(tokenizer, example.prompt, example.spans["op1"])[-1])
    )
    assert Addition(form="ones").for_tokenizer(tokenizer).form == "ones"


def test_for_tokenizer_refuses_what_it_cannot_score():
    with pytest.raises(BadData, match=r"form 'whole' needs answers whose first tokens differ .* 3 tokens in ' 72'"):
        Addition(form="whole").for_tokenizer(DigitTokenizer())
    with pytest.raises(BadData, match=r"form 'tens' needs .* 1 tokens in ' 72'"):
        Addition(form="tens").for_tokenizer(WordTokenizer())  # the model would go on with " 72", not with "7"
    with pytest.raises(BadData, match=r"addition: it needs answers .* or use another model"):
        Addition().for_tokenizer(PlaceholderTokenizer())


def test_refusals():
    with pytest.raises(UnknownName, match=r"addition form 'ten'.*Did you mean tens"):
        Addition(form="ten")
    with pytest.raises(BadModel, match="tens digits of 27 and 75 add up to 9"):
        Addition(form="tens").render(numbers(27, 75))
    with pytest.raises(BadModel, match="'op1': 5 is outside its domain"):
        Addition().render(numbers(5, 75))
    with pytest.raises(UnknownName, match=r"addition variable 'ones_carry'.*Did you mean ones_out"):
        Addition(form="ones").pairs("train", variable="ones_carry", n=2)


def test_a_prefix_stands_before_the_prompt_and_moves_its_spans():
    example = Addition(form="tens", prefix="Add up.\n").render(numbers(27, 45))
    assert example.prompt == "Add up.\nQ: How much is 27 plus 45? A: "
    assert example.prompt[slice(*example.spans["op2"])] == "45"


@pytest.mark.slow
def test_the_default_models_tokenizer_is_scored_by_one_digit(smollm):
    _, tokenizer = smollm
    task = Addition().for_tokenizer(tokenizer)
    assert task.form == "tens"
    for example in task.examples("train", n=20):
        assert len(tokenizer(example.answer, add_special_tokens=False)["input_ids"]) == 1
