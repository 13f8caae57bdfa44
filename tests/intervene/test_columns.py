"""Widths are those of the whole weights, also where ZeRO-3 has cut them."""

from __future__ import annotations

import pytest
import torch

from intervene.families import resolve
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("gpt2", ("L1.mlp_output", "L0.head_key_output[2]", "L2.mlp_neurons", "final_norm_output")),
        ("llama", ("L0.block_output", "L1.mlp_input", "L0.head_output[1]")),
        ("mixtral", ("L0.router_output",)),
    ],
)
def test_zero_3_leaves_widths_as_they_are(name: str, sites: tuple[str, ...]) -> None:
    model, plain = tiny_model(name), tiny_model(name)
    for parameter in model.parameters():  # as between passes: no elements, and the shape beside them
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    for site in sites:
        assert resolve(model, site).width == resolve(plain, site).width
