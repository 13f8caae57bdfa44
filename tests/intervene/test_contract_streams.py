"""Clauses 5 and 8: nothing is written through an alias; the order of blocks and of plans."""

from __future__ import annotations

import pytest
import torch

from intervene import (
    Add,
    AllTokens,
    At,
    Coordinates,
    Intervention,
    LastToken,
    Project,
    Scale,
    Set,
    StopGradient,
    Subspace,
    Swap,
    Zero,
    capture,
    collect_sources,
    intervene,
)
from intervene.families import components_of, locate
from intervene.sites import LAYERLESS
from tests.intervene.by_hand import blocks_of, close, vector
from tests.tiny import TINY, tiny_batch, tiny_model

SITE = "L1.block_output"
READS = ["attention_input", "mlp_input"]


@pytest.mark.parametrize("family", ["olmo2", "llama", "gpt2", "gpt_neox", "falcon", "gemma3_text"])
@pytest.mark.parametrize("component", READS)
@pytest.mark.parametrize("positions", [AllTokens(), LastToken()], ids=["all", "last"])
@pytest.mark.parametrize("edit", [Zero(), Set(torch.ones(32)), Add(vector(1))], ids=["zero", "set", "add"])
@torch.no_grad()
def test_editing_what_a_module_reads_leaves_the_residual_stream(family, component, positions, edit):
    """In OLMo 2 a sub-layer reads the residual stream itself, so writing in place would change both."""
    model = tiny_model(family)
    batch = tiny_batch(model, "left")
    sublayer = "attention" if component == "attention_input" else "mlp"
    sites = ["L1.block_input", "L1.attention_write", "L1.mlp_write", "L1.block_output"]
    with intervene(model, [Intervention(f"L1.{component}", edit, positions)]), capture(model, sites) as acts:
        model(**batch)
    with capture(model, sites) as plain:
        model(**batch)
    close(acts["L1.block_input"], plain["L1.block_input"])
    whole = acts["L1.block_input"] + acts["L1.attention_write"] + acts["L1.mlp_write"]
    close(acts["L1.block_output"], whole)
    changed = acts[f"L1.{sublayer}_write"] - plain[f"L1.{sublayer}_write"]
    assert float(changed[:, -1].abs().max()) > 1e-4


@pytest.mark.parametrize("family", ["falcon", "falcon_new_decoder", "falcon_sequential", "bloom", "phi", "mixtral"])
@torch.no_grad()
def test_captured_tensors_survive_what_the_model_does_in_place(family):
    model, kept = tiny_model(family), {}
    batch = tiny_batch(model)
    place = locate(model)
    sites = [f"L1.{name}" for name in components_of(place.family) if name not in LAYERLESS]
    with capture(model, sites) as acts:
        model(**batch)
        for site in sites:
            kept[site] = acts[site].clone()
    for site in sites:  # one at a time, each forward stopped before anything can write into it
        with capture(model, site, stop_after_last=True) as alone:
            model(**batch)
        close(acts[site], alone[site])
        close(kept[site], alone[site])


@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize(
    "edit", [Scale(1.0), StopGradient(), Set(torch.full((32,), 0.1)), Zero()], ids=["scale", "stop", "set", "zero"]
)
@torch.no_grad()
def test_every_family_takes_edits_that_return_views(family, edit):
    """A model may add to an edited tensor in place, which an expanded one does not allow."""
    model = tiny_model(family)
    batch = tiny_batch(model)
    sites = ["L1.mlp_output", "L1.attention_output", "L1.block_output", "L1.mlp_write", "L0.attention_write"]
    expected = model(**batch).logits
    for site in sites:
        with intervene(model, [Intervention(site, edit)]), capture(model, site) as acts:
            found = model(**{"input_ids": batch["input_ids"]}).logits  # no mask: the edit's own tensor goes on
        if isinstance(edit, (Scale, StopGradient)):
            close(found, expected)
        else:
            close(acts[site], edit.vector.expand(2, 7, 32) if isinstance(edit, Set) else torch.zeros(2, 7, 32))


@torch.no_grad()
def test_sources_and_inputs_are_not_written_to():
    model = tiny_model("llama")
    batch = tiny_batch(model)
    plan = [Intervention(SITE, Swap(), LastToken()), Intervention(SITE, Scale(3.0), LastToken())]
    sources = collect_sources(model, plan, tiny_batch(model, seed=2))
    before = [None if source is None else source.clone() for source in sources]
    inputs = {name: value.clone() for name, value in batch.items()}
    with intervene(model, plan, sources):
        model(**batch)
    assert torch.equal(sources[0], before[0]) and sources[1] is None
    assert all(torch.equal(batch[name], inputs[name]) for name in batch)


def _value_at_last(model, batch, *plans):
    """Return the block's output at the last token inside nested blocks of these plans, outermost first."""
    if not plans:
        with capture(model, SITE, LastToken()) as acts:
            model(**batch)
        return acts[SITE][:, 0]
    with intervene(model, plans[0]):
        return _value_at_last(model, batch, *plans[1:])


ORDERED = [
    lambda h: (Intervention(SITE, Add(vector(1)), LastToken()), h + vector(1)),
    lambda h: (Intervention(SITE, Scale(2.0), AllTokens()), h * 2),
    lambda h: (Intervention(SITE, Set(torch.ones(4)), LastToken(), Coordinates([0, 1, 2, 3])), _ones(h)),
    lambda h: (
        Intervention(SITE, Project(vector(2)), At(-1)),
        h - (h @ vector(2))[:, None] * vector(2) / vector(2).square().sum(),
    ),
]


def _ones(h):
    h = h.clone()
    h[:, :4] = 1
    return h


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
@torch.no_grad()
def test_plan_order_and_nesting_order(order):
    model = tiny_model("llama")
    batch = tiny_batch(model, "left")
    expected, plan = _value_at_last(model, batch), []
    for number in order:
        item, expected = ORDERED[number](expected)
        plan.append(item)
    close(_value_at_last(model, batch, plan), expected)
    close(_value_at_last(model, batch, *[[item] for item in plan]), expected)
    close(_value_at_last(model, batch, plan[:1], plan[1:]), expected)


@torch.no_grad()
def test_an_outer_capture_sees_what_enters_and_an_inner_one_what_leaves():
    model = tiny_model("llama")
    batch = tiny_batch(model)
    with (
        capture(model, SITE) as before,
        intervene(model, [Intervention(SITE, Zero())]),
        capture(model, SITE) as after,
    ):
        model(**batch)
    with capture(model, SITE) as plain:
        model(**batch)
    close(before[SITE], plain[SITE])
    assert not after[SITE].any()


@torch.no_grad()
def test_the_inner_block_ends_alone():
    model = tiny_model("llama")
    batch = tiny_batch(model)
    outer, inner = [Intervention(SITE, Add(vector(1)))], [Intervention(SITE, Scale(2.0))]
    with intervene(model, outer):
        expected = model(**batch).logits
        with intervene(model, inner):
            assert not torch.allclose(model(**batch).logits, expected)
        close(model(**batch).logits, expected)


@torch.no_grad()
def test_a_users_hook_on_the_same_module_sees_the_edit():
    model, seen = tiny_model("llama"), []
    blocks_of(model)[1].register_forward_hook(lambda _m, _a, out: seen.append(out.clone()))
    with intervene(model, [Intervention(SITE, Zero())]):
        model(**tiny_batch(model))
    assert not seen[0].any()


@torch.no_grad()
def test_two_sites_in_one_subspace_and_two_subspaces_at_one_site():
    model = tiny_model("llama")
    batch = tiny_batch(model)
    q = torch.linalg.qr(torch.randn(32, 6, generator=torch.Generator().manual_seed(0)))[0]
    first, second = Subspace.from_frame(q[:, :3]), Subspace.from_frame(q[:, 3:])
    parts = [Intervention(SITE, Zero(), LastToken(), first), Intervention(SITE, Zero(), LastToken(), second)]
    whole = [Intervention(SITE, Zero(), LastToken(), Subspace.from_frame(q))]
    close(_value_at_last(model, batch, parts), _value_at_last(model, batch, whole))


class _AddsInPlace(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x):
        h = self.inner(x)
        h += 1
        return h


@torch.no_grad()
def test_a_set_vector_survives_a_model_that_adds_in_place():
    model, edit = _AddsInPlace(), Set(torch.arange(4.0))
    with intervene(model, [Intervention("path:inner.output", edit)]) as applied:
        found = model(torch.randn(2, 3, 4))
    close(found, (torch.arange(4.0) + 1).expand(2, 3, 4))
    close(edit.vector, torch.arange(4.0))
    assert applied.report()[0].tokens == 6
