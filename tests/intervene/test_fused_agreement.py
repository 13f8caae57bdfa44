"""Fused blocks and losses are used for what they were compared on, and for nothing else."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from intervene import Intervention, ModelChanged, Subspace, Swap, capture, frozen
from intervene.families import locate
from intervene.fused import fusable
from intervene.marked import Marked
from intervene.suffix import prefix_of, suffix_logits
from tests.intervene.test_suffix import full_pass, left_padded
from tests.tiny import tiny_model


class Twice(nn.SiLU):
    """Looks like SiLU and is not."""

    def forward(self, x):
        return 2 * super().forward(x)


Twice.__name__ = "SiLU"


@pytest.mark.parametrize("odd", [0, 2])
@pytest.mark.parametrize("kept", [[1], [0, 1, 2]])
def test_agreement_is_asked_of_every_block_and_again_when_a_module_has_changed(odd, kept):
    model = tiny_model("llama").eval()
    inputs = left_padded(model)
    assert prefix_of(model, inputs, kept).fused
    locate(model).layers[odd].mlp.act_fn = Twice().eval()
    with frozen(model):
        assert fusable(locate(model).layers[odd]) is not None
    prefix = prefix_of(model, inputs, kept)
    assert prefix.exact and not prefix.fused


def suffix_and_full(model, prefix, inputs, labels=(5, 9)):
    """Return twice (logits, losses, gradient to the plan): by the suffix, and by the model's own full pass."""
    width = model.config.hidden_size
    lens = Subspace(width, 3)
    plan = [Intervention("L0.block_output", Swap(), Marked("middle"), lens)]
    source = torch.randn(len(prefix), 1, width, generator=torch.Generator().manual_seed(1))
    found, labels = [], torch.tensor(labels)
    for way in ("suffix", "full"):
        lens.zero_grad()
        with torch.no_grad():
            logits = (suffix_logits(model, plan, [source], prefix) if way == "suffix"
                      else full_pass(model, plan, [source], inputs))  # fmt: skip
        with frozen(model):
            if way == "suffix":
                losses = suffix_logits(model, plan, [source], prefix, labels)
            else:
                losses = nn.functional.cross_entropy(full_pass(model, plan, [source], inputs), labels, reduction="none")
            losses.sum().backward()
        found.append((logits, losses.detach(), lens.weight.grad.clone()))
    return found


def agrees(model, prefix, inputs, **more):
    for one, other in zip(*suffix_and_full(model, prefix, inputs, **more), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_block_that_was_not_compared_is_not_fused_later():
    model = tiny_model("granite").eval()
    inputs = left_padded(model)
    handles = [block.register_forward_hook(lambda *_: None) for block in locate(model).layers]
    prefix = prefix_of(model, inputs, [0])
    assert not prefix.fused
    for handle in handles:
        handle.remove()
    with pytest.raises(ModelChanged, match=r"a hook came or went on module model\.layers\.0"):
        agrees(model, prefix, inputs)
    agrees(model, prefix_of(model, inputs, [0]), inputs)


@pytest.mark.parametrize("name", ["granite", "smollm3", "llama"])
@pytest.mark.parametrize("way", ["mode", "attention"])
def test_a_prefix_of_another_mode_is_refused_and_a_new_one_is_right(name, way):
    model = tiny_model(name).eval()
    inputs = left_padded(model)
    model.train() if way == "mode" else model.set_attn_implementation("eager")
    prefix = prefix_of(model, inputs, [0])
    model.eval() if way == "mode" else model.set_attn_implementation("sdpa")
    what = "the model itself was put into train or eval mode" if way == "mode" else "was 'eager' and is 'sdpa'"
    with pytest.raises(ModelChanged, match=what):
        suffix_and_full(model, prefix, inputs)
    agrees(model, prefix_of(model, inputs, [0]), inputs)


def test_agreement_on_one_column_says_nothing_of_others():
    model = tiny_model("smollm3").eval()  # its second block turns nothing, which one column does not show
    one = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": torch.ones(2, 1, dtype=torch.long)}
    prefix_of(model, one, [0])
    inputs = left_padded(model)
    prefix = prefix_of(model, inputs, [0])
    assert not prefix.fused
    agrees(model, prefix, inputs)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("token", [7, 70])
def test_a_hook_that_edits_logits_is_obeyed(when, token):
    model = tiny_model("llama").eval()
    inputs = left_padded(model)

    def ban(module, args, output):
        output.logits = output.logits.clone()
        output.logits[..., token] = -1e4
        return output

    prefix = prefix_of(model, inputs, [0]) if when == "after" else None
    model.register_forward_hook(ban)
    prefix = prefix or prefix_of(model, inputs, [0])
    agrees(model, prefix, inputs, labels=(token, 9))


def test_logits_that_are_capped_behind_the_head_are_not_taken_from_it():
    model = tiny_model("gemma2", final_logit_softcapping=80.0).eval()
    inputs = left_padded(model)
    prefix = prefix_of(model, inputs, [0])
    assert prefix.exact and not prefix.fused
    agrees(model, prefix, inputs)


@pytest.mark.parametrize("write", ["data", "merge"])
def test_copies_of_weights_are_made_anew_for_every_prefix(write):
    torch.manual_seed(0)
    model = tiny_model("llama", intermediate_size=1100).eval()  # wide enough for turned copies
    inputs = left_padded(model)
    agrees(model, prefix_of(model, inputs, [0]), inputs)
    if write == "data":
        locate(model).layers[2].mlp.down_proj.weight.data.mul_(-1)
    else:
        adapted = get_peft_model(model, LoraConfig(target_modules=["down_proj"], r=4, init_lora_weights=False))
        model = adapted.merge_and_unload().eval()
    prefix = prefix_of(model, inputs, [0])
    assert prefix.fused
    agrees(model, prefix, inputs)


def test_blocks_are_looked_at_again_when_an_adapter_is_gone():
    model = tiny_model("llama").eval()
    inputs = left_padded(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).eval()
    assert not prefix_of(adapted, inputs, [0]).fused
    assert prefix_of(adapted.unload(), inputs, [0]).fused == {0, 1, 2}


def test_hidden_states_that_were_once_asked_for_cost_no_speed():
    model = tiny_model("llama").eval()
    inputs = left_padded(model)
    prefix = prefix_of(model, inputs, [0])
    model(inputs["input_ids"], output_hidden_states=True)  # leaves hooks behind that do nothing
    assert any(block._forward_hooks for block in locate(model).layers)
    assert prefix_of(model, inputs, [0]).fused == {0, 1, 2}
    agrees(model, prefix, inputs)


def test_a_patched_class_and_hooks_on_all_modules_are_seen(monkeypatch):
    model = tiny_model("llama").eval()
    inputs = left_padded(model)
    prefix = prefix_of(model, inputs, [0])
    kind = type(locate(model).layers[0].mlp)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 0.5 * own(self, x))
    with pytest.raises(ModelChanged, match=r"module model\.layers\.0\.mlp got another forward"):
        suffix_and_full(model, prefix, inputs)
    fresh = prefix_of(model, inputs, [0])
    assert not fresh.fused
    agrees(model, fresh, inputs)
    monkeypatch.undo()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 0.5 * output if isinstance(module, kind) else None
    )
    try:
        with pytest.raises(ModelChanged, match="the number of hooks on all modules was 0 and is 1"):
            suffix_and_full(model, prefix, inputs)
        agrees(model, prefix_of(model, inputs, [0]), inputs)
    finally:
        handle.remove()


def test_other_readers_see_the_norm_of_every_column():
    model = tiny_model("llama").eval()
    inputs = left_padded(model)
    prefix = prefix_of(model, inputs, [0])
    plan = [Intervention("L0.block_output", Swap(), Marked("middle"))]
    source = torch.randn(2, 1, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    found = []
    for way in (lambda: suffix_logits(model, plan, [source], prefix), lambda: full_pass(model, plan, [source], inputs)):
        with torch.no_grad(), capture(model, ["final_norm_output"]) as acts:
            way()
        found.append(acts["final_norm_output"])
    width = found[0].shape[1]
    torch.testing.assert_close(found[0], found[1][:, -width:], atol=1e-5, rtol=1e-4)


def test_pairs_of_inference_mode_can_be_fitted_and_autocast_is_told():
    model = tiny_model("llama").eval()
    inputs = left_padded(model)
    with torch.inference_mode():
        prefix = prefix_of(model, inputs, [0])
    assert prefix.fused
    agrees(model, prefix, inputs)
    with torch.autocast("cpu"), pytest.raises(ModelChanged, match="autocast on the CPU was False and is True"):
        suffix_and_full(model, prefix, inputs)


def test_another_default_dtype_changes_nothing():
    model = tiny_model("llama").eval()
    inputs = left_padded(model)
    prefix = prefix_of(model, inputs, [0])
    torch.set_default_dtype(torch.bfloat16)
    try:
        source = torch.zeros(2, 1, model.config.hidden_size, dtype=torch.float32)
        plan = [Intervention("L0.block_output", Swap(), Marked("middle"))]
        labels = torch.tensor([5, 9])
        with torch.no_grad():
            losses = suffix_logits(model, plan, [source], prefix, labels)
            logits = suffix_logits(model, plan, [source], prefix)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(losses, nn.functional.cross_entropy(logits, labels, reduction="none"))


def test_labels_below_zero_are_cross_entropy_s_own_affair():
    model = tiny_model("llama").eval()
    inputs = left_padded(model)
    agrees(model, prefix_of(model, inputs, [0]), inputs, labels=(-100, 9))
