"""Vector tasks: from a configuration to a small network that was trained on the task, with prepared pairs.

    problem = prepare_vectors(config, report)             # config.task is one of VECTOR_TASKS
    model, accuracy = trained_network(HierarchicalEquality())     # seconds the first time, then at once

The network is an MLP as wide as the task's input, of three hidden layers: 16-16-16-16-2 for hierarchical equality,
24-24-24-24-2 for the distributive law. It is kept in the cache of `intervene.load_model` once trained.

One variable is searched on pairs that interchange it; several ("left_equal+right_equal") on a mixture that interchanges
each non-empty part of them equally often, each from a source of its own. A pair's kind is the part that it
interchanges, so that every block of a plan has a score of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import tasks.vectors as arrays
from alignments.config import RunDas, with_derived
from alignments.pairs import PairData, Values
from alignments.problem import Problem, Report, check_rank, digest, resolve_config, sites_of, sizes, variables_of
from alignments.scoring import Elsewhere, Facts, Other
from alignments.vector_pairs import VectorPairs
from intervene import AllTokens, Site, fingerprint
from intervene.embedded import cache_root
from intervene.errors import asked_found_do
from intervene.families import locate
from intervene.files import beside
from intervene.networks import MLP, train_classifier
from records.config_files import ConfigError
from tasks import DistributiveLaw, HierarchicalEquality
from tasks.vectors import EqualityTask

VECTOR_TASKS: dict[str, Callable[..., EqualityTask]] = {
    HierarchicalEquality.name: HierarchicalEquality,
    DistributiveLaw.name: DistributiveLaw,
}
# Weight decay, because without it a network does the task as well (0.995 and more), but how far a rotation of its first
# layer takes the equalities apart hangs on its seed: 0.78 to 0.99 of select pairs, where with it 0.93 to 1.00 came out.
MLP_TRAINING = {"examples": 1_048_576, "steps": 5000, "batch_size": 1024, "lr": 4e-3, "weight_decay": 3e-4}
# Part of every cache key: raise it when training or drawing change what a network would become.
VERSION = 1
HIDDEN_LAYERS = 3
# What a grid on a small MLP wants instead of the defaults for language models. Multiples of 1536 pairs hold every
# pattern of equalities equally often, for one variable and for two, in both tasks.
VECTOR_DEFAULTS: dict[str, Any] = {
    "model": "mlp",
    "n_train": 61_440,
    "n_select": 3072,
    "n_test": 3072,
    "batch_size": 1024,
    "steps": 600,
    "lr": 0.01,
}
# It runs on its own network, on the CPU: asking for another must not be passed over in silence.
VECTOR_FIXED = {"model": "mlp", "device": "cpu", "dtype": "float32", "component": "block_output"}
IDENTITY = "first_object"  # of hierarchical equality: a vector, not a truth value
_CHECKED = 8192  # inputs on which a network's accuracy is measured


def task_defaults(config: RunDas) -> RunDas:
    """Return `config` with the defaults of its task where the user gave nothing.

    Raises:
        ConfigError: a value was given that the task would not use.
    """
    if config.task not in VECTOR_TASKS:
        return config
    for key, fixed in VECTOR_FIXED.items():
        value = getattr(config, key)
        if config.sources.get(key, "default") != "default" and value not in (None, fixed):
            do = f"Leave {key} out, or choose another task."
            found = f"{config.task} trains a small network of its own, with {key} {fixed}."
            raise ConfigError(asked_found_do(f"{key} {value}", found, do))
    # 8 directions in all, as published
    wanted = {**VECTOR_DEFAULTS, "rank": (max(1, 8 // len(variables_of(config))),)}
    changed = {key: value for key, value in wanted.items() if config.sources.get(key) == "default"}
    source = f"default of {config.task}"
    return replace(config, **changed, sources={**config.sources, **dict.fromkeys(changed, source)})


def vector_task(config: RunDas) -> EqualityTask:
    """Return the vector task of `config`, with its options ("width", and "model" of the distributive law).

    Raises:
        ConfigError: it has no such option. TaskError: the option's value is refused.
    """
    try:
        return VECTOR_TASKS[config.task](**config.task_options)
    except TypeError as error:
        found = f"{config.task_options} was given ({error})."
        raise ConfigError(asked_found_do(f"task_options of {config.task}", found, "See the task's class.")) from None


def network_for(task: EqualityTask, *, seed: int = 0) -> MLP:
    """Return the untrained network of a task, in eval mode: three hidden layers as wide as the input, two answers."""
    width = len(task.objects) * task.width
    made = MLP(width, width, HIDDEN_LAYERS, 2, seed=seed)
    made.eval()
    return made


def trained_network(
    task: EqualityTask, *, seed: int = 0, cache_dir: str | os.PathLike[str] | None = None, report: Report | None = None
) -> tuple[MLP, float]:
    """Return the network of `task` trained on fresh inputs, and its accuracy on the select split.

    It is trained once: `trained/<digest>.safetensors` under the cache of `intervene.load_model` holds it afterwards.
    The digest covers the task with its parameters, `seed`, `MLP_TRAINING` and `VERSION`. The file is moved into place
    when it is complete, and one that is damaged is made anew.
    """
    model = network_for(task, seed=seed)
    # a task is a frozen dataclass, so that its text holds all its parameters
    text = json.dumps([VERSION, task.name, repr(task), HIDDEN_LAYERS, seed, MLP_TRAINING])
    path = cache_root(cache_dir) / "trained" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    if not _load(path, model):
        _train(task, model, seed, report)
        with beside(path) as draft:
            save_file(model.state_dict(), draft, metadata={"fingerprint": fingerprint(model), "made_by": text})
            os.replace(draft, path)
    model.eval()
    return model, accuracy_of(task, model)


def _train(task: EqualityTask, model: MLP, seed: int, report: Report | None) -> None:
    tell = report or (lambda text, done, total: None)
    tell("training the MLP", 0, 1)
    train = task.examples("train", n=int(MLP_TRAINING["examples"]))
    train_classifier(
        model,
        torch.from_numpy(train.inputs),
        torch.from_numpy(train.labels),
        steps=int(MLP_TRAINING["steps"]),
        batch_size=int(MLP_TRAINING["batch_size"]),
        lr=MLP_TRAINING["lr"],
        weight_decay=MLP_TRAINING["weight_decay"],
        seed=seed,
    )
    tell("training the MLP", 1, 1)


def _load(path: Path, model: MLP) -> bool:
    """Load the weights in `path` into `model`; return whether they were there and whole."""
    untrained = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        with safe_open(path, framework="pt") as stored:
            known = (stored.metadata() or {}).get("fingerprint")
            model.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118  # no dict
    except (OSError, SafetensorError, RuntimeError):  # not there; no such file; weights of another shape
        return False
    if fingerprint(model) == known:
        return True
    model.load_state_dict(untrained)
    return False


@torch.no_grad()
def accuracy_of(task: EqualityTask, model: nn.Module) -> float:
    """Return the share of inputs of the select split that `model` answers rightly."""
    examples = task.examples("select", n=_CHECKED)
    return float((model(torch.from_numpy(examples.inputs)).argmax(-1).numpy() == examples.labels).mean())


def vector_network(config: RunDas) -> tuple[RunDas, EqualityTask, list[Site]]:
    """Return the resolved `config`, its task and the sites to search; nothing is trained.

    Raises:
        ConfigError: see `vector_task`, `resolve_config` and `check_rank`; a control names no rival variable.
    """
    task = vector_task(config)
    model = network_for(task)
    config = resolve_config(config, locate(model).n_layers, task.variables, ("input",))
    config = config if config.device is not None else with_derived(config, device="cpu")
    sites = sites_of(config)
    check_rank(config, model, sites)
    known = rivals_of(task, variables_of(config))
    for name in config.controls:
        if name.startswith("rival:") and name.removeprefix("rival:") not in known:
            do = f"Use one of {', '.join(known)}."
            raise ConfigError(asked_found_do(f"control {name}", f"{config.task} has no such other variable.", do))
    return config, task, sites


def rivals_of(task: EqualityTask, searched: Sequence[str]) -> dict[str, EqualityTask]:
    """Return the variables that are not searched, each with its task; of the distributive law also the other model's.

    A plan that finds such a variable as well as the searched one does not tell them apart.
    """
    known = {name: task for name in task.variables}
    if isinstance(task, DistributiveLaw):
        other = task.rival()
        known = {name: other for name in other.variables} | known  # what both have is taken from the own model
    return {name: where for name, where in known.items() if name not in searched}


def draw_vectors(task: EqualityTask, variables: Sequence[str], split: str, n: int) -> arrays.VectorPairs:
    """Return `n` pairs: of one variable, or a mixture that interchanges each part of several equally often.

    Of `first_object` alone, half of the sources have the base's second object as their first; see `with_hits`.
    """
    if len(variables) > 1:
        return task.mixed_pairs(split, variables=variables, n=n)
    drawn = task.pairs(split, variables=variables, n=n)
    return with_hits(task, drawn) if tuple(variables) == (IDENTITY,) else drawn


def with_hits(task: EqualityTask, drawn: arrays.VectorPairs) -> arrays.VectorPairs:
    """Return pairs of `first_object` in half of which the source's first object is the base's second.

    Objects drawn apart are never equal by chance: the first object of such a source would always make the left equality
    False, so that the label could be told from the base's right equality, without any first object. Sources keep which
    of their equalities hold; hits are dealt evenly over the patterns of equality of base and source.
    """
    source = drawn.sources[IDENTITY].copy()
    sides = [inputs.reshape(len(drawn), -1, task.width) for inputs in (drawn.base, source)]  # (N, objects, width)
    holds = [arrays.same(side[:, 2 * i], side[:, 2 * i + 1]) for side in sides for i in range(task.equalities)]
    order = np.argsort(sum(bit * 2**i for i, bit in enumerate(holds)), kind="stable")  # (N,)
    hit = np.zeros(len(drawn), dtype=np.bool_)
    hit[order] = np.arange(len(drawn)) % 2 == 1
    base, other = sides  # views: what is written here is in `source`
    equal = hit & holds[task.equalities]
    other[hit, 0] = base[hit, 1]
    other[equal, 1] = base[equal, 1]
    made = replace(drawn, sources={IDENTITY: source})
    return replace(made, labels=task.relabel(made))


def vector_pairs(task: EqualityTask, model: nn.Module, drawn: arrays.VectorPairs) -> VectorPairs:
    """Return the drawn pairs on `model`, with values, kinds and whether it answers base and sources rightly."""
    base = torch.from_numpy(drawn.base)
    sources = {name: torch.from_numpy(inputs) for name, inputs in drawn.sources.items()}
    made = VectorPairs(
        model,
        base,
        list(sources.values()),
        torch.from_numpy(drawn.labels),
        base_answers=torch.from_numpy(drawn.base_labels),
        kinds=kinds_of(drawn),
        values=values_of(task, drawn),
    )
    correct = _right(model, base, drawn.base_labels)
    for name, inputs in sources.items():
        correct &= _right(model, inputs, drawn.source_labels[name])
    made.correct = correct
    return made


@torch.no_grad()
def _right(model: nn.Module, inputs: Tensor, labels: arrays.Labels) -> Tensor:
    right: Tensor = model(inputs).argmax(-1) == torch.from_numpy(labels)
    return right


def kinds_of(drawn: arrays.VectorPairs) -> tuple[str, ...]:
    """Return which variables each pair interchanges: "left_equal", "right_equal" or "both"; empty if there is one."""
    names = drawn.variables
    if len(names) == 1:
        return ()
    every = "both" if len(names) == 2 else "all"
    parts = {
        code: "+".join(name for bit, name in enumerate(names) if code >> bit & 1) for code in range(2 ** len(names))
    }
    parts[2 ** len(names) - 1] = every
    codes = (drawn.interchanged * [2**bit for bit in range(len(names))]).sum(axis=1)
    return tuple(parts[code] for code in codes.tolist())


def values_of(task: EqualityTask, drawn: arrays.VectorPairs) -> Values:
    """Return the variable's value on each base and on its source; of several variables, tuples of them."""

    def values(name: str, inputs: arrays.Floats) -> list[Any]:
        found = task.causal_model.run(task.setting(inputs))[name].tolist()
        return [tuple(one) for one in found] if found and isinstance(found[0], list) else found

    base = [values(name, drawn.base) for name in drawn.variables]
    source = [values(name, inputs) for name, inputs in drawn.sources.items()]
    if len(base) == 1:
        return base[0], source[0]
    return list(zip(*base, strict=True)), list(zip(*source, strict=True))


def baselines_of(drawn: arrays.VectorPairs) -> dict[str, float]:
    """Return copy_base, copy_source and majority on these pairs; of several sources, copy_source is the best one."""
    found = drawn.baselines()
    copies = [value for name, value in found.items() if name.startswith("copy_source")]
    return {**found, "copy_source": max(copies)}


def prepare_vectors(config: RunDas, report: Report, *, network_seed: int = 0) -> Problem:
    """Return a vector task on the network trained on it, with a random network and other variables as controls.

    `network_seed` is of the trained network; the random one has the next.

    Raises:
        ConfigError: see `vector_network`.
    """
    config, task, sites = vector_network(config)
    searched = variables_of(config)
    model, _ = trained_network(task, seed=network_seed, report=report)

    def draw(where: EqualityTask, names: Sequence[str]) -> dict[str, arrays.VectorPairs]:
        return {split: draw_vectors(where, names, split, n) for split, n in sizes(config).items()}

    def on(
        network: nn.Module, where: EqualityTask, names: Sequence[str], drawn: Mapping[str, arrays.VectorPairs]
    ) -> tuple[dict[str, PairData], Facts]:
        pairs = {split: vector_pairs(where, network, found) for split, found in drawn.items()}
        baselines = {split: baselines_of(found) for split, found in drawn.items()}
        accuracy: dict[str, float | None] = {split: _share(made.correct) for split, made in pairs.items()}
        return dict(pairs), Facts(task.name, "mlp", "+".join(names), baselines, accuracy)

    searched_pairs = draw(task, searched)

    def random_model(site: Site) -> Elsewhere:
        network = network_for(task, seed=network_seed + 1)
        return Elsewhere(network, on(network, task, searched, searched_pairs)[0])

    def rival(name: str, where: EqualityTask) -> Other:
        return lambda site: Elsewhere(model, *on(model, where, [name], draw(where, [name])), variables=1)

    splits, facts = on(model, task, searched, searched_pairs)
    return Problem(
        config,
        model,
        splits,
        lambda name: AllTokens(),
        sites,
        facts,
        {split: _lint(pairs) for split, pairs in splits.items()},
        fingerprint(model),
        {"random_model": random_model}
        | {f"rival:{name}": rival(name, where) for name, where in rivals_of(task, searched).items()},
        digests={split: digest_of(pairs) for split, pairs in searched_pairs.items()},
    )


def digest_of(drawn: arrays.VectorPairs) -> str:
    """Return the `digest` of the drawn arrays: bases, sources, which are interchanged, labels."""
    made = (drawn.base, *drawn.sources.values(), drawn.interchanged, drawn.labels)
    return digest(part for one in made for part in (one.shape, one.tobytes()))


def _share(right: Tensor | None) -> float:
    assert right is not None
    return float(right.float().mean())


def _lint(pairs: PairData) -> Mapping[str, Any]:
    told: dict[str, Any] = {"pairs": len(pairs)}
    if len(pairs.kinds):
        told["kinds"] = {kind: list(pairs.kinds).count(kind) for kind in sorted(set(pairs.kinds))}
    return {**told, "model right on base and source": round(_share(pairs.correct), 4)}
