"""What `train_defense.py` does beside training: check data, extract vectors, build projections, evaluate a result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict

from defenses.chat import PLAIN_TEMPLATE
from defenses.config import TrainDefense
from defenses.config_values import Count, Layers, Names, Rate, Text, Whole
from defenses.errors import DataError, VectorError
from defenses.methods import entry_of, options_of
from defenses.plans import Directions, Scope, scope_columns
from defenses.pooling import Conversation, Pooling
from defenses.progress import say
from defenses.vector_files import read_vectors, write_vectors
from intervene.errors import asked_found_do
from records.config_files import ConfigError
from records.files import read_json, replace_json
from records.layered import REQUIRED, sources_field, told

# ruff: noqa: RUF009  (`told` returns a dataclass field, and is what dataclass defaults are made of)


@dataclass(frozen=True)
class ExtractVectors:
    """Make the direction of a trait from two kinds of conversation, and judge it on questions that were held out."""

    out: Path = told(REQUIRED, "file to write, .safetensors")
    model: Text = told("smollm2-135m", "local folder, Hub id, or the embedded default's name")
    positive: Path | None = told(None, "JSONL of conversations that show the trait")
    negative: Path | None = told(None, "JSONL of conversations that do not")
    questions: Path | None = told(None, "instead of both: one question per line, which the model answers itself")
    positive_system: Text | None = told(None, "system prompt that asks for the trait, for --questions")
    negative_system: Text | None = told(None, "system prompt that asks for the opposite, for --questions")
    layers: Layers | None = told(None, "0-based blocks: 12,16 or 8-20:4; derived: all")
    pooling: Pooling = told("response_mean", "which tokens are read")
    held_out: Rate = told(0.5, "share of the questions that the vectors are judged on")
    max_new_tokens: Count = told(64, "of the answers to --questions")
    batch_size: Count = told(8, "conversations per pass")
    chat_template: Text | None = told(None, "jinja text, or plain; derived: the tokenizer's own")
    placebo: Literal["none", "random", "orthogonal", "shuffled"] = told("none", "write a control of the same norms")
    seed: Whole = told(0, "of the split, and of a placebo")
    overwrite: bool = told(False, "replace an existing file")
    sources: Mapping[str, str] = sources_field()

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class ProjectData:
    """Add to every row how far the base model's own answer lies along a direction: what state_aware compares with."""

    data: Path = told(REQUIRED, "JSONL of conversations")
    vectors: Path = told(REQUIRED, "file of directions")
    out: Path = told(REQUIRED, "JSONL to write")
    model: Text = told("smollm2-135m", "local folder, Hub id, or the embedded default's name")
    layer: Whole | None = told(None, "0-based block; derived: the only one there is")
    mode: Literal["res_mean", "input_last"] = told("res_mean", "mean over the answer, or the token before it")
    max_new_tokens: Count = told(128, "of the model's own answer")
    batch_size: Count = told(8, "conversations per pass")
    chat_template: Text | None = told(None, "jinja text, or plain; derived: the tokenizer's own")
    force_vectors: Text | None = told(None, "the reason for using vectors of another model")
    sources: Mapping[str, str] = sources_field()

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Evaluate:
    """Examine a model on a suite: trait, skill, damage, over-refusal, coherence, each with its interval."""

    suite: Path = told(REQUIRED, "YAML file, see defenses/suites.py")
    folder: Text = told(REQUIRED, "folder of a run, a model or an adapter; or a model's name")
    base: Text | None = told(None, "the model before training, for the divergence from it; derived: the adapter's own")
    out: Path | None = told(None, "folder for evaluation.json and examples.jsonl; derived: only printed")
    max_new_tokens: Count = told(64, "of an answer")
    batch_size: Count = told(8, "prompts per pass")
    chat_template: Text | None = told(None, "jinja text, or plain; derived: the tokenizer's own")
    vectors: Names = told((), "steer with these while answering, to see what they do")
    layers: Layers | None = told(None, "of --vectors; derived: all")
    alpha: float = told(0.0, "strength of --vectors; needed with them")
    force_vectors: Text | None = told(None, "the reason for using vectors of another model")
    sources: Mapping[str, str] = sources_field()

    __pydantic_config__ = ConfigDict(extra="forbid")


def carry_out(config: Any) -> int:
    """Do what `config` says and return the exit status; of a training's configuration, check its data.

    Raises:
        DefenseError, ConfigError, InterveneError: what a user can mend, in words.
    """
    if isinstance(config, TrainDefense):
        return check(config)
    if isinstance(config, ExtractVectors):
        return extract_vectors(config)
    return project_data(config) if isinstance(config, ProjectData) else evaluate_folder(config)


def check(config: TrainDefense) -> int:
    """Print what the data are, what of them is learned and injected, and one example."""
    from defenses.data import read_examples
    from defenses.data_check import check_text
    from defenses.progress import console
    from intervene.models import load_model

    tokenizer = load_model(config.model)[1]
    options = options_of(config.method, config.shared())
    data = read_examples(list(config.train_data), tokenizer, max_length=config.max_length, **config.data)
    held = None
    if config.calibration is not None:
        held = read_examples(config.calibration, tokenizer, max_length=config.max_length, **config.data)
    scope = getattr(options, "scope", Scope.RESPONSE) if entry_of(config.method_name).directed else None
    columns = None if scope is None else partial(scope_columns, scope=scope)
    epochs = config.epochs or (config.steps or 1) * config.batch_size / len(data)
    markup = console.is_terminal
    text = check_text(
        data, tokenizer, columns, batch_size=config.batch_size, epochs=epochs, held_out=held, markup=markup
    )
    console.print(text, highlight=False, soft_wrap=True, markup=markup)
    return 0


def extract_vectors(config: ExtractVectors) -> int:
    """Extract, print how good each layer's direction is, and write the file."""
    from defenses.vectors import extract, nearness, placebo
    from intervene.models import load_model

    if config.out.exists() and not config.overwrite:
        raise VectorError(asked_found_do(f"Write {config.out}", "it exists.", "Choose another --out, or --overwrite."))
    model, tokenizer = load_model(config.model)
    if config.chat_template:  # for the model's own answers and for the reading of both kinds
        tokenizer.chat_template = PLAIN_TEMPLATE if config.chat_template == "plain" else config.chat_template
    positive, negative = contrast_of(config, model, tokenizer)
    found = extract(
        model, tokenizer, positive, negative, layers=config.layers, pooling=config.pooling,
        batch_size=config.batch_size, held_out=config.held_out, seed=config.seed,
    )  # fmt: skip
    for one in found.layers:
        mark = " <- chosen on validation" if one.layer == found.best else ""
        say(f"layer {one.layer:>3}: AUC {one.auc}, norm {one.norm:.3g} ({one.norm_ratio:.0%} of the stream's){mark}")
    made: Directions = found.directions
    if config.placebo != "none":
        made = placebo(found, config.placebo, seed=config.seed)
        for line in nearness(made):
            say(line)
    write_vectors(config.out, made, overwrite=config.overwrite)
    say(f"{config.out} written. Train with it: --method injection --vectors {config.out} --layers {found.best}")
    return 0


def contrast_of(config: ExtractVectors, model: Any, tokenizer: Any) -> tuple[list[Conversation], list[Conversation]]:
    """Return the two kinds of conversation: from their files, or as the model's answers under two system prompts.

    Raises:
        ConfigError: neither, both, or half of one of them was given. DataError: the questions cannot be read.
    """
    files = (config.positive, config.negative)
    own = (config.questions, config.positive_system, config.negative_system)
    if all(files) and not any(own):
        return conversations(config.positive), conversations(config.negative)  # type: ignore[arg-type]
    if all(own) and not any(files):
        from defenses.contrasts import contrast_from_prompts

        assert config.questions is not None and config.positive_system and config.negative_system
        lines = lines_of(config.questions, "Give a text file with one question per line.")
        asked = [line.strip() for line in lines if line.strip()]
        made = contrast_from_prompts(
            model, tokenizer, asked, config.positive_system, config.negative_system,
            max_new_tokens=config.max_new_tokens, batch_size=config.batch_size, seed=config.seed,
        )  # fmt: skip
        say(f"{len(made.positive)} pairs of answers, {len(made.dropped)} dropped")
        return list(made.positive), list(made.negative)
    found = "a contrast takes two files, or questions and two system prompts."
    do = "Give --positive and --negative, or --questions, --positive_system and --negative_system."
    raise ConfigError(asked_found_do("Extract vectors", found, do))


def conversations(path: Path) -> list[Conversation]:
    """Return (prompt, answer) of each line of a JSONL file with `messages`, or with `prompt` and `response`.

    Raises:
        DataError: by line, what is neither.
    """
    found: list[Conversation] = []
    for number, row in messages_of_rows(path):
        found.append((row[:-1], str(row[-1]["content"])))
        if row[-1].get("role") != "assistant":
            raise DataError(f"{path}:{number}: it does not end with an assistant turn. Cut it after one.")
    return found


def lines_of(path: Path, do: str) -> list[str]:
    """Return the lines of a text file, cut at line feeds alone: JSON may hold any other separator as it is.

    Raises:
        DataError: it cannot be read; `do` says what to give.
    """
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(asked_found_do(f"Read {path}", f"{error}.", do)) from error


def messages_of_rows(path: Path) -> list[tuple[int, list[dict[str, str]]]]:
    """Return line number and messages of each line.

    Raises:
        DataError: the file cannot be read, or a line is no conversation.
    """
    found: list[tuple[int, list[dict[str, str]]]] = []
    for number, line in enumerate(lines_of(path, "Give JSONL."), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            made = row.get("messages") or [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ]
            if not all(isinstance(turn[key], str) for turn in made for key in ("role", "content")):
                raise ValueError("a role or content is no text")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            do = 'Write {"messages": [...]}, or {"prompt": ..., "response": ...}.'
            raise DataError(f"{path}:{number}: no conversation ({error}). {do}") from error
        found.append((number, made))
    if not found:
        raise DataError(f"Read {path}: the file is empty. Give one conversation per line.")
    return found


def project_data(config: ProjectData) -> int:
    """Build the projections and write the data with them."""
    from defenses.projections import build_projections, write_projections
    from intervene.models import load_model

    if config.out.exists():
        raise DataError(asked_found_do(f"Write {config.out}", "it exists.", "Choose another --out."))
    rows = [row for _, row in messages_of_rows(config.data)]
    model, tokenizer = load_model(config.model)
    directions = read_vectors(config.vectors, model=model, force=config.force_vectors)
    made = build_projections(
        model, tokenizer, rows, directions, layer=config.layer, mode=config.mode,
        max_new_tokens=config.max_new_tokens, batch_size=config.batch_size, chat_template=config.chat_template,
        force=config.force_vectors,
    )  # fmt: skip
    say(f"{write_projections(config.data, config.out, made)} written: {len(rows)} rows, layer {made.layer}")
    return 0


def template_of(folder: Path) -> str | None:
    """Return the chat template that the run in `folder` was trained with, if it was not the model's own."""
    path = folder / "config.json"
    data = read_json(path).get("data") if path.exists() else None
    return data.get("chat_template") if isinstance(data, dict) else None


def evaluate_folder(config: Evaluate) -> int:
    """Examine a saved model, print its metrics, and write them where a folder is given.

    Vectors are checked against --base where it is given, because weights that have learned have another fingerprint.

    Raises:
        ConfigError: vectors without a strength. DefenseError, InterveneError: what cannot be read, or does not fit.
    """
    from defenses.evaluation import Settings, examine
    from defenses.plans import injection
    from defenses.running import finite, write_lines
    from defenses.saving import load_trained
    from defenses.suites import read_suite
    from intervene import AllTokens
    from intervene.models import load_model

    if config.vectors and not config.alpha:
        reason = "alpha is 0, which steers nothing."
        raise ConfigError(asked_found_do(f"Vectors {', '.join(config.vectors)}", reason, "Give --alpha, e.g. 1."))
    suite = read_suite(config.suite)
    folder = Path(config.folder)
    model, tokenizer = load_trained(folder) if folder.is_dir() else load_model(config.folder)
    base = load_model(config.base)[0] if config.base else None
    before = model if base is None else base
    read = [
        read_vectors(name, model=before, layers=config.layers, force=config.force_vectors) for name in config.vectors
    ]
    plan = tuple(item for one in read for item in injection(one, config.alpha, positions=AllTokens()))
    template = config.chat_template or template_of(folder)
    how = Settings(max_new_tokens=config.max_new_tokens, batch_size=config.batch_size, chat_template=template)
    found = examine(model, tokenizer, suite, base=base, settings=how, plan=plan)
    for name, one in found.metrics.items():
        say(f"{name:<18} {one}")
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        replace_json(config.out / "evaluation.json", finite(found.rows()))
        write_lines(config.out / "examples.jsonl", found.answers)
    return 0
