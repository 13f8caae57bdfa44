"""Masks find exactly the planted neurons, heads, components and latents."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from alignments import VectorPairs, evaluate
from alignments.methods import METHODS, Setup
from alignments.methods_masks import load_sae
from intervene import AllTokens, InterveneError, Site
from intervene.families import resolve
from tests.alignments.fitting import fitted
from tests.alignments.planted_methods import SITE, noise, orthonormal, pairs_of, signs_reader
from tests.tiny import tiny_model

PLANTED = [2, 5, 11]
WIDTH = 16


def planted_neurons():
    directions = torch.eye(WIDTH)[:, PLANTED]
    model = signs_reader(directions)
    return pairs_of(model, 512, 1, directions), pairs_of(model, 300, 2, directions)


def open_gates(plan) -> list[int]:
    return plan[0].edit.eval().gate().nonzero()[:, 0].tolist()


@pytest.mark.parametrize("gate", ["sigmoid", "hard_concrete", "top_k"])
def test_each_kind_of_gate_finds_exactly_the_planted_neurons(gate):
    train, test = planted_neurons()
    plan, _ = fitted("mask_neurons", train, gate=gate, budget=3 if gate == "top_k" else None, steps=120)
    assert open_gates(plan) == PLANTED
    facts = METHODS["mask_neurons"].facts(plan)
    assert facts == {"mask_size": 3, "mask_gates": 3, "decisive": 1}
    assert evaluate(plan, test).iia == 1.0


def test_without_sparsity_neurons_that_do_nothing_stay_undecided():
    train, _ = planted_neurons()
    plan, _ = fitted("mask_neurons", train, sparsity=0, steps=60)
    assert set(PLANTED) <= set(open_gates(plan))
    logits = plan[0].edit.logits.detach()
    idle = [neuron for neuron in range(WIDTH) if neuron not in PLANTED]
    # nothing reads them, so they have no gradient but rounding: no evidence either way
    assert float(logits[PLANTED].min()) > 10 * float(logits[idle].abs().max())


def test_the_penalty_is_the_mean_gate_times_its_weight_and_the_temperature_falls_in_the_first_half():
    method, setup = METHODS["mask_neurons"], Setup(SITE, AllTokens(), WIDTH, options={"sparsity": 0.3})
    plan = method.make(setup)
    assert float(method.penalty(plan, setup).detach()) == pytest.approx(0.3 * 0.5)
    for progress, temperature in ((0.0, 1.0), (0.25, 0.505), (0.5, 0.01), (1.0, 0.01)):
        method.anneal(plan, progress)
        assert plan[0].edit.temperature == pytest.approx(temperature)
    fixed = Setup(SITE, AllTokens(), WIDTH, options={"gate": "top_k", "budget": 2})
    assert float(method.penalty(method.make(fixed), fixed)) == 0


def test_two_variables_have_masks_of_their_own():
    plan = METHODS["mask_neurons"].make(Setup(SITE, AllTokens(), WIDTH, variables=2))
    assert plan[0].edit is not plan[1].edit
    assert set(METHODS["mask_neurons"].facts(plan)) >= {"mask_size_1", "mask_size_2"}


def spread_pairs() -> tuple[VectorPairs, torch.Tensor]:
    """Pairs on a basis along which the variances differ by factors, two of which the answer reads.

    The first is the direction of ones, in which the mean of L0 lies: second moments have the same axes as covariances.
    """
    drawn = noise(WIDTH, WIDTH, 4)
    drawn[:, 0] = 1.0
    basis = torch.linalg.qr(drawn).Q
    model = signs_reader(basis[:, [1, 3]])
    scales = 1.5 ** -torch.arange(WIDTH) * 4

    def draw(seed):
        return (noise(2000, WIDTH, seed) * scales) @ basis.T

    base, source = draw(0), draw(1)
    return VectorPairs(model, base, source, model(source).argmax(-1)), basis


@pytest.mark.parametrize("name", ["mask_pca", "mask_svd"])
def test_masks_on_components_find_the_two_that_are_read(name):
    pairs, basis = spread_pairs()
    plan, _ = fitted(name, pairs, steps=100)
    chosen = open_gates(plan)
    assert chosen == [1, 3] and METHODS[name].facts(plan)["mask_size"] == 2
    lens = plan[0].featurizer
    frame = lens.components if name == "mask_pca" else lens.frame()
    torch.testing.assert_close((frame[:, chosen].T @ basis[:, [1, 3]]).abs(), torch.eye(2), atol=0.1, rtol=0)
    assert evaluate(plan, pairs).iia > 0.95
    few = METHODS[name].make(Setup(SITE, AllTokens(), WIDTH, None, 0, pairs, 1, {"components": 3}))
    assert few[0].edit.count == 3


def test_masks_on_latents_find_those_that_are_read(tmp_path):
    basis = orthonormal(WIDTH, WIDTH, 4)
    model = signs_reader(basis[:, [2]])
    pairs = pairs_of(model, 300, 0, basis[:, [2]])
    path = tmp_path / "sae.safetensors"
    mean = 10.0 * torch.ones(WIDTH)
    save_file({"W_enc": torch.cat([basis, -basis], 1), "W_dec": torch.cat([basis.T, -basis.T]), "b_dec": mean}, path)
    plan, _ = fitted("mask_sae", pairs, sae=str(path), sae_centred=True)
    assert open_gates(plan) == [2, 2 + WIDTH]  # the positive and the negative half of one direction
    assert evaluate(plan, pairs).iia == 1.0


def test_a_sparse_autoencoder_that_is_missing_or_wrong_is_refused(tmp_path):
    setup = Setup(SITE, AllTokens(), WIDTH)
    with pytest.raises(InterveneError, match="Method mask_sae: no sparse autoencoder was given"):
        METHODS["mask_sae"].make(setup)
    with pytest.raises(InterveneError, match=r"none\.safetensors: there is no such file"):
        load_sae(tmp_path / "none.safetensors")
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"no tensors")
    with pytest.raises(InterveneError, match=r"Give a \.safetensors file"):
        load_sae(wrong)
    save_file({"weight": torch.eye(3)}, wrong)
    with pytest.raises(InterveneError, match=r"it holds weight\. Name its tensors W_enc"):
        load_sae(wrong)
    save_file({"W_enc": torch.eye(3), "W_dec": torch.eye(3), "threshold": torch.ones(3)}, wrong)
    assert load_sae(wrong).activation == "jumprelu"
    with pytest.raises(InterveneError, match=f"is for width 3, L0.block_output is {WIDTH} wide"):
        METHODS["mask_sae"].make(Setup(SITE, AllTokens(), WIDTH, options={"sae": str(wrong)}))


class OneModel:
    """Pairs that know their model, which is all that is asked of them here."""

    def __init__(self, model) -> None:
        self.model = model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_heads_share_a_gate(family):
    model, site = tiny_model(family), Site("attention_value_output", 1)
    width = resolve(model, site).width
    heads = model.config.num_attention_heads
    plan = METHODS["mask_heads"].make(Setup(site, AllTokens(), width, train=OneModel(model)))
    edit = plan[0].edit
    assert len(edit.logits) == heads
    edit.logits.data.copy_(-torch.ones(heads)).index_fill_(0, torch.tensor([1]), 1.0)
    own = resolve(model, Site("head_attention_value_output", 1, (1,)))
    columns = torch.arange(width)[own.columns if isinstance(own.columns, slice) else list(own.columns)]
    assert open_gates(plan) == columns.tolist()
    assert METHODS["mask_heads"].facts(plan) | {"decisive": 0} == {
        "mask_size": len(columns), "mask_gates": 1, "decisive": 0,
    }  # fmt: skip
    two = Site("head_attention_value_output", 1, (0, 1))
    plan = METHODS["mask_heads"].make(Setup(two, AllTokens(), resolve(model, two).width, train=OneModel(model)))
    assert len(plan[0].edit.logits) == 2


def test_sites_without_heads_and_gates_without_a_budget_are_refused():
    with pytest.raises(InterveneError, match=r"L0.block_output is not made of heads\. Use L0.attention_value_output"):
        METHODS["mask_heads"].make(Setup(SITE, AllTokens(), WIDTH))
    with pytest.raises(InterveneError, match="option gate top_k: no budget was given"):
        METHODS["mask_neurons"].make(Setup(SITE, AllTokens(), WIDTH, options={"gate": "top_k"}))
    with pytest.raises(InterveneError, match=r"Method mask_pca: it reads activations of training pairs"):
        METHODS["mask_pca"].make(Setup(SITE, AllTokens(), WIDTH))
