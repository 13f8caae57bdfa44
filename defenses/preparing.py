"""What a training needs before its first step: model, adapter, directions, data, calibration; and what it will cost.

Everything that can be refused is refused here, the cheap questions first: no model is loaded for a batch that cannot
be cut, and no step is made before the directions fit the model.
"""

from __future__ import annotations

import importlib.util
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defenses.backend import Optimiser, require_precision
from defenses.batch import Batch, Example, collate
from defenses.batches import Batches, Order, check_cut, require_packing
from defenses.checkpoints import file_digest
from defenses.config import TrainDefense, uninoculated
from defenses.data import Data, read_examples
from defenses.defense import Defense
from defenses.errors import BackendError, CalibrationError, DataError
from defenses.filtering import scores_of
from defenses.fusion import fuse
from defenses.kl import frozen_copy
from defenses.launch import Ranks
from defenses.loop import Training
from defenses.methods import Entry, Materials, entry_of, options_of, require_holdout
from defenses.plans import Directions
from defenses.projections import require_references
from defenses.schedules import Rate
from defenses.vector_files import read_vectors
from intervene.errors import asked_found_do
from intervene.families import fingerprint, locate
from records.config_files import ConfigError


@dataclass(frozen=True, eq=False)
class Feed:
    """`Batches` of the examples that are trained on, by their index in the data."""

    inner: Batches

    def indices(self, step: int) -> list[int]:
        """Return the examples of a step, of all ranks."""
        return [self.inner.examples[place].index for place in self.inner.indices(step)]

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        """Return the micro-batches of one rank in a step."""
        return self.inner.batches(step, rank, world)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A training that can begin.

    Attributes:
        model: with its adapter, if it has one. feed, training: for the loop.
        digests: name -> digest of data, calibration and vectors. fingerprint: of the model without adapter.
        facts: what it will cost, see `estimates`; and "warnings", see `warnings_of`. directions: what `analyse_every`
            looks along.
    """

    config: TrainDefense
    entry: Entry
    options: Any
    defense: Defense
    model: nn.Module
    tokenizer: Any
    data: Data
    feed: Feed
    training: Training
    optimiser: Optimiser
    fingerprint: str
    digests: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    directions: tuple[Directions, ...] = ()


def require_possible(config: TrainDefense, ranks: Ranks, *, cuda: bool) -> None:
    """Refuse what no model is needed for.

    Raises:
        DataError: a batch that cannot be cut over ranks, or a file that is missing. BackendError: ZeRO without
            deepspeed, bf16 without its hardware. CalibrationError: a quantile without clean data. VectorError: none.
        ConfigError: inoculation without a prompt.
    """
    check_cut(config.batch_size, ranks.world, config.micro_batch_size)
    for name in config.train_data:
        if not Path(name).exists():
            found = "there is no such file or folder."
            raise DataError(asked_found_do(f"Training data {name}", found, f"Paths are relative to {Path.cwd()}."))
    if config.backend.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        do = "Run: pip install deepspeed, or use --backend fsdp, which shards as well."
        raise BackendError(asked_found_do(f"Backend {config.backend}", "deepspeed is not installed.", do))
    require_precision(config.precision, torch.device("cuda" if cuda else "cpu"))
    entry, options = entry_of(config.method_name), options_of(config.method, config.shared())
    if entry.directed and not config.vectors:
        entry.build(options, Materials())
    if entry.name == "inoculation" and not (config.data.get("inoculation") or config.data.get("system")):
        do = (
            "Give --set data.inoculation='...', a system prompt that asks for the trait; "
            "data that carry one already are for --method sft."
        )
        raise ConfigError(asked_found_do("Method inoculation", "no prompt was given: it would be plain sft.", do))
    if config.calibration is None and not config.holdout:
        require_holdout(entry, options, 0)
    if config.calibration is not None and config.holdout:
        asked = f"calibration {config.calibration} and holdout {config.holdout:g}"
        raise CalibrationError(asked_found_do(asked, "both were given.", "Give one of them."))


def prepare(config: TrainDefense, ranks: Ranks) -> Prepared:
    """Return the training of `config`, everything loaded and checked; no backend yet.

    Raises:
        DefenseError, ConfigError, InterveneError: what does not fit, in words.
    """
    from intervene.models import load_model

    model, tokenizer = load_model(config.model)
    entry, options = entry_of(config.method_name), options_of(config.method, config.shared())
    mark = fingerprint(model)
    directions = directions_of(config, model) if config.vectors else ()
    data = read_examples(list(config.train_data), tokenizer, max_length=config.max_length, **config.data)
    _require_room(model, data)
    examples, clean, calibration = _split(config, data, tokenizer)
    require_holdout(entry, options, len(clean))
    if config.packing:
        require_packing(model)
    pad = tokenizer.pad_token_id
    order = Order(
        len(examples), config.batch_size, config.seed,
        lengths=[len(one.input_ids) for one in examples], bucket=config.bucket,
    )  # fmt: skip
    width = config.max_length if config.packing else None
    steps = config.steps or order.steps(config.epochs or 1.0)
    holdout = [
        collate(clean[at : at + config.micro_batch_size], pad) for at in range(0, len(clean), config.micro_batch_size)
    ]
    materials = Materials(
        directions, holdout, examples,
        base=None if config.lora_rank else partial(frozen_copy, model),
        scores=scores_of(config.scores, data.digest[:12]) if config.scores else None,
        neutral=neutral_feed(config, tokenizer) if config.neutral else None,
        seed=config.seed,
    )  # fmt: skip
    if entry.name == "state_aware":
        files = [*config.train_data, *([str(config.calibration)] if config.calibration else [])]
        require_references(files, directions[0], options.layer, mark=mark)
    defense = entry.build(options, materials)
    digests = {"train": data.digest[:12], **({"calibration": calibration} if calibration else {})}
    files = [*config.vectors, *(str(one) for one in (config.scores, config.neutral) if one)]
    digests |= {name: file_digest(Path(name)) for name in files}
    return Prepared(
        config, entry, options, defense, with_adapter(config, model), tokenizer, data,
        feed=Feed(Batches(examples, order, config.micro_batch_size, pad, width)),
        training=training_of(config, steps),
        optimiser=Optimiser(
            betas=config.betas, weight_decay=config.weight_decay, clip=config.clip, precision=config.precision
        ),
        fingerprint=mark, digests=digests,
        facts=estimates(config, entry, options, model, examples, steps, directions, ranks.world)
        | {"warnings": warnings_of(config, entry, options, examples, clean, steps)},
        directions=tuple(directions),
    )  # fmt: skip


def neutral_feed(config: TrainDefense, tokenizer: Any) -> Batches:
    """Return the batches of neutral texts, as many of them per step as are trained on."""
    assert config.neutral is not None
    held = read_examples(config.neutral, tokenizer, max_length=config.max_length, **uninoculated(config.data)).examples
    order = Order(len(held), config.batch_size, config.seed)
    return Batches(held, order, config.micro_batch_size, tokenizer.pad_token_id)


def training_of(config: TrainDefense, steps: int) -> Training:
    """Return how long and how fast, its schedules tried out on the number of steps."""
    rate = Rate(config.lr or 0.0, config.lr_schedule, config.warmup)
    rate.at(0, steps)
    return Training(steps, rate, save_every=config.save_every, log_every=config.log_every)


def directions_of(config: TrainDefense, model: nn.Module) -> tuple[Directions, ...]:
    """Return the directions of the files, checked against the model and fused.

    Raises:
        VectorError: see `read_vectors` and `fuse`.
    """
    blocks = locate(model).n_layers
    layers = config.layers
    if layers is not None and not config.one_based:
        if beyond := [layer for layer in layers if not -blocks <= layer < blocks]:
            found = f"this model has layers 0-{blocks - 1}, and not {', '.join(map(str, beyond))}."
            raise ConfigError(asked_found_do(f"layers {','.join(map(str, layers))}", found, f"Use 0 to {blocks - 1}."))
        layers = tuple(layer % blocks for layer in layers)
    read = [
        read_vectors(name, model=model, layers=layers, one_based=config.one_based, force=config.force_vectors)
        for name in config.vectors
    ]
    return fuse(read, config.fusion)


def with_adapter(config: TrainDefense, model: Any) -> nn.Module:
    """Return the model with LoRA on it if a rank is given, else with all parameters trainable.

    Raises:
        ConfigError: no module has such a name.
    """
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not config.lora_rank:
        made: nn.Module = model.requires_grad_(True)
        return made
    from peft import LoraConfig, get_peft_model

    targets: str | list[str] = list(config.lora_targets)
    adapter = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft divides by the rank: any number will do
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)  # of the adapter: the same on all ranks
    try:
        with warnings.catch_warnings():  # peft asks transformers by an old name; no user can change that
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            wrapped: nn.Module = get_peft_model(model, adapter)
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, one in model.named_modules() if isinstance(one, nn.Linear)})
        found = f"peft refuses them ({(str(error).splitlines() or [''])[0][:160]})."
        raise ConfigError(
            asked_found_do(f"lora_targets {','.join(config.lora_targets)}", found, f"Use all-linear, or of {names}.")
        ) from error
    return wrapped


def _require_room(model: Any, data: Data) -> None:
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(data.examples, key=lambda one: len(one.input_ids))
    if room is not None and len(longest.input_ids) > room:
        found = f"it has {len(longest.input_ids)} tokens, and this model reads {room}."
        do = f"Set --max_length {room}, with --set data.truncation=drop or response_tail."
        raise DataError(asked_found_do(f"Example {data.place(longest.index)}", found, do))


def _split(config: TrainDefense, data: Data, tokenizer: Any) -> tuple[Sequence[Example], list[Example], str]:
    """Return what is trained on, the clean examples for calibration, and the digest of those from a file."""
    if config.calibration is not None:
        held = read_examples(config.calibration, tokenizer, max_length=config.max_length, **config.data)
        if poisoned := [one for one in held.examples if one.poison]:
            found = f"{len(poisoned)} of its examples are marked as poisoned, first {held.place(poisoned[0].index)}."
            raise CalibrationError(asked_found_do(f"Calibration {config.calibration}", found, "Give clean ones."))
        return data.examples, list(held.examples), held.digest[:12]
    if not config.holdout:
        return data.examples, [], ""
    known = any(one.poison is not None for one in data.examples)
    able = [one.index for one in data.examples if one.poison is False or not known]
    n = round(config.holdout * len(data))
    if not 0 < n <= len(able) or n >= len(data):
        found = f"{n} of {len(data)} examples would be held out, and {len(able)} are clean."
        raise CalibrationError(asked_found_do(f"holdout {config.holdout:g}", found, "Choose another share."))
    drawn = set(random.Random(f"holdout {config.seed}").sample(able, n))
    return (
        tuple(one for one in data.examples if one.index not in drawn),
        [one for one in data.examples if one.index in drawn],
        "",
    )


def warnings_of(
    config: TrainDefense, entry: Entry, options: Any, examples: Sequence[Example], clean: Sequence[Example], steps: int
) -> list[str]:
    """Return what is likely not meant and yet possible, a sentence each, without a full stop.

    Raises:
        ConfigError: the score of an earlier epoch is to decide, and nothing is learned a second time.
    """
    found = []
    shared = len({one.input_ids for one in examples} & {one.input_ids for one in clean})
    if shared and entry.needs_holdout(options):
        found.append(
            f"{shared} of the clean examples that thresholds are calibrated on are also trained on; the false "
            "positive rate will not be what was asked for"
        )
    if config.holdout and entry.needs_holdout(options) and all(one.poison is None for one in (*examples, *clean)):
        found.append(
            f"the data do not say what is poisoned, so that the {len(clean)} examples held out for thresholds may be; "
            "what is poisoned among them raises the threshold, and less is blocked. Give --calibration with clean ones"
        )
    if entry.name == "first_order" and options.when == "next_epoch":
        again = steps * config.batch_size - len(examples) if steps > 1 else 0
        seen = f"{steps} steps of {config.batch_size}, from {len(examples)} examples"
        if again <= 0 and options.action.kind != "log_only":
            why = f"{seen}, learn none a second time, so that nothing can be blocked."
            do = "Give --epochs 2 or more, or method.when=decide_then_learn."
            raise ConfigError(asked_found_do("First-order detector by the score of an earlier epoch", why, do))
        if again < len(examples):
            found.append(
                f"first_order decides by the score of an earlier epoch: {seen}, learn only {max(0, again)} a second "
                "time, and no other can be blocked. Give --epochs 2 or more"
            )
    return found


def estimates(
    config: TrainDefense,
    entry: Entry,
    options: Any,
    model: nn.Module,
    examples: Sequence[Example],
    steps: int,
    directions: Sequence[Directions],
    world: int,
) -> dict[str, Any]:
    """Return steps, tokens, and the cost of a step in forward passes of the model, and as a multiple of SFT's.

    A backward pass counts as two forward ones, recomputation of activations as one.
    """
    tokens, learned = sum(len(one.input_ids) for one in examples), sum(one.n_response for one in examples)
    per_step = config.batch_size / len(examples)
    blocks = locate(model).n_layers
    lowest = min((layer for one in directions for layer in one.layers), default=0)
    upper = 1 - (lowest + 1) / blocks
    whole, part = entry.cost(options)
    plain = 3.0 + config.gradient_checkpointing
    micros = config.batch_size // (config.micro_batch_size * world)
    return {
        "examples": len(examples),
        "steps": steps,
        "epochs": steps * per_step,
        "tokens": round(tokens * per_step * steps),
        "learned_tokens": round(learned * per_step * steps),
        "micro_batches_per_rank": micros,
        "forward_units_per_micro_batch": round(plain + whole + part * upper, 3),
        "times_sft": round((plain + whole + part * upper) / plain, 3),
    }
