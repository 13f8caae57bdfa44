"""What the analyser measures, against hand-made hooks and displacements that are known."""

from __future__ import annotations

import pytest
import torch

from defenses.analysis import Analyser
from defenses.backend import PlainBackend
from defenses.batch import Example, collate
from defenses.plans import Directions, Scope
from tests.tiny import PAD, TINY

LAYER = 1


def some_batch():
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (9, 7)]
    return collate([Example(tuple(one), (-100,) * 4 + tuple(one[4:]), index) for index, one in enumerate(rows)], PAD)


@pytest.fixture
def backend():
    return PlainBackend(TINY["llama"]())


@pytest.fixture
def direction():
    return torch.randn(32, generator=torch.Generator().manual_seed(5))


def test_gradient_and_activations_equal_those_of_a_hand_made_hook(backend, direction):
    batch, seen = some_batch(), {}
    model = backend.model

    def keep(_module, _inputs, output):
        output.retain_grad()
        seen["h"] = output

    handle = model.model.layers[LAYER].register_forward_hook(keep)
    loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    loss.backward()
    handle.remove()
    mask, unit = batch.response, direction / direction.norm()
    gradient, stream = seen["h"].grad[mask], seen["h"].detach()[mask].mean(0)
    [row] = [
        one
        for one in Analyser(Directions({LAYER: direction}), [LAYER]).rows(backend, batch, strength=2.0)
        if one["kind"] == "layer"
    ]
    assert row["gradient_projection"] == pytest.approx(float(gradient.sum(0) @ unit), rel=1e-4, abs=1e-7)
    assert row["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-4)
    assert row["projection"] == pytest.approx(float(stream @ unit), rel=1e-4, abs=1e-6)
    assert row["projection_injected"] - row["projection"] == pytest.approx(2.0 * float(direction.norm()), rel=1e-4)


def test_a_relative_injection_adds_a_share_of_each_tokens_norm(backend, direction):
    batch, seen = some_batch(), {}
    handle = backend.model.model.layers[LAYER].register_forward_hook(lambda _m, _i, out: seen.update(h=out.detach()))
    with torch.no_grad():
        backend.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()
    length = float(seen["h"][batch.response].norm(dim=1).mean())
    looked = Analyser(Directions({LAYER: direction}), [LAYER])
    row = looked.rows(backend, batch, strength=0.5, relative=True)[0]
    assert row["projection_injected"] - row["projection"] == pytest.approx(0.5 * length, rel=1e-4)
    row = looked.rows(backend, batch, strength=0.0)[0]
    assert row["projection_injected"] == row["projection"] and row["cosine"] == pytest.approx(1.0)


def test_a_weight_that_was_moved_against_v_is_found_there_and_nowhere_else(backend, direction):
    batch = some_batch()
    analyser = Analyser(Directions({LAYER: direction}), [0, LAYER])
    analyser.begin(backend)
    name = f"model.layers.{LAYER}.mlp.down_proj.weight"
    weight = backend.value(name)
    unit = direction / direction.norm()
    outer = torch.outer(-unit, torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(1)))
    backend.write(name, weight + 0.1 * outer)
    rows = {(one["kind"], one["layer"]): one for one in analyser.rows(backend, batch, strength=1.0)}
    moved = rows["mlp", LAYER]
    assert moved["energy_along_v"] == pytest.approx(1.0, abs=1e-4)
    assert abs(moved["added_cosine_with_minus_v"]) == pytest.approx(1.0, abs=1e-4)
    assert rows["mlp", 0]["added_norm"] == rows["attention", LAYER]["added_norm"] == 0.0


def test_of_a_lora_the_displacement_is_its_product(direction):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        TINY["llama"](), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["down_proj"], init_lora_weights=False)
    )
    backend = PlainBackend(model)
    rows = Analyser(Directions({LAYER: direction}), [LAYER]).rows(backend, some_batch(), strength=1.0)
    module = model.base_model.model.model.layers[LAYER].mlp.down_proj
    product = (2.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight).detach()
    unit = direction / direction.norm()
    share = float((unit @ product).square().sum() / product.square().sum())
    [row] = [one for one in rows if one["kind"] == "mlp"]
    assert row["energy_along_v"] == pytest.approx(share, rel=1e-4)
    assert not [one for one in rows if one["kind"] == "attention"]


def test_nothing_is_learned_or_left_behind_by_looking(backend, direction):
    before = {name: one.clone() for name, one in backend.model.state_dict().items()}
    Analyser(Directions({LAYER: direction}), [0, 2], Scope.ALL).rows(backend, some_batch(), strength=3.0)
    assert all(torch.equal(one, before[name]) for name, one in backend.model.state_dict().items())
    assert all(one.grad is None for one in backend.model.parameters())
    assert backend.model.training


def test_of_a_lora_on_gpt2_the_displacement_is_turned_as_the_weight_is(direction):
    # its weights are (in, out): square in attention, where a mistake would not show, and 4 to 1 in the MLP
    from peft import LoraConfig, get_peft_model

    chosen = LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(TINY["gpt2"](), chosen)
    looked = Analyser(Directions({LAYER: direction}), [LAYER])
    backend = PlainBackend(model)
    looked.begin(backend)
    generator = torch.Generator().manual_seed(1)
    added = {}
    for name, one in model.named_parameters():
        if f"h.{LAYER}." in name and "lora_B" in name:
            one.data.copy_(torch.randn(one.shape, generator=generator))
            thin = model.get_parameter(name.replace("lora_B", "lora_A"))
            added["mlp" if "mlp" in name else "attention"] = chosen.lora_alpha / chosen.r * one.data @ thin.data
    told = {row["kind"]: row for row in looked.rows(backend, some_batch(), strength=1.0)}
    v = direction / direction.norm()
    for part, moved in added.items():  # (out, in)
        share = float((v @ moved).square().sum() / moved.square().sum())
        assert told[part]["energy_along_v"] == pytest.approx(share, rel=1e-4)
    assert set(added) == {"attention", "mlp"}
