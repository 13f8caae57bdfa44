from __future__ import annotations

import itertools
import random
import re
from fractions import Fraction

import pytest

from tasks import (
    SPLITS,
    NotEnough,
    TaskError,
    UnknownName,
    check,
    distinguishes,
    inspect,
    leakage,
    read_pairs,
    token_span,
    write_pairs,
)
from tasks.price_tagging import CAUSAL_MODEL, ORIGINAL_REGIONS, REGIONS_OF, PriceTagging, original_pairs
from tests.tasks.words import WordTokenizer

ALPACA_TEXT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Please say yes only if it costs between 1.25 and 4.75 dollars, otherwise no.

### Input:
3.05 dollars

### Response:
"""
VARIABLES = ("left", "right", "midpoint", "bracket")
FIXED = {"short": (5.45, 8.45), "alpaca": (5.49, 8.49)}
# cents: below, inside and above a bracket, which bracket does not matter
BELOW, INSIDE, ABOVE = (200, 500, 105), (200, 500, 305), (200, 500, 605)


def named(task, example):
    return {name: example.prompt[slice(*span)] for name, span in example.spans.items()}


def prices(pair):
    return [[example.setting[name] for name in ("lower", "upper", "amount")] for example in (pair.base, pair.source)]


def formula(variable, base, source):
    """The paper's four models, each by its own equation; prices in cents."""
    (xb, yb, zb), (xs, ys, zs) = base, source
    return {
        "left": xs <= zs and zb <= yb,
        "right": xb <= zb and zs <= ys,
        "midpoint": abs(2 * zb - (xs + ys)) <= yb - xb,
        "bracket": xs <= zb <= ys,
    }[variable]


def test_the_short_prompt():
    task = PriceTagging()
    example = task.render(task.setting(125, 475, 305))
    assert (example.prompt, example.answer) == ("1.25 4.75 3.05 =", " Yes")
    assert named(task, example) == {"lower": "1.25", "upper": "4.75", "amount": "3.05", "last": "="}
    tokens = {name: token_span(WordTokenizer(), example.prompt, span) for name, span in example.spans.items()}
    assert tokens == {"lower": (0,), "upper": (1,), "amount": (2,), "last": (3,)}


def test_the_alpaca_prompt_is_that_of_the_paper():
    task = PriceTagging(form="alpaca")
    example = task.render(task.setting(125, 475, 305))
    assert (example.prompt, example.answer) == (ALPACA_TEXT, "Yes")
    assert named(task, example) == {
        "lower": "1.25",
        "upper": "4.75",
        "amount": "3.05",
        "dollars": "dollars",
        "response": "Response",
        "colon": ":",
        "last": "\n",
    }


def test_the_alpaca_prompt_ends_in_the_thirteen_tokens_that_the_paper_numbers():
    """LLaMA's tokens 69 to 81, of 82: a digit or a line break is one each, and "###" is two."""
    tail = ALPACA_TEXT.partition("### Input:")[2]
    pieces = re.findall(r"\n| ?[a-zA-Z]+|##|#|[\d.:]", tail)
    assert "".join(pieces) == tail
    number = dict(zip(range(69, 82), pieces, strict=True))
    assert number[69] == number[75] == number[76] == number[81] == "\n"
    assert [number[i] for i in (70, 71, 72, 73)] == ["3", ".", "0", "5"]
    assert [number[i] for i in (74, 77, 78, 79, 80)] == [" dollars", "##", "#", " Response", ":"]


@pytest.mark.parametrize(
    ("amount", "answer"), [(115, " No"), (125, " Yes"), (305, " Yes"), (475, " Yes"), (485, " No"), (5, " No")]
)
def test_both_bounds_are_inside(amount, answer):
    task = PriceTagging()
    assert task.render(task.setting(125, 475, amount)).answer == answer


@pytest.mark.parametrize(
    ("variable", "base", "source", "label"),
    [
        ("left", BELOW, ABOVE, " Yes"),  # P becomes true, Q of the base is
        ("left", INSIDE, ABOVE, " Yes"),  # the pair that the released sampler calls "No"
        ("left", ABOVE, INSIDE, " No"),
        ("right", INSIDE, BELOW, " Yes"),  # its mirror image
        ("right", BELOW, INSIDE, " No"),
        ("midpoint", (200, 500, 605), (500, 900, 5), " Yes"),  # |605 - 700| <= 150
        ("midpoint", (200, 500, 545), (500, 900, 5), " No"),  # |545 - 700| = 155 > 150
        ("midpoint", (200, 500, 305), (500, 900, 705), " No"),
        ("bracket", (200, 500, 605), (500, 900, 5), " Yes"),
        ("bracket", (200, 500, 895), (500, 900, 5), " Yes"),  # inside 5.00 to 9.00, too far from 7.00 for "midpoint"
        ("bracket", (200, 500, 305), (500, 900, 705), " No"),
    ],
)
def test_labels_by_hand(variable, base, source, label):
    task = PriceTagging()
    assert task.label(variable, task.setting(*base), task.setting(*source)) == label


@pytest.mark.parametrize("variable", VARIABLES)
def test_the_one_causal_model_gives_the_four_of_the_paper(variable):
    task, rng = PriceTagging(form="alpaca"), random.Random(0)
    for _ in range(1500):
        base, source = ((*sorted(rng.sample(range(1, 1000), 2)), rng.randrange(1, 1000)) for _ in range(2))
        expected = "Yes" if formula(variable, base, source) else "No"
        assert task.label(variable, task.setting(*base), task.setting(*source)) == expected


def test_left_and_right_of_two_sources_at_once():
    task = PriceTagging()
    below, inside, above = (task.setting(*one) for one in (BELOW, INSIDE, ABOVE))
    for base in (below, inside, above):
        assert CAUSAL_MODEL.interchange(base, {"left": above, "right": below})["answer"] == " Yes"
        assert CAUSAL_MODEL.interchange(base, {"left": above, "right": above})["answer"] == " No"


def test_the_regions_of_each_label():
    assert {name: {label: set(pairs) for label, pairs in table.items()} for name, table in REGIONS_OF.items()} == {
        "left": {"yes": {(1, 2), (1, 3), (2, 2), (2, 3)}, "no": {(1, 1), (2, 1), (3, 1), (3, 2), (3, 3)}},
        "right": {"yes": {(3, 2), (3, 1), (2, 2), (2, 1)}, "no": {(3, 3), (2, 3), (1, 3), (1, 2), (1, 1)}},
    }


def share(table, right):
    """The exact share of pairs on which `right(label, base region, source region)`, labels being half and half."""
    return sum(
        Fraction(1, 2 * len(pairs)) for label, pairs in table.items() for b, s in pairs if right(label == "yes", b, s)
    )


@pytest.mark.parametrize("variable", ["left", "right"])
def test_copying_is_right_on_13_of_20_of_our_pairs_by_enumeration(variable):
    assert share(REGIONS_OF[variable], lambda yes, b, s: yes == (b == 2)) == Fraction(13, 20)
    assert share(REGIONS_OF[variable], lambda yes, b, s: yes == (s == 2)) == Fraction(13, 20)


@pytest.mark.parametrize(("variable", "wrong"), [("left", (2, 3)), ("right", (2, 1))])
def test_a_perfect_aligner_scores_11_of_12_on_the_original_pairs_by_enumeration(variable, wrong):
    def truth(b, s):
        return (s != 1 and b != 3) if variable == "left" else (b != 1 and s != 3)

    table = ORIGINAL_REGIONS[variable]
    assert sorted(itertools.chain(*table.values())) == sorted(itertools.product((1, 2, 3), repeat=2))
    assert [(b, s) for label, pairs in table.items() for b, s in pairs if truth(b, s) != (label == "yes")] == [wrong]
    assert share(table, lambda yes, b, s: yes == truth(b, s)) == Fraction(11, 12)
    assert share(table, lambda yes, b, s: yes == (s == 2)) == Fraction(3, 4)
    assert share(table, lambda yes, b, s: yes == (b == 2)) == Fraction(1, 2)


@pytest.mark.parametrize(
    ("form", "variable", "n"),
    [
        ("short", "left", 1500),
        ("short", "right", 1500),
        ("alpaca", "left+right", 1500),
        pytest.param("short", "left", 30_000, marks=pytest.mark.slow),
        pytest.param("alpaca", "right", 30_000, marks=pytest.mark.slow),
    ],
)
def test_drawn_pairs_have_the_enumerated_baselines(form, variable, n):
    task = PriceTagging(form=form)
    report = check(task, task.pairs("train", variable=variable, n=n))
    error = 3.5 * (0.65 * 0.35 / n) ** 0.5
    assert report.kinds == {"yes": n / 2, "no": n / 2}
    assert report.baselines["majority"] == 0.5
    assert report.baselines["copy_base"] == pytest.approx(0.65, abs=error)
    assert report.baselines["copy_source"] == pytest.approx(0.65, abs=error)
    assert report.baselines["base_check"] == pytest.approx(0.80, abs=error)
    assert report.baselines["source_check"] == pytest.approx(0.80, abs=error)
    assert report.best_trivial[0] in ("base_check", "source_check")


@pytest.mark.parametrize(
    ("variable", "n"),
    [("left", 1500), ("right", 1500), ("left+right", 500), pytest.param("left", 30_000, marks=pytest.mark.slow)],
)
def test_the_lint_names_the_wrong_pairs_of_the_original_sampler(variable, n):
    task = PriceTagging(form="alpaca")
    pairs = original_pairs(task, variable, n=n)
    report = inspect(task, pairs)
    wrong = [
        index
        for index, pair in enumerate(pairs)
        if (pair.label == "Yes") != formula(pair.variable, *prices(pair))  # by the paper's equation, not our model
    ]
    assert [int(line.split()[1].rstrip(":")) for line in report.problems] == wrong
    assert report.problems[0] == f"pair {wrong[0]}: label 'No', and the causal model gives 'Yes'. Use that."
    for found, expected in (
        (1 - len(wrong) / n, 11 / 12),
        (report.baselines["copy_source"], 0.75),
        (report.baselines["copy_base"], 0.50),
    ):
        assert found == pytest.approx(expected, abs=3.5 * (expected * (1 - expected) / n) ** 0.5)


@pytest.mark.parametrize(
    ("variable", "copy_base", "copy_source", "yes"), [("midpoint", 0.68, 0.50, 0.493), ("bracket", 0.64, 0.54, 0.501)]
)
def test_the_original_pairs_of_the_control_variables(variable, copy_base, copy_source, yes):
    """Against 200,000 pairs of the released sampler, counted apart from this code."""
    task = PriceTagging(form="alpaca")
    report = inspect(task, original_pairs(task, variable, n=1500))
    assert report.problems == ()
    assert report.baselines["copy_base"] == pytest.approx(copy_base, abs=0.045)  # 3.5 standard errors
    assert report.baselines["copy_source"] == pytest.approx(copy_source, abs=0.045)
    assert report.labels["Yes"] / report.n == pytest.approx(yes, abs=0.045)


def test_original_pairs_refuse_what_they_do_not_have():
    with pytest.raises(UnknownName, match=r"variable 'centre': there is none\. Use one of left, right"):
        original_pairs(PriceTagging(), "left+centre", n=2)
    with pytest.raises(UnknownName, match=r"split 'tset'.*Did you mean test"):
        original_pairs(PriceTagging(), "left", split="tset", n=2)
    with pytest.raises(TaskError, match="n=0: at least one pair"):
        original_pairs(PriceTagging(), "left", n=0)


@pytest.mark.parametrize("form", ["short", "alpaca"])
@pytest.mark.parametrize("variable", VARIABLES)
def test_pairs_of_every_split_are_sound_and_half_of_each_label(form, variable):
    task = PriceTagging(form=form)
    for split in SPLITS:
        report = check(task, task.pairs(split, variable=variable, n=100))
        assert report.kinds == {"yes": 50, "no": 50}
        assert set(report.labels.values()) == {50}
    only = task.pairs("train", variable=variable, n=20, kind="no")
    assert {pair.label.strip() for pair in only} == {"No"}


@pytest.mark.parametrize("form", ["short", "alpaca"])
def test_no_bracket_is_in_two_splits_and_train_has_three_fifths(form):
    task = PriceTagging(form=form)
    assert leakage(task) == {}
    sizes = {split: len(task.entities(split)["bracket"]) for split in SPLITS}
    total = {"short": 51 * 48, "alpaca": 501 * 491}[form]  # widths x mean number of places
    assert sum(sizes.values()) == total
    for split, part in (("train", 0.6), ("select", 0.2), ("test", 0.2)):
        assert sizes[split] / total == pytest.approx(part, abs=0.03)


def test_a_set_tells_the_causal_models_apart():
    task = PriceTagging()
    for a, b in itertools.combinations(VARIABLES, 2):
        assert distinguishes(task, task.pairs("train", variable=a, n=400), a, b) > 0.1


def test_a_mixture_says_of_each_pair_which_variable_it_is():
    task = PriceTagging()
    pairs = task.pairs("train", variable="left+right", n=400, seed=4)
    count = sum(pair.variable == "left" for pair in pairs)
    assert {pair.variable for pair in pairs} == {"left", "right"}
    assert 160 < count < 240
    assert pairs.variable == "left+right"
    assert all((pair.label == " Yes") == formula(pair.variable, *prices(pair)) for pair in pairs)
    assert list(task.pairs("train", variable="left+right", n=37, seed=4)) == list(pairs[:37])
    assert list(task.pairs("train", variable="left+right", n=37, seed=5)) != list(pairs[:37])
    three = task.pairs("select", variable="left+midpoint+bracket", n=90)
    assert {pair.variable for pair in three} == {"left", "midpoint", "bracket"}
    assert len(task.pairs("train", variable="left+right", n=1, kind="no")) == 1


def test_a_mixture_refuses_unknown_parts_and_kinds():
    with pytest.raises(UnknownName, match=r"variable 'rihgt'.*Did you mean right"):
        PriceTagging().pairs("train", variable="left+rihgt", n=4)
    with pytest.raises(UnknownName, match="kind 'maybe'"):
        PriceTagging().pairs("train", variable="left+right", n=4, kind="maybe")
    with pytest.raises(TaskError, match="n=0"):
        PriceTagging().pairs("train", variable="left+right", n=0)


@pytest.mark.parametrize("form", ["short", "alpaca"])
def test_a_fixed_bracket_holds_out_amounts(form):
    task = PriceTagging(form=form, bracket=FIXED[form])
    assert task.variables == ("left", "right")
    assert leakage(task) == {}
    for split in SPLITS:
        pairs = task.pairs(split, variable="left", n=60)
        report = check(task, pairs)
        assert report.kinds == {"yes": 30, "no": 30}
        bounds = {(lower, upper) for pair in pairs for lower, upper, _ in prices(pair)}
        assert bounds == {tuple(round(100 * price) for price in FIXED[form])}


def test_the_bracket_of_the_paper_carries_over_to_another():
    for bracket in ((5.49, 8.49), (2.51, 5.51)):
        task = PriceTagging(form="alpaca", bracket=bracket)
        assert f"between {bracket[0]:.2f} and {bracket[1]:.2f} dollars" in task.examples("test", n=1)[0].prompt


def test_brackets_that_cannot_be_written_are_refused():
    with pytest.raises(TaskError, match=r"Price 5\.49: form 'short' does not write it\. Use 5\.45"):
        PriceTagging(bracket=(5.49, 8.49))
    with pytest.raises(TaskError, match="no amount is below, inside and above it"):
        PriceTagging(bracket=(8.45, 5.45))
    with pytest.raises(TaskError, match="no amount is below"):
        PriceTagging(form="alpaca", bracket=(0.01, 5.0))
    with pytest.raises(NotEnough, match=r"owns no amount in region 1 of 0\.15-3\.15"):
        PriceTagging(bracket=(0.15, 3.15)).pairs("select", variable="left", n=20)


def test_irrelevant_context_and_other_words():
    task = PriceTagging(form="alpaca", words=("True", "False"), context="Frogs like rain.")
    example = task.render(task.setting(125, 475, 905))
    assert example.answer == "False"
    asked = "Frogs like rain. Please say true only if it costs between 1.25 and 4.75 dollars, otherwise false."
    assert f"### Instruction:\n{asked}\n\n" in example.prompt
    assert named(task, example)["lower"] == "1.25"
    check(task, task.pairs("train", variable="bracket", n=20))
    short = PriceTagging(context="so then")
    assert short.render(short.setting(125, 475, 305)).prompt == "so then 1.25 4.75 3.05 ="
    with pytest.raises(TaskError, match="both answers are 'Yes'"):
        PriceTagging(words=("Yes", "Yes"))
    with pytest.raises(UnknownName, match=r"form 'shrt'.*Did you mean short"):
        PriceTagging(form="shrt")


def test_texts_are_every_prompt_of_the_split_with_its_answer():
    task = PriceTagging()
    texts = dict(task.texts("select"))
    assert len(texts) == 100 * len(task.entities("select")["bracket"])
    for prompt, answer in random.Random(0).sample(sorted(texts.items()), 300):
        lower, upper, amount = (float(word) for word in prompt.split()[:3])
        assert answer == (" Yes" if lower <= amount <= upper else " No")
        assert f"{lower:.2f}-{upper:.2f}" in task.entities("select")["bracket"]
    assert all(texts[example.prompt] == example.answer for example in task.examples("select", n=200))
    fixed = PriceTagging(bracket=FIXED["short"])
    assert len(list(fixed.texts("test"))) == len(fixed.entities("test")["amount"])
    with pytest.raises(TaskError, match="too many prompts to list"):
        next(PriceTagging(form="alpaca").texts("train"))


def test_about_half_of_the_examples_are_inside():
    examples = PriceTagging(form="alpaca").examples("train", n=2000)
    assert sum(example.answer == "Yes" for example in examples) / 2000 == pytest.approx(0.503, abs=0.04)


def test_answers_that_one_token_does_not_tell_apart_are_refused():
    task = PriceTagging(words=("Ja", "Jein"))
    assert task.for_tokenizer(WordTokenizer()) is task
    with pytest.raises(NotEnough, match=r"answers ' Ja' and ' Jein' begin with the same token"):
        task.for_tokenizer(WordTokenizer(split_up=("Ja", "Jein")))


def test_pairs_survive_a_file(tmp_path):
    task = PriceTagging(form="alpaca")
    pairs = task.pairs("test", variable="left", n=10)
    write_pairs(pairs, tmp_path / "pairs.jsonl")
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs
