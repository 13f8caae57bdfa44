"""The product table: every method works on prompts and on vectors, is stored and read back, and says what it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from alignments import Budget, Cell, Facts, Job, LanguagePairs, Scorer, evaluate, predict
from alignments.method import OPTIONS
from alignments.methods import METHODS, Setup, describe_methods, describe_options
from intervene import AllTokens, InterveneError, Site
from intervene.families import resolve
from intervene.marked import Marked
from intervene.store import load_plan, save_plan
from tasks import Example, Pair
from tests.alignments.planted import toy_tokenizer
from tests.alignments.planted_methods import SITE, orthonormal, pairs_of, sign_reader
from tests.tiny import tiny_model

NAMES = ("Ann", "Bob", "Cid", "Dan")
BASELINES = {split: {"copy_base": 0.0, "copy_source": 0.0, "majority": 0.0} for split in ("select", "test")}


def example(first: str, second: str) -> Example:
    prompt = f"When {first} and {second} went to the park , {second} gave a ring to"
    names = (5, 5 + len(f"{first} and {second}"))
    return Example(prompt, f" {first}", {}, {"names": names, "last": (len(prompt) - 2, len(prompt))})


def language_pairs(site: Site) -> LanguagePairs:
    examples = [example(a, b) for a in NAMES for b in NAMES if a != b]
    made = [
        Pair(base, source, "first", source.answer)
        for base, source in zip(examples, examples[5:] + examples[:5], strict=True)
    ]
    values = [pair.base.answer for pair in made], [pair.source.answer for pair in made]
    return LanguagePairs(
        tiny_model("llama"), toy_tokenizer(), made, sites=[site], positions=["names[:]", "last"], values=values
    )


def sae_file(tmp_path, width: int) -> str:
    basis = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0))).Q
    path = tmp_path / "sae.safetensors"
    save_file({"W_enc": torch.cat([basis, -basis], 1), "W_dec": torch.cat([basis.T, -basis.T])}, path)
    return str(path)


def scorer(pairs, where, options) -> Scorer:
    facts = Facts("planted", "tiny", "first", BASELINES, {})
    return Scorer(
        pairs.model, dict.fromkeys(("train", "select", "test"), pairs), where, facts,
        budget=Budget(steps=3, batch_size=8), options=options,
    )  # fmt: skip


def setup_of(method: str, pairs, site: Site, where, **options) -> Setup:
    width = resolve(pairs.model, site).width
    return Setup(site, where, width, 2 if METHODS[method].ranked else None, 0, pairs, 1, options)


@pytest.fixture(scope="module")
def prompts():
    return {name: language_pairs(Site(name, 1)) for name in ("block_output", "attention_value_output")}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_prompts_at_one_token_and_several(method, prompts, tmp_path):
    site = Site("attention_value_output" if method == "mask_heads" else "block_output", 1)
    pairs = prompts[site.component]
    options = {"sae": sae_file(tmp_path, 32), "divergence": 0.01}
    one = scorer(pairs, Marked, options)
    for position in ("last", "names[:]"):
        cell = Cell(site, position, method, 2 if METHODS[method].ranked else None)
        rows = one.rows(Job(cell, (0, 1)))
        assert len(rows) == 4 and all(row.n == 12 for row in rows)
        told = METHODS[method].facts
        assert set(rows[0].facts) == {"width"} | set(told(one.fitted(Job(cell, (0,)))[0]) if told else ())


@pytest.mark.parametrize("method", [name for name in METHODS if name != "mask_heads"])
def test_every_method_runs_on_vectors_repeats_by_its_seed_and_is_stored(method, tmp_path):
    direction = orthonormal(8, 1, 0)
    pairs = pairs_of(sign_reader(direction[:, 0]), 40, 0, direction)
    options = {"sae": sae_file(tmp_path, 8)}
    plans = []
    for _ in range(2):
        cell = Cell(SITE, "input", method, 2 if METHODS[method].ranked else None)
        plans.append(scorer(pairs, lambda name: AllTokens(), options).fitted(Job(cell, (3,)))[0])
    rows = torch.arange(40)
    assert torch.equal(*[pairs.logits(plan, rows) for plan in plans])
    again = load_plan(save_plan(plans[0], tmp_path / "plan", model=pairs.model), model=pairs.model)
    assert torch.equal(predict(again, pairs), predict(plans[0], pairs))
    assert evaluate(again, pairs) == evaluate(plans[0], pairs)


def test_the_tables_name_every_method_and_option_in_order():
    lines = describe_methods().splitlines()
    assert [line.split()[0] for line in lines] == ["method", *METHODS]
    assert lines[1].split() == ["full_vector", "full", "vector", "any", "no", "-", "-"]
    assert [line.split()[0] for line in describe_options().splitlines()] == ["option", *OPTIONS]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame": "spiral"}, r"option frame: 'spiral' was given\. Give one of qr, cayley, householder, matrix_exp\."),
        ({"divergence": -1}, r"option divergence: -1 was given\. Give a number of at least 0\."),
        ({"init_fraction": 1.5}, r"Give a number of at least 0 and at most 1\."),
        ({"k_max": True}, r"option k_max: True was given\. Give a whole number of at least 1\."),
    ],
)
def test_values_that_an_option_cannot_have_are_refused(options, message):
    (name,) = options
    with pytest.raises(InterveneError, match=message):
        Setup(SITE, AllTokens(), 8, options=options).option(name)


def test_an_option_that_is_none_has_its_default():
    assert Setup(SITE, AllTokens(), 8, options={"frame": None}).option("frame") == "qr"


@pytest.mark.parametrize("frame", ["qr", "cayley", "householder"])
@pytest.mark.parametrize("method", ["das", "mdas", "boundless", "boundless_faithful"])
def test_the_frame_option_reaches_every_learned_frame(method, frame):
    direction = orthonormal(8, 1, 0)
    pairs = pairs_of(sign_reader(direction[:, 0]), 40, 0, direction)
    plan = METHODS[method].make(setup_of(method, pairs, SITE, AllTokens(), frame=frame))
    assert plan[0].featurizer.parametrisation == frame
    assert any(parameter.requires_grad for parameter in plan[0].featurizer.parameters())


def test_methods_of_one_variable_refuse_several():
    direction = orthonormal(8, 1, 0)
    pairs = pairs_of(sign_reader(direction[:, 0]), 40, 0, direction)
    for name in ("mean_difference", "lda", "probe", "loreft"):
        several = replace(setup_of(name, pairs, SITE, AllTokens()), variables=2)
        with pytest.raises(InterveneError, match=f"Method {name}: 2 variables were asked, it has one"):
            METHODS[name].make(several)
