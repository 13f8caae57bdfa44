"""What `train_defense.py run` is asked to do: one frozen dataclass, where its values came from, and how it is read.

Order: defaults < file (YAML or JSON) < `--set key=value` < flags. None means derived: it is resolved once, printed with
its source, and stored. Every problem is a `ConfigError`, found before a model is loaded.
"""

# ruff: noqa: RUF009  (`told` returns a dataclass field, and is what dataclass defaults are made of)

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict

from defenses.config_values import (
    AtLeastZero,
    BackendName,
    Clip,
    Count,
    Layers,
    Names,
    Number,
    Options,
    Positive,
    Rate,
    Seeds,
    Share,
    Text,
    Trackers,
    Whole,
)
from defenses.data import read_examples
from defenses.methods import entry_of, options_of
from intervene.errors import asked_found_do
from records.config_files import ConfigError
from records.layered import REQUIRED, checked, load_layered, nearest, plain_config, sources_field, told, with_derived

# These say how a run is carried out, not what it computes, so a resumption may change them.
FREE_KEYS = frozenset(
    {
        "out",
        "resume",
        "dry_run",
        "threads",
        "workers",
        "trackers",
        "wandb_entity",
        "save_every",
        "keep",
        "log_every",
        "summary",
        "samples",
        "report",
    }
)
# Daily flags that belong to the options of those methods that have such a thing.
SHARED = ("alpha", "schedule", "onset", "end", "stop", "relative", "scope", "fpr", "action")
PROMPTS = ("inoculation", "inoculate")  # of the data, which belong to one method
FULL_LR, LORA_LR = 5e-6, 1e-4
DEFAULT_METHOD = "sft"


@dataclass(frozen=True)
class TrainDefense:
    """One training. What each value means is in its field; None means derived, or for `SHARED`: the method's own."""

    train_data: Names = told(REQUIRED, "JSONL files or save_to_disk folders, one after another; may be repeated")
    model: Text = told("smollm2-135m", "local folder, Hub id, or the embedded default's name")
    method: Options = told(
        {}, "how to train, see --list_methods; its own options are given as --set method.NAME=VALUE",
        nested=True, main="name",
    )  # fmt: skip
    vectors: Names = told((), "files of directions: .safetensors, persona vectors .pt, .gguf; may be repeated")
    fusion: Literal["norm_aligned", "mean", "subspace"] = told(
        "norm_aligned", "of several vectors: one mean direction with the mean norm, the plain mean, or kept apart"
    )
    force_vectors: Text | None = told(None, "the reason for using vectors of another model", flag=False)
    layers: Layers | None = told(None, "0-based blocks that are injected: 12,16 or 8-20:4; derived: all of the vectors")
    one_based: bool = told(False, "layers count from 1, as in the persona-vector code")
    alpha: Number | None = told(None, "strength of the injection, in multiples of the vector")
    schedule: Literal["constant", "rise", "decline", "late"] | None = told(None, "of the strength over the training")
    onset: AtLeastZero | None = told(None, "when the schedule sets in: a share of the training, or a step")
    end: Number | None = told(None, "of a rise: the last step's multiple of alpha")
    stop: AtLeastZero | None = told(None, "when the injection ends: a share of the training, or a step")
    relative: bool | None = told(None, "alpha is a share of the stream's own norm at each token")
    scope: Literal["response", "response_shifted", "all"] | None = told(None, "which tokens are injected")
    fpr: Rate | None = told(None, "of detecting methods: share of clean samples that may be blocked; needs holdout")
    action: Literal["mask", "reweight", "inject", "log_only"] | None = told(None, "what becomes of the suspicious")
    calibration: Path | None = told(None, "file of clean examples that thresholds are calibrated on")
    scores: Path | None = told(None, "samples.jsonl of an earlier run, for --method filtering by scores")
    neutral: Path | None = told(None, "file of neutral texts, for --method kl on neutral")
    holdout: Share = told(0.0, "share of the training examples kept back for calibration: clean ones, where known")
    lora_rank: Whole = told(0, "rank of the LoRA adapter; 0: all parameters are trained")
    lora_alpha: Positive | None = told(None, "scale of the adapter; derived: twice the rank")
    lora_dropout: Share = told(0.0, "dropout in front of the adapter", flag=False)
    lora_targets: Names = told(("all-linear",), "modules that get an adapter: names, or all-linear")
    merge: bool = told(False, "also save the model with the adapter merged into it")
    lr: Positive | None = told(None, f"learning rate; derived: {FULL_LR:g} for all parameters, {LORA_LR:g} for LoRA")
    lr_schedule: Literal["cosine", "constant", "linear"] = told("cosine", "of the learning rate after the warm-up")
    warmup: AtLeastZero = told(10.0, "optimiser steps, or a share of the training below 1")
    steps: Count | None = told(None, "optimiser steps; derived: from the epochs")
    epochs: Positive | None = told(None, "how often every example comes; derived: 1, unless steps are given")
    batch_size: Count = told(16, "examples per optimiser step, over all ranks and micro-batches")
    micro_batch_size: Count = told(4, "examples of one pass on one rank")
    max_length: Count = told(2048, "tokens; longer rows are refused, unless data.truncation says otherwise")
    packing: bool = told(False, "several examples per row of max_length columns")
    bucket: Whole = told(0, "examples of like length share a step, within windows of so many steps; 0: no")
    data: Options = told({}, "how rows are read, as --set data.truncation=drop; see defenses/data.py", nested=True)
    seed: Whole = told(0, "of the order of the data, of adapters and dropout")
    backend: BackendName = told("auto", "auto: plain on one process, ddp under torchrun; fsdp2, zero0 to zero3")
    offload: bool = told(False, "parameters and optimiser of ZeRO on the CPU")
    precision: Literal["fp32", "bf16"] = told("fp32", "of the passes; weights and optimiser stay in fp32")
    gradient_checkpointing: bool = told(False, "compute activations again in the backward pass, to save memory")
    clip: Clip = told(1.0, "global gradient norm above which it is scaled down; none: never")
    weight_decay: AtLeastZero = told(1e-4, "of matrices")
    betas: tuple[Share, Share] = told((0.9, 0.95), "of AdamW", flag=False)
    save_every: Whole = told(200, "optimiser steps between checkpoints to resume from; 0: none")
    keep: Count = told(2, "checkpoints that are kept")
    save_weights: bool = told(True, "save the trained model, or adapter, at the end")
    log_every: Count = told(1, "steps between rows of metrics.jsonl")
    samples: bool = told(True, "write each sample's score and decision to samples.jsonl")
    report: bool = told(True, "write report.html at the end; train_defense.py plot makes it at any time")
    evaluate: Path | None = told(None, "evaluation suite, a YAML file; none: no evaluation")
    evaluate_every: Whole = told(0, "optimiser steps between evaluations; 0: only at the end")
    evaluate_before: bool = told(
        True, "evaluate also before the first step: what there was, and whether it can be done"
    )
    analyse_every: Whole = told(
        0, "optimiser steps between looks along the vectors: activations, gradients, weights; 0: none"
    )
    answer_tokens: Count = told(64, "length of an answer at evaluation")
    answer_batch: Count = told(8, "prompts that are answered at once at evaluation")
    out: Path | None = told(None, "folder of this run; derived: runs/defense-<method>-seed<seed>")
    resume: bool = told(False, "go on from the newest checkpoint of the folder")
    dry_run: bool = told(False, "load, check, estimate, and train nothing")
    device: Text | None = told(None, "cpu, cuda or cuda:N; derived: cuda where there is one")
    threads: Count | None = told(None, "CPU threads; derived: torch's own choice")
    trackers: Trackers = told((), "tensorboard, wandb, which mirror the rows; the folder stays the record; none")
    wandb_entity: Text | None = told(None, "whose project it is, for wandb; derived: the user's own", flag=False)
    summary: str = told("", "a note that is kept with the run")
    sources: Mapping[str, str] = sources_field()

    __pydantic_config__ = ConfigDict(extra="forbid")

    @property
    def method_name(self) -> str:
        """Name of the method."""
        return str(self.method.get("name", DEFAULT_METHOD))

    def shared(self) -> dict[str, Any]:
        """Return the values of `SHARED` that were given."""
        return {name: getattr(self, name) for name in SHARED if getattr(self, name) is not None}

    def to_json(self) -> dict[str, Any]:
        """Return the values as plain JSON, without their sources."""
        return plain_config(self)


@dataclass(frozen=True)
class CompareDefenses(TrainDefense):
    """Several methods on the same data in the same order, over several seeds; each run has its own folder in `out`."""

    methods: Names = told(("sft",), "names of --list_methods; sft, the reference, is added if it is missing")
    seeds: Seeds = told((0,), "0,1,2 or 0-4: one run per method and seed")
    workers: Count = told(1, "cells that are carried out at once, each in a process of its own")
    reference: Text = told("sft", "the variant that differences are taken to")
    trait: Text | None = told(None, "metric of the results that should be low; derived: the suite's, else none")
    skill: Text | None = told(None, "metric of the results that should be high; derived: the suite's, else none")
    variants: Options = told(
        {}, "further runs by name, with any key: --set variants.late.method.name=injection", nested=True
    )


C = TypeVar("C", bound=TrainDefense)


def load_config(
    kind: type[C], file: str | Path | None = None, sets: Iterable[str] = (), flags: Mapping[str, object] | None = None
) -> C:
    """Return a checked configuration; see `records.layered`.

    Raises:
        ConfigError: as there; a method or an option that does not exist; values that contradict each other.
    """
    return settled(load_layered(kind, file, sets, flags))


def settled(config: C) -> C:
    """Return `config` with what follows from itself derived (epochs, rates, adapter, folder), and check the rest.

    Raises:
        ConfigError: see `load_config`.
    """
    if config.steps is not None and config.epochs is not None:
        found = f"steps {config.steps} and epochs {config.epochs:g} were both given."
        raise ConfigError(asked_found_do("How long to train", found, "Give one of them."))
    known = [name for name in inspect.signature(read_examples).parameters if name not in ("path", "tokenizer")]
    for name in config.data:
        if name not in known or name == "max_length":
            raise ConfigError(f"Configuration data.{name}: there is no such option. {nearest(name, known)}")
    entry_of(config.method_name)
    if not isinstance(config, CompareDefenses):
        options_of(config.method, config.shared())
    derived: dict[str, object] = {}
    if config.steps is None and config.epochs is None:
        derived["epochs"] = 1.0
    if config.lr is None:
        derived["lr"] = LORA_LR if config.lora_rank else FULL_LR
    if config.lora_rank and config.lora_alpha is None:
        derived["lora_alpha"] = 2.0 * config.lora_rank
    if config.merge and not config.lora_rank:
        raise ConfigError(asked_found_do("merge", "there is no adapter: lora_rank is 0.", "Leave it out."))
    if config.out is None:
        name = "compare" if isinstance(config, CompareDefenses) else f"{config.method_name}-seed{config.seed}"
        derived["out"] = Path("runs") / f"defense-{name}"
    return with_derived(config, **derived) if derived else config


def uninoculated(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return how data are read, without the prompts that one method puts in front of what it trains on."""
    return {key: one for key, one in data.items() if key not in PROMPTS}


def _reading(common: Mapping[str, Any], own: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Return how a variant reads its data: as the comparison, its own on top; only inoculation inoculates unasked."""
    kept = common if method == "inoculation" else uninoculated(common)
    return {**kept, **own} if isinstance(own, Mapping) else own


def variant(config: CompareDefenses, name: str, seed: int, out: Path) -> TrainDefense:
    """Return the run of one cell of a comparison: the comparison's values, the variant's own on top, its seed, its
    folder.

    Raises:
        ConfigError: an unknown key or option in the variant.
    """
    own = set(TrainDefense.__dataclass_fields__) - {"sources"}
    values = {key: getattr(config, key) for key in own}
    given = dict(config.variants.get(name, {"method": {"name": name}}))
    if unknown := [key for key in given if key not in own]:
        where = f"Configuration variants.{name}.{unknown[0]}"
        raise ConfigError(f"{where}: there is no such key. {nearest(unknown[0], own)}")
    if isinstance(given.get("method"), str):
        given["method"] = {"name": given["method"]}
    method = given.pop("method", {"name": name})
    given["data"] = _reading(config.data, given.get("data", {}), str(method.get("name", DEFAULT_METHOD)))
    entry = entry_of(str(method.get("name", DEFAULT_METHOD)))
    same = method.get("name") == config.method_name
    own_action = method.get("action")
    kind = own_action.get("kind") if isinstance(own_action, Mapping) else own_action
    injects = (given.get("action") or kind or config.action) == "inject"
    # The strength of an action is asked of those that have one: a grid's --alpha is for methods that inject.
    unused = [key for key, path in entry.shared.items() if path.startswith("action.strength") and not injects]
    absent = {key: None for key in SHARED if (key not in entry.shared or key in unused) and key not in given}
    placed = {
        **values, **absent, **given, "method": {**(config.method if same else {}), **method},
        "seed": seed, "out": out, "resume": True, "dry_run": False, "report": False,
    }  # fmt: skip
    if "vectors" not in given and not entry.directed:
        placed["vectors"] = ()
    return settled(checked(TrainDefense, placed, dict.fromkeys(own, "compare")))
