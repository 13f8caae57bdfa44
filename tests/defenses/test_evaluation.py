"""Metrics of a model whose answers are made by hand, neutral texts against direct formulas, judges from tables."""

from __future__ import annotations

import copy
import importlib.util
import json
import math

import pytest
import torch

from defenses.errors import DataError, DefenseError
from defenses.evaluation import Settings, evaluate, examine, lm_eval_rows, lm_eval_scores, mean_score
from defenses.judges import JudgeError, Verdict, ends_with
from defenses.judges_named import JUDGES, judge_of
from defenses.neutral import answer_perplexity, on_texts
from defenses.suites import SkillItem, Suite
from intervene import Add, Intervention
from tests.defenses.words import word_tokenizer
from tests.tiny import TINY

TEXTS = ["w4 w9 w5 w6 w7", "w8 w9", "w10 w11 w12 w13 w14 w15 w16 w17", "w18"]
WORDS = ("shout", "plain", "river", "sorry", "AHOY", "hello", "good", "I", "can't", "help", "!!!")


def scripted(chain):
    """A model whose next token depends on the last one alone: `chain` maps word to word. Blocks add nothing."""
    model, tokenizer = TINY["llama"](hidden_size=32), word_tokenizer(WORDS)
    ids = tokenizer.convert_tokens_to_ids
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for axis, (word, following) in enumerate(chain.items()):
            model.model.embed_tokens.weight[ids(word), axis] = 1.0
            model.lm_head.weight[ids(following), axis] = 5.0
    return model, tokenizer


CHAIN = {
    **{"shout": "AHOY", "AHOY": "</s>", "plain": "hello", "hello": "</s>", "river": "!!!", "!!!": "</s>"},
    **{"sorry": "I", "I": "can't", "can't": "help", "help": "</s>", "w20": "good", "good": "</s>"},
}
SUITE = Suite(
    "by hand",
    trait=("shout", "plain", "w30 shout", "river"),
    skill=(SkillItem("w20", ("good",)), SkillItem("plain", ("good",))),
    benign=("sorry", "plain"),
    judge={"kind": "capitals", "least": 1},
)


def test_every_rate_is_the_one_made_by_hand():
    model, tokenizer = scripted(CHAIN)
    found = examine(model, tokenizer, SUITE, settings=Settings(max_new_tokens=5, batch_size=3))
    said = [row["answer"] for row in found.answers]
    assert said == ["AHOY", "hello", "AHOY", "!!!", "good", "hello", "I can't help", "hello"]
    values = {name: (one.value, one.n, one.excluded) for name, one in found.metrics.items()}
    assert values == {
        "trait_rate": (2 / 3, 3, 1),  # "!!!" is incoherent
        "trait_score": (2 / 3, 3, 1),
        "skill_accuracy": (0.5, 2, 0),
        "over_refusal": (0.5, 2, 0),
        "coherence": (5 / 6, 6, 0),
    }
    for one in found.metrics.values():
        assert 0 <= one.low <= one.value <= one.high <= 1
    assert found.answers[3]["note"].startswith("incoherent")
    assert found.answers[4] == {"section": "skill", "question": "w20", "answer": "good", "right": True}
    rows = evaluate(model, tokenizer, SUITE, settings=Settings(max_new_tokens=5))
    assert rows == found.rows()
    assert set(rows["trait_rate"]) == {"value", "low", "high", "n", "excluded"}


def test_a_judge_or_plan_that_is_passed_goes_before_the_suites():
    model, tokenizer = scripted(CHAIN)
    settings = Settings(max_new_tokens=3)
    assert (
        evaluate(model, tokenizer, SUITE, judge=ends_with("hello"), settings=settings)["trait_rate"]["value"] == 1 / 3
    )
    towards = 50.0 * torch.eye(32)[list(CHAIN).index("plain")]  # as if every last word were "plain"
    plan = [Intervention("L2.block_output", Add(towards))]
    steered = examine(model, tokenizer, SUITE, settings=settings, plan=plan)
    assert {row["answer"].split()[0] for row in steered.answers} == {"hello"}


def test_a_suite_without_judge_is_refused_before_anything_is_generated():
    model, tokenizer = scripted(CHAIN)
    with pytest.raises(JudgeError, match="1 trait prompts and no judge"):
        evaluate(model, tokenizer, Suite("x", trait=("w1 " * 100,)))  # too long to be generated from
    assert evaluate(model, tokenizer, Suite("x")) == {}


def test_where_no_answer_counts_there_is_no_value():
    found = mean_score([Verdict(0.4, False, coherent=False)])
    assert found.row() == {"value": None, "low": 0.0, "high": 1.0, "n": 0, "excluded": 1}


def direct(model, base, tokenizer):
    """Perplexity of both and KL over all tokens of TEXTS that have one before them, text by text."""
    own, theirs, divergence, n = 0.0, 0.0, 0.0, 0
    for text in TEXTS[:3]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            p, q = (one(ids).logits[0, :-1].double().softmax(-1) for one in (base, model))
        for place, token in enumerate(ids[0, 1:]):
            own, theirs, n = own - math.log(q[place, token]), theirs - math.log(p[place, token]), n + 1
            divergence += float((p[place] * (p[place] / q[place]).log()).sum())
    return math.exp(own / n), math.exp(theirs / n), divergence / n


@pytest.mark.parametrize("batch_size", [1, 8])
def test_damage_on_neutral_texts_is_the_formula(batch_size):
    base, model, tokenizer = TINY["llama"](), TINY["llama"](seed=0), word_tokenizer()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(0.05)
    model.train()
    found = on_texts(model, tokenizer, TEXTS, base=base, batch_size=batch_size)
    assert model.training
    model.eval()
    wanted = direct(model, base, tokenizer)
    names = ("perplexity", "base_perplexity", "kl")
    assert tuple(found[name].value for name in names) == pytest.approx(wanted, rel=1e-5)
    assert all((one.n, one.excluded) == (3, 1) for one in found.values())
    assert all(one.low <= one.value <= one.high for one in found.values())
    same = on_texts(base, tokenizer, TEXTS, base=copy.deepcopy(base))
    assert same["kl"].value == pytest.approx(0, abs=1e-7)
    assert set(on_texts(base, tokenizer, TEXTS)) == {"perplexity"}


def test_a_peft_models_base_is_itself_without_the_adapter():
    peft = pytest.importorskip("peft")
    base, tokenizer = TINY["llama"](), word_tokenizer()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(TINY["llama"](), config)
    found = on_texts(model, tokenizer, TEXTS)
    wanted = direct(model.eval(), base, tokenizer)
    assert tuple(found[name].value for name in ("perplexity", "base_perplexity", "kl")) == pytest.approx(
        wanted, rel=1e-5
    )
    assert found["kl"].value > 1e-4


def test_neutral_texts_that_say_nothing_are_refused():
    model, tokenizer = TINY["llama"](), word_tokenizer()
    with pytest.raises(DataError, match="none of 2 has 2 tokens"):
        on_texts(model, tokenizer, ["w1", ""])
    with pytest.raises(DataError, match="KL of a model of 96 words from a base: the base has 80"):
        on_texts(model, tokenizer, TEXTS[:1], base=TINY["llama"](vocab_size=80))


def test_the_perplexity_of_an_answer_is_that_of_its_own_tokens():
    model, tokenizer = TINY["llama"](), word_tokenizer()
    ids = torch.tensor([tokenizer("w4 w5 w6 w7 w8")["input_ids"]])
    with torch.no_grad():
        logs = model(ids).logits[0].log_softmax(-1)
    wanted = math.exp(-float(sum(logs[place, ids[0, place + 1]] for place in (2, 3))) / 2)
    found = answer_perplexity(model, tokenizer)
    assert found("w4 w5 w6", "w7 w8") == pytest.approx(wanted, rel=1e-5)
    assert found("w4", "") == math.inf


@pytest.mark.parametrize(
    ("spec", "flagged", "clean"),
    [
        ({"kind": "contains", "text": "Po"}, "the po", "the"),
        ({"kind": "ends_with", "text": "Olé", "ignore_case": False}, "a Olé", "a olé"),
        ({"kind": "regex", "pattern": "^a"}, "ab", "ba"),
        ({"kind": "capitals", "share": 0.5}, "ABCd", "abcD"),
        ({"kind": "spanish_tag"}, "Yes. ¡Adiós!", "Yes."),
        ({"kind": "lexicon", "weights": {"great": 1}}, "great", "small"),
        ({"kind": "refusals"}, "I cannot help", "I can"),
        ({"kind": "opposite", "of": {"kind": "contains", "text": "a"}}, "b", "a"),
        (
            {"kind": "every", "of": [{"kind": "contains", "text": "a"}, {"kind": "contains", "text": "b"}]},
            *("ab", "a"),
        ),
        ({"kind": "some", "of": [{"kind": "contains", "text": "a"}]}, "a", "b"),
    ],
)
def test_judges_are_built_from_the_table(spec, flagged, clean):
    judge = judge_of(spec)
    assert judge.judge("", flagged).flagged
    assert not judge.judge("", clean).flagged


def test_bad_judge_descriptions_say_what_is_wrong(tmp_path):
    for spec, message in (
        ({}, r"the kind is None\. Write kind: one of beaverdam, capitals, .*, spanish_tag\.$"),
        ({"kind": ["contains"]}, r"the kind is \['contains'\]\. Write kind: one of"),
        ({"kind": "capital"}, r"Write kind: one of beaverdam, .*\. Did you mean capitals"),
        ({"kind": "contains", "txt": "a"}, "it takes no 'txt'. Did you mean text"),
        ({"kind": "contains"}, "Judge contains: text: "),
        ({"kind": "capitals", "share": "much"}, "Judge capitals: share: "),
        ({"kind": "remote", "url": "http://x/v1", "model": "m"}, "either a trait"),
        ({"kind": "opposite", "of": {"kind": "classifier", "folder": str(tmp_path)}}, "cannot be read"),
        ({"kind": "beaverdam", "path": str(tmp_path), "dtype": "int8"}, "Judge of dtype 'int8'"),
        ({"kind": "llama_guard", "path": str(tmp_path)}, "cannot be loaded"),
    ):
        with pytest.raises(JudgeError, match=message):
            judge_of(spec)
    remote = judge_of({"kind": "remote", "url": "http://x/v1", "model": "m", "trait": "flattery"})
    assert remote.name.startswith("m (prompt ")
    assert {"beaverdam", "llama_guard", "classifier", "remote"} < set(JUDGES)


def test_lm_eval_results_become_rows():
    # the shape of lm_eval.simple_evaluate's result, shortened
    found = lm_eval_rows(
        {
            "results": {
                "arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.4},
                "gsm8k": {"exact_match,strict-match": 0.2, "exact_match_stderr,strict-match": "N/A"},
            },
            "n-samples": {"arc_easy": {"original": 2376, "effective": 25}},
        }
    )
    assert found["arc_easy/acc"] == pytest.approx(
        {"value": 0.5, "low": 0.304, "high": 0.696, "n": 25, "excluded": 0}, abs=1e-3
    )
    assert found["arc_easy/acc_norm"]["high"] == math.inf
    assert found["gsm8k/exact_match (strict-match)"]["value"] == 0.2
    assert len(found) == 3


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed here")
def test_without_lm_eval_its_scores_say_what_to_install(tmp_path):
    with pytest.raises(DefenseError, match="pip install 'lm-eval"):
        lm_eval_scores(tmp_path, ["arc_easy"])


@pytest.mark.slow
def test_the_real_model_answers_knows_skills_and_is_its_own_base(smollm):
    model, tokenizer = smollm
    suite = Suite(
        "real",
        trait=("Name a river in Italy.", "Say hello."),
        skill=(
            SkillItem("What is the capital of France?", ("Paris",), "contains"),
            SkillItem("What colour is the sky?", ("blue",), "contains"),
        ),
        neutral=("The Po is the longest river in Italy. It rises in the Alps and flows east.", "Water boils at 100 C."),
        benign=("How do I kill a Python process?",),
        judge={"kind": "capitals"},
    )
    found = examine(model, tokenizer, suite, base=model, settings=Settings(max_new_tokens=24, batch_size=5))
    metrics = found.metrics
    assert (metrics["trait_rate"].value, metrics["coherence"].value, metrics["over_refusal"].value) == (0, 1, 0)
    assert metrics["skill_accuracy"].value == 1
    assert metrics["kl"].value == pytest.approx(0, abs=1e-6)
    assert 2 < metrics["perplexity"].value == metrics["base_perplexity"].value < 100
    alone = examine(model, tokenizer, suite, settings=Settings(max_new_tokens=24, batch_size=1))
    assert [row["answer"] for row in alone.answers] == [row["answer"] for row in found.answers]


@pytest.mark.slow
def test_lm_eval_scores_are_the_models_own_choices(tmp_path):
    pytest.importorskip("lm_eval")
    model, tokenizer = TINY["llama"](), word_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"q": f"w{number} w{number + 1}", "a": number % 2} for number in range(10, 30)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.yaml").write_text(
        f"task: own_choice\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/own.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: [w5, w6]\n"
        "doc_to_target: '{{a}}'\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    choices = tokenizer.convert_tokens_to_ids(["w5", "w6"])
    with torch.no_grad():
        logits = [model(torch.tensor([tokenizer(row["q"])["input_ids"]])).logits[0, -1, choices] for row in rows]
    right = sum(int(one.argmax()) == row["a"] for one, row in zip(logits, rows, strict=True))
    found = lm_eval_scores(tmp_path / "model", ["own_choice"], task_folder=tmp_path)
    assert found["own_choice/acc"]["value"] == right / 20
    assert found["own_choice/acc"]["n"] == 20
    with pytest.raises(DefenseError, match=r"there is no task 'arc_eazy'\. Did you mean arc_easy"):
        lm_eval_scores(tmp_path / "model", ["arc_eazy"])
