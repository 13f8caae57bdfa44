"""Recall of attributes, in RAVEL's manner: cities (country, continent, language), countries (capital, continent, ...).

    task = cities().for_tokenizer(tokenizer)
    pairs = task.pairs("train", variable="country", n=1000)          # half cause, half isolate

Each attribute is a variable of its own, computed from the entity. A pair aims at one of them:

cause:   the base's prompt asks for the target attribute. Label: the source's value. The edit must reach the answer.
isolate: the base's prompt asks for another attribute. Label: the base's own value. The edit must leave it alone.

Base and source differ in every attribute, so copying the base is right on exactly the isolate half, and copying the
source only where its prompt, which asks for any attribute with equal chance, happens to ask for the target of a cause
pair: 1/6 of the pairs on average. The entity stands before the question, so what its tokens carry cannot depend on it.

Source: RAVEL, Huang et al. 2024 (arXiv 2402.17700): cause, isolate and their mean, "disentangle". We differ: entities
are split by country, so that no country of the test split was ever an answer in training; prompts give no examples.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tasks.base import SPLITS, Example, Pair, Task, fill, split_in_order
from tasks.causal_model import CausalModel
from tasks.errors import BadModel, NotEnough
from tasks.facts import CITIES, COUNTRIES
from tasks.tokens import Tokenizer, token_ids

# split -> entity -> attribute -> value
Table = Mapping[str, Mapping[str, Mapping[str, str]]]

# The same templates in every split: what is held out is the entity. Of several wordings, those that SmolLM2-135M
# answers best on the training split.
CITY_TEMPLATES: dict[str, tuple[str, ...]] = {
    "country": ("The city of {entity} is in the country of",),
    "continent": ("The city of {entity} is on the continent of",),
    "language": ("In the city of {entity}, the official language is",),
}
COUNTRY_TEMPLATES: dict[str, tuple[str, ...]] = {
    "capital": ("In the country of {entity}, the capital is the city of",),
    "continent": ("The country of {entity} is on the continent of",),
    "language": ("In the country of {entity}, the official language is",),
}
_SHARES = {"train": 2, "select": 1, "test": 2}


@dataclass(frozen=True)
class Attributes(Task):
    """A table of entities with attributes and templates that ask for one; `cities()` and `countries()` make the two.

    `table` is split -> entity -> attribute -> value; `templates` is attribute -> prompts with the field {entity}.
    """

    name: str
    noun: str
    table: Table
    templates: Mapping[str, tuple[str, ...]]
    causal_model: CausalModel = field(init=False, compare=False)
    variables: tuple[str, ...] = field(init=False)

    kinds = ("cause", "isolate")

    def __post_init__(self) -> None:
        """Build the causal model of this table."""
        object.__setattr__(self, "variables", tuple(self.templates))
        object.__setattr__(self, "causal_model", _causal_model(self.noun, self.table, self.variables))

    def entities(self, split: str) -> Mapping[str, frozenset[str]]:
        """Return the cities or countries of `split`; attribute values that name a country count as entities too."""
        found = {self.noun: frozenset(self.table[split])}
        if "country" in self.variables:
            found["country"] = frozenset(values["country"] for values in self.table[split].values())
        return found

    def entities_in(self, example: Example) -> Mapping[str, frozenset[str]]:
        """Return the city or country of `example`."""
        return {self.noun: frozenset({str(example.setting["entity"])})}

    def render(self, setting: Mapping[str, Any]) -> Example:
        """Return the prompt with the spans entity (all its characters) and last (the last word)."""
        prompt, spans = fill(self.templates[setting["asked"]][setting["template"]], setting)
        spans["last"] = (prompt.rindex(" ") + 1, len(prompt))
        return Example(prompt, self.causal_model.run(setting)["answer"], dict(setting), spans)

    def kind(self, pair: Pair) -> str:
        """Return "cause" if the base's prompt asks for the pair's variable, else "isolate"."""
        return "cause" if pair.base.setting["asked"] == pair.variable else "isolate"

    def for_tokenizer(self, tokenizer: Tokenizer) -> Attributes:
        """Return this task with only entities whose every answer is told apart by its first token.

        Where two values of an attribute begin with the same token, the one that more entities have stays (on a tie, the
        one listed first). Score the first token of the answer.

        Raises:
            NotEnough: a split is left with fewer than two entities.
        """
        kept_values = {name: self._told_apart(tokenizer, name) for name in self.variables}
        table = {
            split: {
                entity: values
                for entity, values in rows.items()
                if all(values[name] in kept for name, kept in kept_values.items())
            }
            for split, rows in self.table.items()
        }
        for split, rows in table.items():
            if len(rows) < 2:
                raise NotEnough(
                    f"{self.name}, {split}: {len(rows)} entities have answers that this tokenizer tells apart by their "
                    "first token, and two are needed. Give a table whose answers begin differently."
                )
        return Attributes(self.name, self.noun, table, self.templates)

    def draw_setting(self, rng: random.Random, split: str) -> dict[str, Any]:
        """Return a random entity of `split` with a random question."""
        return self._ask(rng, rng.choice(tuple(self.table[split])), rng.choice(self.variables))

    def draw_settings(
        self, rng: random.Random, split: str, variable: str, kind: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return base and source inputs of two entities that differ in every attribute.

        Raises:
            NotEnough: the base's entity has no such counterpart in `split`.
        """
        rows = self.table[split]
        entity = rng.choice(tuple(rows))
        others = [e for e, values in rows.items() if all(values[a] != rows[entity][a] for a in self.variables)]
        if not others:
            raise NotEnough(
                f"{self.name}, {split}: no entity differs from {entity!r} in all of {', '.join(self.variables)}. "
                "Give a table with more variety."
            )
        asked = variable if kind == "cause" else rng.choice([name for name in self.variables if name != variable])
        return self._ask(rng, entity, asked), self._ask(rng, rng.choice(others), rng.choice(self.variables))

    def _ask(self, rng: random.Random, entity: str, asked: str) -> dict[str, Any]:
        return {"entity": entity, "asked": asked, "template": rng.randrange(len(self.templates[asked]))}

    def _told_apart(self, tokenizer: Tokenizer, attribute: str) -> frozenset[str]:
        counts = Counter(values[attribute] for rows in self.table.values() for values in rows.values())
        owner: dict[int, str] = {}
        for value, _ in counts.most_common():
            owner.setdefault(token_ids(tokenizer, f" {value}")[0], value)
        return frozenset(owner.values())


def _causal_model(noun: str, table: Table, attributes: tuple[str, ...]) -> CausalModel:
    facts = {entity: values for rows in table.values() for entity, values in rows.items()}

    def recall(attribute: str) -> Any:
        def value(entity: str) -> str:
            if entity not in facts:
                raise BadModel(f"{noun} {entity!r}: it is not in the table. Use one of its {len(facts)} entries.")
            return facts[entity][attribute]

        return value

    return CausalModel(
        variables=("entity", "asked", "template", *attributes, "answer"),
        parents={**{name: ("entity",) for name in attributes}, "answer": ("asked", *attributes)},
        mechanisms={
            **{name: recall(name) for name in attributes},
            "answer": lambda asked, *values: f" {values[attributes.index(asked)]}",
        },
        domains={"asked": attributes},
    )


def cities() -> Attributes:
    """Return the task "cities": country, continent and language of a city. Cities of one country share a split."""
    table = {
        split: {
            city: {"country": country, "continent": COUNTRIES[country][1], "language": COUNTRIES[country][2]}
            for country in countries_of_split
            for city in CITIES[country]
        }
        for split, countries_of_split in _country_splits().items()
    }
    return Attributes("cities", "city", table, CITY_TEMPLATES)


def countries() -> Attributes:
    """Return the task "countries": capital, continent and language of a country.

    Countries whose capital holds their name or the reverse (Mexico, Tunisia) are left out: copying the prompt would
    answer them. A language is often written in the country's name (Germany): of the three it says least about recall.
    """
    table = {
        split: {
            country: dict(zip(("capital", "continent", "language"), COUNTRIES[country], strict=True))
            for country in countries_of_split
            if COUNTRIES[country][0] not in country and country not in COUNTRIES[country][0]
        }
        for split, countries_of_split in _country_splits().items()
    }
    return Attributes("countries", "country", table, COUNTRY_TEMPLATES)


def _country_splits() -> dict[str, tuple[str, ...]]:
    parts = split_in_order(tuple(COUNTRIES), _SHARES)
    return {split: parts[split] for split in SPLITS}
