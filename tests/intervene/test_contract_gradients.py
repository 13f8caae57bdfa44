"""Clauses 6 and 7: gradients under checkpointing equal those without it, and noise is drawn once per forward."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

from intervene import (
    Add,
    Affine,
    AllTokens,
    AmbiguousForward,
    At,
    Intervention,
    LastToken,
    Noise,
    Scale,
    StopGradient,
    Subspace,
    Swap,
    capture,
    collect_sources,
    intervene,
    trainable_parameters,
)
from tests.intervene.by_hand import block_output, close, hook_state, vector
from tests.tiny import tiny_batch, tiny_model

MODES = {"plain": None, "not reentrant": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}
CHECKPOINTED = ["not reentrant", "reentrant"]
SITES = ["L1.block_output", "L1.mlp_output", "L1.head_output[1,3]", "L0.block_input", "final_norm_output"]
pytestmark = pytest.mark.filterwarnings("ignore:.*requires_grad=True.*:UserWarning")


def trained(mode, family="llama"):
    """Return a model in training mode; embeddings require gradients, so that reentrant checkpointing has any."""
    model = tiny_model(family).train()
    if MODES[mode] is not None:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # newer name
        enable(MODES[mode])
    return model


def loss_of(model, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return model(**batch, labels=labels, use_cache=False).loss


def plan_at(site, edit, positions):
    width = {"L1.head_output[1,3]": 16}.get(site, 32)
    if edit == "add":
        return [Intervention(site, Add(vector(1, width=width), trainable=True), positions)]
    if edit == "affine":
        affine = Affine(4)  # starts as the identity, where the frame has no gradient
        torch.nn.init.normal_(affine.weight, generator=torch.Generator().manual_seed(5))
        return [Intervention(site, affine, positions, Subspace(width, 4, seed=1, trainable=True))]
    return [Intervention(site, Swap(), positions, Subspace(width, 4, seed=1, trainable=True))]


def gradients(mode, site, edit, positions, family="llama"):
    model, plan = trained(mode, family), plan_at(site, edit, positions)
    batch = tiny_batch(model, "right")
    sources = collect_sources(model.eval(), plan, tiny_batch(model, "right", seed=3))
    model.train()
    torch.manual_seed(0)  # of the models that drop out
    with intervene(model, plan, sources):
        loss_of(model, batch).backward()
    ours = [parameter.grad for parameter in trainable_parameters(plan)]
    return ours, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mode", CHECKPOINTED)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("edit", ["add", "affine", "swap"])
@pytest.mark.parametrize("positions", [AllTokens(), At(1, -1)], ids=["all", "at"])
def test_gradients_equal_those_without_checkpointing(mode, site, edit, positions):
    expected_ours, expected = gradients("plain", site, edit, positions)
    ours, theirs = gradients(mode, site, edit, positions)
    assert all(float(gradient.abs().max()) > 0 for gradient in expected_ours)
    for a, b in zip(ours, expected_ours, strict=True):
        close(a, b)
    for name, gradient in theirs.items():
        close(gradient, expected[name])


@pytest.mark.parametrize("mode", CHECKPOINTED)
@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "falcon"])
def test_families_under_checkpointing(mode, family):
    expected_ours, expected = gradients("plain", "L1.mlp_output", "add", AllTokens(), family)
    ours, theirs = gradients(mode, "L1.mlp_output", "add", AllTokens(), family)
    for a, b in zip(ours, expected_ours, strict=True):
        close(a, b)
    for name, gradient in theirs.items():
        if gradient is not None:
            close(gradient, expected[name])


def test_the_gradient_of_a_vector_is_that_of_a_raw_hook():
    model, v = trained("plain"), vector(1).requires_grad_()
    batch, plan = tiny_batch(model, "right"), plan_at("L1.block_output", "add", AllTokens())
    with intervene(model, plan):
        loss_of(model, batch).backward()
    real = batch["attention_mask"][..., None]
    with block_output(model, 1, lambda h: h + real * v):
        loss_of(model, batch).backward()
    close(plan[0].edit.vector.grad, v.grad)


@pytest.mark.parametrize("mode", CHECKPOINTED)
def test_the_gradient_of_frozen_models_reaches_the_edit(mode):
    """With all parameters frozen, reentrant checkpointing needs an input that requires a gradient."""
    results = []
    for how in ("plain", mode):
        model, plan = trained(how), plan_at("L0.block_output", "add", LastToken())
        model.requires_grad_(False)
        model.enable_input_require_grads()
        with intervene(model, plan):
            loss_of(model, tiny_batch(model)).backward()
        results.append(plan[0].edit.vector.grad)
    close(*results)


@pytest.mark.parametrize("mode", CHECKPOINTED)
def test_backward_outside_the_block_is_refused(mode):
    model = trained(mode)
    before = hook_state(model)
    with intervene(model, plan_at("L1.mlp_output", "add", AllTokens())):
        loss = loss_of(model, tiny_batch(model))
    with pytest.raises(AmbiguousForward, match="Call backward\\(\\) inside the block"):
        loss.backward()
    assert hook_state(model) == before


@pytest.mark.parametrize("mode", CHECKPOINTED)
def test_backward_outside_the_block_is_refused_for_hidden_states_too(mode):
    model = trained(mode)
    with intervene(model, plan_at("L0.mlp_output", "add", AllTokens())):
        out = model(**tiny_batch(model), output_hidden_states=True, use_cache=False)
    with pytest.raises(AmbiguousForward, match="Call backward\\(\\) inside the block"):
        out.hidden_states[2].sum().backward()


def test_backward_outside_the_block_is_right_without_checkpointing():
    model, plan = trained("plain"), plan_at("L1.mlp_output", "add", AllTokens())
    with intervene(model, plan):
        loss = loss_of(model, tiny_batch(model))
    loss.backward()
    assert plan[0].edit.vector.grad is not None


def _two_batches(model):
    return tiny_batch(model, "right"), tiny_batch(model, "left", seed=4, lengths=(5, 3, 4))


def _one_after_another(model, first, second):
    loss_of(model, first).backward()
    loss_of(model, second).backward()


def _first_then_second(model, first, second):
    losses = loss_of(model, first), loss_of(model, second)
    losses[0].backward()
    losses[1].backward()


def _second_then_first(model, first, second):
    losses = loss_of(model, first), loss_of(model, second)
    losses[1].backward()
    losses[0].backward()


def _together(model, first, second):
    (loss_of(model, first) + loss_of(model, second)).backward()


def _one_without_backward(model, first, second):
    loss_of(model, first).backward()
    with torch.no_grad():
        loss_of(model, second)
    loss_of(model, second).backward()


def _one_dropped(model, first, second):
    loss_of(model, first)
    loss_of(model, first).backward()
    loss_of(model, second).backward()


ORDERS = [_first_then_second, _second_then_first, _together, _one_without_backward, _one_dropped]


@pytest.mark.parametrize("mode", CHECKPOINTED)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("positions", [AllTokens(), LastToken()], ids=["all", "last"])
def test_several_forwards_in_one_block_are_told_apart(mode, order, positions):
    """Each recomputation must use its own pass's padding and positions, whatever the order of the backwards."""
    results = []
    for how, work in (("plain", _one_after_another), (mode, order)):
        model, plan = trained(how), plan_at("L1.mlp_output", "add", positions)
        batches = _two_batches(model)
        with intervene(model, plan):
            work(model, *batches)
        results.append([plan[0].edit.vector.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        close(a, b)


@pytest.mark.parametrize("mode", CHECKPOINTED)
def test_report_counts_no_recomputation(mode):
    model, plan = trained(mode), plan_at("L1.mlp_output", "add", AllTokens())
    with intervene(model, plan) as applied, capture(model, "L1.mlp_output", LastToken()) as acts:
        loss_of(model, tiny_batch(model, "right")).backward()
    report = applied.report()[0]
    assert (report.calls, report.tokens) == (1, 11)
    assert len(acts.every("L1.mlp_output")) == 1


@pytest.mark.parametrize("mode", CHECKPOINTED)
def test_nested_blocks_under_checkpointing(mode):
    results = []
    for how in ("plain", mode):
        model = trained(how)
        outer = plan_at("L1.mlp_output", "add", AllTokens())
        inner = [Intervention("L1.mlp_output", Scale(0.5), At(0, -1))]
        with intervene(model, outer), intervene(model, inner):
            loss_of(model, tiny_batch(model, "left")).backward()
        results.append([outer[0].edit.vector.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        close(a, b)


@pytest.mark.parametrize("mode", CHECKPOINTED)
def test_a_stopped_source_run_between_forward_and_backward_does_not_confuse_the_recomputation(mode):
    results = []
    for how in ("plain", mode):
        model, plan = trained(how), plan_at("L1.mlp_output", "add", LastToken())
        swap = [Intervention("L0.block_output", Swap(), At(0))]
        with intervene(model, plan):
            loss = loss_of(model, tiny_batch(model, "right"))
            if how == mode:
                collect_sources(model, swap, tiny_batch(model, "left", seed=4, lengths=(3, 5)))
            loss.backward()
        results.append([plan[0].edit.vector.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        close(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_whole_model_is_refused(reentrant):
    model = tiny_model("llama")
    embedded = model.model.embed_tokens(tiny_batch(model)["input_ids"]).detach().requires_grad_()

    def forward(h):
        return model(inputs_embeds=h, use_cache=False).logits

    with intervene(model, _noise(AllTokens())):
        logits = torch.utils.checkpoint.checkpoint(forward, embedded, use_reentrant=reentrant)
        with pytest.raises(AmbiguousForward, match="a checkpoint around the whole of it"):
            logits.sum().backward()


def test_stop_gradient_cuts_the_gradient_and_nothing_else():
    model, batch = trained("plain"), None
    batch = tiny_batch(model)
    expected = model(**batch).logits
    with intervene(model, [Intervention("L1.block_output", StopGradient())]):
        logits = model(**batch).logits
        logits.sum().backward()
    close(logits, expected)
    assert all(p.grad is None or not p.grad.any() for p in model.model.layers[1].parameters())
    assert any(p.grad.any() for p in model.model.layers[2].parameters())


# --- random edits -------------------------------------------------------------------------------------------------


def _noise(positions, seed=0):
    return [Intervention("L1.mlp_output", Noise(0.7, seed=seed), positions)]


@pytest.mark.parametrize("mode", CHECKPOINTED)
@pytest.mark.parametrize("positions", [AllTokens(), LastToken()], ids=["all", "last"])
def test_noise_is_replayed_by_recomputation(mode, positions):
    results = []
    for how in ("plain", mode):
        model, plan = trained(how), _noise(positions)
        with intervene(model, plan):
            for batch in _two_batches(model):
                loss_of(model, batch).backward()
        results.append([p.grad for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        close(a, b)


@torch.no_grad()
def test_noise_is_drawn_anew_in_each_forward_and_reproducible_by_seed():
    model = tiny_model("llama")
    batch = tiny_batch(model)

    def draws(seed):
        plan = _noise(LastToken(), seed)
        with (
            capture(model, "L1.mlp_output", LastToken()) as before,
            intervene(model, plan),
            capture(model, "L1.mlp_output", LastToken()) as after,
        ):
            for _ in range(3):
                model(**batch)
        pairs = zip(after.every("L1.mlp_output"), before.every("L1.mlp_output"), strict=True)
        return [(a - b) / 0.7 for a, b in pairs]

    first, again, other = draws(0), draws(0), draws(1)
    for a, b, c in zip(first, again, other, strict=True):
        close(a, b)
        assert not torch.allclose(a, c)
    assert not torch.allclose(first[0], first[1])
    expected = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first[0], expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_noise_does_not_touch_the_global_generator():
    model = tiny_model("llama")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with intervene(model, _noise(AllTokens())):
        model(**tiny_batch(model))
    assert torch.equal(torch.rand(3), expected)
