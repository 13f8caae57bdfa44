"""Answers that read one side alone: their shares by enumeration, and which of them a report tells."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest

from tasks import inspect
from tasks.base import Task
from tasks.checks import one_sided_rules
from tasks.price_tagging import REGIONS_OF, PriceTagging


def share(table, right):
    """The exact share of pairs on which `right(label, base region, source region)`, labels being half and half."""
    return sum(
        Fraction(1, 2 * len(pairs)) for label, pairs in table.items() for b, s in pairs if right(label == "yes", b, s)
    )


@pytest.mark.parametrize(
    "task",
    [PriceTagging(), PriceTagging(form="alpaca"), PriceTagging(form="alpaca", bracket=(5.49, 8.49))],
    ids=["short", "alpaca", "fixed"],
)
@pytest.mark.parametrize(("variable", "base_fails", "source_fails"), [("left", 3, 1), ("right", 1, 3)])
def test_one_side_alone_is_right_on_4_of_5_of_our_pairs_by_enumeration(task, variable, base_fails, source_fails):
    """All "yes" pairs pass both checks; of the five "no" pairs three fail each of them."""
    rng = random.Random(0)
    for b, s in itertools.product((1, 2, 3), repeat=2):
        pair = task.pair(variable, task.draw_in(rng, "train", b), task.draw_in(rng, "train", s))
        answers = {name: answer.strip() == "Yes" for name, answer in task.trivial_answers(pair).items()}
        assert answers == {
            "copy_base": b == 2,
            "copy_source": s == 2,
            "base_check": b != base_fails,
            "source_check": s != source_fails,
        }
    assert share(REGIONS_OF[variable], lambda yes, b, s: yes == (b != base_fails)) == Fraction(4, 5)
    assert share(REGIONS_OF[variable], lambda yes, b, s: yes == (s != source_fails)) == Fraction(4, 5)


@pytest.mark.parametrize("variable", ["left", "right"])
def test_no_rule_of_one_region_beats_its_check_by_enumeration(variable):
    """All eight maps from the region of one side to a label; prices say no more, being drawn by region alone."""
    for words in itertools.product((True, False), repeat=3):
        assert share(REGIONS_OF[variable], lambda yes, b, s, words=words: yes == words[b - 1]) <= Fraction(4, 5)
        assert share(REGIONS_OF[variable], lambda yes, b, s, words=words: yes == words[s - 1]) <= Fraction(4, 5)


@pytest.mark.parametrize(
    ("variable", "base", "source", "base_check", "source_check"),
    [  # the typical input is 5.00 in 2.50 to 7.50
        ("midpoint", (200, 500, 605), (300, 800, 5), "Yes", "Yes"),  # |605 - 500| <= 150; |500 - 550| <= 250
        ("midpoint", (200, 500, 305), (600, 950, 5), "No", "No"),  # |305 - 500| = 195; |500 - 775| = 275
        ("bracket", (200, 500, 605), (500, 900, 5), "Yes", "Yes"),  # 250 <= 605 <= 750; 500 <= 500 <= 900
        ("bracket", (200, 500, 205), (510, 900, 605), "No", "No"),
    ],
)
def test_one_side_alone_of_midpoint_and_bracket_by_hand(variable, base, source, base_check, source_check):
    task = PriceTagging(form="alpaca")
    answers = task.trivial_answers(task.pair(variable, task.setting(*base), task.setting(*source)))
    assert (answers["base_check"], answers["source_check"]) == (base_check, source_check)


@pytest.mark.parametrize(
    ("variable", "base_reads", "source_reads"), [("left", "right", "left"), ("right", "left", "right")]
)
def test_the_general_rules_find_the_checks_and_are_told_only_where_no_baseline_has_them(
    variable, base_reads, source_reads
):
    class Unnamed(PriceTagging):
        def trivial_answers(self, pair):
            return Task.trivial_answers(self, pair)

    pairs = PriceTagging().pairs("train", variable=variable, n=800)
    named, found = inspect(PriceTagging(), pairs).baselines, inspect(Unnamed(), pairs).baselines
    assert set(named) == {"copy_base", "copy_source", "base_check", "source_check", "majority"}
    assert found["best_base_rule"] == named["base_check"] and found["best_source_rule"] == named["source_check"]
    assert one_sided_rules(Unnamed(), pairs) == {
        "best_base_rule": (base_reads, named["base_check"]),
        "best_source_rule": (source_reads, named["source_check"]),
    }
    assert one_sided_rules(Unnamed(), pairs[:9]) == {}  # ten pairs for a value are too many to ask of these


def test_a_mixture_has_a_rule_for_each_of_its_variables():
    """Right of the base: 0.8 of the left pairs; of the right pairs 0.65 (yes above the bracket, else no)."""
    task = PriceTagging()
    pairs = task.pairs("train", variable="left+right", n=1500)
    report, rules = inspect(task, pairs), one_sided_rules(task, pairs)
    error = 3.5 * (0.8 * 0.2 / 1500) ** 0.5
    assert report.baselines["base_check"] == pytest.approx(0.8, abs=error)
    assert report.baselines["source_check"] == pytest.approx(0.8, abs=error)
    assert rules["best_base_rule"][1] == pytest.approx((0.8 + 0.65) / 2, abs=error)
