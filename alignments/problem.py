"""`prepare`: from a configuration to a model, prepared pairs and a grid of cells; what `run_das.py` searches.

Text tasks run on a language model; `hierarchical_equality` on a small MLP, which is trained here first. Nothing is
learned about an alignment yet, but everything that can refuse has refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from alignments.config import ConfigError, RunDas, resolve_layers, with_derived
from alignments.methods import LEARNED
from alignments.pairs import LanguagePairs, PairData, VectorPairs
from alignments.search import Facts, Other
from intervene import AllTokens, Positions, Site, fingerprint
from intervene.errors import asked_found_do
from intervene.families import locate, resolve
from intervene.marked import Marked
from intervene.networks import MLP, train_classifier
from tasks import HierarchicalEquality, PairReport, PairSet, Task, inspect, task_named

EQUALITY = HierarchicalEquality.name
SPLITS = ("train", "select", "test")
MLP_TRAINING = {"examples": 400_000, "steps": 3000, "batch_size": 1024, "lr": 5e-3}
# What a grid on a small MLP wants instead of the defaults for language models.
EQUALITY_DEFAULTS: dict[str, Any] = {
    "model": "mlp",
    "rank": 8,
    "n_train": 64_000,
    "n_select": 3200,
    "n_test": 3200,
    "batch_size": 1024,
    "steps": 600,
    "lr": 0.01,
}
# It runs on its own network, on the CPU: asking for another must not be passed over in silence.
EQUALITY_FIXED = {"model": "mlp", "device": "cpu", "dtype": "float32"}
SAMPLE = 32  # examples on which a dry run measures task accuracy and speed

Report = Callable[[str, int, int], None]  # what is being done, how many of how many


@dataclass(frozen=True, eq=False)
class Problem:
    """A model with prepared pairs: everything a `Search` needs."""

    config: RunDas
    model: nn.Module
    splits: Mapping[str, PairData]
    where: Callable[[str], Positions]
    sites: Sequence[Site]
    facts: Facts
    lint: Mapping[str, Any]
    fingerprint: str
    others: Mapping[str, Other] = field(default_factory=dict)
    examples: Sequence[Mapping[str, Any]] = ()  # one per test pair, for people to read; empty for vectors
    tokenizer: Any = None


def task_defaults(config: RunDas) -> RunDas:
    """Return `config` with the defaults of its task where the user gave nothing.

    Raises:
        ConfigError: a value was given that the task would not use.
    """
    if config.task != EQUALITY:
        return config
    for key, fixed in EQUALITY_FIXED.items():
        value = getattr(config, key)
        if config.sources.get(key, "default") != "default" and value not in (None, fixed):
            do = f"Leave {key} out, or choose another task."
            found = f"{EQUALITY} trains a small network of its own, with {key} {fixed}."
            raise ConfigError(asked_found_do(f"{key} {value}", found, do))
    changed = {key: value for key, value in EQUALITY_DEFAULTS.items() if config.sources.get(key) == "default"}
    return replace(config, **changed, sources={**config.sources, **dict.fromkeys(changed, f"default of {EQUALITY}")})


def sizes(config: RunDas) -> dict[str, int]:
    """Return split -> number of pairs."""
    return {"train": config.n_train, "select": config.n_select, "test": config.n_test}


def resolve_config(config: RunDas, n_layers: int, variables: Sequence[str], positions: Sequence[str]) -> RunDas:
    """Return `config` with variable, layers and positions derived where they were left open, and checked.

    Raises:
        ConfigError: the task has no such variable or position; see `resolve_layers`.
    """
    config = resolve_layers(config, n_layers)
    derived: dict[str, Any] = {}
    if config.variable is None:
        derived["variable"] = variables[0]
    if config.positions is None:
        derived["positions"] = tuple(positions)
    config = with_derived(config, **derived)
    for kind, asked, known in (
        ("variable", (config.variable,), variables),
        ("position", config.positions or (), positions),
    ):
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise ConfigError(f"Task {config.task}: it has no {kind} {unknown[0]!r}. Use one of {', '.join(known)}.")
    return config


def resolve_device(config: RunDas) -> RunDas:
    """Return `config` with a device that this machine has: the given one, else cuda where there is one, else cpu.

    Raises:
        ConfigError: torch cannot use the given one here.
    """
    if config.device is None:
        return with_derived(config, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:  # no such kind of device; torch built without it
        reason = str(error).splitlines()[0].rstrip(".")
        do = "Use cpu, or cuda where there is one."
        raise ConfigError(asked_found_do(f"device {config.device}", f"{reason}.", do)) from None
    return config


def check_rank(config: RunDas, model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse a rank above the width of some site, before any work.

    Raises:
        ConfigError: naming the first such site.
    """
    if not LEARNED & set(config.methods):
        return
    for site in sites:
        width = resolve(model, site).width
        if width is not None and config.rank > width:
            do = f"Choose 1 to {width}."
            raise ConfigError(asked_found_do(f"rank {config.rank}", f"{site} is {width} wide.", do))


def draw_text(config: RunDas, task: Task) -> dict[str, tuple[PairSet, PairReport]]:
    """Return split -> its pairs, and what the task's own check says of them; all splits, before the model runs.

    Raises:
        ConfigError: a pair is wrong. NotEnough: a split does not hold as many distinct pairs.
    """
    assert config.variable is not None
    drawn: dict[str, tuple[PairSet, PairReport]] = {}
    for split, n in sizes(config).items():
        pairs = task.pairs(split, variable=config.variable, n=n)
        found = inspect(task, pairs)
        if found.problems:
            raise ConfigError(f"Task {task.name}, {split}: {len(found.problems)} bad pairs. First: {found.problems[0]}")
        drawn[split] = pairs, found
    return drawn


def text_task(config: RunDas, tokenizer: Any) -> Task:
    """Return the task of `config`, restricted to what `tokenizer` can tell apart."""
    return task_named(config.task).for_tokenizer(tokenizer)


def text_positions(task: Task, variable: str) -> tuple[str, ...]:
    """Return the names of the positions that both sides of the task's pairs mark, the default ones first."""
    pair = task.pairs("train", variable=variable, n=1)[0]
    return tuple(name for name in pair.base.spans if name in pair.source.spans)


def prepare_text(config: RunDas, model: nn.Module, tokenizer: Any, task: Task, report: Report) -> Problem:
    """Return the problem of a resolved `config` on a language model: draws, checks and runs all pairs once."""
    assert config.variable is not None and config.positions is not None and isinstance(config.layers, tuple)
    sites = [Site("block_output", layer) for layer in config.layers]
    check_rank(config, model, sites)
    splits: dict[str, PairData] = {}
    baselines: dict[str, dict[str, float]] = {}
    accuracy: dict[str, float | None] = {}
    lint: dict[str, Any] = {}
    drawn = draw_text(config, task)

    def run_once(network: nn.Module, kept: Sequence[Site], split: str, what: str) -> LanguagePairs:
        pairs = drawn[split][0]
        return LanguagePairs(
            network,
            tokenizer,
            pairs,
            sites=kept,
            positions=config.positions or (),
            kinds=[task.kind(pair) for pair in pairs],
            progress=lambda done, total: report(f"running {split} pairs{what}", done, total),
        )

    def random_model(site: Site) -> tuple[nn.Module, Mapping[str, PairData]]:
        network = random_like(model)
        return network, {split: run_once(network, [site], split, " of a random model") for split in drawn}

    for split, (_, found) in drawn.items():
        baselines[split] = dict(found.baselines)
        data = run_once(model, sites, split, "")
        base, source = data.task_correct()
        accuracy[split] = float((base & source).float().mean())
        lint[split] = {
            "pairs": found.n,
            "kinds": dict(found.kinds),
            "informative": round(found.informative, 4),
            "model right on the base": round(float(base.float().mean()), 4),
            "model right on base and source": round(accuracy[split] or 0.0, 4),
            "suffix against full pass": data.exactness(),
            "beware": "; ".join(found.warnings) or "-",
        }
        splits[split] = data
    facts = Facts(task.name, config.model, config.variable, baselines, accuracy)
    examples = [
        {"base": pair.base.prompt, "source": pair.source.prompt, "label": pair.label, "kind": task.kind(pair)}
        for pair in drawn["test"][0]
    ]
    return Problem(
        config,
        model,
        splits,
        Marked,
        sites,
        facts,
        lint,
        fingerprint(model),
        {"random_model": random_model},
        examples=examples,
        tokenizer=tokenizer,
    )


def random_like(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return a model of the same configuration, device and dtype with freshly drawn weights, in eval mode.

    The control of Sutter et al. 2025 (arXiv 2507.08802): what is also found in a network that has learned nothing was
    put there by the search.
    """
    from transformers import AutoModelForCausalLM  # only language models come here

    like = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: nn.Module = AutoModelForCausalLM.from_config(locate(model).config)  # type: ignore[no-untyped-call]
    return made.to(device=like.device, dtype=like.dtype).eval()


def equality_network(config: RunDas) -> tuple[RunDas, HierarchicalEquality, MLP, list[Site]]:
    """Return the resolved `config`, the task, its untrained network (16-16-16-16-2), and the sites to search.

    Raises:
        ConfigError: see `resolve_config` and `check_rank`.
    """
    task = HierarchicalEquality()
    model = MLP(4 * task.width, 16, 3, 2, seed=0)
    config = resolve_config(config, locate(model).n_layers, task.variables, ("input",))
    config = config if config.device is not None else with_derived(config, device="cpu")
    assert isinstance(config.layers, tuple)
    sites = [Site("block_output", layer) for layer in config.layers]
    check_rank(config, model, sites)
    return config, task, model, sites


def prepare_equality(config: RunDas, report: Report) -> Problem:
    """Return hierarchical equality on an MLP trained here, with a random one as control."""
    config, task, model, sites = equality_network(config)
    report("training the MLP", 0, 1)
    train = task.examples("train", n=int(MLP_TRAINING["examples"]))
    train_classifier(
        model,
        torch.from_numpy(train.inputs),
        torch.from_numpy(train.labels),
        steps=int(MLP_TRAINING["steps"]),
        batch_size=int(MLP_TRAINING["batch_size"]),
        lr=MLP_TRAINING["lr"],
    )
    report("training the MLP", 1, 1)
    assert config.variable is not None
    arrays = {split: task.pairs(split, variables=[config.variable], n=n) for split, n in sizes(config).items()}

    def on(network: nn.Module) -> dict[str, PairData]:
        return {
            split: VectorPairs(
                network,
                torch.from_numpy(pairs.base),
                torch.from_numpy(pairs.sources[pairs.variables[0]]),
                torch.from_numpy(pairs.labels),
            )
            for split, pairs in arrays.items()
        }

    def random_model(site: Site) -> tuple[nn.Module, Mapping[str, PairData]]:
        network = MLP(4 * task.width, 16, 3, 2, seed=1).eval()
        return network, on(network)

    accuracy: dict[str, float | None] = {}
    for split, pairs in arrays.items():
        with torch.no_grad():
            right = model(torch.from_numpy(pairs.base)).argmax(-1) == torch.from_numpy(pairs.base_labels)
        accuracy[split] = float(right.float().mean())
    facts = Facts(
        task.name,
        "mlp",
        config.variable,
        {split: pairs.baselines() for split, pairs in arrays.items()},
        accuracy,
    )
    lint = {split: {"pairs": len(pairs), "model right on the base": accuracy[split]} for split, pairs in arrays.items()}
    return Problem(
        config,
        model,
        on(model),
        lambda name: AllTokens(),
        sites,
        facts,
        lint,
        fingerprint(model),
        {"random_model": random_model},
    )
