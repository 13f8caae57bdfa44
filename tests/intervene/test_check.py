"""check_family passes every family of ours and names what is wrong with a wrong one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from intervene.check import check_family
from intervene.errors import InterveneError
from intervene.families import FAMILIES, Family, register_family
from tests.tiny import TINY, tiny_batch, tiny_model


@pytest.fixture
def llama() -> Iterator[PreTrainedModel]:
    """Yield a llama, and undo what the test registers for it."""
    before = FAMILIES["llama"]
    yield tiny_model("llama")
    FAMILIES["llama"] = before


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", TINY)
def test_every_family_passes(name: str, padding: str) -> None:
    model = tiny_model(name)
    check_family(model, tiny_batch(model, padding))


def test_the_check_leaves_no_hook_behind(llama: PreTrainedModel) -> None:
    batch = tiny_batch(llama)
    check_family(llama, batch)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.modules()]
    assert sum(hooks) == 0


def test_a_write_before_the_post_norm_is_found() -> None:
    before = FAMILIES["gemma2"]
    try:
        register_family("gemma2", Family())  # llama's paths: right modules, but the writes miss the post-norms
        model = tiny_model("gemma2")
        with pytest.raises(
            InterveneError, match=r"Check of layer 0 in family 'gemma2': block_input \+ attention_write"
        ):
            check_family(model, tiny_batch(model))
    finally:
        FAMILIES["gemma2"] = before


def test_a_wrong_scale_is_found() -> None:
    before = FAMILIES["granite"]
    try:
        register_family("granite", Family())
        model = tiny_model("granite")
        with pytest.raises(InterveneError, match=r"Check of layer 0 in family 'granite'.* differs from block_output"):
            check_family(model, tiny_batch(model))
    finally:
        FAMILIES["granite"] = before


def test_a_wrong_width_is_found(llama: PreTrainedModel) -> None:
    # the whole feed-forward module in place of its activation: 32 columns, where down_proj reads 48
    register_family("llama", replace(Family(), act="mlp"))
    with pytest.raises(InterveneError, match=r"L0\.mlp_activation in family 'llama': it is 32 wide, .* says 48"):
        check_family(llama, tiny_batch(llama))


def test_a_component_without_effect_is_found(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight.zero_()
    with pytest.raises(InterveneError, match=r"L1\.mlp_input in family 'llama': setting it to zero leaves every"):
        check_family(llama, tiny_batch(llama))
