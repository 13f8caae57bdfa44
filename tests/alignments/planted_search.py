"""The planted language model with prepared pairs and a scorer, for the tests of the circuit, screens and planner."""

from __future__ import annotations

from functools import cache

from alignments.fit import Budget
from alignments.pairs import LanguagePairs
from alignments.planted import LAYERS, planted_model, planted_sites
from alignments.scoring import Facts, Scorer
from alignments.search import Search, cells_of
from intervene import Site
from intervene.marked import Marked
from tasks.planted import Planted

SITES = [Site("block_output", layer) for layer in range(LAYERS)]
POSITIONS = ("start", "noise1", "first", "noise2", "second", "third", "noise3", "last")
RANKS = {"key": 3, "mark": 2, "content": 3}
TRIVIAL = 0.5  # copying the base


@cache
def model_of(seed=0):
    return planted_model(seed)


@cache
def data_of(variable, seed=0, sizes=(512, 96, 192)):
    model, tokenizer = model_of(seed)
    return {
        split: LanguagePairs(
            model, tokenizer, Planted().pairs(split, variable=variable, n=n), sites=SITES, positions=POSITIONS
        )
        for split, n in zip(("train", "select", "test"), sizes, strict=True)
    }


def scorer_of(variable, seed=0, steps=100, **more):
    data = data_of(variable, seed, **more)
    baselines = {split: {"copy_base": 0.5, "copy_source": 0.0, "majority": 0.12} for split in data}
    facts = Facts("planted", "planted", variable, baselines, dict.fromkeys(data, 1.0))
    return Scorer(model_of(seed)[0], data, Marked, facts, budget=Budget(steps=steps, batch_size=32, lr=0.05))


def search_of(variable, seed=0, *, ranks=None, methods=("das", "full_vector"), **more):
    cells = cells_of(SITES, POSITIONS, methods, ranks or RANKS[variable])
    return Search(scorer_of(variable, seed, **more), cells, seeds=(seed, seed + 10))


def planted_places(variable):
    return {(one.site, one.positions) for one in planted_sites(variable)}
