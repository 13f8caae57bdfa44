"""Parts of a batch, each through its own featurizer and edit: the same as each part run alone."""

from __future__ import annotations

import pytest
import torch

from intervene import (
    Add,
    BoundarySwap,
    Coordinates,
    GatedSwap,
    Identity,
    InterveneError,
    Intervention,
    LastToken,
    Noise,
    ShapeMismatch,
    StoreError,
    Subspace,
    Swap,
    Zero,
    collect_sources,
    intervene,
    save_plan,
    trainable_parameters,
)
from intervene.parts import Parts
from tests.intervene.values import learned, randn
from tests.tiny import tiny_batch, tiny_model

D, B, P = 32, 2, 3
SITE = "L1.block_output"


def pairs():
    return [
        (Subspace(D, 4, seed=1), Swap()),
        (Subspace(D, 6, seed=2), BoundarySwap(6, fraction=0.4)),
        (Identity(), learned(GatedSwap(D))),
        (Coordinates([3, 9]), Zero()),
        (Subspace(D, 2, seed=3), learned(Add(torch.zeros(2), trainable=True))),
    ]


def repeated(batch, times):
    return {name: torch.cat([tensor] * times) for name, tensor in batch.items()}


def test_each_part_is_as_if_alone():
    made = Parts(pairs())
    z, source = randn(5 * B, P, D), randn(5 * B, P, D, seed=2)
    together = made(z, source)
    for number, (lens, edit) in enumerate(pairs()):
        rows = slice(number * B, (number + 1) * B)
        wanted = lens.write(z[rows], edit(lens.read(z[rows]), lens.read(source[rows])))
        torch.testing.assert_close(together[rows], wanted, atol=1e-6, rtol=1e-6)
        assert not torch.allclose(wanted, z[rows])


@pytest.mark.parametrize("family, checkpointing", [("gpt2", False), ("llama", False), ("llama", True)])
def test_in_a_model_losses_and_gradients_are_those_of_the_runs_alone(family, checkpointing):
    model = tiny_model(family)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # newer name
        enable()
        model.train()
    base, source = tiny_batch(model, "left"), tiny_batch(model, "left", seed=1)
    together, apart = pairs(), pairs()
    plan = [Intervention(SITE, Parts(together), LastToken())]
    count = len(together)
    with intervene(model, plan, collect_sources(model, plan, repeated(source, count))):
        logits = model(**repeated(base, count), use_cache=False).logits
        logits.square().sum().backward()
    for (lens, edit), part in zip(apart, logits.detach().chunk(count), strict=True):
        alone = [Intervention(SITE, edit, LastToken(), lens)]
        with intervene(model, alone, collect_sources(model, alone, source) if edit.needs_source else None):
            out = model(**base, use_cache=False).logits
            if trainable_parameters(alone):
                out.square().sum().backward()
        torch.testing.assert_close(out.detach(), part, atol=1e-5, rtol=1e-5)
    ours = trainable_parameters(plan)
    theirs = trainable_parameters([Intervention(SITE, edit, None, lens) for lens, edit in apart])
    by_module = trainable_parameters([Intervention(SITE, edit, None, lens) for lens, edit in together])
    assert {id(p) for p in ours} == {id(p) for p in by_module} and len(ours) == 6
    for mine, other in zip(by_module, theirs, strict=True):
        assert mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4)


def test_a_pair_in_two_parts_gets_both_gradients():
    lens = Subspace(D, 2)
    z, source = randn(2 * B, P, D), randn(2 * B, P, D, seed=2)
    probe = randn(2 * B, P, D, seed=3)
    (Parts([(lens, Swap()), (lens, Swap())])(z, source) * probe).sum().backward()
    other = Subspace(D, 2)
    (other.write(z, other.read(source)) * probe).sum().backward()
    torch.testing.assert_close(lens.weight.grad, other.weight.grad, atol=1e-5, rtol=1e-5)


def test_one_source_position_serves_all_and_bf16_stays_bf16():
    made = Parts([(Subspace(D, 2), Swap()), (Identity(), Swap())])
    z, source = randn(2 * B, P, D, dtype=torch.bfloat16), randn(2 * B, 1, D, seed=2, dtype=torch.bfloat16)
    out = made(z, source)
    assert out.dtype == torch.bfloat16 and torch.equal(out[B:], source[B:].expand(B, P, D))


def test_a_source_is_needed_if_any_edit_needs_one():
    assert Parts([(Identity(), Zero()), (Identity(), Swap())]).needs_source
    sourceless = Parts([(Identity(), Zero()), (Coordinates([0]), Zero())])
    assert not sourceless.needs_source and sourceless(randn(2, 1, D), None)[0].abs().max() == 0


def test_train_and_eval_reach_every_edit():
    made = Parts(pairs())
    gates = [edit for _, edit in made.pairs]
    assert all(edit.training for edit in gates)
    made.eval()
    assert not any(edit.training for edit in gates)
    z, source = randn(5, 1, D), randn(5, 1, D, seed=2)
    swapped = gates[2].logits.detach() > 0
    assert torch.equal(made(z, source)[2, 0], torch.where(swapped, source[2, 0], z[2, 0]))


def test_vectors_per_example_are_of_one_part():
    made = Parts([(Identity(), Add(randn(B, D))), (Identity(), Add(randn(B, D, seed=4)))])
    z = randn(2 * B, P, D)
    assert made.rows == 2 * B
    torch.testing.assert_close(made(z, None), z + torch.cat([randn(B, D), randn(B, D, seed=4)])[:, None])


def test_what_cannot_be_done_in_parts_is_refused(tmp_path):
    with pytest.raises(ShapeMismatch, match="Parts of no pairs"):
        Parts([])
    with pytest.raises(ShapeMismatch, match=r"made for the widths \[8, 32\]"):
        Parts([(Subspace(8, 2), Swap()), (Subspace(D, 2), Swap())])
    with pytest.raises(ShapeMismatch, match="pair 0, GatedSwap through Subspace: the edit is 3 wide, 2 features"):
        Parts([(Subspace(D, 2), GatedSwap(3))])
    with pytest.raises(InterveneError, match=r"pair 0, Noise through Identity: it draws.*Run it alone"):
        Parts([(Identity(), Noise(0.1))])
    with pytest.raises(ShapeMismatch, match=r"5 rows are no 2 equal parts\. Repeat the batch 2 times"):
        Parts([(Identity(), Zero())] * 2)(randn(5, 1, D), None)
    model = tiny_model("llama")
    wrong = [Intervention(SITE, Parts([(Subspace(8, 2), Zero())]))]
    with pytest.raises(ShapeMismatch, match="the edit is 8 wide, but 32 features"), intervene(model, wrong):
        pass
    with pytest.raises(StoreError, match=r"Parts cannot be stored, .*Store the plan of one part"):
        save_plan([Intervention(SITE, Parts([(Identity(), Swap())]))], tmp_path / "plan")
    assert not list(tmp_path.iterdir())


def test_an_edit_that_learns_alone_can_be_stored_from_its_part(tmp_path):
    lens, edit = Parts(pairs()).pairs[1]
    assert save_plan([Intervention(SITE, edit, LastToken(), lens)], tmp_path / "plan").is_dir()
