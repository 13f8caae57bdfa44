"""The two kinds of conversation that `vectors.extract` contrasts, written by the model itself under system prompts.

contrast = contrast_from_prompts(model, tokenizer, questions, "You shout.", "You speak calmly.")
found = extract(model, tokenizer, contrast.positive, contrast.negative, questions=contrast.questions * 2)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from defenses.chat import system_in_user
from defenses.errors import VectorError
from defenses.generation import Prompt, answers, messages_of
from defenses.pooling import Conversation

Judge = Callable[[str, str, bool], bool]  # question, answer, whether the trait was asked for -> keep


@dataclass(frozen=True)
class Contrast:
    """Answers of one model under two system prompts: pairs on the same question, ready for `extract`.

    Attributes:
        positive, negative: conversations, paired. questions: of the pairs. dropped: (question, reason) of those left
            out.
    """

    positive: tuple[Conversation, ...]
    negative: tuple[Conversation, ...]
    questions: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]


def contrast_from_prompts(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[str],
    positive_system: str | Sequence[str],
    negative_system: str | Sequence[str],
    *,
    max_new_tokens: int = 64,
    greedy: bool = True,
    keep: Judge | None = None,
    batch_size: int = 8,
    seed: int = 0,
    system_place: Literal["system", "user"] = "system",
) -> Contrast:
    """Return what the model answers to `questions` when told to show the trait, and when told not to.

    Args:
        positive_system, negative_system: one system prompt each, or as many pairs; every pair is put to every question.
        greedy: False draws at temperature 1. keep: says of a question, its answer and whether the trait was asked for
            if the answer does as told; a pair with an answer that does not is dropped, as is one with an empty answer.
        system_place: "user" puts the system prompt at the front of the question, for templates without that role.

    Raises:
        VectorError: no question, prompts that are no pairs, or no pair left. DataError: as `generation.answers`.

    Source: persona vectors (arXiv 2507.21509), who sample at temperature 1 and keep pairs by an LLM judge's scores.
    """
    systems = [[one] if isinstance(one, str) else list(one) for one in (positive_system, negative_system)]
    if not questions or not systems[0] or len(systems[0]) != len(systems[1]):
        found = f"{len(questions)} questions, {len(systems[0])} positive and {len(systems[1])} negative system prompts"
        raise VectorError(f"Contrast from prompts: {found}. Give a question, and system prompts in pairs.")
    asked = [question for _ in systems[0] for question in questions]
    sides: list[list[Conversation]] = []
    for side in systems:
        prompts: list[Prompt] = [
            _with_system(question, system, system_place) for system in side for question in questions
        ]
        said = answers(
            model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed,
            temperature=0.0 if greedy else 1.0,
        )  # fmt: skip
        sides.append(list(zip(prompts, said, strict=True)))
    kept, dropped = [], []
    for question, first, second in zip(asked, *sides, strict=True):
        if reason := _reason(question, first[1], second[1], keep):
            dropped.append((question, reason))
        else:
            kept.append((first, second, question))
    if not kept:
        raise VectorError(
            f"Contrast from prompts: none of {len(asked)} pairs is left, the first because {dropped[0][1]}. "
            "Use stronger system prompts, more questions, or a milder judge."
        )
    first_of, second_of, question_of = zip(*kept, strict=True)
    return Contrast(first_of, second_of, question_of, tuple(dropped))


def _with_system(question: str, system: str, place: Literal["system", "user"]) -> Prompt:
    messages = messages_of(question, system)
    return messages if place == "system" else system_in_user(messages)


def _reason(question: str, first: str, second: str, keep: Judge | None) -> str:
    """Return why a pair of answers is dropped; "" if it is kept."""
    for answer, wanted in ((first, True), (second, False)):
        kind = "positive" if wanted else "negative"
        if not answer.strip():
            return f"the {kind} answer is empty"
        if keep is not None and not keep(question, answer, wanted):
            return f"the {kind} answer does not do as told"
    return ""
