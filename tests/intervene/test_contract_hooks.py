"""Clause 1: no flag, no hook but its own, also after an exception; set-up is all or nothing."""

from __future__ import annotations

import pytest
import torch

from intervene import Add, Intervention, LastToken, SiteOutOfRange, Swap, capture, frozen, interchange, intervene
from tests.intervene.by_hand import block_output, close, flags, hook_state, vector
from tests.tiny import tiny_batch, tiny_model


def _plan(layer=1, component="block_output"):
    return [Intervention(f"L{layer}.{component}", Add(vector(1)), LastToken())]


@pytest.fixture
def marked_model():
    """A model whose flags are mixed and which carries the user's hooks, with the log they write."""
    model, log = tiny_model("llama"), []
    model.model.layers[0].train()
    for parameter in model.model.layers[1].parameters():
        parameter.requires_grad_(False)
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda *_: log.append("first"))
    layer.register_forward_hook(lambda *_: log.append("second"))
    layer.register_forward_hook(lambda *_: log.append("always"), always_call=True)
    layer.register_forward_pre_hook(lambda *_, **__: log.append("before"), with_kwargs=False)
    model.model.register_forward_pre_hook(lambda *_: log.append("backbone"))
    return model, log


def test_leaves_flags_and_the_users_hooks_as_they_were(marked_model):
    model, log = marked_model
    batch = tiny_batch(model)
    flags_before, hooks_before = flags(model), hook_state(model)
    with intervene(model, _plan()), capture(model, ["L1.block_output", "L0.mlp_input"]):
        model(**batch)
        inside = list(log)
        assert flags(model) == flags_before
    model(**batch)
    assert flags(model) == flags_before
    assert hook_state(model) == hooks_before
    assert inside == ["backbone", "before", "first", "second", "always"]
    assert log == inside * 2


class _BrokenAdd(Add):
    def forward(self, z, source):
        raise RuntimeError("broken edit")


def _fails_in_body(model, batch):
    with intervene(model, _plan()):
        model(**batch)
        raise RuntimeError("mine")


def _fails_in_edit(model, batch):
    with intervene(model, [Intervention("L1.block_output", _BrokenAdd(vector(1)))]):
        model(**batch)


def _fails_in_setup(model, batch):
    with intervene(model, [*_plan(), *_plan(layer=99)]):
        raise AssertionError("never entered")


def _fails_in_capture_setup(model, batch):
    with capture(model, ["L0.block_output", "L99.block_output"]):
        raise AssertionError("never entered")


def _fails_in_forward(model, batch):
    with intervene(model, _plan()):
        model(input_ids=batch["input_ids"].float(), attention_mask=batch["attention_mask"])


def _is_interrupted(model, batch):
    def stop(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_hook(stop)
    try:
        with intervene(model, _plan()), capture(model, "L0.block_output"):
            model(**batch)
    finally:
        handle.remove()


def _is_not_applied(model, batch):
    with intervene(model, _plan()):
        pass


FAILURES = [
    _fails_in_body,
    _fails_in_edit,
    _fails_in_setup,
    _fails_in_capture_setup,
    _fails_in_forward,
    _is_interrupted,
    _is_not_applied,
]


@pytest.mark.parametrize("fail", FAILURES)
def test_after_a_failure_nothing_is_left_behind(marked_model, fail):
    model, _ = marked_model
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = model(**batch).logits
    flags_before, hooks_before = flags(model), hook_state(model)
    with pytest.raises(BaseException) as raised:
        fail(model, batch)
    assert not isinstance(raised.value, AssertionError)
    assert flags(model) == flags_before
    assert hook_state(model) == hooks_before
    with torch.no_grad():
        close(model(**batch).logits, expected)
    with intervene(model, _plan()) as applied, torch.no_grad():
        model(**batch)
    assert applied.report()[0].calls == 1


def test_setup_checks_the_whole_plan_before_the_first_hook():
    model = tiny_model("llama")
    with pytest.raises(SiteOutOfRange), intervene(model, [*_plan(), *_plan(layer=99)]):
        pass
    assert hook_state(model) == {}


@torch.no_grad()
def test_a_failed_forward_inside_the_block_does_not_spoil_the_next():
    model = tiny_model("llama")
    batch = tiny_batch(model, "left")
    with intervene(model, _plan()) as applied:
        expected = model(**batch).logits
        with pytest.raises(RuntimeError):
            model(input_ids=batch["input_ids"].float())
        close(model(**batch).logits, expected)
    assert applied.report()[0].calls == 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "olmo2"])
@torch.no_grad()
def test_hidden_states_and_attentions_are_right_inside_and_after(name):
    model = tiny_model(name, attn_implementation="eager")
    batch = tiny_batch(model)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with block_output(model, 1, lambda h: h + vector(1)):
        by_hand = model(**batch, **wanted)
    fresh = tiny_model(name, attn_implementation="eager")
    plain = tiny_model(name, attn_implementation="eager")(**batch, **wanted)
    with intervene(fresh, [Intervention("L1.block_output", Add(vector(1)))]):
        inside = fresh(**batch, **wanted)
    after = fresh(**batch, **wanted)
    for found, expected in ((inside, by_hand), (after, plain)):
        assert len(found.hidden_states) == len(expected.hidden_states) == 4
        assert len(found.attentions) == 3
        for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
            close(a, b)
        for a, b in zip(found.attentions, expected.attentions, strict=True):
            close(a, b)


@torch.no_grad()
def test_a_stopped_capture_leaves_output_capturing_clean():
    model = tiny_model("llama")
    batch = tiny_batch(model)
    expected = tiny_model("llama")(**batch, output_hidden_states=True).hidden_states
    with capture(model, "L0.mlp_output", stop_after_last=True) as acts:
        model(**batch, output_hidden_states=True)
        raise AssertionError("the block ends with the forward pass")
    assert acts["L0.mlp_output"].shape == (2, 7, 32)
    found = model(**batch, output_hidden_states=True).hidden_states
    assert len(found) == 4
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    assert model(**batch).hidden_states is None


@torch.no_grad()
def test_stop_after_last_computes_no_further_layer():
    model, ran = tiny_model("llama"), []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    with capture(model, ["L1.attention_output", "L0.block_output"], LastToken(), stop_after_last=True):
        model(**tiny_batch(model))
    assert ran == [0]


@torch.no_grad()
def test_a_stopped_capture_swallows_no_exception_of_the_user():
    model = tiny_model("llama")
    with pytest.raises(ZeroDivisionError), capture(model, "L0.mlp_output", stop_after_last=True):
        _ = 1 / 0


def test_frozen_restores_each_flag_also_after_an_exception():
    model = tiny_model("llama")
    model.lm_head.weight.requires_grad_(False)
    before = flags(model)
    with pytest.raises(RuntimeError), frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise RuntimeError
    assert flags(model) == before


@torch.no_grad()
def test_interchange_leaves_no_hook():
    model = tiny_model("llama")
    base, source = tiny_batch(model, seed=1), tiny_batch(model, seed=2)
    interchange(model, [Intervention("L0.mlp_output", Swap(), LastToken())], base, source)
    assert hook_state(model) == {}
