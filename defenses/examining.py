"""Looks at a run's own model while it trains: its evaluation, and `Looking` along the directions."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defenses.actions import Inject
from defenses.analysis import Analyser
from defenses.backend import Backend
from defenses.batch import Batch
from defenses.config import TrainDefense
from defenses.evaluation import Evaluation, Settings, examine
from defenses.generation import evaluating
from defenses.judges import JudgeError
from defenses.judges_named import judge_of
from defenses.methods import options_of
from defenses.plans import Directions, Scope
from defenses.schedules import Strength
from defenses.suites import read_suite
from intervene.errors import asked_found_do
from records.config_files import ConfigError

WHOLE = ("auto", "plain", "ddp")  # backends that keep the whole model on each rank
LOADED = ("classifier", "beaverdam", "llama_guard")  # judges that are models: not loaded only to be tried out


@dataclass(frozen=True)
class Dose:
    """An injection: how much of the direction, at which tokens; `relative`: as a share of the stream's norm there."""

    strength: float = 1.0
    scope: Scope = Scope.RESPONSE
    relative: bool = False


def dose_of(options: Any) -> Dose:
    """Return what a method with these options (None: it has none) injects, given one trait.

    Of a schedule it is its alpha, and not the strength of a step: looks along a training can be compared with one
    another. A detector whose action injects nothing has the strength that it probes with; a method without a
    strength of its own, or with one that it finds on the way, the direction itself.
    """
    action = getattr(options, "action", None)
    held = getattr(action if isinstance(action, Inject) else options, "strength", None)
    if isinstance(held, Strength):
        strength = held.alpha * (getattr(options, "factors", ()) or (1.0,))[0]
    else:
        strength = getattr(options, "detection_alpha", 1.0)
    return Dose(strength, getattr(options, "scope", Scope.RESPONSE), getattr(options, "relative", False))


class Looking:
    """Rows of `defenses.analysis` every so many steps, on the micro-batch that step 0 began with; all ranks look.

    What is injected is what the method does, see `dose_of`. The rows go to analysis.jsonl, each with its step; those
    after a checkpoint that a run goes on from are made again.
    """

    def __init__(self, config: TrainDefense, backend: Backend, directions: Sequence[Directions], batch: Batch) -> None:
        """Keep the weights that training starts from.

        Raises:
            ConfigError: no single set of directions, or a backend that has the model in pieces.
        """
        require_looking(config, len(directions))
        self.every, self.path, self.batch = config.analyse_every, config.out, batch.to(backend.device)
        self.dose = dose_of(options_of(config.method, config.shared()))
        layers = directions[0].layers
        self.analyser = Analyser(directions[0].to(backend.device), layers, self.dose.scope)
        self.analyser.begin(backend)
        self._rewound = False

    def at(self, backend: Backend, step: int) -> None:
        """Look, if it is time."""
        if backend.rank == 0 and self.path is not None and not self._rewound:
            rewind(self.path / "analysis.jsonl", step)
        self._rewound = True
        if step % self.every:
            return
        dose = self.dose
        rows = self.analyser.rows(backend, self.batch, strength=dose.strength, relative=dose.relative)
        if backend.rank == 0 and self.path is not None:
            with (self.path / "analysis.jsonl").open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps({"step": step, **row}) + "\n" for row in rows)


def rewind(path: Path, step: int) -> None:
    """Keep the whole rows of `path` before `step`; what came later, or was cut off by a kill, is made again."""
    if not path.exists():
        return
    lines = [one for one in path.read_bytes().splitlines(keepends=True) if one.endswith(b"\n")]
    part = path.with_name(path.name + ".part")
    part.write_bytes(b"".join(one for one in lines if json.loads(one)["step"] < step))
    os.replace(part, path)


def require_looking(config: TrainDefense, n_directions: int) -> None:
    """Refuse looks that cannot be had, before training.

    Raises:
        ConfigError: no directions, several kept apart, or a backend that has the model in pieces.
    """
    if not config.analyse_every:
        return
    asked = f"analyse_every {config.analyse_every}"
    if n_directions != 1:
        found = "there are no vectors." if not n_directions else f"there are {n_directions} sets of vectors."
        raise ConfigError(asked_found_do(asked, found, "Give --vectors of one trait, or fuse them."))
    if config.backend not in WHOLE:
        found = f"{config.backend} keeps the model in pieces."
        raise ConfigError(asked_found_do(asked, found, "Leave it out, or use plain or ddp."))


def require_suite(config: TrainDefense) -> None:
    """Refuse an evaluation that cannot be made, before training.

    Raises:
        DataError, JudgeError: the suite or its judge cannot be read. ConfigError: there is none to evaluate on, or a
            backend that has the model in pieces.
    """
    if config.evaluate is None:
        if config.evaluate_every:
            found = "there is no suite."
            raise ConfigError(asked_found_do(f"evaluate_every {config.evaluate_every}", found, "Give --evaluate FILE."))
        return
    suite = read_suite(config.evaluate)
    if suite.trait and suite.judge is None:
        found = f"{len(suite.trait)} trait prompts and no judge."
        raise JudgeError(asked_found_do(f"Suite {config.evaluate}", found, "Write judge: {kind: ...} into it."))
    if suite.trait and suite.judge is not None and suite.judge.get("kind") not in LOADED:
        judge_of(suite.judge)
    if config.backend not in WHOLE:
        found = f"{config.backend} keeps the model in pieces, and answers are written with the whole."
        do = "Leave it out, and use `train_defense.py evaluate` on the folder afterwards."
        raise ConfigError(asked_found_do(f"evaluate {config.evaluate}", found, do))


def examined(config: TrainDefense, backend: Backend, tokenizer: Any, *, with_base: bool = True) -> Evaluation | None:
    """Return what the suite finds of the model as it is now; None on other ranks than 0.

    The random state of training stays as it was, so that how often one looks changes nothing. Prompts are written as
    the training data were, with the same chat template.

    Args:
        with_base: also measure the divergence from the base model, which is loaded anew if it is not underneath.
    """
    assert config.evaluate is not None
    if backend.rank:
        return None
    suite = read_suite(config.evaluate)
    base: nn.Module | None = None
    if with_base and suite.neutral and not hasattr(backend.model, "peft_config"):
        from intervene.models import load_model

        base = load_model(config.model, device=backend.device)[0]
    devices = [backend.device] if backend.device.type == "cuda" else []
    how = Settings(
        max_new_tokens=config.answer_tokens,
        batch_size=config.answer_batch,
        chat_template=config.data.get("chat_template"),
    )
    with torch.random.fork_rng(devices=devices), evaluating(backend.model), torch.no_grad():
        return examine(backend.model, tokenizer, suite, base=base, settings=how)
