"""CAFT: the trained loss and its gradients against a hand-written hook."""

from __future__ import annotations

import pytest
import torch

from defenses.ablation import Ablation, AblationOptions
from defenses.batch import collate
from defenses.defense import Sft, Step
from defenses.errors import VectorError
from defenses.objectives import n_tokens
from defenses.plans import Scope, scope_columns
from intervene import capture
from tests.defenses.small_training import WIDTH, backend_of, directions, examples, trained


def by_hand(backend, batch, frames, mask):
    """Gradients of the mean cross-entropy with h - Q Q^T h at each layer."""
    handles = [
        backend.model.model.layers[layer].register_forward_hook(
            lambda _m, _i, h, q=q: torch.where(mask[..., None], h - h @ q @ q.T, h)
        )
        for layer, q in frames.items()
    ]
    logits = backend.model(**batch.inputs()).logits[:, :-1]
    for handle in handles:
        handle.remove()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100)
    backend.model.zero_grad()
    loss.backward()
    return loss.item(), {name: one.grad.clone() for name, one in backend.model.named_parameters()}


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("checkpointed", [False, True])
def test_loss_and_gradients_are_those_of_the_hand_written_projection(scope, checkpointed):
    backend, batch = backend_of(), collate(examples()[:3], 0)
    traits = [directions(0, 2, seed=1), directions(0, 2, seed=2)]
    columns = scope_columns(batch, scope)
    mask = torch.zeros(batch.labels.shape, dtype=torch.bool)
    for row, line in enumerate(columns.tolist()):
        mask[row, [column for column in line if column >= 0]] = True
    frames = {layer: torch.linalg.qr(torch.stack([one.at(layer) for one in traits], 1))[0] for layer in (0, 2)}
    loss, expected = by_hand(backend, batch, frames, mask)
    backend.model.zero_grad()
    if checkpointed:
        backend.model.gradient_checkpointing_enable({"use_reentrant": False})
    defense = Ablation(traits, AblationOptions(scope=scope))
    tokens = int(n_tokens(batch))
    sums = defense.accumulate(backend, batch, Step(0, 1, 0, 1, tokens, 3))
    assert float(sums["loss_sum"]) / tokens == pytest.approx(loss, rel=1e-4)
    assert int(sums["ablated"]) == int(mask.sum())
    for name, value in expected.items():
        torch.testing.assert_close(backend.gradient(name), value, rtol=1e-3, atol=1e-5)


def test_what_is_ablated_from_a_block_cannot_be_learned_by_it():
    """Nothing that writes to the ablated stream sees a gradient along the direction, and everything does across it."""
    backend, batch = backend_of(), collate(examples()[:3], 0)
    q = directions(2).at(2)
    Ablation(directions(2)).accumulate(backend, batch, Step(0, 1, 0, 1, 1, 3))
    down = backend.gradient("model.layers.2.mlp.down_proj.weight")  # (32, 48)
    # the first token of a sample is not ablated, but the last block's output there predicts no learned token
    assert float((q @ down).norm()) < 1e-5 * float(down.norm())
    Sft().accumulate(backend, batch, Step(0, 1, 0, 1, 1, 3))
    assert float((q @ backend.gradient("model.layers.2.mlp.down_proj.weight")).norm()) > 0.01 * float(down.norm())


def test_the_model_is_used_without_it():
    backend, rows = trained(Ablation(directions(1)), 5)
    batch = collate(examples()[:2], 0)
    with torch.no_grad(), capture(backend.model, ["L1.block_output"]) as acts:
        backend.model(**batch.inputs())
    along = acts["L1.block_output"] @ directions(1).at(1)
    assert float(along.abs().max()) > 1e-2
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_batch_without_tokens_in_scope_is_trained_plainly():
    from defenses.batch import Example

    backend = backend_of()
    batch = collate([Example((5, 6, 7), (-100, -100, -100), 0)], 0)
    sums = Ablation(directions(1), AblationOptions(Scope.RESPONSE)).accumulate(backend, batch, Step(0, 1, 0, 1, 1, 1))
    assert float(sums["loss_sum"]) == 0


def test_one_basis_needs_layers_and_may_have_several():
    basis = torch.randn(WIDTH, 3)
    with pytest.raises(VectorError, match="no layers were given"):
        Ablation(basis)
    defense = Ablation(basis, AblationOptions(layers=(0, 1)))
    assert [str(item.site) for item in defense.plan] == ["L0.block_output", "L1.block_output"]
