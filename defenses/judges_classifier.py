"""A small local judge: TF-IDF and logistic regression, fitted on labelled answers, with its accuracy on held-out ones.

    fitted = fit_classifier("shouting", answers, labels)       # needs scikit-learn
    fitted.save(Path("judge")); load_classifier(Path("judge"))  # classifier.json + classifier.safetensors, no pickle

Scoring needs only numpy: the vocabulary, idf and weights are the whole classifier.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from defenses.errors import DataError
from defenses.judges import JudgeError, Verdict
from defenses.statistics import Estimate, auroc, wilson
from intervene.errors import asked_found_do

SCHEMA = 1
_WORD = re.compile(r"\w\w+|[!?¡¿]")
_JSON, _WEIGHTS = "classifier.json", "classifier.safetensors"


@dataclass(frozen=True, eq=False)
class TextClassifier:
    """P(trait | answer) = sigmoid(w . x + b), x the l2-normed tf-idf of the answer's words and pairs of words.

    tf = 1 + ln(count); upper case is kept where `fold` is False.

    Shapes:
        idf, weights: (V,) float64, by `vocabulary`'s columns.
    """

    name: str
    vocabulary: Mapping[str, int]
    idf: np.ndarray
    weights: np.ndarray
    bias: float
    threshold: float = 0.5
    fold: bool = True
    held_out: Mapping[str, Any] = field(default_factory=dict)  # "accuracy" and "auroc" as rows, "majority", "n_train"

    def probability(self, answer: str) -> float:
        """Return the probability that `answer` has the trait."""
        counts = Counter(terms(answer, fold=self.fold))
        known = {self.vocabulary[term]: count for term, count in counts.items() if term in self.vocabulary}
        if not known:
            return _sigmoid(self.bias)
        columns = np.fromiter(known, dtype=int)
        values = (1 + np.log(np.fromiter(known.values(), dtype=float))) * self.idf[columns]
        return _sigmoid(float(values @ self.weights[columns] / np.linalg.norm(values)) + self.bias)

    def judge(self, question: str, answer: str) -> Verdict:
        """Return the verdict on one answer; the question is not looked at."""
        score = self.probability(answer)
        return Verdict(score, score > self.threshold)

    def judge_all(self, questions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Return one verdict per answer."""
        return [self.judge(*pair) for pair in zip(questions, answers, strict=True)]

    def save(self, folder: Path) -> None:
        """Write classifier.json and classifier.safetensors into `folder`, which may exist."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({"idf": self.idf, "weights": self.weights}, folder / _WEIGHTS)
        facts = {name: getattr(self, name) for name in ("name", "bias", "threshold", "fold")}
        facts |= {"schema": SCHEMA, "vocabulary": list(self.vocabulary), "held_out": dict(self.held_out)}
        (folder / _JSON).write_text(json.dumps(facts, ensure_ascii=False, indent=1), encoding="utf-8")


def terms(text: str, *, fold: bool = True) -> list[str]:
    """Return the words of two letters or more and the marks ! ? of `text`, then its pairs of neighbours."""
    words = _WORD.findall(text.lower() if fold else text)
    return words + [f"{a} {b}" for a, b in pairwise(words)]


def fit_classifier(
    name: str,
    answers: Sequence[str],
    labels: Sequence[bool],
    *,
    share_held_out: float = 0.25,
    seed: int = 0,
    strength: float = 10.0,
    fold: bool = True,
    threshold: float = 0.5,
) -> TextClassifier:
    """Return the classifier fitted on a part of the labelled answers, and its accuracy and AUROC on the rest.

    Equal answers are kept once, so that none is both fitted and held out. The classes are weighed equally.

    Args:
        strength: inverse of the l2 penalty (scikit-learn's C). fold: ignore case; not for traits that are in the case.

    Raises:
        DataError: unequal lengths, one answer under both labels, or fewer than 4 different answers of a class.
        JudgeError: scikit-learn is not installed.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        asked, do = f"Classifier {name!r}", "Install it: pip install scikit-learn."
        raise JudgeError(asked_found_do(asked, "scikit-learn is not installed.", do)) from error
    texts, truth = _distinct(name, answers, labels)
    parts = train_test_split(texts, truth, test_size=share_held_out, random_state=seed, stratify=truth)
    fit_texts, test_texts, fit_truth, test_truth = parts
    words = TfidfVectorizer(analyzer=lambda text: terms(text, fold=fold), sublinear_tf=True)
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000)
    model.fit(words.fit_transform(fit_texts), fit_truth)
    order = sorted(words.vocabulary_, key=words.vocabulary_.__getitem__)
    fitted = TextClassifier(
        name=name,
        vocabulary={term: column for column, term in enumerate(order)},
        idf=np.asarray(words.idf_, dtype=np.float64),
        weights=np.ascontiguousarray(model.coef_[0], dtype=np.float64),
        bias=float(model.intercept_[0]),
        threshold=threshold,
        fold=fold,
        held_out={},
    )
    facts = held_out_facts(fitted, test_texts, test_truth) | {"n_train": len(fit_texts)}
    return TextClassifier(**{**vars(fitted), "held_out": facts})


def held_out_facts(fitted: TextClassifier, answers: Sequence[str], labels: Sequence[bool]) -> dict[str, Any]:
    """Return "accuracy" and "auroc" as rows, and "majority", the accuracy of always saying the commoner label."""
    scores = [fitted.probability(answer) for answer in answers]
    right = sum((score > fitted.threshold) == label for score, label in zip(scores, labels, strict=True))
    accuracy: Estimate = wilson(right, len(labels))
    majority = max(sum(labels), len(labels) - sum(labels)) / len(labels)
    return {"accuracy": accuracy.row(), "auroc": auroc(scores, labels).row(), "majority": majority}


def load_classifier(folder: Path) -> TextClassifier:
    """Return the classifier that `save` wrote into `folder`.

    Raises:
        JudgeError: a file is missing or broken, of another schema, or the two do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    asked = f"Classifier in {folder}"
    try:
        facts = json.loads((folder / _JSON).read_text(encoding="utf-8"))
        arrays = load_file(folder / _WEIGHTS)
        if facts["schema"] != SCHEMA:
            found = f"it has schema {facts['schema']}, this version reads {SCHEMA}."
            raise JudgeError(asked_found_do(asked, found, "Fit it anew."))
        words = facts["vocabulary"]
        shapes = {len(words), *(len(arrays[part]) for part in ("idf", "weights"))}
        if len(shapes) > 1 or len(set(words)) < len(words):
            raise JudgeError(asked_found_do(asked, f"words and weights differ in number ({shapes}).", "Fit it anew."))
        return TextClassifier(
            name=str(facts["name"]),
            vocabulary={word: column for column, word in enumerate(words)},
            idf=arrays["idf"],
            weights=arrays["weights"],
            bias=float(facts["bias"]),
            threshold=float(facts["threshold"]),
            fold=bool(facts["fold"]),
            held_out=facts["held_out"],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        do = "Pass a folder that TextClassifier.save wrote."
        raise JudgeError(asked_found_do(asked, f"cannot be read ({type(error).__name__}: {error}).", do)) from error


def _distinct(name: str, answers: Sequence[str], labels: Sequence[bool]) -> tuple[list[str], list[bool]]:
    if len(answers) != len(labels):
        raise DataError(f"Classifier {name!r}: {len(answers)} answers, {len(labels)} labels. Give one label each.")
    known: dict[str, bool] = {}
    for number, (answer, label) in enumerate(zip(answers, labels, strict=True)):
        if known.setdefault(answer, bool(label)) != bool(label):
            found = f"answer {number} ({answer[:40]!r}) is labelled both ways."
            raise DataError(asked_found_do(f"Classifier {name!r}", found, "Decide for one."))
    positive = sum(known.values())
    if min(positive, len(known) - positive) < 4:
        found = f"{positive} different answers with the trait, {len(known) - positive} without."
        raise DataError(asked_found_do(f"Classifier {name!r}", found, "Give at least 4 of each, better 100."))
    return list(known), list(known.values())


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
