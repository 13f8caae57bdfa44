"""Suffix and full pass agree to 1e-5 on every family x site x position kind, behind padding and sliding windows.

The full pass is the model's own uncached forward over all tokens. Prompts are 12 and 9 tokens long, so the longer one
is more than twice every sliding window of the tiny models (4 or 5), and the shorter one is padded.
"""

from __future__ import annotations

import pytest
import torch

from intervene import Intervention, Subspace, Swap, UnknownComponent
from intervene.families import resolve
from intervene.marked import Marked
from intervene.suffix import prefix_of, suffix_logits
from tests.intervene.test_suffix import full_pass
from tests.tiny import TINY, tiny_batch, tiny_model

FAMILIES = sorted(TINY)
COMPONENTS = (
    "block_input",
    "block_output",
    "attention_input",
    "attention_output",
    "attention_value_output",
    "head_output",
    "query_output",
    "key_output",
    "value_output",
    "attention_write",
    "mlp_input",
    "mlp_neurons",
    "mlp_output",
    "mlp_write",
)
LENGTHS = (12, 9)
COLUMNS = {
    "first": [[0], [3]],  # of the real tokens: the second example has three pads
    "middle": [[5], [6]],
    "last": [[11], [11]],
    "several": [[2, 5, 10], [4, 7, 11]],
    "one column apart": [[10], [11]],
}


def batch_of(model):
    batch = tiny_batch(model, padding="left", lengths=LENGTHS)
    return {**batch, "marks": {name: torch.tensor(columns) for name, columns in COLUMNS.items()}}


def sites_of(model):
    """Every site of the first and last block that this family has, and those outside the blocks."""
    named = [f"L{layer}.{component}" for layer in (0, -1) for component in COMPONENTS]
    named = [name.replace("head_output", "head_output[0]") for name in named]
    found = []
    for name in [*named, "embedding_output", "final_norm_output"]:
        try:
            found.append(resolve(model, name))
        except UnknownComponent:
            continue
    return [tap for tap in found if tap.width is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_site_and_position_kind(family):
    model = tiny_model(family)
    inputs = batch_of(model)
    prefix = prefix_of(model, inputs, range(model.config.num_hidden_layers))
    assert prefix.exact, f"{family}: suffix differs by {prefix.difference}"
    taps = sites_of(model)
    assert len(taps) >= 8, f"{family}: only {[str(tap.site) for tap in taps]}"
    moved = 0
    for number, tap in enumerate(taps):
        for where, columns in COLUMNS.items():
            lens = Subspace(tap.width, min(3, tap.width), seed=number)
            plan = [Intervention(tap.site, Swap(), Marked(where), lens)]
            generator = torch.Generator().manual_seed(number)
            source = 3 * torch.randn(2, len(columns[0]), tap.width, generator=generator)
            with torch.no_grad():
                found = suffix_logits(model, plan, [source], prefix)
                expected = full_pass(model, plan, [source], inputs)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=f"{tap.site} @ {where} differs")
            moved += not torch.allclose(expected, prefix.logits, atol=1e-4)
    assert moved > len(taps)  # the edits do something: equality is not that of two unedited passes


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_frame_in_the_middle(family):
    model = tiny_model(family)
    inputs = batch_of(model)
    prefix = prefix_of(model, inputs, range(model.config.num_hidden_layers))
    lens = Subspace(model.config.hidden_size, 3)
    plan = [Intervention("L0.block_output", Swap(), Marked("middle"), lens)]
    source = torch.randn(2, 1, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    gradients = []
    for logits in (suffix_logits(model, plan, [source], prefix), full_pass(model, plan, [source], inputs)):
        lens.weight.grad = None
        (logits.square().sum() / logits.detach().square().sum()).backward()
        gradients.append(lens.weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    assert gradients[0].abs().max() > 1e-4
