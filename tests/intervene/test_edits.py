"""Every edit against its formula, worked out by hand or in numpy."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from intervene import (
    Add,
    Affine,
    BadVector,
    BoundarySwap,
    BudgetSwap,
    FaithfulBoundarySwap,
    GatedSwap,
    HardConcreteSwap,
    Identity,
    Intervention,
    LastToken,
    LowRankAffine,
    Noise,
    Project,
    Scale,
    SecondBoundarySwap,
    Set,
    ShapeMismatch,
    Site,
    SteeringVector,
    StopGradient,
    Subspace,
    Swap,
    Zero,
    interchange,
    intervene,
)
from intervene.edits import Edit
from tests.intervene.values import classes, learned, randn
from tests.tiny import tiny_batch, tiny_model

B, P, K = 2, 3, 6


CASES = {
    "Swap": Swap,
    "Add": lambda: Add(randn(K)),
    "Add, relative": lambda: Add(randn(K), 0.5, relative=True),
    "Add, strengths": lambda: Add(randn(B, K), torch.tensor([0.5, 2.0])),
    "Set": lambda: Set(randn(K)),
    "Set, everywhere": lambda: Set(randn(B, P, K)),
    "Zero": Zero,
    "Scale": lambda: Scale(1.0),
    "Project": lambda: Project(randn(K)),
    "GatedSwap": lambda: learned(GatedSwap(K)),
    "GatedSwap, hard": lambda: learned(GatedSwap(K)).eval(),
    "BoundarySwap": lambda: BoundarySwap(K, fraction=0.4),
    "BoundarySwap, hard": lambda: BoundarySwap(K, fraction=0.4).eval(),
    "GatedSwap, groups": lambda: learned(GatedSwap(K, groups=torch.arange(K) // 2)),
    "HardConcreteSwap": lambda: learned(HardConcreteSwap(K)),
    "HardConcreteSwap, hard": lambda: learned(HardConcreteSwap(K)).eval(),
    "BudgetSwap": lambda: learned(BudgetSwap(K, 2)),
    "BudgetSwap, hard": lambda: learned(BudgetSwap(K, 2)).eval(),
    "FaithfulBoundarySwap": lambda: FaithfulBoundarySwap(K),
    "SecondBoundarySwap": lambda: SecondBoundarySwap(FaithfulBoundarySwap(K, variables=2, temperature=1.0)),
    "LowRankAffine": lambda: learned(LowRankAffine(K, 2)),
    "Affine": lambda: learned(Affine(K)),
    "StopGradient": lambda: StopGradient(torch.arange(K) < 2),
    "StopGradient, all": StopGradient,
    "Noise": lambda: Noise(0.3),
}


def test_every_edit_is_tried():
    assert {type(make()).__name__ for make in CASES.values()} == classes(Edit)


@pytest.fixture(params=CASES)
def edit(request):
    return CASES[request.param]()


def other_of(edit, z):
    """Return what the engine hands in beside z."""
    if edit.draws and not edit.needs_source:
        return edit.draw(z)
    return randn(*z.shape, seed=2, dtype=z.dtype) if edit.needs_source else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_result_is_a_new_tensor_of_the_same_kind(edit, dtype):
    z = randn(B, P, K, dtype=dtype)
    source = other_of(edit, z)
    held = [z, *edit.parameters(), *edit.buffers(), *([] if source is None else [source])]
    kept = [tensor.clone() for tensor in held]
    result = edit(z, source)
    assert result.shape == z.shape and result.dtype == dtype
    with torch.no_grad():
        result += 1.0  # a model may write into what it is given
    assert all(torch.equal(old, new) for old, new in zip(kept, held, strict=True))


def test_a_deep_copy_does_the_same(edit):
    z = randn(B, P, K)
    other = copy.deepcopy(edit)
    assert torch.equal(edit(z, other_of(edit, z)), other(z, other_of(other, z)))


def test_gradients_reach_the_parameters_and_nothing_is_nan(edit):
    z = randn(B, P, K).requires_grad_()
    result = edit(z, other_of(edit, z))
    if result.requires_grad:
        result.square().sum().backward()
    for tensor in (z, *edit.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()
    learning = [name for name, parameter in edit.named_parameters() if parameter.requires_grad]
    without = [name for name, parameter in edit.named_parameters() if parameter.grad is None]
    assert set(learning).isdisjoint(without) or not edit.training


def test_the_base_says_what_an_edit_that_draws_nothing_is():
    with pytest.raises(AssertionError, match="draws nothing"):
        Swap().draw(torch.zeros(1))
    assert issubclass(Swap, Edit) and Swap.needs_source and not Zero.needs_source


# without parameters


def test_swap_zero_scale_set_by_hand():
    z, source = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[5.0, 6.0]]])
    assert Swap()(z, source).tolist() == [[[5.0, 6.0]]]
    assert Zero()(z, None).tolist() == [[[0.0, 0.0]]]
    assert Scale(-2.5)(z, None).tolist() == [[[-2.5, 5.0]]]
    assert Set(torch.tensor([7.0, 8.0]))(z, None).tolist() == [[[7.0, 8.0]]]


def test_swap_takes_one_source_position_for_all():
    z, source = torch.zeros(B, P, K), randn(B, 1, K)
    assert torch.equal(Swap()(z, source), source.repeat(1, P, 1))


@pytest.mark.parametrize("factor", [math.inf, -math.inf, math.nan])
def test_a_scale_that_is_not_finite_is_refused(factor):
    with pytest.raises(BadVector, match="the factor must be finite"):
        Scale(factor)


# Add


def test_add_broadcasts_by_its_axes():
    z, one, two, three = randn(B, P, K), randn(K, seed=2), randn(B, K, seed=3), randn(B, P, K, seed=4)
    torch.testing.assert_close(Add(one, 2.0)(z, None), z + 2 * one)
    torch.testing.assert_close(Add(two, 2.0)(z, None), torch.stack([z[0] + 2 * two[0], z[1] + 2 * two[1]]))
    torch.testing.assert_close(Add(three, -1.0)(z, None), z - three)
    edits = [Add(one), Add(two), Add(three)]
    assert [(e.features, e.rows, e.slots) for e in edits] == [(K, None, None), (K, B, None), (K, B, P)]


@pytest.mark.parametrize("shape", [(K,), (B, K), (B, P, K)])
@pytest.mark.parametrize("relative", [False, True])
def test_a_strength_per_example(shape, relative):
    z, vector, strengths = randn(B, P, K), randn(*shape, seed=2), torch.tensor([0.5, -2.0])
    edit = Add(vector, strengths, relative=relative)
    rows = [
        Add(vector if len(shape) == 1 else vector[b : b + 1], float(strengths[b]), relative=relative)(
            z[b : b + 1], None
        )
        for b in range(B)
    ]
    torch.testing.assert_close(edit(z, None), torch.cat(rows))
    assert edit.rows == B


def test_rows_are_repeated_for_beams():
    z, vector = randn(2 * B, P, K), randn(B, K, seed=2)
    wanted = z + vector.repeat_interleave(2, 0)[:, None]
    torch.testing.assert_close(Add(vector)(z, None), wanted)
    doubled = z + torch.tensor([1.0, 1.0, 3.0, 3.0])[:, None, None] * vector[0]
    torch.testing.assert_close(Add(vector[0], torch.tensor([1.0, 3.0]))(z, None), doubled)


def test_a_relative_strength_is_a_fraction_of_each_tokens_norm():
    z, vector = randn(B, P, K), randn(K, seed=2) * 100
    change = Add(vector, 0.25, relative=True)(z, None) - z
    torch.testing.assert_close(change.norm(dim=-1), 0.25 * z.norm(dim=-1))
    torch.testing.assert_close(torch.cosine_similarity(change, vector.expand_as(z), dim=-1), torch.ones(B, P))
    assert Add(torch.tensor([0.0, 2.0]), 0.5, relative=True)(torch.tensor([[[3.0, 4.0]]]), None).tolist() == [
        [[3.0, 6.5]]
    ]


def test_vectors_and_strengths_that_mean_nothing_are_refused():
    with pytest.raises(BadVector, match="Add: the vector has 1 NaN or infinite entries of 2"):
        Add(torch.tensor([1.0, torch.nan]))
    with pytest.raises(BadVector, match="all zero"):
        Add(torch.zeros(K))
    with pytest.raises(BadVector, match="all zero"):
        Add(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ShapeMismatch, match=r"Give \(D,\), \(B, D\) or \(B, P, D\)"):
        Add(torch.ones(1, 1, 1, K))
    with pytest.raises(ShapeMismatch, match=r"strength of shape \(2, 1\)\. Give a number or one per example"):
        Add(torch.ones(K), torch.ones(2, 1))
    with pytest.raises(ShapeMismatch, match=r"strength of shape \(3,\)\. Give a number or 2, as the vectors are"):
        Add(torch.ones(2, K), torch.ones(3))
    with pytest.raises(BadVector, match="strength nan"):
        Add(torch.ones(K), math.nan)
    with pytest.raises(BadVector, match=r"strength \[1\.0, inf\]"):
        Add(torch.ones(K), torch.tensor([1.0, math.inf]))


def test_a_vector_may_start_at_zero_to_learn_but_not_as_a_direction():
    edit = Add(torch.zeros(K), trainable=True)
    edit(randn(B, P, K), None).sum().backward()
    assert torch.equal(edit.vector.grad, torch.full((K,), float(B * P)))
    with pytest.raises(BadVector, match="relative"):
        Add(torch.zeros(K), relative=True, trainable=True)
    assert not Set(torch.zeros(K)).vector.any()


def test_the_users_vector_is_copied():
    vector = randn(K)
    edit = Add(vector)
    vector.zero_()
    assert edit.vector.any()


def test_a_steering_vector_is_remembered_as_the_origin():
    vector = SteeringVector(randn(K), Site.parse("L1.mlp_output"), "0" * 16, "pca")
    for kind in (Add, Set, Project):
        assert kind(vector).made_for is vector and torch.equal(kind(vector).vector, vector.vector)
        assert kind(vector.vector).made_for is None


# Project


@pytest.mark.parametrize("shape", [(K,), (B, K), (B, P, K)])
def test_project_leaves_no_component_and_nothing_else_changes(shape):
    z, vector = randn(B, P, K), 5 * randn(*shape, seed=2)
    result = Project(vector)(z, None)
    wide = vector if vector.dim() != 2 else vector[:, None]
    unit = (wide / wide.norm(dim=-1, keepdim=True)).expand_as(z)
    assert (result * unit).sum(-1).abs().max() < 1e-6
    torch.testing.assert_close(z - result, (z * unit).sum(-1, keepdim=True) * unit, atol=1e-6, rtol=0)
    torch.testing.assert_close(Project(vector)(result, None), result, atol=1e-6, rtol=0)


def test_project_equals_zero_through_a_subspace():
    z, vector = randn(B, P, K), randn(K, seed=2)
    lens = Subspace.from_frame((vector / vector.norm())[:, None])
    torch.testing.assert_close(Project(vector)(z, None), lens.write(z, Zero()(lens.read(z), None)), atol=1e-6, rtol=0)


def test_project_in_bf16_is_fp32_rounded_once():
    z, vector = 50 * randn(B, P, K, dtype=torch.bfloat16), randn(K, seed=2)
    assert torch.equal(Project(vector)(z, None), Project(vector)(z.float(), None).bfloat16())


# StopGradient


@pytest.mark.parametrize("lens", [Identity(), Subspace(K, K, seed=2)], ids=["Identity", "Subspace"])
def test_stop_gradient_changes_no_value_and_stops_where_masked(lens):
    mask = torch.tensor([True, False, True, False, False, False])
    h = randn(B, P, K).requires_grad_()
    weights = randn(B, P, K, seed=4)
    written = lens.write(h, StopGradient(mask)(lens.read(h), None))
    assert torch.equal(written, h)
    (written * weights).sum().backward()
    wanted = lens.write(torch.zeros_like(weights), lens.read(weights) * ~mask)  # the gradient's features, masked
    torch.testing.assert_close(h.grad, wanted, atol=1e-5, rtol=0)


def test_stop_gradient_without_a_mask_stops_all():
    z = randn(B, P, K).requires_grad_()
    assert torch.equal(StopGradient()(z, None), z) and not StopGradient()(z, None).requires_grad


def test_stop_gradient_in_a_model_routes_around_the_layer():
    model, batch = tiny_model("llama"), tiny_batch(tiny_model("llama"))
    with torch.no_grad():
        plain = model(**batch).logits
    with intervene(model, [Intervention("L1.mlp_output", StopGradient())]):
        logits = model(**batch).logits
        logits.square().mean().backward()
    assert torch.equal(logits, plain)
    stopped = model.model.layers[1].mlp.down_proj.weight.grad
    assert stopped is None or not stopped.any()
    assert model.model.layers[0].mlp.down_proj.weight.grad.any()


# Noise


def test_noise_is_drawn_from_its_seed():
    z = torch.zeros(200, 20, K)
    first, second = Noise(2.0, seed=3), Noise(2.0, seed=3)
    draws = [first.draw(z), first.draw(z)]
    assert torch.equal(draws[0], second.draw(z)) and torch.equal(draws[1], second.draw(z))
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], Noise(2.0, seed=4).draw(z))
    result = first(z, draws[0])
    assert torch.equal(result, 2.0 * draws[0])
    assert float(result.mean()) == pytest.approx(0, abs=0.05) and float(result.std()) == pytest.approx(2, abs=0.05)


def test_noise_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    Noise(1.0).draw(torch.zeros(3))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_noise_of_no_size_is_refused(scale):
    with pytest.raises(BadVector, match="the scale must be positive and finite"):
        Noise(scale)


# in a model


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"Set, everywhere"}))  # which is made for three positions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_edit_runs_in_a_model_and_trains(name, dtype):
    model = tiny_model("llama").to(dtype)
    base, source = tiny_batch(model), tiny_batch(model, seed=1)
    edit = CASES[name]()
    plan = [Intervention("L1.block_output", edit, LastToken(), Subspace(32, K))]
    output = interchange(model, plan, base, source).logits
    assert output.dtype == dtype and output.isfinite().all()
    output.float().square().mean().backward()
    for parameter in edit.parameters():
        assert (parameter.grad is not None) == (parameter.requires_grad and edit.training)
