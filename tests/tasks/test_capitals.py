from __future__ import annotations

import itertools

import pytest

from tasks import SPLITS, BadModel, NotEnough, check, cities, countries, leakage
from tasks.capitals import Attributes
from tasks.facts import CITIES, COUNTRIES
from tests.tasks.words import WordTokenizer


def ask(entity, asked):
    return {"entity": entity, "asked": asked, "template": 0}


@pytest.mark.parametrize(
    ("base", "source", "variable", "label"),
    [
        (ask("Lyon", "country"), ask("Osaka", "continent"), "country", " Japan"),
        (ask("Lyon", "continent"), ask("Osaka", "country"), "country", " Europe"),
        (ask("Lyon", "language"), ask("Osaka", "language"), "language", " Japanese"),
        (ask("Lyon", "country"), ask("Osaka", "country"), "language", " France"),
        (ask("Lyon", "continent"), ask("Cairo", "continent"), "continent", " Africa"),
    ],
)
def test_labels_by_hand(base, source, variable, label):
    assert cities().label(variable, base, source) == label


def test_prompts_and_spans():
    example = countries().render(ask("Norway", "capital"))
    assert example.answer == " Oslo"
    assert example.prompt[slice(*example.spans["entity"])] == "Norway"
    assert example.prompt[slice(*example.spans["last"])] == example.prompt.split()[-1]


@pytest.mark.parametrize("make", [cities, countries])
def test_baselines_are_as_documented(make):
    task = make()
    for split, variable in itertools.product(SPLITS, task.variables):
        report = check(task, task.pairs(split, variable=variable, n=300))
        assert report.kinds == {"cause": 150, "isolate": 150}
        assert report.baselines["copy_base"] == 0.5
        assert 1 / 6 - 0.09 < report.baselines["copy_source"] < 1 / 6 + 0.09
        # A cause pair is informative unless the source's prompt asks for the target too; an isolate pair never is.
        assert report.informative == pytest.approx(0.5 - report.baselines["copy_source"])


@pytest.mark.parametrize("make", [cities, countries])
def test_cause_takes_the_sources_value_and_isolate_keeps_the_bases(make):
    task = make()
    facts = {entity: values for rows in task.table.values() for entity, values in rows.items()}
    for variable in task.variables:
        for pair in task.pairs("train", variable=variable, n=60, seed=2):
            base, source = facts[pair.base.setting["entity"]], facts[pair.source.setting["entity"]]
            assert all(base[name] != source[name] for name in task.variables)
            if task.kind(pair) == "cause":
                assert pair.label == f" {source[variable]}"
            else:
                assert pair.label == f" {base[pair.base.setting['asked']]}" == pair.base.answer


def test_no_entity_and_no_country_is_in_two_splits():
    assert leakage(cities()) == {}
    assert leakage(countries()) == {}
    everything = [city for rows in cities().table.values() for city in rows]
    assert len(everything) == len(set(everything)) == sum(map(len, CITIES.values()))
    for split in SPLITS:
        assert countries().entities(split)["country"] <= cities().entities(split)["country"]


def test_the_tables_fit_together():
    assert set(CITIES) == set(COUNTRIES)
    assert {continent for _, continent, _ in COUNTRIES.values()} == {
        "Europe",
        "Asia",
        "Africa",
        "South America",
        "North America",
    }
    for country, (capital, _, _) in COUNTRIES.items():
        others = {city for other, names in CITIES.items() if other != country for city in names}
        assert capital not in others
        # Tripoli is a city of Lebanon too; Mexico City says its country.
        assert capital in CITIES[country] or country in ("Libya", "Mexico")


def test_no_prompt_gives_its_own_answer_away_unless_it_is_a_language():
    for task in (cities(), countries()):
        for split in SPLITS:
            for entity, values in task.table[split].items():
                for name in set(task.variables) - {"language"}:
                    assert values[name] not in task.render(ask(entity, name)).prompt


def test_every_split_has_every_continent():
    for split in SPLITS:
        assert len({values["continent"] for values in countries().table[split].values()}) == 5


def table(**rows):
    return {split: {f"{name}{split}": dict(values) for name, values in rows.items()} for split in SPLITS}


def small(**rows):
    return Attributes("t", "thing", table(**rows), {"k": ("The {entity} is",), "l": ("A {entity} has",)})


def test_for_tokenizer_keeps_only_answers_that_differ_in_their_first_token():
    task = small(
        a={"k": "South Korea", "l": "x"},
        b={"k": "South Africa", "l": "y"},
        c={"k": "South Korea", "l": "y"},
        d={"k": "Japan", "l": "xx"},
    )
    kept = task.for_tokenizer(WordTokenizer())
    # " South" is Korea's, which two entities have; so b goes.
    assert {split: set(rows) for split, rows in kept.table.items()} == {
        split: {f"{name}{split}" for name in "acd"} for split in SPLITS
    }
    # Now "x" begins as "xx" is spelt: "xx" becomes two tokens, " x" and "x".
    again = task.for_tokenizer(WordTokenizer(split_up=("xx",)))
    assert set(again.table["train"]) == {"atrain", "ctrain"}


def test_for_tokenizer_refuses_when_nothing_can_be_told_apart():
    task = small(a={"k": "South Korea", "l": "x"}, b={"k": "South Africa", "l": "y"})
    with pytest.raises(NotEnough, match="t, train: 1 entities have answers that this tokenizer tells apart"):
        task.for_tokenizer(WordTokenizer())


def test_entities_without_a_counterpart_are_refused():
    task = small(a={"k": "1", "l": "x"}, b={"k": "2", "l": "x"})
    with pytest.raises(NotEnough, match=r"no entity differs from .* in all of k, l"):
        task.pairs("train", variable="k", n=2)


def test_an_unknown_entity_or_question_is_refused():
    with pytest.raises(BadModel, match="city 'Atlantis': it is not in the table"):
        cities().causal_model.run(ask("Atlantis", "country"))
    with pytest.raises(BadModel, match="'asked': 'mayor' is outside its domain"):
        cities().causal_model.run(ask("Paris", "mayor"))
