from __future__ import annotations

import itertools

import pytest

from tasks import BadModel, CausalModel, UnknownName


def price_tag(domains=None):
    """Is the price z within [low, high]? (alignment-search literature's price tagging, in whole numbers)"""
    return CausalModel(
        variables=("low", "high", "price", "above", "below", "answer"),
        parents={"above": ("low", "price"), "below": ("price", "high"), "answer": ("above", "below")},
        mechanisms={
            "above": lambda low, price: low <= price,
            "below": lambda price, high: price <= high,
            "answer": lambda above, below: "Yes" if above and below else "No",
        },
        domains=domains,
    )


def test_run_gives_every_variable_in_the_order_of_its_declaration():
    setting = price_tag().run({"price": 5, "low": 2, "high": 4})
    assert list(setting.items()) == [
        ("low", 2),
        ("high", 4),
        ("price", 5),
        ("above", True),
        ("below", False),
        ("answer", "No"),
    ]


@pytest.mark.parametrize(
    ("base", "source", "variable", "answer"),
    [
        ((2, 4, 1), (2, 4, 3), "above", "Yes"),  # below the bracket, told it is above its low end
        ((2, 4, 3), (2, 4, 1), "above", "No"),
        ((2, 4, 3), (2, 4, 9), "above", "Yes"),  # above in the source too: nothing changes
        ((2, 4, 3), (2, 4, 9), "below", "No"),
        ((2, 4, 9), (2, 4, 3), "below", "Yes"),
        ((2, 4, 9), (2, 4, 3), "above", "No"),
        ((2, 4, 3), (5, 9, 7), "price", "No"),  # the source's price 7 in the base's bracket
        ((2, 4, 9), (5, 9, 7), "answer", "Yes"),
    ],
)
def test_interchange_by_hand(base, source, variable, answer):
    names = ("low", "high", "price")
    model = price_tag()
    result = model.interchange(dict(zip(names, base, strict=True)), {variable: dict(zip(names, source, strict=True))})
    assert result["answer"] == answer


def test_region_pairs_that_the_published_sampler_labels_no_are_yes():
    """Base inside the bracket, source above it: the source too is above the low end, so the base's answer stays."""
    model = price_tag()
    base, source = {"low": 2, "high": 4, "price": 3}, {"low": 2, "high": 4, "price": 9}
    assert model.interchange(base, {"above": source})["answer"] == "Yes"


def test_two_variables_take_their_values_from_two_sources():
    model = price_tag()
    inputs = [{"low": 2, "high": 4, "price": price} for price in (1, 3, 9)]
    for base, one, two in itertools.product(inputs, repeat=3):
        result = model.interchange(base, {"above": one, "below": two})
        assert result["answer"] == ("Yes" if one["price"] >= 2 and two["price"] <= 4 else "No")
        assert result["price"] == base["price"]


def test_interchange_with_oneself_changes_nothing():
    model = price_tag()
    inputs = {"low": 2, "high": 4, "price": 3}
    for name in model.variables:
        assert model.interchange(inputs, {name: inputs}) == model.run(inputs)


def test_intervening_recomputes_what_is_downstream_and_keeps_the_rest():
    model = price_tag()
    held = model.intervene({"low": 2, "high": 4, "price": 3}, {"below": False})
    assert held["answer"] == "No"
    moved = model.intervene(held, {"low": 7})  # above becomes False; below is not downstream and stays held
    assert (moved["above"], moved["below"]) == (False, False)
    freed = model.intervene(held, {"high": 5})  # below is downstream of high: computed anew
    assert (freed["below"], freed["answer"]) == (True, "Yes")


def test_descendants():
    model = price_tag()
    assert model.descendants(["price"]) == {"above", "below", "answer"}
    assert model.descendants(["above"]) == {"answer"}
    assert model.descendants(["answer"]) == frozenset()


def test_order_of_declaration_does_not_matter():
    model = CausalModel(("c", "b", "a"), {"c": ("b",), "b": ("a",)}, {"c": lambda b: b + 1, "b": lambda a: a * 10})
    assert model.run({"a": 3}) == {"c": 31, "b": 30, "a": 3}
    assert model.inputs == ("a",)


def test_a_cycle_is_refused_and_shown():
    with pytest.raises(BadModel, match=r"a <- c <- b <- a is a cycle\. Remove one of these parents"):
        CausalModel(
            ("a", "b", "c"),
            {"a": ("c",), "b": ("a",), "c": ("b",)},
            dict.fromkeys("abc", lambda value: value),
        )


def test_a_variable_that_is_its_own_parent_is_a_cycle():
    with pytest.raises(BadModel, match="a <- a is a cycle"):
        CausalModel(("a",), {"a": ("a",)}, {"a": lambda a: a})


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: CausalModel(("a", "a"), {}, {}), BadModel, "a stands more than once"),
        (lambda: CausalModel(("a", "b"), {"b": ("a",)}, {}), BadModel, "'b': it has parents but no mechanism"),
        (lambda: CausalModel(("above",), {"above": ("abve",)}, {}), UnknownName, "'abve'.*Did you mean above"),
        (lambda: CausalModel(("a",), {}, {"zzz": lambda: 1}), UnknownName, "'zzz'.*Known: a"),
        (lambda: price_tag().run({"low": 1, "high": 2}), BadModel, "input 'price' has no value"),
        (lambda: price_tag().run({"lo": 1}), UnknownName, "'lo'.*Did you mean.*low"),
        (lambda: price_tag().run({"above": True}), BadModel, "'above' is computed, not an input. Use intervene"),
        (lambda: price_tag().interchange({}, {"abov": {}}), UnknownName, "Did you mean above"),
        (lambda: price_tag().intervene({}, {"blow": 1}), UnknownName, "Did you mean below"),
    ],
)
def test_refusals(build, error, text):
    with pytest.raises(error, match=text):
        build()


def test_domains_are_checked_on_inputs_mechanisms_and_interventions():
    model = price_tag(domains={"low": range(5), "answer": ("Yes",), "below": (True, False)})
    with pytest.raises(BadModel, match="'low': 7 is outside its domain"):
        model.run({"low": 7, "high": 9, "price": 8})
    with pytest.raises(BadModel, match=r"'answer': 'No' is outside its domain. Use one of 'Yes'"):
        model.run({"low": 1, "high": 3, "price": 8})
    with pytest.raises(BadModel, match=r"'below': 'maybe' is outside its domain. Use one of True, False"):
        model.intervene({"low": 1, "high": 3, "price": 2}, {"below": "maybe"})
