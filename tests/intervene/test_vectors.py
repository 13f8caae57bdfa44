"""Directions against hand calculation and scikit-learn; pooling; and the provenance that guards a vector."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from intervene import (
    Activations,
    Add,
    AllTokens,
    BadVector,
    First,
    InterveneError,
    Intervention,
    Mask,
    NotApplied,
    Project,
    Set,
    ShapeMismatch,
    Site,
    Span,
    SteeringVector,
    WrongModel,
    activations,
    fingerprint,
    intervene,
    mean_difference,
    pca_direction,
    probe_direction,
)
from intervene.store import load_vector, save_vector
from intervene.vectors import checked_vector, pool
from tests.tiny import tiny_batch, tiny_model

D = 8


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def acts(values, **changes):
    given = {"site": Site.parse("L1.mlp_output"), "fingerprint": "f", "model": "m", "pooling": "mean", **changes}
    return Activations(torch.as_tensor(values), **given)


def contrast(shift=1.0, n=40):
    """Return activations that differ by `shift` along the last axis, among noise of unequal widths."""
    noise = torch.linspace(0.2, 3.0, D)
    direction = torch.zeros(D)
    direction[-1] = shift
    return acts(randn(n, D) * noise + direction), acts(randn(n, D, seed=2) * noise - direction)


def test_mean_difference_by_hand():
    vector = mean_difference(acts([[1.0, 2.0], [3.0, 6.0]]), acts([[0.0, 1.0], [0.0, 0.0], [3.0, -1.0]]))
    assert vector.vector.tolist() == [1.0, 4.0]
    assert vector.norm == pytest.approx(17**0.5)
    assert (vector.method, vector.n_positive, vector.n_negative) == ("mean_difference", 2, 3)
    assert vector.stream_norm == pytest.approx((5**0.5 + 45**0.5 + 1 + 0 + 10**0.5) / 5)
    assert (str(vector.site), vector.fingerprint, vector.model, vector.pooling) == ("L1.mlp_output", "f", "m", "mean")
    assert "0-based" in vector.convention


def test_the_mean_of_many_bf16_rows_is_not_rounded_on_the_way():
    positive = torch.full((3000, 2), 1.0).bfloat16()
    assert mean_difference(acts(positive), acts(torch.zeros(10, 2))).vector.tolist() == [1.0, 1.0]


def test_pca_direction_is_scikit_learns():
    from sklearn.decomposition import PCA, TruncatedSVD

    positive, negative = contrast()
    vector = pca_direction(positive, negative).vector.double().numpy()
    differences = (positive.values - negative.values).double().numpy()
    # pairs of both signs have mean zero, so that centring changes nothing: Zou et al.'s recipe
    mirrored = PCA(1, svd_solver="full").fit(np.concatenate([differences, -differences])).components_[0]
    uncentred = TruncatedSVD(1, algorithm="arpack").fit(differences).components_[0]
    for reference in (mirrored, uncentred):
        assert abs(vector @ reference) == pytest.approx(1, abs=1e-6)
    assert vector @ differences.mean(0) > 0 and np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_pca_direction_finds_a_shift_that_all_pairs_share():
    base = randn(20, D)
    shift = torch.nn.functional.normalize(randn(D, seed=3), dim=0)
    found = pca_direction(acts(base + 3 * shift), acts(base)).vector
    torch.testing.assert_close(found, shift, atol=1e-5, rtol=0)
    flipped = pca_direction(acts(base), acts(base + 3 * shift)).vector
    torch.testing.assert_close(flipped, -shift, atol=1e-5, rtol=0)


def test_probe_direction_orders_as_scikit_learns_decision():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    positive, negative = contrast(shift=2.0)
    vector = probe_direction(positive, negative, c=0.5).vector
    both = torch.cat([positive.values, negative.values]).double().numpy()
    labels = [1] * 40 + [0] * 40
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, max_iter=2000)).fit(both, labels)
    fresh = 3 * randn(200, D, seed=7)
    scores, decisions = (fresh @ vector).numpy(), reference.decision_function(fresh.double().numpy())
    assert np.corrcoef(scores, decisions)[0, 1] > 0.9999
    assert float(vector.norm()) == pytest.approx(1, abs=1e-6)


def test_a_probe_finds_the_direction_that_separates_whatever_its_scale():
    positive, negative = contrast(shift=6.0)
    scales = torch.logspace(-3, 3, D)
    vector = probe_direction(acts(positive.values * scales), acts(negative.values * scales)).vector
    assert float((positive.values * scales @ vector).min()) > float((negative.values * scales @ vector).max())


def test_a_feature_that_never_changes_has_no_weight():
    positive, negative = contrast(shift=2.0)
    positive.values[:, 0] = negative.values[:, 0] = 4.0
    assert float(probe_direction(positive, negative).vector[0]) == 0.0


@pytest.mark.parametrize("method", [mean_difference, pca_direction, probe_direction])
def test_contrasts_that_mean_nothing_are_refused(method):
    positive, negative = contrast()
    for name, value in (("site", Site.parse("L2.mlp_output")), ("fingerprint", "other"), ("pooling", "last")):
        with pytest.raises(BadVector, match=rf"Contrast: {name} is .* Collect alike"):
            method(positive, replace(negative, **{name: value}))
    broken = replace(negative, values=negative.values.clone())
    broken.values[3, 2] = torch.nan
    with pytest.raises(BadVector, match="the negative activations have 1 NaN or infinite entries of 320"):
        method(positive, broken)
    with pytest.raises(BadVector, match="the positive activations have no rows"):
        method(replace(positive, values=torch.zeros(0, D)), negative)
    if method is not pca_direction:
        return
    with pytest.raises(ShapeMismatch, match=r"40 positive and 39 negative rows\. Pair them"):
        method(positive, replace(negative, values=negative.values[1:]))


def test_equal_means_give_no_vector():
    with pytest.raises(BadVector, match=r"mean_difference vector at L1\.mlp_output.*all zero"):
        mean_difference(acts(torch.ones(2, D)), acts(torch.ones(3, D)))


# pooling


def test_pooling_by_hand():
    h = torch.arange(12.0).view(2, 3, 2)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    assert pool(h, valid, "mean").tolist() == [[1.0, 2.0], [8.0, 9.0]]
    assert pool(h, valid, "last").tolist() == [[2.0, 3.0], [10.0, 11.0]]
    assert pool(h, valid, "first").tolist() == [[0.0, 1.0], [6.0, 7.0]]
    assert pool(h, valid, "tokens").tolist() == [[0.0, 1.0], [2.0, 3.0], [6.0, 7.0], [8.0, 9.0], [10.0, 11.0]]


def test_pooling_where_the_valid_slots_do_not_come_first():
    h = torch.arange(6.0).view(1, 6, 1)
    valid = torch.tensor([[False, True, False, True, True, False]])
    assert [pool(h, valid, kind).item() for kind in ("first", "last")] == [1.0, 4.0]
    assert pool(h, valid, "mean").item() == pytest.approx(8 / 3)


def test_what_is_not_valid_does_not_reach_the_mean_even_as_nan():
    h = torch.tensor([[[1.0], [torch.nan]]])
    assert pool(h, torch.tensor([[True, False]]), "mean").tolist() == [[1.0]]


def test_a_long_mean_is_exact_in_bf16():
    h, valid = torch.ones(1, 301, 2).bfloat16(), torch.ones(1, 301, dtype=torch.bool)
    assert pool(h, valid, "mean").tolist() == [[1.0, 1.0]]  # bf16 cannot count to 301


def test_pooling_that_means_nothing_is_refused():
    h = torch.ones(2, 2, 1)
    with pytest.raises(InterveneError, match=r"Pooling 'max': there is none\. Use one of mean, last, first, tokens"):
        pool(h, torch.ones(2, 2, dtype=torch.bool), "max")
    with pytest.raises(ShapeMismatch, match="example 1 has no selected token"):
        pool(h, torch.tensor([[True, False], [False, False]]), "mean")


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "last", "first", "tokens"])
@pytest.mark.parametrize("positions", [None, First(2), Span(1, -1)])
def test_activations_are_hf_hidden_states_pooled_by_hand(padding, pooling, positions):
    model = tiny_model("llama")
    batches = [tiny_batch(model, padding), tiny_batch(model, padding, seed=3, lengths=(3, 5, 6))]
    chosen = {None: slice(None), First(2): slice(2), Span(1, -1): slice(1, -1)}[positions]
    wanted = []
    for batch in batches:
        with torch.no_grad():
            hidden = model(**batch, output_hidden_states=True).hidden_states[2]  # after block 1
        for row, mask in zip(hidden, batch["attention_mask"].bool(), strict=True):
            tokens = row[mask][chosen]
            wanted += {"mean": [tokens.mean(0)], "last": [tokens[-1]], "first": [tokens[0]], "tokens": list(tokens)}[
                pooling
            ]
    found = activations(model, batches, "L1.block_output", positions, pooling=pooling)
    torch.testing.assert_close(found.values, torch.stack(wanted), atol=1e-6, rtol=1e-5)
    assert (found.site, found.fingerprint, found.pooling) == (Site("block_output", 1), fingerprint(model), pooling)
    assert found.model == "LlamaForCausalLM" and not found.values.requires_grad


def test_activations_of_a_ragged_mask_and_of_a_layer_from_the_end():
    model = tiny_model("llama")
    batch = tiny_batch(model)
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    mask[0, [1, 4, 5]] = mask[1, [6]] = True
    found = activations(model, [batch], "L-2.block_output", Mask(mask), pooling="last")
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(found.values, torch.stack([hidden[0, 5], hidden[1, 6]]), atol=1e-6, rtol=1e-5)
    assert found.site.layer == 1, "resolved, so that it equals the site it is applied at"
    with pytest.raises(NotApplied, match="no batch was given"):
        activations(model, [], "L0.block_output")


# the value and its guard


def test_vectors_that_mean_nothing_are_refused():
    site = Site.parse("L0.mlp_output")
    with pytest.raises(
        BadVector, match=r"mine vector at L0\.mlp_output: the vector has 2 NaN or infinite entries of 3"
    ):
        SteeringVector(torch.tensor([torch.nan, 1.0, torch.inf]), site, "f", "mine")
    with pytest.raises(BadVector, match="all zero"):
        SteeringVector(torch.zeros(3), site, "f", "mine")
    with pytest.raises(ShapeMismatch, match=r"it must be \(D,\)"):
        SteeringVector(torch.ones(2, 3), site, "f", "mine")
    with pytest.raises(ShapeMismatch, match=r"Give \(D,\), \(B, D\) or \(B, P, D\)"):
        checked_vector(torch.tensor(1.0))
    assert checked_vector(torch.zeros(2), allow_zero=True).shape == (2,)


def test_scaled_to_is_a_fraction_of_the_stream():
    vector = replace(mean_difference(*contrast()), stream_norm=7.0)
    half = vector.scaled_to(0.5)
    assert half.norm == pytest.approx(3.5)
    torch.testing.assert_close(half.vector / half.norm, vector.vector / vector.norm)
    assert half.provenance() == vector.provenance()
    assert vector.scaled_to(-1.0).norm == pytest.approx(7.0)
    with pytest.raises(BadVector, match=r"its stream norm is unknown\. Use Add\(v, strength, relative=True\)"):
        SteeringVector(torch.ones(2), Site.parse("L0.mlp_output"), "f", "mine").scaled_to(0.5)
    with pytest.raises(BadVector, match="all zero"):
        vector.scaled_to(0.0)


def test_provenance_survives_saving(tmp_path):
    model = tiny_model("llama")
    parts = [activations(model, [tiny_batch(model, seed=s)], "L1.block_output", pooling="last") for s in (0, 1)]
    vector = mean_difference(*parts)
    loaded = load_vector(save_vector(vector, tmp_path / "v.safetensors"))
    assert torch.equal(loaded.vector, vector.vector) and loaded.provenance() == vector.provenance()
    assert loaded.site == vector.site and loaded.stream_norm == vector.stream_norm
    again = SteeringVector.from_provenance(vector.vector, vector.provenance())
    assert again.provenance() == vector.provenance()


@pytest.fixture
def made():
    model = tiny_model("llama")
    parts = [activations(model, [tiny_batch(model, seed=s)], "L1.block_output", pooling="last") for s in (0, 1)]
    return model, mean_difference(*parts)


@pytest.mark.parametrize("kind", [Add, Set, Project])
def test_a_vector_is_accepted_only_where_it_was_made(made, kind):
    model, vector = made
    batch = tiny_batch(model)
    for site in ("L1.block_output", "L-2.block_output"):
        with torch.no_grad(), intervene(model, [Intervention(site, kind(vector), AllTokens())]):
            model(**batch)
    for site in ("L2.block_output", "L1.mlp_output", "L2.block_input"):
        plan = [Intervention(site, kind(vector))]
        with pytest.raises(WrongModel, match=r"made at L1\.block_output.*elsewhere='<reason>'"), intervene(model, plan):
            pass
        forced = [Intervention(site, kind(vector), elsewhere="layer sweep")]
        with torch.no_grad(), intervene(model, forced):
            model(**batch)


def test_a_vector_is_refused_by_another_model_unless_forced(made):
    model, vector = made
    other = tiny_model("llama", seed=1)
    plan = [Intervention("L1.block_output", Add(vector))]
    message = rf"made for model LlamaForCausalLM \({fingerprint(model)}\), this one is {fingerprint(other)}"
    with pytest.raises(WrongModel, match=message), intervene(other, plan):
        pass
    with torch.no_grad(), intervene(other, [Intervention("L1.block_output", Add(vector), elsewhere="transfer")]):
        other(**tiny_batch(other))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())


def test_the_vector_pushes_along_itself(made):
    """Adding the difference of two prompts' last tokens to one of them gives the other."""
    model, vector = made
    batches = [tiny_batch(model, seed=s, lengths=(7,)) for s in (0, 1)]
    parts = [activations(model, [batch], "L2.block_output", pooling="last") for batch in batches]
    vector = mean_difference(*parts)
    mask = torch.zeros(1, 7, dtype=torch.bool)
    mask[0, -1] = True
    plan = [Intervention("L2.block_output", Add(vector), Mask(mask))]
    with torch.no_grad():
        with intervene(model, plan):
            found = model(**batches[1]).logits[:, -1]
        wanted = model(**batches[0]).logits[:, -1]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
