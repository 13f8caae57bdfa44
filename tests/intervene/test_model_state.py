"""What was kept of a model is refused, with the reason, as soon as the model computes otherwise."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from intervene import Add, AllTokens, Intervention, ModelChanged, Swap, frozen, intervene
from intervene.marked import Marked
from intervene.model_state import ModelState
from intervene.suffix import prefix_of, suffix_logits
from tests.intervene.test_suffix import full_pass, left_padded
from tests.tiny import TINY, tiny_batch, tiny_model


def asked(model, prefix):
    source = torch.zeros(2, 1, model.config.hidden_size)
    with torch.no_grad():
        return suffix_logits(model, [Intervention("L1.block_output", Swap(), Marked("middle"))], [source], prefix)


def written(model):
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()


def written_behind(model):
    model.model.layers[2].mlp.up_proj.weight.data.mul_(-1)


def stepped(model):
    model(**tiny_batch(model)).logits.sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def replaced(model):
    model.model.layers[1].mlp = type(model.model.layers[1].mlp)(model.config).eval()


def scaled(model):
    model.model.layers[1].self_attn.scaling *= 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (written, r"module model\.layers\.0\.mlp\.down_proj had weight written or replaced"),
        (written_behind, r"a weight was written through \.data"),
        (stepped, r"had weight written or replaced"),
        (replaced, r"module model\.layers\.1 had a module below it replaced"),
        (scaled, r"module model\.layers\.1\.self_attn had its scale changed"),
        (lambda model: model.train(), "the model itself was put into train or eval mode"),
        (lambda model: model.model.embed_tokens.register_forward_hook(lambda *_: None), r"a hook came or went on"),
        (lambda model: model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: None), r"a hook came or went on"),
    ],
)
def test_kept_activations_of_a_model_that_has_changed_are_refused(change, told):
    model = tiny_model("llama").eval()
    prefix = prefix_of(model, left_padded(model), [1])
    asked(model, prefix)
    change(model)
    with pytest.raises(ModelChanged, match=told) as error:
        asked(model, prefix)
    assert "Prepare the pairs, or the prefix, again." in str(error.value)


def test_steering_around_a_suffix_is_refused_and_asked_for_in_its_plan_it_is_right():
    model = tiny_model("llama").eval()
    inputs = left_padded(model)
    prefix = prefix_of(model, inputs, [0, 1])
    push = Intervention("L0.block_output", Add(torch.ones(model.config.hidden_size)), AllTokens())
    with pytest.raises(ModelChanged, match="a hook came or went on module model"), intervene(model, [push]):
        asked(model, prefix)
    swap = Intervention("L1.block_output", Swap(), Marked("middle"))
    source = torch.zeros(2, 1, model.config.hidden_size)
    with torch.no_grad():
        found = suffix_logits(model, [push, swap], [None, source], prefix)
        expected = full_pass(model, [push, swap], [None, source], inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_adapters_that_are_switched_off_or_scaled_are_noticed():
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model.eval()
    prefix = prefix_of(model, left_padded(model), [1])
    asked(model, prefix)
    with model.disable_adapter(), pytest.raises(ModelChanged, match="had its adapters switched"):
        asked(model, prefix)
    asked(model, prefix)
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] *= 2
    with pytest.raises(ModelChanged, match="had its scale changed"):
        asked(model, prefix)


@pytest.mark.parametrize("name", sorted(TINY))
def test_passes_gradients_and_freezing_change_nothing(name):
    model = tiny_model(name).eval()
    state = ModelState(model)
    model(**tiny_batch(model)).logits.sum().backward()
    model(**tiny_batch(model), output_hidden_states=True)
    with frozen(model):
        assert state.change(list(model.children())) == ""
    with torch.no_grad():
        model.generate(tiny_batch(model)["input_ids"][:, :3], max_new_tokens=2, do_sample=False)
    assert state.change(list(model.children())) == ""


def test_a_weight_that_is_no_number_equals_itself():
    model = tiny_model("llama").eval()
    weight = model.lm_head.weight
    with torch.no_grad():
        weight.view(-1)[weight.numel() // 2] = float("nan")
    assert ModelState(model).change() == ""


def test_rotary_angles_that_depend_on_the_batch_mean_full_passes():
    scaling = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 6,
               "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "factor": 4.0}  # fmt: skip
    model = tiny_model("llama", rope_parameters=scaling, max_position_embeddings=24).eval()
    ids = torch.randint(5, 60, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, :5] = 0  # by itself within the original length, beside the other one not
    prefix = prefix_of(model, {"input_ids": ids, "attention_mask": mask}, [1])
    assert not prefix.exact and prefix.difference > 1e-3
