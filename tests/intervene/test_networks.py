"""The small networks: their blocks are sites, and editing one does what the arithmetic says."""

from __future__ import annotations

import pytest
import torch

from intervene import (
    Add,
    AllTokens,
    At,
    Intervention,
    Set,
    SiteOutOfRange,
    Swap,
    UnknownComponent,
    capture,
    interchange,
    intervene,
)
from intervene.networks import GRU, MLP, train_classifier


def test_an_mlp_block_is_relu_of_its_linear():
    model, x = MLP(5, 7, 2, 3), torch.randn(4, 5)
    with capture(model, ["embedding_output", "L0.block_output", "L1.block_output"]) as acts:
        model(x)
    first = torch.relu(x @ model.layers[0].linear.weight.T + model.layers[0].linear.bias)
    torch.testing.assert_close(acts["L0.block_output"][:, 0], first)
    assert torch.equal(acts["embedding_output"][:, 0], x)
    assert acts["L1.block_output"].shape == (4, 1, 7)


def test_setting_a_block_leaves_only_what_is_above():
    model, x = MLP(5, 7, 2, 3), torch.randn(4, 5)
    value = torch.rand(7)
    with intervene(model, [Intervention("L1.block_output", Set(value))]):
        found = model(x)
    torch.testing.assert_close(found, model.head(value).expand(4, -1))


def test_one_neuron_of_an_mlp():
    model, x = MLP(5, 7, 2, 3), torch.randn(4, 5)
    with torch.no_grad(), intervene(model, [Intervention("L1.block_output[3]", Add(torch.tensor([2.0])))]):
        found = model(x)
    torch.testing.assert_close(found, model(x) + 2.0 * model.head.weight[:, 3])


def test_full_interchange_in_an_mlp_copies_the_source():
    model, base, source = MLP(5, 7, 2, 3), torch.randn(4, 5), torch.randn(4, 5)
    plan = [Intervention("L0.block_output", Swap(), AllTokens())]
    found = interchange(model, plan, base={"inputs": base}, source={"inputs": source})
    assert torch.equal(found, model(source))


def test_a_gru_step_is_edited_at_its_own_time_and_no_other():
    model, x = GRU(3, 4, 2, 2), torch.randn(2, 6, 3)
    with torch.no_grad():
        with capture(model, ["L1.block_output"]) as clean:
            model(x)
        edit = intervene(model, [Intervention("L0.block_output", Add(torch.ones(4)), At(2))])
        with edit, capture(model, ["L0.block_output", "L1.block_output"]) as acts:
            model(x)
        first = model.layers[0](x)[0].clone()
        first[:, 2] += 1
        expected = model.layers[1](first)[0]
    torch.testing.assert_close(acts["L0.block_output"], first)
    torch.testing.assert_close(acts["L1.block_output"], expected)
    assert torch.equal(acts["L1.block_output"][:, :2], clean["L1.block_output"][:, :2])


def test_what_they_do_not_have_is_refused():
    with pytest.raises(SiteOutOfRange, match="this mlp has layers 0-1"):
        capture(MLP(5, 7, 2, 3), ["L2.block_output"]).__enter__()
    with pytest.raises(UnknownComponent, match=r"mlp has no such module.*block_input, block_output"):
        capture(MLP(5, 7, 2, 3), ["L0.attention_output"]).__enter__()


def test_a_classifier_learns_and_is_repeatable():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 4, generator=generator)
    labels = (inputs[:, 0] > inputs[:, 1]).long()
    losses = []
    for _ in range(2):
        model = MLP(4, 8, 1, 2, seed=3)
        losses.append(train_classifier(model, inputs, labels, steps=300, batch_size=128, lr=1e-2))
    assert losses[0] == losses[1] < 0.1
    assert not model.training
    with torch.no_grad():
        assert (model(inputs).argmax(-1) == labels).float().mean() > 0.97
