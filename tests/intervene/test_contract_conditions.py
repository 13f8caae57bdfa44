"""Clause 10 of what was promised to users: conditions and strengths per token and per example, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from intervene import (
    Add,
    AllTokens,
    At,
    First,
    Intervention,
    LastToken,
    ProbeAbove,
    ProjectionAbove,
    Span,
    Zero,
    capture,
    intervene,
)
from tests.intervene.by_hand import added, block_output, close, vector
from tests.tiny import tiny_batch, tiny_model

SITE, V, W = "L1.block_output", vector(1), vector(2)
LENGTHS = (7, 4, 5, 2)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@torch.no_grad()
def stream(model, batch):
    with capture(model, SITE) as acts:
        model(**batch)
    return acts[SITE]


SCORES = {
    "projection": lambda h: h @ W / W.norm(),
    "cosine": lambda h: h @ W / W.norm() / h.norm(dim=-1),
    "probe": lambda h: 1 / (1 + torch.exp(-(h @ W - 0.5))),
}
CONDITIONS = {
    "projection": lambda threshold, per: ProjectionAbove(W, threshold, per=per),
    "cosine": lambda threshold, per: ProjectionAbove(W, threshold, cosine=True, per=per),
    "probe": lambda threshold, per: ProbeAbove(W, -0.5, threshold, per=per),
}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("per", ["token", "example"])
@pytest.mark.parametrize("positions", ["all", "span"])
@torch.no_grad()
def test_a_condition_decides_per_token_or_per_example(model, padding, kind, per, positions):
    batch = tiny_batch(model, padding, lengths=LENGTHS)
    real = batch["attention_mask"].bool()
    where = Span(-2) if positions == "span" else AllTokens()
    ordinal = real.cumsum(1) - 1
    asked = real & (ordinal >= real.sum(1, keepdim=True) - 2) if positions == "span" else real
    score = SCORES[kind](stream(model, batch))
    best = score.masked_fill(~asked, -torch.inf).max(1).values.sort().values  # of each example
    threshold = float(best[1] + best[2]) / 2  # holds somewhere in two examples of four
    chosen = (score > threshold) & asked
    if per == "example":  # one real, selected token decides; padding has no say
        chosen = chosen.any(1, keepdim=True) & asked
    assert chosen.any(1).sum() == 2
    condition = CONDITIONS[kind](threshold, per)
    with intervene(model, [Intervention(SITE, Add(V), where, when=condition)]) as applied:
        found = model(**batch).logits
    with block_output(model, 1, added(V, chosen)):
        close(found[real], model(**batch).logits[real])
    report = applied.report()[0]
    assert (report.tokens, report.elements) == (int(chosen.sum()), int(chosen.sum()) * 32)


@torch.no_grad()
def test_a_condition_that_never_holds_is_no_error_and_changes_nothing(model):
    batch = tiny_batch(model, "left")
    with intervene(model, [Intervention(SITE, Zero(), when=ProjectionAbove(W, 1e6))]) as applied:
        found = model(**batch).logits
    close(found, model(**batch).logits)
    assert (applied.report()[0].tokens, applied.report()[0].elements) == (0, 0)


@pytest.mark.parametrize("positions", [AllTokens(), LastToken(), First(2)], ids=["all", "last", "first"])
@torch.no_grad()
def test_strengths_and_vectors_per_example_and_per_position(model, positions):
    batch = tiny_batch(model, "right", lengths=(7, 4, 5))
    real = batch["attention_mask"].bool()
    ordinal = real.cumsum(1) - 1
    chosen = {
        "AllTokens": real,
        "LastToken": real & (ordinal == real.sum(1, keepdim=True) - 1),
        "First": real & (ordinal < 2),
    }[type(positions).__name__]
    strengths, many = torch.tensor([0.5, -2.0, 3.0]), vector(5, 3)
    cases = [
        (Add(V, strengths), strengths[:, None, None] * V),
        (Add(many), many[:, None]),
        (Add(many, strengths), strengths[:, None, None] * many[:, None]),
    ]
    for edit, change in cases:
        with intervene(model, [Intervention(SITE, edit, positions)]):
            found = model(**batch).logits
        with block_output(model, 1, lambda h, c=change: h + chosen[..., None] * c):
            close(found[real], model(**batch).logits[real])


@torch.no_grad()
def test_a_vector_for_each_position(model):
    batch, each = tiny_batch(model, "left"), vector(5, 2, 2)
    with intervene(model, [Intervention(SITE, Add(each, torch.tensor([1.0, 2.0])), At([[0, 5], [3, 1]]))]):
        found = model(**batch).logits
    change = torch.zeros(2, 7, 32)
    change[0, 0], change[0, 5] = each[0, 0], each[0, 1]
    change[1, 3 + 3], change[1, 3 + 1] = 2 * each[1, 0], 2 * each[1, 1]  # three columns of padding
    with block_output(model, 1, lambda h: h + change):
        close(found, model(**batch).logits)


@pytest.mark.parametrize("positions", [AllTokens(), LastToken()], ids=["all", "last"])
@torch.no_grad()
def test_relative_strength_is_a_fraction_of_the_stream(model, positions):
    batch = tiny_batch(model, "right")
    h, fraction = stream(model, batch), 0.25
    change = fraction * h.norm(dim=-1, keepdim=True) * V / V.norm()
    real = batch["attention_mask"].bool()
    last = torch.zeros_like(real)
    last[0, 6] = last[1, 3] = True
    chosen = real if isinstance(positions, AllTokens) else last
    with intervene(model, [Intervention(SITE, Add(V, fraction, relative=True), positions)]) as applied:
        found = model(**batch).logits
    with block_output(model, 1, lambda h: h + chosen[..., None] * change):
        close(found[real], model(**batch).logits[real])
    assert applied.report()[0].relative_norm == pytest.approx(fraction, rel=1e-5)
