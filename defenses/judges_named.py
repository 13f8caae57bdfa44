"""Judges as data: `judge_of({"kind": "ends_with", "text": "¡Olé!"})`, from one explicit table.

Every kind's keys are the arguments of its function; an unknown key is refused with the nearest name. Nothing that a
file names is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import torch

from defenses import judges
from defenses.judges import Judge, JudgeError, Rule
from defenses.judges_classifier import load_classifier
from defenses.judges_models import PUBLISHED_LENGTH, load_beaverdam, load_llama_guard
from defenses.judges_remote import RemoteJudge, rubric
from intervene.errors import asked_found_do, close_names


def _capitals(share: float = 0.8, least: int = 3) -> Rule:
    return judges.capitals(share, least=least)


def _lexicon(weights: dict[str, float], threshold: float = 0.5, head: int = 0) -> Rule:
    return judges.lexicon(weights, threshold=threshold, head=head)


def _opposite(of: dict[str, Any]) -> Rule:
    return judges.opposite(_rule_of(of))


def _every(of: list[dict[str, Any]]) -> Rule:
    return judges.every(*map(_rule_of, of))


def _some(of: list[dict[str, Any]]) -> Rule:
    return judges.some(*map(_rule_of, of))


def _beaverdam(
    path: str,
    device: str = "cpu",
    dtype: str = "float32",
    max_length: int = PUBLISHED_LENGTH,
    threshold: float = 0.5,
    batch_size: int = 16,
) -> Judge:
    limits = {"max_length": max_length, "threshold": threshold, "batch_size": batch_size}
    return load_beaverdam(path, device=device, dtype=_dtype(dtype), **limits)  # type: ignore[arg-type]


def _llama_guard(
    path: str, device: str = "cpu", dtype: str = "float32", threshold: float = 0.5, batch_size: int = 8
) -> Judge:
    return load_llama_guard(path, device=device, dtype=_dtype(dtype), threshold=threshold, batch_size=batch_size)


def _remote(
    url: str,
    model: str,
    trait: str = "",
    about: str = "",
    prompt: str = "",
    threshold: float = 0.5,
    key_variable: str = "OPENAI_API_KEY",
    cache: Path | None = None,
    logprobs: bool = True,
    parallel: int = 4,
    options: dict[str, Any] | None = None,
) -> Judge:
    if bool(trait) == bool(prompt):
        raise JudgeError(
            "Judge remote: it needs either a trait, for the default rubric, or a prompt. Give one of them."
        )
    return RemoteJudge(
        url,
        model,
        prompt or rubric(trait, about=about),
        threshold,
        key_variable,
        cache,
        logprobs,
        parallel=parallel,
        options=options or {},
    )


def _classifier(folder: Path) -> Judge:
    return load_classifier(folder)


JUDGES: dict[str, Callable[..., Judge]] = {
    "contains": judges.contains,
    "ends_with": judges.ends_with,
    "regex": judges.matches,
    "capitals": _capitals,
    "spanish_tag": judges.spanish_tag,
    "lexicon": _lexicon,
    "refusals": judges.refusals,
    "opposite": _opposite,
    "every": _every,
    "some": _some,
    "classifier": _classifier,
    "beaverdam": _beaverdam,
    "llama_guard": _llama_guard,
    "remote": _remote,
}


def judge_of(spec: Mapping[str, Any]) -> Judge:
    """Return the judge that `spec` describes: "kind", a key of `JUDGES`, and that kind's arguments.

    Raises:
        JudgeError: no or an unknown kind, an unknown, missing or ill-typed argument, or what building it raises.
    """
    values = dict(spec)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in JUDGES:
        hint = close_names(kind, JUDGES) if isinstance(kind, str) else ""
        near = f" {hint}" if hint.startswith("Did you mean") else ""  # otherwise it is the list once more
        do = f"Write kind: one of {', '.join(sorted(JUDGES))}.{near}"
        raise JudgeError(asked_found_do(f"Judge {dict(spec)}", f"the kind is {kind!r}.", do))
    build = JUDGES[kind]
    known = list(inspect.signature(build).parameters)
    if unknown := [name for name in values if name not in known]:
        raise JudgeError(f"Judge {kind}: it takes no {unknown[0]!r}. {close_names(unknown[0], known)}")
    try:
        return _checked(build)(**values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(one) for one in first["loc"]) or "the arguments"
        raise JudgeError(asked_found_do(f"Judge {kind}", f"{where}: {first['msg']}.", "Mend it.")) from error


def _checked(build: Callable[..., Judge]) -> Callable[..., Judge]:
    checked: Callable[..., Judge] = pydantic.validate_call(build)
    return checked


def _rule_of(spec: Mapping[str, Any]) -> Rule:
    found = judge_of(spec)
    if not isinstance(found, Rule):
        raise JudgeError(f"Judge {spec.get('kind')}: only rules can be combined. Use one of contains, regex, ...")
    return found


def _dtype(name: str) -> torch.dtype:
    known: Sequence[str] = ("float32", "bfloat16", "float16")
    if name not in known:
        raise JudgeError(f"Judge of dtype {name!r}: {close_names(name, known)}")
    found: torch.dtype = getattr(torch, name)
    return found
