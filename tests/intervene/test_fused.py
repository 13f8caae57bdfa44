"""Fused blocks and losses give what the model's own modules give, and stand aside where they would not."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from intervene import Intervention, Subspace, Swap, Zero, frozen, intervene
from intervene.families import locate
from intervene.fused import fusable, fused
from intervene.fused_loss import plain_head, unembedded_losses
from intervene.marked import Marked
from intervene.precision import fast_products
from intervene.suffix import prefix_of, suffix_logits
from tests.intervene.test_suffix import full_pass, left_padded
from tests.tiny import tiny_batch, tiny_model

LIKE_LLAMA = ["llama", "mistral", "qwen2"]


def last_logits(model, batch, stream):
    """Own blocks or fused ones, from embeddings `stream`; logits at the last column and the gradient to `stream`."""
    x = stream.clone().requires_grad_()
    logits = model(inputs_embeds=x, attention_mask=batch["attention_mask"], use_cache=False).logits[:, -1]
    logits.log_softmax(-1)[:, 7].sum().backward()
    return logits.detach(), x.grad


@pytest.mark.parametrize("name", LIKE_LLAMA)
@pytest.mark.parametrize("padding", ["left", None])
@pytest.mark.parametrize("last", [False, True])
def test_a_fused_block_equals_the_models_own(name, padding, last):
    model = tiny_model(name).eval()
    batch = tiny_batch(model, padding=padding)
    stream = model.get_input_embeddings()(batch["input_ids"]).detach()
    with frozen(model):
        logits, gradient = last_logits(model, batch, stream)
        blocks = locate(model).layers
        with fused(blocks, last=blocks[-1] if last else None) as which:
            found, slope = last_logits(model, batch, stream)
    assert which == list(range(model.config.num_hidden_layers))
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(slope, gradient, atol=1e-5, rtol=1e-4)


def test_few_rows_lie_by_columns_and_give_the_same():
    model = tiny_model("llama", intermediate_size=1100).eval()  # wide enough for products of the other layout
    batch = tiny_batch(model, padding=None)
    stream = model.get_input_embeddings()(batch["input_ids"]).detach()
    with frozen(model):
        expected = last_logits(model, batch, stream)
        with fused(locate(model).layers):
            found = last_logits(model, batch, stream)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_in_bf16_products_it_is_no_farther_from_the_truth_than_own_blocks_are():
    model = tiny_model("llama").eval()
    batch = tiny_batch(model, padding="left")
    stream = model.get_input_embeddings()(batch["input_ids"]).detach()
    with frozen(model):
        logits, gradient = last_logits(model, batch, stream)
        with fast_products():
            own, own_slope = last_logits(model, batch, stream)
            with fused(locate(model).layers):
                ours, slope = last_logits(model, batch, stream)
    if torch.equal(own, logits):
        pytest.skip("this processor has no instructions for bf16 products")
    assert 0 < (ours - logits).norm() < 3 * (own - logits).norm()
    assert 0 < (slope - gradient).norm() < 3 * (own_slope - gradient).norm()


@pytest.mark.parametrize("name", ["gpt2", "gemma", "gemma2", "olmo2", "phi3", "qwen3", "mixtral"])
def test_blocks_of_another_shape_are_left_alone(name):
    model = tiny_model(name).eval()
    with frozen(model), fused(locate(model).layers) as which:
        assert which == []


def test_watched_trained_adapted_or_rounded_blocks_are_left_alone():
    model = tiny_model("llama").eval()
    first, second, third = locate(model).layers
    assert fusable(first) is None  # its weights would need gradients
    with torch.no_grad():
        assert fusable(first) is not None
    with frozen(model):
        assert fusable(first) is not None
        with intervene(model, [Intervention("L1.mlp_output", Zero())]):
            assert fusable(second) is None and fusable(third) is not None
            model(**tiny_batch(model))
        handle = second.self_attn.register_forward_hook(lambda *_: None)
        assert fusable(second) is None
        handle.remove()
        assert fusable(second) is not None
        model.train()
        assert fusable(first) is None
        model.eval()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).eval()
    with frozen(adapted):
        assert all(fusable(block) is None for block in (first, second, third))
    with frozen(half := tiny_model("llama").eval().bfloat16()):
        assert fusable(locate(half).layers[0]) is None


def test_the_blocks_are_as_before_after_an_error():
    model = tiny_model("llama").eval()
    with frozen(model), pytest.raises(KeyError), fused(locate(model).layers):
        raise KeyError
    assert all("forward" not in block.__dict__ for block in locate(model).layers)


@pytest.mark.parametrize("name", LIKE_LLAMA)
def test_a_model_that_agrees_is_fused(name):
    model = tiny_model(name).eval()
    assert prefix_of(model, left_padded(model), [0, 1]).fused == {0, 1, 2}


@pytest.mark.parametrize("name", ["granite", "smollm3"])
def test_a_model_that_only_looks_alike_is_not(name):
    """Granite scales its residuals, SmolLM3 leaves some layers unrotated; their modules are named like Llama's."""
    model = tiny_model(name).eval()
    with frozen(model):
        assert fusable(locate(model).layers[0]) is not None
    prefix = prefix_of(model, left_padded(model), [0, 1])
    assert prefix.exact and not prefix.fused


@pytest.mark.parametrize("name", [*LIKE_LLAMA, "granite", "gpt2", "gemma2"])
def test_losses_and_their_gradient_equal_those_of_the_full_pass(name):
    model = tiny_model(name).eval()
    inputs = left_padded(model)
    prefix = prefix_of(model, inputs, [0])
    width = model.config.hidden_size
    lens = Subspace(width, 3)
    plan = [Intervention("L0.block_output", Swap(), Marked("middle"), lens)]
    source, labels = torch.randn(2, 1, width, generator=torch.Generator().manual_seed(1)), torch.tensor([5, 9])
    found = []
    for way in ("suffix", "full"):
        lens.zero_grad()
        with frozen(model):
            if way == "suffix":
                losses = suffix_logits(model, plan, [source], prefix, labels)
            else:
                logits = full_pass(model, plan, [source], inputs)
                losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            losses.sum().backward()
        found.append((losses.detach(), lens.weight.grad.clone()))
    assert bool(found[0][1].abs().max() > 1e-4)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("words", [96, 512, 1300])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_unembedded_losses_are_the_cross_entropy_of_the_logits(words, size):
    generator = torch.Generator().manual_seed(words)
    h = (size * torch.randn(5, 16, generator=generator)).requires_grad_()
    weight = torch.randn(words, 16, generator=generator)
    labels = torch.randint(0, words, (5,), generator=generator)
    exact = h.detach().double().requires_grad_()
    expected = nn.functional.cross_entropy(exact @ weight.double().T, labels, reduction="none")
    found = unembedded_losses(h, weight, labels)
    weights = torch.arange(1.0, 6)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(found.double(), expected, atol=1e-4 * size, rtol=1e-5)
    torch.testing.assert_close(h.grad.double(), exact.grad, atol=1e-3, rtol=1e-3)


def test_only_a_frozen_plain_unembedding_is_multiplied_in_parts():
    model = tiny_model("llama")
    assert plain_head(model) is None  # something may train it
    with frozen(model):
        assert plain_head(model) is model.get_output_embeddings()
        handle = model.get_output_embeddings().register_forward_hook(lambda *_: None)
        assert plain_head(model) is None
        handle.remove()
    assert plain_head(nn.Linear(2, 2)) is None
