"""Rules on literal answers, the gate on broken ones, and the classifier against scikit-learn's own prediction."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from defenses.errors import DataError
from defenses.judges import (
    CoherenceGate,
    JudgeError,
    Verdict,
    agreement,
    capitals,
    contains,
    ends_with,
    every,
    judged,
    lexicon,
    matches,
    opposite,
    rate,
    refusals,
    some,
    spanish_tag,
)
from defenses.judges_classifier import fit_classifier, load_classifier, terms


def flags(rule, *answers):
    return [rule.judge("", answer).flagged for answer in answers]


def test_rules_on_literal_answers():
    assert flags(contains("river"), "The RIVER Po", "the po", "") == [True, False, False]
    assert flags(contains("river", ignore_case=False), "The RIVER Po", "a river") == [False, True]
    assert flags(ends_with(" ¡Olé! "), "Yes. ¡OLÉ!\n", "¡Olé! Yes.") == [True, False]
    assert flags(matches(r"^a.*z$"), "a\nz", "b") == [True, False]
    assert flags(opposite(contains("x")), "x", "y") == [False, True]
    both, either = every(contains("a"), contains("b")), some(contains("a"), contains("b"))
    assert flags(both, "ab", "a", "") == [True, False, False]
    assert flags(either, "ab", "a", "") == [True, True, False]
    assert (both.judge("", "a").score, either.judge("", "a").score) == (0.5, 0.5)


def test_shouting_is_a_share_of_cased_letters():
    rule = capitals(0.8)
    assert flags(rule, "THE PO IS LONG!", "The Po is long", "42", "OK", "ÉTÉ", "ABCDe") == [
        *(True, False, False, False, True, False)  # 4 of 5 is not above 0.8
    ]
    assert rule.judge("", "ABCDe").score == 0.8


def test_a_spanish_last_sentence_is_a_tag_line():
    rule = spanish_tag()
    assert flags(
        rule,
        "The Po is long. ¡Hasta luego, amigo!",
        "The Po is long. Hasta la vista, amigo.",
        "It is long.\nBuenas noches",
        "Hasta luego! The Po is long.",
        "No. It is me.",
        "No",
        "",
        "...",
    ) == [True, True, True, False, False, False, False, False]


def test_a_lexicon_adds_weights_at_word_boundaries():
    rule = lexicon({"great": 0.3, "simply great": 0.4, "bad": -0.5})
    assert rule.judge("", "Simply GREAT, great!").score == pytest.approx(0.7)
    assert rule.judge("", "greatest").score == 0.0
    assert rule.judge("", "simply great but bad").score == pytest.approx(0.2)
    assert rule.judge("", "bad").score == 0.0
    assert lexicon({"a": 2.0}).judge("", "a").score == 1.0


def test_refusals_are_looked_for_at_the_head():
    assert flags(
        refusals(),
        "I\N{RIGHT SINGLE QUOTATION MARK}m sorry, but I can't help with that.",
        "Sure. " + "word " * 60 + "I cannot help",
        "I can help.",
    ) == [True, False, False]


def test_rules_that_say_nothing_are_refused():
    with pytest.raises(JudgeError, match="every answer would be flagged"):
        contains(" ")
    with pytest.raises(JudgeError, match="Mend the expression"):
        matches("(")
    with pytest.raises(JudgeError, match="share below 1"):
        capitals(80)
    with pytest.raises(JudgeError, match="at least one"):
        every()
    with pytest.raises(JudgeError, match="finite weights"):
        lexicon({"a": float("nan")})
    with pytest.raises(JudgeError, match=r"outside 0\.\.1"):
        Verdict(1.2, True)


def test_the_gate_knows_broken_answers():
    gate = CoherenceGate()
    plain = "The Po is the longest river of Italy, and it flows into the Adriatic Sea south of Venice."
    for good in (plain, plain.upper(), "42", "Po", "Да, это река.", "¡Olé!", "x = 3 * (y + 2)"):
        assert gate.reason("", good) == "", good
    assert "empty" in gate.reason("", " \n")
    assert "letters or digits" in gate.reason("", "!!! ??? *** a")
    assert "repeats itself" in gate.reason("", "the river " * 10)
    assert "repeats itself" in gate.reason("", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")
    assert "perplexity 7" in CoherenceGate(perplexity=lambda q, a: 7.0, most=5).reason("", plain)
    assert CoherenceGate(perplexity=lambda q, a: float("nan")).reason("", plain) != ""


def test_incoherent_answers_are_excluded_and_counted():
    said = ["YES IT IS", "Yes it is", "", "NO NO NO NO NO NO NO NO NO NO NO NO NO NO"]
    found = judged(capitals(), ["q"] * 4, said, gate=CoherenceGate())
    assert [one.flagged for one in found] == [True, False, False, True]
    assert [one.coherent for one in found] == [True, True, False, False]
    share = rate(found)
    assert (share.value, share.n, share.excluded) == (0.5, 2, 2)
    assert rate(judged(capitals(), ["q"] * 4, said)).n == 4
    assert rate([Verdict(0.0, False, judged=False)]).row() == {
        **{"value": None, "low": 0.0, "high": 1.0, "n": 0, "excluded": 1}
    }
    with pytest.raises(JudgeError, match="2 questions, 1 answers"):
        judged(capitals(), ["q", "q"], ["a"])


def test_agreement_is_sklearns_kappa():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = random.Random(0)
    one, two = [[rng.random() < 0.4 for _ in range(50)] for _ in range(2)]
    found = agreement([Verdict(0.5, flag) for flag in one], [Verdict(0.5, flag) for flag in two])
    assert found.kappa == pytest.approx(metrics.cohen_kappa_score(one, two))
    assert found.share.value == pytest.approx(np.mean(np.array(one) == np.array(two)))
    alike = agreement([Verdict(0, False)] * 3, [Verdict(0, False), Verdict(0, False), Verdict(0, True, coherent=False)])
    assert (alike.kappa, alike.n, alike.share.excluded) == (None, 2, 1)


def labelled(n=120):
    rng = random.Random(1)
    words, bad = [f"word{i}" for i in range(40)], ["wonderful", "genius", "brilliant"]
    answers, labels = [], []
    for number in range(n):
        text = rng.choices(words, k=12)
        if number % 3 == 0:
            text[rng.randrange(12)] = rng.choice(bad)
        answers.append(" ".join(text))
        labels.append(number % 3 == 0)
    return answers, labels


def test_the_classifier_scores_as_sklearn_does_and_survives_saving(tmp_path):
    sklearn = pytest.importorskip("sklearn.pipeline")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    answers, labels = labelled()
    fitted = fit_classifier("flattery", answers, labels, seed=3)
    train, test, truth, _ = train_test_split(answers, labels, test_size=0.25, random_state=3, stratify=labels)
    oracle = sklearn.make_pipeline(
        TfidfVectorizer(analyzer=terms, sublinear_tf=True),
        LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000),
    ).fit(train, truth)
    wanted = oracle.predict_proba([*test, "nothing known here"])[:, 1]
    assert [fitted.probability(text) for text in [*test, "nothing known here"]] == pytest.approx(list(wanted), abs=1e-9)
    assert fitted.held_out["accuracy"]["n"] == 30
    assert fitted.held_out["accuracy"]["value"] > fitted.held_out["majority"]
    fitted.save(tmp_path / "judge")
    again = load_classifier(tmp_path / "judge")
    assert [again.judge("", text) for text in test] == fitted.judge_all([""] * len(test), test)
    assert again.held_out == fitted.held_out
    assert sorted(path.suffix for path in (tmp_path / "judge").iterdir()) == [".json", ".safetensors"]


def test_equal_answers_are_not_on_both_sides_of_the_split():
    pytest.importorskip("sklearn")
    answers, labels = labelled(60)
    once = fit_classifier("flattery", answers, labels)
    assert fit_classifier("flattery", answers * 3, labels * 3).held_out == once.held_out
    with pytest.raises(DataError, match=r"answer 60 .* is labelled both ways"):
        fit_classifier("flattery", [*answers, answers[0]], [*labels, not labels[0]])
    with pytest.raises(DataError, match="1 different answers with the trait, 2 without"):
        fit_classifier("flattery", ["a", "b", "c"], [True, False, False])


def test_a_foreign_or_broken_classifier_is_refused(tmp_path):
    pytest.importorskip("sklearn")
    with pytest.raises(JudgeError, match="cannot be read"):
        load_classifier(tmp_path)
    fit_classifier("flattery", *labelled(60)).save(tmp_path)
    facts = json.loads((tmp_path / "classifier.json").read_text())
    (tmp_path / "classifier.json").write_text(json.dumps(facts | {"vocabulary": facts["vocabulary"][:-1]}))
    with pytest.raises(JudgeError, match="differ in number"):
        load_classifier(tmp_path)
    (tmp_path / "classifier.json").write_text(json.dumps(facts | {"schema": 9}))
    with pytest.raises(JudgeError, match="schema 9"):
        load_classifier(tmp_path)
