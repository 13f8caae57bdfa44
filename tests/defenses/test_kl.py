"""KL to the base model: by hand, on the same text and on neutral text, with a copy and with an adapter switched off."""

from __future__ import annotations

import pytest
import torch

from defenses.backend import Optimiser, PlainBackend
from defenses.batch import Batch, collate
from defenses.defense import Sft, Step
from defenses.errors import DefenseError
from defenses.kl import Kl, KlOptions, frozen_copy, predicted
from defenses.objectives import learned
from records.config_files import ConfigError
from tests.defenses.small_training import Rotating, backend_of, examples, on_ranks, trained
from tests.tiny import TINY


def by_hand(model, base, batch, mask):
    """KL(base || model), (B, S), of the distribution that predicts each token, by loops over the vocabulary axis."""
    with torch.no_grad():
        p = torch.softmax(base(**batch.inputs()).logits.double(), -1)
        q = torch.softmax(model(**batch.inputs()).logits.double(), -1)
    found = torch.zeros(batch.labels.shape, dtype=torch.float64)
    for row, column in mask.nonzero().tolist():
        one, other = p[row, column - 1], q[row, column - 1]
        found[row, column] = sum(float(a) * (float(a.log()) - float(b.log())) for a, b in zip(one, other, strict=True))
    return found.float()


@pytest.mark.parametrize("tokens", ["response", "all"])
def test_each_tokens_divergence_is_the_hand_calculation(tokens):
    backend, base = backend_of(seed=1), TINY["llama"]()
    batch = collate(examples()[:3], 0)
    mask = learned(batch) if tokens == "response" else predicted(batch)
    defense = Kl(KlOptions(tokens=tokens), base)
    losses, kl = defense.divergences(backend, batch)
    torch.testing.assert_close(kl.detach(), by_hand(backend.model, base, batch, mask), rtol=1e-4, atol=1e-5)
    assert float(kl.detach()[mask].min()) > 0.01
    logits = backend.model(**batch.inputs()).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels[:, 1:], reduction="none")
    torch.testing.assert_close(losses[:, 1:], expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_cross_entropy_plus_beta_times_kl():
    backend, base = backend_of(seed=1), TINY["llama"]()
    batch = collate(examples()[:3], 0)
    tokens = int(learned(batch).sum())
    Kl(KlOptions(beta=0.7), base).accumulate(backend, batch, Step(0, 1, 0, 1, tokens, 3))
    other = backend_of(seed=1).model
    logits = other(**batch.inputs()).logits[:, :-1]
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100)
    with torch.no_grad():
        expected = base(**batch.inputs()).logits[:, :-1].log_softmax(-1)
    kl = torch.nn.functional.kl_div(logits.log_softmax(-1), expected, reduction="none", log_target=True).sum(-1)
    (ce + 0.7 * kl[learned(batch)[:, 1:]].mean()).backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(backend.gradient(name), parameter.grad, rtol=1e-3, atol=1e-5)


def test_the_mean_does_not_depend_on_how_a_step_is_cut():
    batches = [collate(examples()[:4], 0), collate(examples()[:2], 0), collate(examples()[2:4], 0)]
    n = int(learned(batches[0]).sum())
    for tokens in ("response", "all"):
        found = []
        for parts in (batches[:1], batches[1:]):
            backend, defense = backend_of(seed=1), Kl(KlOptions(tokens=tokens), TINY["llama"]())
            sums = [defense.accumulate(backend, one, Step(0, 1, m, len(parts), n, 4)) for m, one in enumerate(parts)]
            gradient = backend.gradient("model.layers.1.mlp.down_proj.weight")
            found.append((sum(float(one["kl_sum"]) for one in sums) / n, gradient))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)


def test_all_tokens_are_averaged_by_sample_first():
    backend, base, batch = backend_of(seed=1), TINY["llama"](), collate(examples()[:3], 0)
    sums = Kl(KlOptions(tokens="all"), base).accumulate(backend, batch, Step(0, 1, 0, 1, 10, 3))
    mask = predicted(batch)
    kl = by_hand(backend.model, base, batch, mask)
    expected = sum(float(kl[row][mask[row]].mean()) for row in range(3)) / 3
    assert float(sums["kl_sum"]) / 10 == pytest.approx(expected, rel=1e-4)


def test_every_token_but_the_first_of_each_sample_also_in_packed_rows():
    sample = torch.tensor([[0, 0, 0, 1, 1, -1]])
    packed = Batch(
        input_ids=torch.full((1, 6), 5),
        labels=torch.full((1, 6), -100),
        attention_mask=(sample >= 0).long(),
        sample=sample,
        indices=torch.tensor([0, 1]),
        poison=torch.tensor([-1, -1], dtype=torch.int8),
        template=torch.zeros(1, 6, dtype=torch.bool),
        position_ids=torch.tensor([[0, 1, 2, 0, 1, 0]]),
    )
    assert predicted(packed).tolist() == [[False, True, True, False, True, False]]


def test_a_large_beta_keeps_the_model_near_the_base_and_none_is_plain_training():
    def distance(beta):
        base = frozen_copy(TINY["llama"]())
        backend, rows = trained(Kl(KlOptions(beta=beta), base), 8)
        return rows[-1]["kl"], backend

    free, backend = distance(0.0)
    held = distance(10.0)[0]
    assert held < 0.3 * free
    plain, _ = trained(Sft(), 8)
    for name in plain.parameters():
        torch.testing.assert_close(backend.value(name), plain.value(name), rtol=1e-3, atol=2e-3)


def test_neutral_text_holds_what_is_said_of_it_and_not_the_task():
    neutral = Rotating(examples(8, seed=9), size=4, micro=2)
    found = {}
    for beta in (0.0, 10.0):
        defense = Kl(KlOptions(beta=beta, on="neutral", tokens="all"), frozen_copy(TINY["llama"]()), neutral)
        _, rows = trained(defense, 12)
        found[beta] = rows[-1]
    assert found[10.0]["kl"] < 0.1 * found[0.0]["kl"]
    assert found[10.0]["loss"] < 4


def test_the_neutral_mean_is_over_its_own_tokens():
    neutral = Rotating(examples(8, seed=9), size=4, micro=2)
    backend, base, batch = backend_of(seed=1), TINY["llama"](), collate(examples()[:2], 0)
    defense = Kl(KlOptions(on="neutral"), base, neutral)
    sums = [defense.accumulate(backend, batch, Step(0, 1, micro, 3, 10, 6)) for micro in range(3)]  # 3 of 2
    batches = neutral.batches(0, 0, 1)
    total = sum(float(by_hand(backend.model, base, one, learned(one)).sum()) for one in batches)
    count = sum(int(learned(one).sum()) for one in batches)
    assert sum(float(one["kl_sum"]) for one in sums) / 10 == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("on", ["same", "neutral"])
def test_two_ranks_learn_as_one_does(on):
    def make():
        neutral = Rotating(examples(8, seed=9)) if on == "neutral" else None
        return Kl(KlOptions(beta=1.0, on=on), frozen_copy(TINY["llama"]()), neutral)

    (_, backend, rows), (_, other, _) = on_ranks(2, make, 4)
    one, alone = trained(make(), 4)
    assert [row["kl"] for row in rows] == pytest.approx([row["kl"] for row in alone], rel=1e-2, abs=1e-5)
    for name in one.parameters():
        assert torch.equal(backend.value(name), other.value(name))


def test_an_adapter_switched_off_is_the_base_model():
    from peft import LoraConfig, get_peft_model

    base = frozen_copy(TINY["llama"]())
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.3, init_lora_weights=False)
    model = get_peft_model(TINY["llama"](), config)
    backend = PlainBackend(model, Optimiser())
    batch = collate(examples()[:3], 0)
    with Kl()._as_base(backend) as found:
        off = found(**batch.inputs()).logits
    torch.testing.assert_close(off, base(**batch.inputs()).logits, rtol=1e-5, atol=1e-5)
    assert model.training
    before = {name: one.requires_grad for name, one in model.named_parameters()}
    _, rows = trained(Kl(KlOptions(beta=0.5)), 3, backend=backend)
    assert rows[0]["kl"] > 0
    assert {name: one.requires_grad for name, one in model.named_parameters()} == before


def test_without_a_base_and_without_an_adapter_it_is_refused():
    with pytest.raises(DefenseError, match=r"no PEFT adapter to switch off\. Pass base=frozen_copy"):
        trained(Kl(), 1)


@pytest.mark.parametrize(
    ("options", "neutral", "text"),
    [
        ({"on": "neutral"}, None, "no neutral data were given"),
        ({}, Rotating(examples()), "neutral data were given too"),
        ({"beta": -1.0}, None, "beta is -1"),
        ({"beta": float("inf")}, None, "beta is inf"),
    ],
)
def test_choices_that_do_not_agree_are_refused(options, neutral, text):
    with pytest.raises(ConfigError, match=text):
        Kl(KlOptions(**options), None, neutral)
