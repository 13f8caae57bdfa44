"""Both judges on tiny random checkpoints saved to disk: against Hugging Face's own logits, one row and no padding."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, LlamaForSequenceClassification

from defenses.judges import JudgeError, rate
from defenses.judges_models import BEAVER_FORMAT, BEAVERTAILS, load_beaverdam, load_llama_guard
from tests.defenses.words import word_tokenizer
from tests.tiny import CONFIGURATIONS, TINY

QUESTIONS = ["w20 w21", "w22", "w23 w24 w25 w26"]
ANSWERS = ["w30 w31 w32", "w33", "w34 w35 w36 w37 w38 w39"]


def tiny_config(**values):
    model_type, shape = CONFIGURATIONS["llama"]
    common = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(model_type, **{**common, **shape, **values})


@pytest.fixture
def beaver(tmp_path):
    torch.manual_seed(0)
    classifier = LlamaForSequenceClassification(tiny_config(num_labels=14, problem_type="multi_label_classification"))
    with torch.no_grad():
        classifier.score.weight.mul_(60)
    classifier.save_pretrained(tmp_path)
    word_tokenizer(("BEGINNING", "OF", "CONVERSATION:", "USER:")).save_pretrained(tmp_path)
    return tmp_path


def logits_of_one(folder, question, answer, length):
    model, tokenizer = (
        LlamaForSequenceClassification.from_pretrained(folder),
        word_tokenizer(("BEGINNING", "OF", "CONVERSATION:", "USER:")),
    )
    ids = tokenizer(BEAVER_FORMAT.format(question=question, answer=answer) + "</s>")["input_ids"][:length]
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("length", [256, 9])
def test_beaverdam_is_the_classifier_on_each_text_alone(beaver, length):
    judge = load_beaverdam(str(beaver), max_length=length, batch_size=2)
    found = judge.judge_all(QUESTIONS, ANSWERS)
    for verdict, question, answer in zip(found, QUESTIONS, ANSWERS, strict=True):
        wanted = logits_of_one(beaver, question, answer, length).sigmoid()
        assert verdict.score == pytest.approx(float(wanted.max()), abs=1e-5)
        assert verdict.flagged == (float(wanted.max()) > 0.5)
        for kind, share in zip(BEAVERTAILS, wanted.tolist(), strict=True):
            assert (kind in verdict.note) == (share > 0.5)
    assert judge.judge(QUESTIONS[2], ANSWERS[2]).score == pytest.approx(found[2].score, abs=1e-6)


def test_what_was_cut_is_counted_and_said(beaver):
    judge = load_beaverdam(str(beaver), max_length=9)
    notes = [one.note for one in judge.judge_all(QUESTIONS, ANSWERS)]
    assert judge.cut == 2
    assert ["judged on its first 9 tokens" in note for note in notes] == [True, False, True]
    whole = load_beaverdam(str(beaver))
    whole.judge_all(QUESTIONS, ANSWERS)
    assert whole.cut == 0
    assert whole.name.endswith("(max 256 tokens, above 0.5)")


def test_a_classifier_that_is_not_beaverdam_is_refused(beaver, tmp_path_factory):
    LlamaForSequenceClassification(tiny_config(num_labels=2)).save_pretrained(beaver)
    with pytest.raises(JudgeError, match="has 2 labels, BeaverTails has 14"):
        load_beaverdam(str(beaver))
    base = tmp_path_factory.mktemp("base")
    TINY["llama"](num_labels=14).save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    with pytest.raises(JudgeError, match=r"lacks 1 weights, first score\.weight"):
        load_beaverdam(str(base))
    with pytest.raises(JudgeError, match="cannot be loaded"):
        load_beaverdam(str(base / "nothing"))


GUARD_WORDS = ("user", "assistant", ":", "safe", "unsafe", "S1", "S14")


@pytest.fixture
def guard(tmp_path):
    model = TINY["llama"]()
    with torch.no_grad():  # only its last layer's scale: random, but with weight on a few tokens
        model.lm_head.weight.mul_(4)
    model.save_pretrained(tmp_path)
    word_tokenizer(GUARD_WORDS, chat=True).save_pretrained(tmp_path)
    return tmp_path


def next_shares(judge, text):
    ids = judge.tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return judge.model(torch.tensor([ids])).logits[0, -1].softmax(-1)


def test_llama_guard_reads_the_first_tokens_logits(guard):
    judge = load_llama_guard(str(guard), batch_size=2)
    judge.least = 0.0
    ids = judge.tokenizer.convert_tokens_to_ids
    for verdict, question, answer in zip(judge.judge_all(QUESTIONS, ANSWERS), QUESTIONS, ANSWERS, strict=True):
        shares = next_shares(judge, f"<s> user : {question} </s> <s> assistant : {answer} </s> <s> assistant :")
        wanted = float(shares[ids("unsafe")] / (shares[ids("safe")] + shares[ids("unsafe")]))
        assert verdict.score == pytest.approx(wanted, abs=1e-5)
        assert verdict.flagged == (wanted > 0.5)
        assert bool(verdict.note) == verdict.flagged


def test_a_guard_that_does_not_answer_gives_no_verdict(guard):
    judge = load_llama_guard(str(guard))
    judge.least = 1.0
    found = judge.judge_all(QUESTIONS, ANSWERS)
    assert all(not one.judged and "not answering" in one.note for one in found)
    assert (rate(found).value, rate(found).excluded) == (None, 3)


def test_line_breaks_before_the_answer_are_taken_along_and_the_category_is_greedy(tmp_path):
    # A guard by hand: blocks add nothing, so the last token alone decides: ":" -> line break -> unsafe -> S14 -> end.
    model, tokenizer = TINY["llama"](), word_tokenizer((*GUARD_WORDS, "\n\n"), chat=True)
    ids = tokenizer.convert_tokens_to_ids
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        chain = [
            (":", {"\n\n": 9.0}),
            ("\n\n", {"unsafe": 6.0, "safe": 4.0}),
            ("unsafe", {"S14": 9}),
            ("S14", {"</s>": 9}),
        ]
        for axis, (token, following) in enumerate(chain):
            model.model.embed_tokens.weight[ids(token), axis] = 1.0
            for name, logit in following.items():
                model.lm_head.weight[ids(name), axis] = logit / 32**0.5  # the norm makes a unit vector sqrt(D) long
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    verdict = load_llama_guard(str(tmp_path)).judge("w20", "w21")
    assert verdict.judged
    assert verdict.score == pytest.approx(float(torch.tensor(2.0).sigmoid()), abs=1e-4)
    assert (verdict.flagged, verdict.note) == (True, "S14")


def test_a_guard_without_policy_or_words_is_refused(guard):
    word_tokenizer(GUARD_WORDS).save_pretrained(guard)
    (guard / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(JudgeError, match="no chat template"):
        load_llama_guard(str(guard))
    word_tokenizer(("user", "assistant", ":", "safe"), chat=True).save_pretrained(guard)
    with pytest.raises(JudgeError, match="'safe' and 'unsafe': they begin with the tokens"):
        load_llama_guard(str(guard))
