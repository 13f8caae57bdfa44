"""Every featurizer's two laws, and each against its formula or scikit-learn."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from intervene import (
    PCA,
    BadVector,
    Block,
    Coordinates,
    Featurizer,
    Identity,
    Intervention,
    LastToken,
    ShapeMismatch,
    SiteOutOfRange,
    Subspace,
    Swap,
    collect_sources,
    interchange,
    intervene,
)
from intervene.frames import orthonormal
from tests.intervene.values import D, K, classes, frame, learned, randn, sae
from tests.tiny import tiny_batch, tiny_model

LENSES = {
    "Identity": Identity,
    "Coordinates": lambda: Coordinates([5, 0, 11]),
    "Subspace": lambda: Subspace(D, K),
    "Subspace from a weight": lambda: Subspace.from_weight(randn(D, K)),
    "Subspace from a frame": lambda: Subspace.from_frame(frame()),
    "Subspace of full rank": lambda: Subspace(D, D, seed=3),
    "Subspace, Cayley": lambda: learned(Subspace(D, K, frame="cayley")),
    "Subspace, Householder": lambda: learned(Subspace(D, K, frame="householder")),
    "Subspace, matrix_exp": lambda: learned(Subspace(D, K, frame="matrix_exp")),
    "Block": lambda: Block(Subspace(D, K), 1, 3),
    "PCA": lambda: PCA.fit(randn(40, D, seed=9) + 1, K),
    "SAE": sae,
    "SAE, centred": lambda: sae(centred=True),
    "SAE jumprelu": lambda: sae("jumprelu"),
}
EXACT = ("Identity", "Coordinates")


def test_every_featurizer_is_tried():
    assert {type(make()).__name__ for make in LENSES.values()} == classes(Featurizer)


@pytest.fixture(params=LENSES)
def lens(request):
    return LENSES[request.param]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_writing_what_was_read_changes_nothing(lens, dtype):
    h = randn(2, 3, D, dtype=dtype)
    written = lens.write(h, lens.read(h))
    assert written.dtype == dtype and written.shape == h.shape
    assert torch.equal(written, h)  # for all of them: z - read(h) is exactly zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_written_is_read_again_where_lossless(lens, dtype):
    h = randn(2, 3, D, dtype=dtype)
    z = randn(2, 3, lens.features(D), seed=3, dtype=dtype)
    again = lens.read(lens.write(h, z))
    if lens.lossless:
        torch.testing.assert_close(again, z, atol=1e-5, rtol=0)
    else:
        assert (again - z).abs().max() > 0.1, "claims too little: this one is lossless after all"


def test_a_lens_is_the_featurizer_evaluated_once(lens):
    h, z = randn(2, 3, D), randn(2, 3, lens.features(D), seed=3)
    once = lens.lens()
    assert torch.equal(once.read(h), lens.read(h)) and torch.equal(once.write(h, z), lens.write(h, z))


def test_neither_input_is_written_to(lens):
    h, z = randn(2, 3, D), randn(2, 3, lens.features(D), seed=3)
    kept = h.clone(), z.clone()
    written = lens.write(h, z)
    assert torch.equal(h, kept[0]) and torch.equal(z, kept[1])
    assert written.data_ptr() != h.data_ptr() and not torch.equal(written, h)


def test_what_lies_outside_the_features_is_left(lens):
    """Two writes of different features differ only where the features reach."""
    h = randn(1, 1, D)
    count = lens.features(D)
    changes = torch.stack([(lens.write(h, randn(1, 1, count, seed=s)) - h)[0, 0] for s in range(30)])
    assert torch.linalg.matrix_rank(changes, atol=1e-4) == min(count, D)


def test_gradients_reach_activations_features_and_parameters(lens):
    h, z = randn(2, 3, D).requires_grad_(), randn(2, 3, lens.features(D), seed=3).requires_grad_()
    (lens.write(h, z).square().sum() + lens.read(h).square().sum()).backward()
    assert h.grad.isfinite().all() and h.grad.any()
    assert z.grad.isfinite().all() and z.grad.any()
    for parameter in lens.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad


def test_write_has_the_gradient_of_finite_differences(lens):
    lens = copy.deepcopy(lens).double()
    h, z = randn(1, 2, D, dtype=torch.float64).requires_grad_(), randn(1, 2, lens.features(D), dtype=torch.float64)
    assert torch.autograd.gradcheck(lens.write, (h, z.requires_grad_()))


def test_deep_copies_agree_and_are_apart(lens):
    h, z = randn(2, 3, D), randn(2, 3, lens.features(D), seed=3)
    lens.read(h)
    other = copy.deepcopy(lens)
    assert torch.equal(other.write(h, z), lens.write(h, z))
    ours = {tensor.data_ptr() for tensor in lens.state_dict().values()}
    assert ours.isdisjoint(tensor.data_ptr() for tensor in other.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_round_the_frame(lens, dtype):
    h, z = randn(2, 3, D, dtype=dtype), randn(2, 3, lens.features(D), seed=3)
    plain = lens.read(h), lens.write(h, z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lens.read(h), plain[0]) and torch.equal(lens.write(h, z), plain[1])


# Coordinates


def test_coordinates_by_hand():
    h = torch.arange(6.0).view(1, 1, 6)
    lens = Coordinates([4, 1])
    assert lens.read(h).tolist() == [[[4.0, 1.0]]]
    assert lens.write(h, torch.tensor([[[-1.0, -2.0]]])).tolist() == [[[0.0, -2.0, 2.0, 3.0, -1.0, 5.0]]]
    assert lens.features(6) == 2


@pytest.mark.parametrize("indices", [[], [1, 1], [-1]])
def test_coordinates_that_mean_nothing_are_refused(indices):
    with pytest.raises(SiteOutOfRange, match="need distinct numbers from 0"):
        Coordinates(indices)
    with pytest.raises(SiteOutOfRange, match=r"index 7 was asked of a site 6 wide\. Use 0 to 5"):
        Coordinates([7]).features(6)


# Subspace


def gram_error(q):
    return float((q.mT.double() @ q.double() - torch.eye(q.shape[1])).abs().max())


@pytest.mark.parametrize("width, rank", [(12, 1), (12, 4), (12, 12), (100, 20)])
def test_the_frame_stays_orthonormal_under_an_optimiser(width, rank):
    lens = Subspace(width, rank)
    start = lens.frame().detach().clone()
    optimiser = torch.optim.Adam(lens.parameters(), lr=0.1)
    h, target = randn(8, 1, width), randn(8, 1, width, seed=4)
    for _ in range(25):
        optimiser.zero_grad()
        (lens.write(h, lens.read(target)) - target.flip(0)).square().mean().backward()
        optimiser.step()
    assert gram_error(lens.weight.detach()) > 1e-3, "the weight itself has left the sphere: the test says something"
    assert gram_error(lens.frame().detach()) < 1e-6
    assert (lens.frame() - start).abs().max() > 0.01


def test_a_frame_that_learned_and_was_then_frozen_is_still_orthonormal():
    lens = Subspace.from_weight(randn(D, K) * 3)
    learning = lens.frame().detach().clone()
    lens.weight.requires_grad_(False)
    assert torch.equal(lens.frame(), learning) and gram_error(lens.frame()) < 1e-6
    with torch.no_grad():  # and it is looked at again whenever the weight changes
        lens.weight.copy_(frame())
    assert torch.equal(lens.frame(), frame())
    lens.load_state_dict(Subspace.from_weight(randn(D, K, seed=5)).state_dict())
    assert torch.equal(lens.frame(), orthonormal(randn(D, K, seed=5)))


def test_a_frozen_frame_first_used_in_inference_mode_can_be_trained_through():
    lens = Subspace.from_weight(randn(D, K), trainable=False)
    with torch.inference_mode():
        lens.read(randn(1, 1, D))
    h = randn(1, 1, D).requires_grad_()
    lens.write(h, lens.read(h) * 2).sum().backward()
    assert h.grad.isfinite().all()


def test_qr_has_the_gradient_of_finite_differences():
    probe = randn(D, K, seed=4, dtype=torch.float64)
    weight = randn(D, K, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: (orthonormal(w) * probe).sum(), (weight,))
    square = randn(K, K, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: (orthonormal(w) @ probe[:K]).sum(), (square,))


def test_a_frame_does_not_change_with_the_scale_of_its_weight_nor_jump():
    weight = randn(D, K)
    torch.testing.assert_close(orthonormal(weight * 7), orthonormal(weight), atol=1e-6, rtol=0)
    torch.testing.assert_close(orthonormal(weight + 1e-5), orthonormal(weight), atol=1e-4, rtol=0)
    for signs in (torch.ones(K), -torch.ones(K), torch.tensor([1.0, -1.0, -1.0, 1.0])):
        torch.testing.assert_close(orthonormal(frame() * signs), frame() * signs, atol=1e-6, rtol=0)
    for sign in (1, -1):  # a plain Householder QR turns the column round where its first entry changes sign
        torch.testing.assert_close(
            orthonormal(torch.tensor([[1e-6 * sign], [1.0]])), torch.tensor([[0.0], [1.0]]), atol=1e-5, rtol=0
        )


def test_a_given_frame_is_kept_bit_for_bit():
    given = frame()
    lens = Subspace.from_frame(given)
    assert torch.equal(lens.frame(), given) and not lens.weight.requires_grad
    assert lens.weight.data_ptr() != given.data_ptr()
    torch.testing.assert_close(Subspace.from_frame(given, trainable=True).frame(), given, atol=1e-6, rtol=0)
    assert lens.weight.is_contiguous() and Subspace.from_frame(given.mT.contiguous().mT).weight.is_contiguous()


def test_seeds_give_frames_and_the_same_seed_the_same():
    assert torch.equal(Subspace(D, K, seed=3).frame(), Subspace(D, K, seed=3).frame())
    assert not torch.equal(Subspace(D, K, seed=3).frame(), Subspace(D, K, seed=4).frame())


def test_the_das_swap_is_its_formula():
    lens = Subspace(D, K)
    h, s = randn(2, 3, D), randn(2, 3, D, seed=4)
    q = lens.frame().double()
    wanted = h.double() + (s - h).double() @ q @ q.mT
    torch.testing.assert_close(lens.write(h, lens.read(s)).double(), wanted, atol=1e-5, rtol=0)
    # the swap of a full rotation's first K columns, as DAS has it: any completion gives the same
    rotation = torch.linalg.qr(torch.cat([q, randn(D, D - K, seed=8, dtype=torch.float64)], 1)).Q
    mixed = torch.cat([(s.double() @ rotation)[..., :K], (h.double() @ rotation)[..., K:]], -1) @ rotation.mT
    torch.testing.assert_close(wanted, mixed, atol=1e-6, rtol=0)  # the frame is fp32


def test_bf16_activations_meet_an_fp32_frame():
    lens = Subspace(D, K)
    h, s = randn(2, 3, D, dtype=torch.bfloat16), randn(2, 3, D, seed=4, dtype=torch.bfloat16)
    assert lens.read(h).dtype == torch.float32 and lens.frame().dtype == torch.float32
    q = lens.frame()
    wanted = (h.float() + (s.float() - h.float()) @ q @ q.mT).bfloat16()
    written = lens.write(h, lens.read(s))
    assert written.dtype == torch.bfloat16
    assert (written.float() - wanted.float()).abs().max() <= 2**-6  # at most the last of bf16's 8 bits, below 4
    rounded = q.detach().bfloat16()
    assert gram_error(rounded) > 1e-4, "the frame rounded to bf16 would not be orthonormal"


def test_frames_that_are_none_are_refused():
    with pytest.raises(BadVector, match=r"off orthonormal by 1\.0e\+00.*linalg\.qr"):
        Subspace.from_frame(torch.ones(4, 2) / 2)
    with pytest.raises(BadVector, match="off orthonormal by nan"):
        Subspace.from_frame(torch.full((4, 2), torch.nan))
    for shape in ((2, 4), (4,), (4, 0)):
        with pytest.raises(ShapeMismatch, match=r"need \(D, K\) with 1 <= K <= D"):
            Subspace.from_frame(torch.zeros(shape))
    for rank in (0, 5):
        with pytest.raises(ShapeMismatch, match="must be 1 to 4"):
            Subspace(4, rank)


def plan_of(lens):
    return [
        Intervention("L0.block_output", Swap(), LastToken(), lens),
        Intervention("L1.mlp_output", Swap(), LastToken(), lens),
    ]


def test_one_subspace_in_two_interventions_gets_both_gradients():
    model = tiny_model("llama")
    base, source = tiny_batch(model), tiny_batch(model, seed=1)
    shared = Subspace(32, 3)
    interchange(model, plan_of(shared), base, source).logits.square().sum().backward()
    apart = [Subspace(32, 3), Subspace(32, 3)]
    plan = [plan_of(lens)[number] for number, lens in enumerate(apart)]
    interchange(model, plan, base, source).logits.square().sum().backward()
    assert all(lens.weight.grad.abs().max() > 1e-3 for lens in apart)
    torch.testing.assert_close(shared.weight.grad, apart[0].weight.grad + apart[1].weight.grad, atol=1e-4, rtol=1e-5)


def test_two_forwards_before_one_backward_add_their_gradients():
    model = tiny_model("llama")
    batches = [(tiny_batch(model, seed=s), tiny_batch(model, seed=s + 5)) for s in (0, 1)]
    together, apart = Subspace(32, 3), Subspace(32, 3)
    losses = [interchange(model, plan_of(together), *pair).logits.square().sum() for pair in batches]
    sum(losses).backward()
    for pair in batches:
        interchange(model, plan_of(apart), *pair).logits.square().sum().backward()
    torch.testing.assert_close(together.weight.grad, apart.weight.grad, atol=1e-4, rtol=1e-5)


def test_a_subspace_acts_on_a_bf16_model():
    model = tiny_model("llama").bfloat16()
    base, source = tiny_batch(model), tiny_batch(model, seed=1)
    lens = Subspace(32, 3)
    plan = plan_of(lens)
    with intervene(model, plan, collect_sources(model, plan, source)):
        model(**base).logits.float().square().mean().backward()
    assert lens.weight.grad.dtype == torch.float32 and lens.weight.grad.isfinite().all() and lens.weight.grad.any()


def test_only_subspaces_and_their_blocks_learn():
    for name, make in LENSES.items():
        learning = [p for p in make().parameters() if p.requires_grad]
        assert bool(learning) == (name.startswith(("Subspace", "Block")) and name != "Subspace from a frame"), name
        assert isinstance(make(), nn.Module)
