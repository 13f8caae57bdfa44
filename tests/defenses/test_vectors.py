"""Extraction of directions: against hidden states read one conversation at a time, and on data where truth is known."""

from __future__ import annotations

import random

import pytest
import torch

from defenses.chat import chat_of
from defenses.contrasts import contrast_from_prompts
from defenses.errors import VectorError
from defenses.plans import Directions
from defenses.pooling import pooled
from defenses.vectors import FIT, TEST, VALIDATION, extract, judge, nearness, placebo
from intervene import fingerprint
from tests.defenses.words import word_tokenizer
from tests.tiny import TINY

LAYERS = (0, 1, 2)
LOUD, CALM = ("w40", "w41", "w42", "w43"), ("w60", "w61", "w62", "w63")
NEUTRAL = tuple(f"w{number}" for number in range(10, 30))


@pytest.fixture(scope="module")
def model():
    return TINY["llama"]()


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(("user", "assistant", "system", ":"), chat=True)


def sentence(draw, words, length):
    return " ".join(draw.choice(words) for _ in range(length))


def conversations(n, words, seed, *, system=None):
    """`n` conversations on questions q0, q1, ... that are the same for every `words`; answers of 2 to 6 words."""
    draw = random.Random(seed)
    made = []
    for number in range(n):
        question = sentence(random.Random(number), NEUTRAL, 3 + number % 3)
        turns = [{"role": "user", "content": question}]
        prompt = question if system is None else [{"role": "system", "content": system}, *turns]
        made.append((prompt, sentence(draw, words, draw.randint(2, 6))))
    return made


@pytest.fixture(scope="module")
def planted(model, tokenizer):
    positive = conversations(24, LOUD + NEUTRAL[:4], 1, system="w5 w6")
    negative = conversations(24, CALM + NEUTRAL[:4], 2, system="w7 w8")
    return extract(model, tokenizer, positive, negative, batch_size=5), positive, negative


def by_hand(model, tokenizer, conversation, pooling):
    """(L, D) mean and (L,) mean norm from transformers' own hidden states, one conversation without padding."""
    prompt, answer = conversation
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    rendered = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    n = len(answer.split())
    end = len(ids) - 1  # </s>
    places = {"response_mean": range(end - n, end), "prompt_last": [end - n - 1]}
    if pooling == "prompt_mean":
        words = [tokenizer.convert_tokens_to_ids(w) for turn in turns for w in turn["content"].split()]
        places[pooling] = [place for place, one in enumerate(ids[: end - n]) if one in words]
    held = []
    handles = [layer.register_forward_hook(lambda _m, _i, out: held.append(out[0])) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    chosen = torch.stack(held)[:, list(places[pooling])]  # (L, P, D)
    return chosen.mean(1), chosen.norm(dim=-1).mean(1)


@pytest.mark.parametrize("pooling", ["response_mean", "prompt_last", "prompt_mean"])
def test_pooled_activations_are_those_of_each_conversation_alone(model, tokenizer, pooling):
    both = conversations(5, LOUD, 3) + conversations(4, CALM, 4, system="w5 w6")
    found = pooled(model, tokenizer, both, LAYERS, pooling=pooling, batch_size=4)
    for number, one in enumerate(both):
        mean, norm = by_hand(model, tokenizer, one, pooling)
        torch.testing.assert_close(found.values[number], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.stream_norms[number], norm, rtol=1e-4, atol=1e-5)


def test_a_layers_vector_is_the_difference_of_means_of_the_part_that_makes_it(model, tokenizer, planted):
    found, positive, negative = planted
    every = torch.stack([by_hand(model, tokenizer, one, "response_mean")[0] for one in (*positive, *negative)])
    fit = found.samples.part == FIT
    kind = found.samples.positive
    expected = every[fit & kind].mean(0) - every[fit & ~kind].mean(0)
    for place, layer in enumerate(LAYERS):
        torch.testing.assert_close(found.directions.at(layer), expected[place], rtol=1e-3, atol=1e-5)
    assert found.directions.fingerprint == fingerprint(model)
    assert found.directions.facts["counts"]["fit"] == {"positive": 12, "negative": 12}


def test_a_planted_trait_is_found_and_its_auc_is_that_of_all_pairs(planted):
    found, *_ = planted
    test = found.samples.part == TEST
    for place, facts in enumerate(found.layers):
        scores = found.samples.values[test, place] @ found.directions.at(facts.layer)
        kind = found.samples.positive[test]
        pairs = scores[kind][:, None] - scores[~kind][None]
        assert facts.auc.value == pytest.approx(float((pairs > 0).float().mean() + 0.5 * (pairs == 0).float().mean()))
        assert facts.auc.low < facts.auc.value <= facts.auc.high
        assert facts.norm == pytest.approx(float(found.directions.at(facts.layer).norm()))
        assert facts.norm_ratio == facts.norm / facts.stream_norm
    assert found.chosen.auc.value > 0.9


def test_the_layer_is_chosen_on_validation_alone(planted):
    found, *_ = planted
    key = {one.layer: (one.validation, one.separation) for one in found.layers}
    assert found.best == max(key, key=key.get)
    moved = found.samples.values.clone()
    moved[found.samples.part == TEST] = torch.randn(moved[found.samples.part == TEST].shape)
    again = judge(type(found.samples)(moved, *list(vars(found.samples).values())[1:]), found.directions)
    assert [(one.validation, one.separation) for one in again] == [key[layer] for layer in LAYERS]
    assert [one.auc.value for one in again] != [one.auc.value for one in found.layers]


def test_no_question_is_in_two_parts(planted):
    found, positive, negative = planted
    questions = [prompt[-1]["content"] for prompt, _ in (*positive, *negative)]
    for question in questions:
        assert len({int(part) for part, one in zip(found.samples.part, questions, strict=True) if one == question}) == 1
    assert {int(part) for part in found.samples.part} == {FIT, VALIDATION, TEST}


def test_unpaired_conversations_on_different_questions_reach_every_part(model, tokenizer):
    positive, negative = conversations(12, LOUD, 1), [(f"w70 {q}", a) for q, a in conversations(20, CALM, 2)]
    found = extract(model, tokenizer, positive, negative, layers=[1], held_out=0.5)
    assert found.directions.facts["counts"] == {
        "fit": {"positive": 6, "negative": 10},
        "validation": {"positive": 3, "negative": 5},
        "test": {"positive": 3, "negative": 5},
    }


def test_kinds_that_do_not_differ_have_an_auc_of_chance(model, tokenizer):
    positive, negative = conversations(60, NEUTRAL, 1), conversations(60, NEUTRAL, 2)
    found = extract(model, tokenizer, positive, negative)
    assert found.chosen.auc.low < 0.5 < found.chosen.auc.high


def test_the_model_is_left_as_it_was(tokenizer):
    model = TINY["llama"]().train()
    extract(model, tokenizer, conversations(12, LOUD, 1), conversations(12, CALM, 2), layers=[0])
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


# --- placebos ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "orthogonal", "shuffled"])
def test_placebos_have_the_same_norm_and_another_direction(planted, kind):
    found, *_ = planted
    other = placebo(found, kind, seed=3)
    assert other.layers == found.directions.layers
    assert other.norms == pytest.approx(found.directions.norms, rel=1e-5)
    for layer, facts in zip(other.layers, judge(found.samples, other), strict=True):
        cosine = float(torch.cosine_similarity(other.at(layer), found.directions.at(layer), dim=0))
        assert other.facts["cosine"][str(layer)] == pytest.approx(cosine, abs=1e-6)
        assert abs(cosine) < (1e-5 if kind == "orthogonal" else 0.8)
        assert facts.norm_ratio == pytest.approx(found.layers[layer].norm_ratio, rel=1e-5)
    assert torch.equal(placebo(found, kind, seed=3).at(1), other.at(1))
    assert not torch.allclose(placebo(found, kind, seed=4).at(1), other.at(1))


def test_a_shuffled_placebo_is_shorter_before_it_is_lengthened_and_lies_in_the_span_of_the_data(planted):
    found, *_ = planted
    before = [placebo(found, "shuffled", seed).facts["norms_before"]["1"] for seed in range(20)]
    assert sum(before) / len(before) < 0.6 * found.directions.norms[1]
    values, _ = found.samples.of(FIT)
    data = values[:, 1].double()
    other = placebo(found, "shuffled").at(1).double()
    residual = torch.linalg.lstsq((data - data.mean(0)).T, other[:, None], driver="gelsd").solution
    torch.testing.assert_close((data - data.mean(0)).T @ residual[:, 0], other, rtol=1e-4, atol=1e-4)


def test_a_control_that_lies_along_the_direction_is_told(planted):
    found, *_ = planted
    warned = set()
    for seed in range(30):
        control = placebo(found, "shuffled", seed)
        near = [
            layer for layer in control.layers
            if abs(torch.cosine_similarity(control.at(layer), found.directions.at(layer), dim=0)) > 0.5
        ]  # fmt: skip
        *each, last = nearness(control)
        assert last.startswith("warning: layer " + ", ".join(map(str, near)) + ":") == bool(near), last
        assert all("shuffled control, cosine" in line and "% as long by itself" in line for line in each)
        warned.add(bool(near))
    assert warned == {True, False}
    assert all("warning" not in line for line in nearness(placebo(found, "orthogonal")))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": []}, "no positive conversations"),
        ({"held_out": 1.0}, "held_out=1.0: it is a share"),
        ({"layers": [3]}, r"at layers \[3\]: this model has 0-2"),
        ({"layers": [1, 1]}, "Name each once"),
        ({"layers": []}, "this model has 0-2"),
        ({"pooling": "mean"}, "Pooling 'mean': there is none. Use one of response_mean, prompt_last, prompt_mean"),
        ({"questions": ["w10"]}, "1 questions of 24 conversations"),
        ({"questions": ["w10"] * 24}, "from 1 questions: 0 positive and 0 negative conversations are left for the vec"),
    ],
)
def test_what_cannot_be_extracted(model, tokenizer, change, message):
    given = {"positive": conversations(12, LOUD, 1), "negative": conversations(12, CALM, 2), **change}
    with pytest.raises(VectorError, match=message):
        extract(model, tokenizer, given.pop("positive"), given.pop("negative"), **given)


def test_identical_kinds_give_no_direction(model, tokenizer):
    same = conversations(12, LOUD, 1)
    with pytest.raises(VectorError, match="its norm is 0"):
        extract(model, tokenizer, same, same)


def test_placebos_and_judgements_that_there_are_not(planted):
    found, *_ = planted
    with pytest.raises(VectorError, match="Placebo 'none': there is none"):
        placebo(found, "none")
    with pytest.raises(VectorError, match=r"Judge layer 7: activations were read at \(0, 1, 2\)"):
        judge(found.samples, Directions({7: torch.ones(32)}))


# --- contrasts from system prompts ------------------------------------------------------------------------------------


def test_a_contrast_pairs_what_the_model_says_under_two_system_prompts(model, tokenizer):
    questions = [prompt for prompt, _ in conversations(6, LOUD, 0)]
    found = contrast_from_prompts(
        model, tokenizer, questions, ["w5 w6", "w5 w9"], ["w7 w8", "w7 w9"], max_new_tokens=4, batch_size=4
    )
    assert len(found.positive) + len(found.dropped) == 12
    for (first, said), (second, _), question in zip(found.positive, found.negative, found.questions, strict=True):
        assert first[-1]["content"] == second[-1]["content"] == question
        assert (first[0]["content"][:2], second[0]["content"][:2]) == ("w5", "w7")
        text = tokenizer.apply_chat_template(first, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        for word in said.split():  # greedy, one token at a time, without a cache
            token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
            while token in tokenizer.all_special_ids:  # left out of the text
                ids = torch.cat([ids, torch.tensor([[token]])], 1)
                token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
            assert tokenizer.convert_ids_to_tokens(token) == word
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        assert chat_of(tokenizer).render([*first, {"role": "assistant", "content": said}]).responses


def test_pairs_that_the_judge_refuses_are_dropped_with_a_reason(model, tokenizer):
    questions = [prompt for prompt, _ in conversations(4, LOUD, 0)]
    asked = []

    def keep(question, answer, wanted):
        asked.append((question, wanted))
        return question != questions[1] or wanted

    found = contrast_from_prompts(model, tokenizer, questions, "w5", "w7", max_new_tokens=3, keep=keep)
    assert (questions[1], "the negative answer does not do as told") in found.dropped
    assert questions[1] not in found.questions
    assert {wanted for _, wanted in asked} == {True, False}
    with pytest.raises(VectorError, match="none of 4 pairs is left, the first because the positive answer"):
        contrast_from_prompts(model, tokenizer, questions, "w5", "w7", max_new_tokens=3, keep=lambda *_: False)


def test_a_system_prompt_in_the_user_turn_and_prompts_that_are_no_pairs(model, tokenizer):
    found = contrast_from_prompts(
        model, tokenizer, ["w10", "w11"], "w5", "w7", max_new_tokens=3, system_place="user", greedy=False
    )
    assert found.positive[0][0] == [{"role": "user", "content": f"w5\n\n{found.questions[0]}"}]
    with pytest.raises(VectorError, match="1 questions, 2 positive and 1 negative system prompts"):
        contrast_from_prompts(model, tokenizer, ["w10"], ["w5", "w6"], "w7")


@pytest.mark.slow
def test_shouting_has_a_direction_in_the_real_model(smollm):
    """Answers in capitals against the same answers in small letters, in 24 questions; a random direction tells less."""
    model, tokenizer = smollm
    things = [
        "river",
        "mountain",
        "city",
        "animal",
        "colour",
        "fruit",
        "tool",
        "planet",
        "metal",
        "flower",
        "sport",
        "drink",
    ]
    questions = [f"{ask} a {thing}." for thing in things for ask in ("Name", "Tell me something about")]
    answer = [f"here is what i know about it: {question.lower()}" for question in questions]
    loud = [(question, text.upper()) for question, text in zip(questions, answer, strict=True)]
    calm = list(zip(questions, answer, strict=True))
    found = extract(model, tokenizer, loud, calm, layers=[5, 14, 20])
    assert found.chosen.auc.value > 0.95
    assert 0.02 < found.chosen.norm_ratio < 1.5
    chance = [judge(found.samples, placebo(found, "orthogonal", seed))[1].auc.value for seed in range(8)]
    assert sum(max(value, 1 - value) for value in chance) / 8 < found.chosen.auc.value
