"""A task of your own. This file works as it is: run it with `--task <this file>`, then change it part by part.

The task here: two things are for two people, and the prompt asks whom one of them is for.

    The hat is for Mary and the cup is for John. The cup is for  ->  " John"
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from tasks import CausalModel

# What the answer is computed from, and how. Labels come from running this, never from you.
# Variables with a mechanism are computed from their parents; the others are inputs. "answer" continues the prompt.
causal_model = CausalModel(
    variables=("thing1", "name1", "thing2", "name2", "asked", "place", "name", "answer"),
    parents={
        "place": ("thing1", "thing2", "asked"),
        "name": ("place", "name1", "name2"),
        "answer": ("name",),
    },
    mechanisms={
        "place": lambda thing1, thing2, asked: 1 if asked == thing1 else 2,
        "name": lambda place, name1, name2: name1 if place == 1 else name2,
        "answer": lambda name: f" {name}",  # with its space: it is read on from the prompt
    },
)

# What a search may look for. Left out, it is everything computed but the answer.
variables = ("place", "name")

# What each split may use. No word may stand in two splits: what is found in training is tested on new ones.
entities = {
    "train": {
        "thing": ["hat", "cup", "box", "book", "ball", "car", "bag", "chair"],
        "name": ["Mary", "John", "Sarah", "Michael", "Linda", "James"],
    },
    "select": {
        "thing": ["door", "shirt", "coat", "pen"],
        "name": ["Susan", "Robert", "Anna", "Paul"],
    },
    "test": {
        "thing": ["boat", "house", "wall", "bike", "lamp", "table"],
        "name": ["Emma", "David", "Laura", "Peter", "Julia", "Henry"],
    },
}

# The prompt. Every {input} becomes a position of that name that a search can look at; so does the last word, "last".
# For more, write `def render(setting)` instead, which returns (prompt, answer, {name: (begin, end)}).
template = "The {thing1} is for {name1} and the {thing2} is for {name2}. The {asked} is for"

# Kinds of entities of which only words are kept that are one token for the model's tokenizer.
single_token = ("thing", "name")


def draw(rng: random.Random, split: str) -> Mapping[str, Any]:
    """Return one random input of the causal model, with words of `split` alone."""
    thing1, thing2 = rng.sample(entities[split]["thing"], 2)
    name1, name2 = rng.sample(entities[split]["name"], 2)
    return {
        "thing1": thing1,
        "name1": name1,
        "thing2": thing2,
        "name2": name2,
        "asked": rng.choice((thing1, thing2)),
    }
