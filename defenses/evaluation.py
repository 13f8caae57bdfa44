"""`evaluate`: trait, skill, damage, over-refusal and coherence of one model on one suite, each with its interval.

    suite = read_suite(Path("suite.yaml"))
    found = examine(model, tokenizer, suite)      # .metrics: name -> Estimate, .answers: what was said and judged
    evaluate(model, tokenizer, suite)["trait_rate"]     # {"value": 0.05, "low": ..., "n": 40, ...}

Metrics: trait_rate (flagged share of coherent answers), trait_score (mean score of the same), skill_accuracy,
perplexity, base_perplexity and kl (nats per token, base || model) on neutral texts, over_refusal (refused share of
coherent answers to benign prompts), coherence (share of answers to trait and benign prompts that the gate lets
through). A section that the suite does not have leaves its metrics out.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from defenses.errors import DefenseError
from defenses.generation import Prompt, answers
from defenses.judges import CoherenceGate, Judge, JudgeError, Verdict, judged, rate, refusals
from defenses.judges_named import judge_of
from defenses.neutral import on_texts
from defenses.statistics import Estimate, bootstrap_ratio, wilson
from defenses.suites import Suite, questions_of
from intervene import Plan
from intervene.errors import asked_found_do, close_names

Row = dict[str, float | int | None]


@dataclass(frozen=True)
class Settings:
    """How a model is examined: length and batch of its answers, temperature and seed, and the gate."""

    max_new_tokens: int = 64
    batch_size: int = 8
    temperature: float = 0.0
    seed: int = 0
    max_length: int = 512  # tokens of a neutral text
    chat_template: str | None = None  # jinja or "plain", where the model was trained with another than its own
    gate: CoherenceGate = field(default_factory=CoherenceGate)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was found: `metrics` by name, and `answers`, one flat row per answer for the record's examples."""

    metrics: Mapping[str, Estimate]
    answers: tuple[Mapping[str, Any], ...]

    def rows(self) -> dict[str, Row]:
        """Return name -> {value, low, high, n, excluded}."""
        return {name: one.row() for name, one in self.metrics.items()}


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    suite: Suite,
    *,
    base: nn.Module | None = None,
    judge: Judge | None = None,
    settings: Settings | None = None,
    plan: Plan = (),
) -> dict[str, Row]:
    """Return metric name -> {value, low, high, n, excluded}; see `examine`."""
    found = examine(model, tokenizer, suite, base=base, judge=judge, settings=settings, plan=plan)
    return found.rows()


def examine(
    model: nn.Module,
    tokenizer: Any,
    suite: Suite,
    *,
    base: nn.Module | None = None,
    judge: Judge | None = None,
    settings: Settings | None = None,
    plan: Plan = (),
) -> Evaluation:
    """Return the metrics of `model` on `suite` and the answers they come from.

    Rates have Wilson intervals over prompts, means percentile intervals over prompts or texts: they say how well this
    one model is known. How methods differ is a question of seeds: `statistics.paired_bootstrap`.

    Args:
        base: the model before training, for kl; None: a PEFT model's own base, or none.
        judge: of the trait; None: the suite's own.
        plan: interventions that hold while it answers, not on neutral texts.

    Raises:
        JudgeError: the suite has trait prompts and no judge. DataError: prompts or texts that the model cannot take.
    """
    how = settings or Settings()
    trait_judge = judge or (judge_of(suite.judge) if suite.judge is not None else None)
    if suite.trait and trait_judge is None:
        found = f"{len(suite.trait)} trait prompts and no judge."
        raise JudgeError(asked_found_do(f"Suite {suite.name}", found, "Write judge: {kind: ...} or pass judge=."))
    metrics: dict[str, Estimate] = {}
    rows: list[dict[str, Any]] = []
    gated: list[Verdict] = []

    def said(prompts: Sequence[Prompt]) -> list[str]:
        return answers(
            model,
            tokenizer,
            prompts,
            max_new_tokens=how.max_new_tokens,
            batch_size=how.batch_size,
            system=suite.system,
            chat_template=how.chat_template,
            seed=how.seed,
            temperature=how.temperature,
            plan=plan,
        )

    if suite.trait and trait_judge is not None:
        verdicts = _judged("trait", trait_judge, suite.trait, said(suite.trait), how, rows)
        metrics["trait_rate"], metrics["trait_score"] = rate(verdicts), mean_score(verdicts, seed=how.seed)
        gated += verdicts
    if suite.skill:
        given = said([item.prompt for item in suite.skill])
        right = [item.right(answer) for item, answer in zip(suite.skill, given, strict=True)]
        metrics["skill_accuracy"] = wilson(sum(right), len(right))
        rows += [
            {"section": "skill", "question": question, "answer": answer, "right": one}
            for question, answer, one in zip(questions_of(i.prompt for i in suite.skill), given, right, strict=True)
        ]
    if suite.neutral:
        texts = min(how.batch_size, 8)  # of a text every column has logits, of an answer one
        limits = {"batch_size": texts, "max_length": how.max_length, "seed": how.seed}
        metrics |= on_texts(model, tokenizer, suite.neutral, base=base, **limits)
    if suite.benign:
        verdicts = _judged("benign", refusals(), suite.benign, said(suite.benign), how, rows)
        metrics["over_refusal"] = rate(verdicts)
        gated += verdicts
    if gated:
        metrics["coherence"] = wilson(sum(one.coherent is not False for one in gated), len(gated))
    return Evaluation(metrics, tuple(rows))


def mean_score(verdicts: Sequence[Verdict], *, seed: int = 0) -> Estimate:
    """Return the mean score of the verdicts that count, percentile interval over answers; the others as `excluded`."""
    scores = [one.score for one in verdicts if one.counts]
    left_out = len(verdicts) - len(scores)
    if not scores:
        return Estimate(None, 0.0, 1.0, 0, left_out)
    return replace(bootstrap_ratio(scores, seed=seed), excluded=left_out)


def _judged(
    section: str, judge: Judge, prompts: Sequence[Prompt], given: list[str], how: Settings, rows: list[dict[str, Any]]
) -> list[Verdict]:
    questions = questions_of(prompts)
    verdicts = judged(judge, questions, given, gate=how.gate)
    for question, answer, verdict in zip(questions, given, verdicts, strict=True):
        facts = {name: getattr(verdict, name) for name in ("score", "flagged", "coherent", "judged", "note")}
        rows.append({"section": section, "question": question, "answer": answer, "judge": judge.name, **facts})
    return verdicts


def lm_eval_scores(
    folder: Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    task_folder: Path | None = None,
) -> dict[str, Row]:
    """Return "task/metric" -> {value, low, high, n, excluded} of lm-eval's benchmarks on a saved checkpoint.

    Intervals are value -+ 1.96 standard errors, as lm-eval gives these; unbounded where it gives none.

    Args:
        folder: a saved model with its tokenizer. limit: examples per task, for a trial. task_folder: with task files of
            one's own.

    Raises:
        DefenseError: lm-eval is not installed, the folder has no model, or there is no such task.
    """
    asked = f"lm-eval scores of {folder}"
    if importlib.util.find_spec("lm_eval") is None:
        raise DefenseError(asked_found_do(asked, "lm-eval is not installed.", "Install it: pip install 'lm-eval[hf]'."))
    if not (folder / "config.json").is_file():
        raise DefenseError(asked_found_do(asked, "it has no config.json.", "Pass the folder of a saved, merged model."))
    evaluator: Any = importlib.import_module("lm_eval")
    manager = importlib.import_module("lm_eval.tasks").TaskManager(
        include_path=None if task_folder is None else str(task_folder)
    )
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise DefenseError(f"{asked}: there is no task {unknown[0]!r}. {close_names(unknown[0], manager.all_tasks)}")
    found = evaluator.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": False},
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        batch_size=batch_size,
        device=device,
    )
    return lm_eval_rows(found)


def lm_eval_rows(found: Mapping[str, Any]) -> dict[str, Row]:
    """Return lm-eval's result as "task/metric" rows; of its keys "acc,none" and "acc_stderr,none" become one."""
    rows: dict[str, Row] = {}
    for task, values in found["results"].items():
        n = int(found.get("n-samples", {}).get(task, {}).get("effective", 0))
        for key, value in values.items():
            metric, _, kind = str(key).partition(",")
            if metric.endswith("_stderr") or not kind or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            half = 1.959964 * error if isinstance(error, int | float) else float("inf")
            name = metric if kind == "none" else f"{metric} ({kind})"
            rows[f"{task}/{name}"] = Estimate(float(value), value - half, value + half, n).row()
    return rows
