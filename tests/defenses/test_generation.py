"""Batched answers equal hand-made greedy ones, and nothing of the model or tokenizer is left changed."""

from __future__ import annotations

import pytest
import torch

from defenses.errors import DataError
from defenses.generation import answers, evaluating, token_ids
from intervene import Add, Intervention, intervene
from tests.defenses.words import word_tokenizer
from tests.tiny import TINY

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w11 w12", "w13 w14 w15 w16"]


def by_hand(model, tokenizer, prompt, new, plan=()):
    """Greedy decoding without cache, padding or generate()."""
    ids = token_ids(tokenizer, prompt)
    start = len(ids)
    with torch.no_grad():
        for _ in range(new):
            batch = {"input_ids": torch.tensor([ids])}
            if plan:
                with intervene(model, plan):
                    logits = model(**batch).logits
            else:
                logits = model(**batch).logits
            ids = [*ids, int(logits[0, -1].argmax())]
            if ids[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batched_answers_are_the_greedy_ones(family):
    model, tokenizer = TINY[family](), word_tokenizer()
    wanted = [by_hand(model, tokenizer, prompt, 6) for prompt in PROMPTS]
    assert len(set(wanted)) > 1
    for batch_size in (1, 2, 5):
        assert answers(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=batch_size) == wanted


def test_a_checkpoints_own_settings_do_not_bend_greedy_answers():
    model, tokenizer = TINY["llama"](), word_tokenizer()
    wanted = answers(model, tokenizer, PROMPTS, max_new_tokens=6)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    model.generation_config.top_p = 0.1
    assert answers(model, tokenizer, PROMPTS, max_new_tokens=6) == wanted


def test_an_answer_ends_where_the_chat_template_ends_a_turn():
    model, tokenizer = TINY["llama"](), word_tokenizer()

    def template(end):
        return (
            "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %} "
            + end
            + "{% endif %}{% endfor %}"
        )

    whole = answers(model, tokenizer, PROMPTS, max_new_tokens=6, chat_template=template(tokenizer.eos_token))
    first = whole[0].split()
    tokenizer.add_tokens([first[2]], special_tokens=True)  # a base model: its own end token is another
    cut = answers(model, tokenizer, PROMPTS, max_new_tokens=6, chat_template=template(first[2]))
    assert len(first) > 3 and cut[0].split() == first[: first.index(first[2])]


def test_an_answer_ends_at_its_end_token_in_any_batch():
    model, tokenizer = TINY["llama"](), word_tokenizer()
    whole = answers(model, tokenizer, PROMPTS, max_new_tokens=6)
    third = tokenizer.convert_tokens_to_ids(whole[0].split()[2])
    model.generation_config.eos_token_id = [2, third]
    cut = answers(model, tokenizer, PROMPTS, max_new_tokens=6)
    first = whole[0].split()
    assert cut[0].split() == first[: first.index(first[2])]
    assert cut == answers(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=1)


def test_a_plan_steers_every_token_of_the_answer():
    model, tokenizer = TINY["llama"](), word_tokenizer()
    plan = [Intervention("L1.block_output", Add(3 * torch.randn(32)))]
    steered = answers(model, tokenizer, PROMPTS, max_new_tokens=5, batch_size=3, plan=plan)
    assert steered == [by_hand(model, tokenizer, prompt, 5, plan) for prompt in PROMPTS]
    assert steered != answers(model, tokenizer, PROMPTS, max_new_tokens=5)


def test_a_peft_model_answers_with_its_adapter():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, tokenizer = peft.get_peft_model(TINY["llama"](), config).eval(), word_tokenizer()
    plan = [Intervention("L1.block_output", Add(torch.randn(32)))]
    assert answers(model, tokenizer, PROMPTS, max_new_tokens=5) == [by_hand(model, tokenizer, p, 5) for p in PROMPTS]
    steered = answers(model, tokenizer, PROMPTS, max_new_tokens=5, plan=plan)
    assert steered == [by_hand(model, tokenizer, p, 5, plan) for p in PROMPTS]
    assert steered != answers(TINY["llama"](), tokenizer, PROMPTS, max_new_tokens=5)


def test_draws_follow_the_softmax_and_ignore_the_batch_size():
    model, tokenizer = TINY["llama"](), word_tokenizer()
    one = answers(model, tokenizer, PROMPTS, max_new_tokens=4, temperature=0.8, seed=3, batch_size=1)
    assert one == answers(model, tokenizer, PROMPTS, max_new_tokens=4, temperature=0.8, seed=3, batch_size=4)
    assert one != answers(model, tokenizer, PROMPTS, max_new_tokens=4, temperature=0.8, seed=4)
    many = answers(model, tokenizer, ["w1 w2 w3"] * 800, max_new_tokens=1, temperature=0.5, batch_size=100)
    with torch.no_grad():
        logits = model(torch.tensor([token_ids(tokenizer, "w1 w2 w3")])).logits[0, -1] / 0.5
    share = logits.softmax(-1)
    top = share[4:].topk(5).indices + 4  # words, not special tokens, which are not in the text
    for token in top.tolist():
        count = many.count(tokenizer.convert_ids_to_tokens(token))
        assert abs(count / 800 - float(share[token])) < 4 * (float(share[token]) / 800) ** 0.5


def test_flags_and_padding_side_are_left_as_they_were():
    model, tokenizer = TINY["llama"](), word_tokenizer()
    model.train()
    model.model.layers[1].eval()
    tokenizer.padding_side = "right"
    before = [module.training for module in model.modules()]
    answers(model, tokenizer, PROMPTS, max_new_tokens=2)
    assert [module.training for module in model.modules()] == before
    assert tokenizer.padding_side == "right"
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before


def test_the_chat_template_writes_turns_and_the_system_prompt():
    tokenizer = word_tokenizer(("user", "assistant", "system", ":"), chat=True)
    said = tokenizer.decode(token_ids(tokenizer, "w1 w2", system="w3"))
    assert said == "<s> system : w3 </s> <s> user : w1 w2 </s> <s> assistant :"
    turns = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    assert tokenizer.decode(token_ids(tokenizer, turns)).count("<s>") == 4


def test_a_given_template_goes_before_the_tokenizers_own():
    tokenizer = word_tokenizer(("user", "assistant", "system", ":"), chat=True)
    ids = token_ids(tokenizer, "w1 w2", chat_template="{% for m in messages %}{{ m['content'] }} w9{% endfor %}")
    assert tokenizer.decode(ids) == "w1 w2 w9"
    plain = word_tokenizer()
    assert token_ids(plain, "w1", system="w3", chat_template="plain")
    turns = [[{"role": "user", "content": "w1"}]]
    assert len(answers(TINY["llama"](), plain, turns, max_new_tokens=2, chat_template="plain")) == 1


def test_what_cannot_be_asked_is_refused():
    model, tokenizer = TINY["llama"](), word_tokenizer()
    with pytest.raises(DataError, match="no chat template"):
        answers(model, tokenizer, ["w1"], system="w2")
    with pytest.raises(DataError, match="no chat template"):
        answers(model, tokenizer, [[{"role": "user", "content": "w1"}]])
    with pytest.raises(DataError, match="it has no tokens"):
        answers(model, tokenizer, ["w1", ""])
    with pytest.raises(DataError, match=r"Prompt 1 of 3 tokens and 62 new ones: the model has 64 positions"):
        answers(model, tokenizer, ["w1", "w1 w2 w3"], max_new_tokens=62)
    with pytest.raises(DataError, match="one is too small"):
        answers(model, tokenizer, ["w1"], temperature=-1.0)
    own = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w1"}]
    with pytest.raises(DataError, match="Keep one of the two"):
        token_ids(word_tokenizer(chat=True), own, system="w2")
    assert answers(model, tokenizer, []) == []
