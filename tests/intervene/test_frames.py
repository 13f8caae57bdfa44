"""Orthonormal frames in four parametrisations, and blocks of one frame, against dense formulas and torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from intervene import (
    BadVector,
    Block,
    InterveneError,
    Intervention,
    LastToken,
    ShapeMismatch,
    StoreError,
    Subspace,
    Swap,
    collect_sources,
    intervene,
    load_plan,
    save_plan,
    trainable_parameters,
)
from intervene.frames import FRAMES, cayley, householder, matrix_exp, orthonormal, orthonormal_error
from tests.intervene.values import frame, randn
from tests.tiny import tiny_batch, tiny_model

SHAPES = [(12, 1), (12, 4), (12, 12), (40, 8)]
WIDTH = 32


def subspace(name, width=12, rank=4, **options):
    return Subspace(width, rank, frame=name, **options)


@pytest.mark.parametrize("width, rank", [*SHAPES, (1, 1)])
@pytest.mark.parametrize("name", FRAMES)
def test_all_start_at_the_frame_of_the_seed(name, width, rank):
    made, wanted = subspace(name, width, rank, seed=3), Subspace(width, rank, seed=3)
    torch.testing.assert_close(made.frame(), wanted.frame(), atol=2e-6, rtol=0)
    assert not torch.allclose(made.frame(), subspace(name, width, rank, seed=4).frame(), atol=0.01) or width == 1


@pytest.mark.parametrize("width, rank", SHAPES)
@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_200_steps_of_adam_leave_it_orthonormal_and_learn(name, width, rank, rate):
    lens = subspace(name, width, rank)
    start = lens.frame().detach().clone()
    optimiser = torch.optim.Adam(lens.parameters(), lr=rate)
    probe = randn(width, rank, seed=5)
    for _ in range(200):
        optimiser.zero_grad()
        (lens.frame() - probe).square().sum().backward()
        optimiser.step()
    assert orthonormal_error(lens.frame().detach()) < 1e-5
    assert (lens.frame() - start).abs().max() > 0.05
    if rate == 0.01:
        assert (lens.frame() - probe).square().sum() < (start - probe).square().sum()


@pytest.mark.parametrize("width, rank", [(7, 1), (7, 3), (4, 4)])
@pytest.mark.parametrize("name", FRAMES)
def test_gradients_are_those_of_finite_differences(name, width, rank):
    start = FRAMES[name].start(orthonormal(randn(width, rank, seed=2, dtype=torch.float64)))
    weight = (start["weight"] + 0.4 * randn(width, rank, seed=3, dtype=torch.float64)).requires_grad_()
    probe = randn(width, rank, seed=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda w: (FRAMES[name].evaluate(w, start.get("base")) * probe).sum(), (weight,), atol=1e-7
    )


@pytest.mark.parametrize("width, rank", SHAPES)
def test_cayley_is_the_dense_transform(width, rank):
    base = orthonormal(randn(width, rank, seed=2, dtype=torch.float64))
    weight = randn(width, rank, seed=3, dtype=torch.float64)
    skew = weight @ base.mT - base @ weight.mT
    one = torch.eye(width, dtype=torch.float64)
    dense = torch.linalg.solve(one - skew / 2, (one + skew / 2) @ base)
    torch.testing.assert_close(cayley(weight, base), dense, atol=1e-12, rtol=0)
    # and Woodbury's 2K x 2K system, with A = U V^T
    u, v = torch.cat([weight, base], 1), torch.cat([base, -weight], 1)
    inner = torch.linalg.solve(torch.eye(2 * rank, dtype=torch.float64) - v.mT @ u / 2, v.mT @ base)
    torch.testing.assert_close(cayley(weight, base), base + u @ inner, atol=1e-12, rtol=0)


@pytest.mark.parametrize("width, rank", SHAPES)
def test_householder_is_the_product_of_reflections_and_torchs(width, rank):
    weight = randn(width, rank, seed=3, dtype=torch.float64)
    product = torch.eye(width, dtype=torch.float64)
    for k in range(rank):
        v = torch.cat([torch.zeros(k, dtype=torch.float64), weight[k:, k]])
        product = product @ (torch.eye(width, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v))
    signs = torch.ones(rank, dtype=torch.float64)
    torch.testing.assert_close(householder(weight, signs), product[:, :rank], atol=1e-12, rtol=0)
    unit = weight.tril() / weight.diagonal()
    tau = 2 / unit.square().sum(0)
    theirs = torch.linalg.householder_product(unit, tau)
    torch.testing.assert_close(householder(weight, signs), theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("width, rank", SHAPES)
def test_matrix_exp_is_torchs_parametrisation(width, rank):
    linear = nn.Linear(rank, width, bias=False).double()  # weight (D, K)
    linear.weight.data = orthonormal(randn(width, rank, seed=2, dtype=torch.float64))
    torch.nn.utils.parametrizations.orthogonal(linear, orthogonal_map="matrix_exp")
    theirs = linear.parametrizations.weight
    theirs.original.data = theirs.original.data + 0.3 * randn(width, rank, seed=3, dtype=torch.float64)
    ours = matrix_exp(theirs.original.detach(), theirs[0].base)
    torch.testing.assert_close(ours, linear.weight.detach(), atol=1e-10, rtol=0)


def test_no_frame_needs_memory_that_grows_with_the_square_of_the_width_but_matrix_exp():
    sizes = {name: sum(t.numel() for t in subspace(name, 512, 4).state_dict().values()) for name in FRAMES}
    assert max(sizes[name] for name in ("qr", "cayley", "householder")) <= 2 * 512 * 4
    assert sizes["matrix_exp"] == 512 * 4 + 512 * 512


@pytest.mark.parametrize("name", FRAMES)
def test_in_a_bf16_model_and_under_autocast_frames_stay_fp32(name):
    model = tiny_model("llama").bfloat16()
    base, source = tiny_batch(model), tiny_batch(model, seed=1)
    lens = subspace(name, WIDTH, 3)
    plan = [Intervention("L0.block_output", Swap(), LastToken(), lens)]
    plain = lens.frame().detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lens.frame(), plain) and lens.frame().dtype == torch.float32
        with intervene(model, plan, collect_sources(model, plan, source)):
            model(**base).logits.float().square().mean().backward()
    assert lens.weight.grad.dtype == torch.float32 and lens.weight.grad.isfinite().all() and lens.weight.grad.any()


@pytest.mark.parametrize("name", FRAMES)
def test_fp64_weights_stay_fp64(name):
    given = orthonormal(randn(12, 4, dtype=torch.float64))
    lens = Subspace.from_frame(given, parametrisation=name)
    assert lens.frame().dtype == torch.float64 and orthonormal_error(lens.frame()) < 1e-12
    torch.testing.assert_close(lens.frame(), given, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", FRAMES)
def test_a_frozen_frame_is_evaluated_once_for_each_value_of_its_weight(name):
    lens = subspace(name)
    lens.weight.data += 0.2 * randn(12, 4)
    learning = lens.frame().detach().clone()
    lens.weight.requires_grad_(False)
    assert torch.equal(lens.frame(), learning) and lens.frame() is lens.frame()
    with torch.no_grad():
        lens.weight += 0.1 * randn(12, 4, seed=7)
    assert not torch.allclose(lens.frame(), learning, atol=1e-3) and orthonormal_error(lens.frame()) < 1e-5


@pytest.mark.parametrize("name", FRAMES)
def test_a_weight_that_is_not_finite_is_refused_once_it_no_longer_learns(name):
    lens = subspace(name)
    lens.weight.data[0, 0] = torch.nan
    lens.weight.requires_grad_(False)
    with pytest.raises(BadVector, match=rf"Subspace \({name}\).*off orthonormal by nan.*lower learning rate"):
        lens.frame()


def test_frames_that_are_not_there_or_lack_their_base_are_refused():
    with pytest.raises(InterveneError, match=r"Frame 'caley': there is none\. Did you mean cayley"):
        Subspace(12, 4, frame="caley")
    with pytest.raises(ShapeMismatch, match=r"Frame 'cayley' with a base of shape None: need \(12, 4\)"):
        Subspace.from_weight(randn(12, 4), frame="cayley")
    with pytest.raises(ShapeMismatch, match=r"Frame 'qr' with a base of shape \(12, 4\): need None"):
        Subspace.from_weight(randn(12, 4), base=randn(12, 4))


# blocks


def test_a_block_is_its_columns():
    lens, h, z = Subspace(12, 6, seed=2), randn(2, 3, 12), randn(2, 3, 2, seed=4)
    block, columns = Block(lens, 2, 4), lens.frame()[:, 2:4].detach()
    assert block.width == 12 and block.features(12) == 2
    torch.testing.assert_close(block.read(h), h @ columns, atol=1e-6, rtol=0)
    torch.testing.assert_close(block.write(h, z), h + (z - h @ columns) @ columns.mT, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FRAMES)
def test_disjoint_blocks_commute_and_together_are_the_whole(name):
    lens = subspace(name, 12, 6)
    first, second = Block(lens, 0, 2), Block(lens, 2, 6)
    h, z = randn(2, 3, 12), randn(2, 3, 6, seed=4)
    one = second.write(first.write(h, z[..., :2]), z[..., 2:])
    other = first.write(second.write(h, z[..., 2:]), z[..., :2])
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(one, lens.write(h, z), atol=1e-5, rtol=0)
    torch.testing.assert_close(second.read(first.write(h, z[..., :2])), second.read(h), atol=1e-5, rtol=0)
    overlapping = Block(lens, 1, 3)
    assert not torch.allclose(overlapping.read(first.write(h, z[..., :2])), overlapping.read(h), atol=0.1)


def test_blocks_share_the_parameters_of_their_subspace():
    lens = Subspace(WIDTH, 4)
    plan = [Intervention("L0.block_output", Swap(), LastToken(), Block(lens, n, n + 2)) for n in (0, 2)]
    assert [id(p) for p in trainable_parameters(plan)] == [id(lens.weight)]
    model = tiny_model("llama")
    sources = [randn(3, 1, WIDTH, seed=n) for n in (5, 6)]
    batch = tiny_batch(model)
    sources = [source[: len(batch["input_ids"])] for source in sources]
    with intervene(model, plan, sources):
        model(**batch).logits.square().sum().backward()
    assert lens.weight.grad.abs().max() > 0
    # the two swaps are one of the whole subspace, with each block from its own source
    whole, other = copy.deepcopy(lens), Subspace(WIDTH, 4)
    q = other.frame().detach()
    mixed = sources[0] @ q[:, :2] @ q[:, :2].mT + sources[1] @ q[:, 2:] @ q[:, 2:].mT
    with torch.no_grad(), intervene(model, plan, sources):
        apart = model(**batch).logits
    with torch.no_grad(), intervene(model, [Intervention("L0.block_output", Swap(), LastToken(), whole)], [mixed]):
        torch.testing.assert_close(model(**batch).logits, apart, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start, stop", [(-1, 2), (2, 2), (3, 2), (2, 5)])
def test_blocks_of_no_columns_are_refused(start, stop):
    with pytest.raises(ShapeMismatch, match=r"the subspace has 4\..*Need 0 <= start < stop <= 4"):
        Block(Subspace(12, 4), start, stop)


@pytest.mark.parametrize("name", FRAMES)
def test_stored_blocks_come_back_on_one_subspace_bit_for_bit(name, tmp_path):
    lens = subspace(name, WIDTH, 6)
    lens.weight.data += 0.2 * randn(WIDTH, 6)
    plan = [
        Intervention("L0.block_output", Swap(), LastToken(), Block(lens, 3, 6)),
        Intervention("L1.block_output", Swap(), LastToken(), Block(lens, 0, 3).eval()),
        Intervention("L1.block_output", Swap(), LastToken(), lens),
        Intervention("L1.block_output", Swap(), LastToken(), Block(Subspace(WIDTH, 2, trainable=False), 0, 1)),
    ]
    lens.train()
    loaded = load_plan(save_plan(plan, tmp_path / "plan"))
    blocks = [item.featurizer for item in loaded]
    assert blocks[0].subspace is blocks[1].subspace is blocks[2] and blocks[3].subspace is not blocks[2]
    assert (blocks[0].start, blocks[0].stop, blocks[1].start, blocks[1].stop) == (3, 6, 0, 3)
    assert blocks[2].parametrisation == name and torch.equal(blocks[2].frame(), lens.frame())
    assert blocks[2].weight.requires_grad and not blocks[3].subspace.weight.requires_grad
    assert blocks[2].training and not blocks[1].training
    assert len(trainable_parameters(loaded)) == 1


def test_a_plan_of_qr_frames_is_written_as_before(tmp_path):
    folder = save_plan([Intervention("L0.block_output", Swap(), LastToken(), Subspace(WIDTH, 2))], tmp_path / "plan")
    assert '"parametrisation"' not in (folder / "plan.json").read_text()
    given = save_plan(
        [Intervention("L0.block_output", Swap(), LastToken(), subspace("cayley", WIDTH, 2))], tmp_path / "other"
    )
    text = (given / "plan.json").read_text()
    assert '"cayley"' in text
    (given / "plan.json").write_text(text.replace('"cayley"', '"kayley"'))
    with pytest.raises(StoreError, match=r"Frame 'kayley': there is none\. Did you mean cayley"):
        load_plan(given)


def test_a_block_whose_subspace_is_not_there_is_refused(tmp_path):
    plan = [Intervention("L0.block_output", Swap(), LastToken(), Block(Subspace(WIDTH, 2), 0, 1))]
    folder = save_plan(plan, tmp_path / "plan")
    text = (folder / "plan.json").read_text()
    for number in ("1", "-1", '"0"', "null"):
        changed = text.replace('"subspace": 0', f'"subspace": {number}')
        assert changed != text
        (folder / "plan.json").write_text(changed)
        with pytest.raises(StoreError, match=r"featurizers\[1\]: it is part of number"):
            load_plan(folder)


def test_given_frames_keep_their_span_in_every_parametrisation():
    for name in FRAMES:
        made = Subspace.from_frame(frame(), trainable=True, parametrisation=name)
        torch.testing.assert_close(made.frame(), frame(), atol=2e-6, rtol=0)
