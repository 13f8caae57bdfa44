"""The cost promised: at most six tensor operations per static edit and site, one truncated forward per source."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from intervene import Add, AllTokens, At, Intervention, LastToken, Scale, Swap, Zero, collect_sources, intervene
from tests.intervene.by_hand import blocks_of, vector
from tests.tiny import tiny_batch, tiny_model

_SYNCHRONISING = {"_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero"}


class Operations(TorchDispatchMode):
    """Counts tensor operations by name; views and detaches are free."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def _counted(model, batch, plan):
    with torch.no_grad(), Operations() as operations, intervene(model, plan):
        model(**batch)  # leaving the block is counted too
    return operations.counts


def _per_site(edit, positions, padding="left"):
    """Return the operations that one more site costs: with all three blocks edited, less with two."""
    model = tiny_model("llama")
    batch = tiny_batch(model, padding)
    counts = [
        _counted(model, batch, [Intervention(f"L{layer}.block_output", edit, positions) for layer in range(n)])
        for n in (2, 3)
    ]
    return counts[1] - counts[0]


@pytest.mark.parametrize("positions", [AllTokens(), LastToken(), At(0, -1)], ids=["all", "last", "at"])
@pytest.mark.parametrize("edit", [Add(vector(1)), Zero(), Scale(2.0)], ids=["add", "zero", "scale"])
def test_a_static_edit_costs_at_most_six_operations(positions, edit):
    cost = _per_site(edit, positions)
    assert sum(cost.values()) <= 6, cost
    assert not cost.keys() & _SYNCHRONISING


def test_the_operations_are_these():
    assert dict(_per_site(Add(vector(1)), AllTokens())) == {
        "add": 1,
        "where": 1,
        "sub": 1,
        "linalg_vector_norm": 2,
        "count_nonzero": 1,
    }
    assert dict(_per_site(Add(vector(1)), LastToken())) == {"index": 1, "add": 1, "index_put": 1}


@pytest.mark.parametrize("n_sites", [1, 5])
def test_many_sources_cost_one_truncated_forward(n_sites):
    model, ran = tiny_model("llama"), []
    for number, block in enumerate(blocks_of(model)):
        block.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    sites = ["L1.block_output", "L0.mlp_output", "L1.head_output[1]", "L0.block_input", "L1.mlp_input"][:n_sites]
    plan = [Intervention(site, Swap(), LastToken()) for site in sites]
    plan.append(Intervention("L1.block_output", Swap(), At(0)))  # one site twice, on other tokens
    sources = collect_sources(model, plan, tiny_batch(model))
    assert len(sources) == n_sites + 1
    assert ran == [0, 1, 0, 1]  # the second forward is of the site that is named twice
    ran.clear()
    collect_sources(model, plan[:-1], tiny_batch(model))
    assert ran == [0, 1]
