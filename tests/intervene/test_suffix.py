"""Suffix recomputation gives the logits and gradients of the full pass, on every family, or says that it does not."""

from __future__ import annotations

import pytest
import torch

from intervene import BadVector, Intervention, ShapeMismatch, Subspace, Swap, Zero, intervene
from intervene.marked import Marked
from intervene.prefix import positions_of
from intervene.suffix import call_inputs, first_block, prefix_of, suffix_logits
from tests.tiny import TINY, tiny_batch, tiny_model

FAMILIES = sorted(TINY)


def left_padded(model, seed=0):
    batch = tiny_batch(model, padding="left", seed=seed)
    length = batch["input_ids"].shape[1]
    marks = {"last": torch.full((2, 1), length - 1), "middle": torch.full((2, 1), length - 3)}
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "marks": marks}


def full_pass(model, plan, sources, inputs):
    """The answer from elsewhere: the model's own uncached forward over all tokens and all layers."""
    full = {**inputs, "position_ids": positions_of(inputs["attention_mask"])}
    call = call_inputs(model, full)
    call.pop("logits_to_keep", None)
    with intervene(model, plan, sources, prompt=full):
        return model(**call, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("where", ["last", "middle"])
def test_equals_the_full_pass(name, where):
    model = tiny_model(name)
    inputs = left_padded(model)
    prefix = prefix_of(model, inputs, range(model.config.num_hidden_layers))
    assert prefix.exact, f"{name}: suffix differs by {prefix.difference}"
    width = model.config.hidden_size
    for layer in range(model.config.num_hidden_layers):
        for component in ("block_output", "mlp_output"):
            plan = [Intervention(f"L{layer}.{component}", Swap(), Marked(where), Subspace(width, 3))]
            source = torch.randn(2, 1, width, generator=torch.Generator().manual_seed(layer))
            with torch.no_grad():
                found = suffix_logits(model, plan, [source], prefix)
                expected = full_pass(model, plan, [source], inputs)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_gradients_equal_those_of_the_full_pass(name):
    model = tiny_model(name)
    inputs = left_padded(model)
    prefix = prefix_of(model, inputs, [0])
    lens = Subspace(model.config.hidden_size, 3)
    plan = [Intervention("L0.block_output", Swap(), Marked("middle"), lens)]
    source = torch.randn(2, 1, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    found = []
    for logits in (suffix_logits(model, plan, [source], prefix), full_pass(model, plan, [source], inputs)):
        lens.weight.grad = None
        logits.square().sum().backward()
        found.append(lens.weight.grad.clone())
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
    assert found[0].abs().max() > 0


def test_the_stored_cache_neither_grows_nor_changes():
    model = tiny_model("llama")
    prefix = prefix_of(model, left_padded(model), [0, 1])
    before = [keys.clone() for keys, _ in prefix.cache]
    plan = [Intervention("L1.block_output", Zero(), Marked("middle"), phase="prompt")]
    once = suffix_logits(model, plan, [None], prefix)
    again = suffix_logits(model, plan, [None], prefix)
    assert torch.equal(once, again)
    assert all(torch.equal(a, b) for a, (b, _) in zip(before, prefix.cache, strict=True))


def test_blocks_are_themselves_again_after_an_exception():
    model = tiny_model("llama")
    inputs = left_padded(model)
    prefix = prefix_of(model, inputs, [0, 1])
    plan = [Intervention("L1.block_output", Swap(), Marked("last"))]
    with pytest.raises(ShapeMismatch, match="the source has shape"):
        suffix_logits(model, plan, [torch.zeros(2, 1, 5)], prefix)

    def broken(*_args, **_kwargs):
        raise RuntimeError("broken on purpose")

    handle = model.lm_head.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        suffix_logits(model, plan, [torch.zeros(2, 1, model.config.hidden_size)], prefix)
    handle.remove()
    assert not any("forward" in block.__dict__ for block in model.model.layers)
    with torch.no_grad():
        expected = prefix.logits
        found = model(**call_inputs(model, prefix.inputs)).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_model_whose_cached_pass_differs_falls_back_to_full_passes():
    model = tiny_model("llama")
    inputs = left_padded(model)
    exact = prefix_of(model, inputs, [0])
    # a head that depends on how many tokens it is shown: cached and full passes of this model do differ
    plain = model.model.norm.forward
    model.model.norm.forward = lambda h: plain(h) * h.shape[1]
    wrong = prefix_of(model, inputs, [0])
    assert exact.exact and not wrong.exact and wrong.difference > 0.01
    plan = [Intervention("L0.block_output", Zero(), Marked("last"), phase="prompt")]
    with torch.no_grad():
        found = suffix_logits(model, plan, [None], wrong)
        torch.testing.assert_close(found, full_pass(model, plan, [None], inputs), atol=1e-5, rtol=1e-5)


def test_right_padding_is_refused():
    model = tiny_model("llama")
    batch = tiny_batch(model, padding="right", seed=0)
    with pytest.raises(ShapeMismatch, match=r"last column of some example is padding\. Pad on the left"):
        prefix_of(model, {**batch, "marks": {}}, [0])


def test_first_block_is_the_last_whose_output_no_edit_precedes():
    swap = [Intervention("L3.block_output", Swap()), Intervention("L2.mlp_output", Swap())]
    assert first_block(swap[:1], 6) == 3
    assert first_block(swap, 6) == 1
    assert first_block([Intervention("embedding_output", Swap())], 6) == -1
    assert first_block([Intervention("final_norm_output", Swap())], 6) == 5


def test_a_model_that_gives_nan_is_refused_and_not_called_exact():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(BadVector, match=r"own logits are NaN or infinite.*Check the weights"):
        prefix_of(model, left_padded(model), [0])


def test_an_empty_plan_is_refused():
    model = tiny_model("llama")
    prefix = prefix_of(model, left_padded(model), [0])
    with pytest.raises(ShapeMismatch, match="the plan holds no intervention"):
        suffix_logits(model, [], [], prefix)
