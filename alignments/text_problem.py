"""Text tasks: from a configuration to a language model with prepared pairs.

`load_text` resolves what was left open and loads model, tokenizer and task; `prepare_text` draws, checks and runs all
pairs once. Nothing is learned about an alignment yet, but everything that can refuse has refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from alignments.config import RunDas
from alignments.metrics import wilson
from alignments.pairs import LanguagePairs, PairData, Values
from alignments.planted import planted_model
from alignments.problem import (
    Problem,
    Report,
    check_rank,
    check_rivals,
    digest,
    resolve_config,
    resolve_device,
    sites_of,
    sizes,
    variables_of,
)
from alignments.scoring import Elsewhere, Facts, Other
from alignments.small_models import trained
from alignments.space import space_of
from intervene import Site, fingerprint
from intervene.errors import asked_found_do
from intervene.families import locate
from intervene.marked import Marked
from intervene.models import load_model
from records.config_files import ConfigError
from tasks import TASKS, BadData, Example, Pair, PairReport, PairSet, Task, inspect, require_distinguishable, task_named
from tasks import lint as look

EVERY = "every"  # as positions: each column of prompts of one length
OWN_MODELS = ("planted", "small")  # names of models that are made here, for the task at hand


def task_of(config: RunDas) -> Task:
    """Return the task of `config`, with its options.

    Raises:
        ConfigError: it has no such option.
    """
    made = task_named(config.task)
    if not config.task_options:
        return made
    make: Any = TASKS.get(config.task) or (lambda **given: replace(made, **given))  # type: ignore[type-var]
    try:
        found: Task = make(**config.task_options)
        return found
    except TypeError as error:
        given = f"{config.task_options} was given ({error})."
        raise ConfigError(asked_found_do(f"task_options of {config.task}", given, "See the task's class.")) from None


def network_of(config: RunDas, task: Task, report: Report) -> tuple[nn.Module, Any]:
    """Return the model of `config` and its tokenizer: a loaded one, or one that is made for the task.

    "planted" is the circuit built by hand; "small" a transformer trained on the task, once.
    """
    if config.model == "planted":
        return planted_model()
    if config.model == "small":
        model, tokenizer, _ = trained(task, progress=lambda done, total: report("training a small model", done, total))
        return model, tokenizer
    return loaded_model(config)


def loaded_model(config: RunDas) -> tuple[nn.Module, Any]:
    """Return the model that `config` names, on its device or spread as its device_map says, and its tokenizer."""
    dtype = getattr(torch, config.dtype)
    if config.device_map is not None:
        return load_model(config.model, dtype=dtype, device_map=config.device_map)
    return load_model(config.model, dtype=dtype, device=str(config.device))


def load_text(config: RunDas, report: Report) -> tuple[RunDas, nn.Module, Any, Task]:
    """Return the resolved configuration, the loaded model, its tokenizer and the task."""
    task = task_of(config)  # a wrong name must not cost the loading of a model
    config = resolve_device(config)
    model, tokenizer = network_of(config, task, report)
    if config.device_map is None:
        model = model.to(config.device)
    task = task.for_tokenizer(tokenizer)
    variable = config.variable or task.variables[0]
    marked = text_positions(task, variable)
    if config.positions == (EVERY,):
        prompt = task.pairs("train", variable=variable, n=1)[0].base.prompt
        columns = tuple(map(str, range(len(tokenizer(prompt)["input_ids"]))))
        config = replace(config, positions=columns)
    resolved = resolve_config(config, locate(model).n_layers, task.variables, marked)
    searched = variables_of(resolved)
    check_rivals(resolved, [name for name in task.variables if name not in searched and "+" not in name])
    return resolved, model, tokenizer, task


def text_positions(task: Task, variable: str) -> tuple[str, ...]:
    """Return the names of the positions that both sides of the task's pairs mark, the default ones first."""
    pair = task.pairs("train", variable=variable, n=1)[0]
    return tuple(name for name in pair.base.spans if name in pair.source.spans)


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
    if config.do_align and not config.force and "+" not in config.variable:
        report = look(task, {split: pairs for split, (pairs, _) in drawn.items()})
        rivals = [name for name in task.variables if name != config.variable and name in report.explanations]
        try:
            require_distinguishable(report, config.variable, rivals)
        except BadData as error:
            raise ConfigError(f"{error} Or go on with --force.") from None
    return drawn


def check_lengths(config: RunDas, tokenizer: Any, drawn: Mapping[str, Sequence[Pair]]) -> None:
    """Refuse prompts of more than `max_tokens` tokens.

    Raises:
        ConfigError: with their number, and the first one's split and row.
    """
    if config.max_tokens is None:
        return
    prompts = [
        (one.prompt, split, row)
        for split, pairs in drawn.items()
        for row, p in enumerate(pairs)
        for one in (p.base, p.source)
    ]
    lengths = [len(ids) for ids in tokenizer([prompt for prompt, _, _ in prompts])["input_ids"]]
    long = [number for number, length in enumerate(lengths) if length > config.max_tokens]
    if long:
        _, split, row = prompts[long[0]]
        first = f"first {split} pair {row} with {lengths[long[0]]} tokens"
        found = f"{len(long)} of {len(prompts)} prompts are longer, {first}."
        do = f"Allow {max(lengths)} tokens, or write shorter prompts."
        raise ConfigError(asked_found_do(f"max_tokens {config.max_tokens}", found, do))


class _Text:
    """What the splits of one text problem share while they are prepared."""

    def __init__(self, config: RunDas, model: nn.Module, tokenizer: Any, task: Task, report: Report) -> None:
        self.config, self.model, self.tokenizer, self.task, self.report = config, model, tokenizer, task, report
        self.drawn = draw_text(config, task)
        check_lengths(config, tokenizer, {split: pairs for split, (pairs, _) in self.drawn.items()})
        self.space = space_of(config.cache)

    def run_once(self, network: nn.Module, sites: Sequence[Site], split: str, what: str = "") -> LanguagePairs:
        """Return the pairs of `split`, run once through `network`, their activations kept at `sites`."""
        pairs = self.drawn[split][0]
        return LanguagePairs(
            network,
            self.tokenizer,
            pairs,
            sites=sites,
            positions=self.config.positions or (),
            variables=variables_of(self.config),
            kinds=[self.task.kind(pair) for pair in pairs],
            values=values_of(self.task, pairs),
            space=self.space,
            progress=lambda done, total: self.report(f"running {split} pairs{what}", done, total),
        )

    def lint(self, split: str, data: LanguagePairs) -> dict[str, Any]:
        """Return what a reader should know of the pairs of `split`."""
        found = self.drawn[split][1]
        base, source = data.task_correct()
        return {
            "pairs": found.n,
            "kinds": dict(found.kinds),
            "informative": round(found.informative, 4),
            "model right on the base": round(float(base.float().mean()), 4),
            "model right on base and source": round(float((base & source).float().mean()), 4),
            "suffix against full pass": data.exactness(),
            "beware": "; ".join(found.warnings) or "-",
        }

    def random_model(self, site: Site) -> Elsewhere:
        """Return the same pairs on a model of random weights."""
        network = random_like(self.model)
        return Elsewhere(
            network, {split: self.run_once(network, [site], split, " of a random model") for split in self.drawn}
        )

    def rival(self, name: str) -> Other:
        """Return what prepares the pairs of a rival variable at a site, with their own baselines."""

        def made(site: Site) -> Elsewhere:
            alone = replace(self.config, variable=name, layers=(site.layer or 0,), force=True)
            problem = prepare_text(alone, self.model, self.tokenizer, self.task, self.report)
            return Elsewhere(self.model, problem.splits, problem.facts, variables=1)

        return made

    def examples(self) -> list[dict[str, Any]]:
        """Return one record per test pair, for people to read."""
        return [
            {
                "base": pair.base.prompt,
                "source": pair.source.prompt,
                "label": pair.label,
                "kind": self.task.kind(pair),
                "base_setting": dict(pair.base.setting),
                "source_setting": dict(pair.source.setting),
            }
            for pair in self.drawn["test"][0]
        ]


def prepare_text(config: RunDas, model: nn.Module, tokenizer: Any, task: Task, report: Report) -> Problem:
    """Return the problem of a resolved `config` on a language model: draws, checks and runs all pairs once.

    Raises:
        ConfigError: a pair is wrong, the data cannot tell the variable from another, or the model cannot do the task.
    """
    assert config.variable is not None and config.positions is not None
    sites = sites_of(config)
    check_rank(config, model, sites)
    made = _Text(config, model, tokenizer, task, report)
    splits: dict[str, PairData] = {}
    accuracy: dict[str, float | None] = {}
    lint: dict[str, Any] = {}
    for split in made.drawn:
        data = made.run_once(model, sites, split)
        assert data.correct is not None
        accuracy[split] = float(data.correct.float().mean())
        if split == "train":
            check_accuracy(config, accuracy[split] or 0.0, len(data))
        splits[split], lint[split] = data, made.lint(split, data)
        if made.space.notes:
            lint[split]["cache"] = made.space.notes[-1]
    baselines = {split: dict(found.baselines) for split, (_, found) in made.drawn.items()}
    single = [name for name in task.variables if name != config.variable and "+" not in name]
    return Problem(
        config,
        model,
        splits,
        Marked,
        sites,
        Facts(task.name, config.model, config.variable, baselines, accuracy),
        lint,
        fingerprint(model),
        {"random_model": made.random_model, **{f"rival:{name}": made.rival(name) for name in single}},
        examples=made.examples(),
        tokenizer=tokenizer,
        digests={split: digest_of(task, pairs) for split, (pairs, _) in made.drawn.items()},
    )


def digest_of(task: Task, pairs: Sequence[Pair]) -> str:
    """Return the `digest` of what is searched of `pairs`: prompts, spans, labels and kinds."""
    sides = [[(one.prompt, sorted(one.spans.items())) for one in (pair.base, pair.source)] for pair in pairs]
    return digest((*side, pair.label, task.kind(pair)) for side, pair in zip(sides, pairs, strict=True))


def check_accuracy(config: RunDas, accuracy: float, n: int) -> None:
    """Refuse a model that cannot do the task, unless it is forced.

    Raises:
        ConfigError: `accuracy`, the share of training pairs whose base and source it answers rightly, is too low.
    """
    if config.do_align and accuracy < config.min_accuracy and not config.force:
        low, high = wilson(round(accuracy * n), n)
        raise ConfigError(
            asked_found_do(
                f"{config.task} on {config.model}, with min_accuracy {config.min_accuracy:g}",
                f"the model answers base and source rightly on {accuracy:.2f} [{low:.2f}, {high:.2f}] of {n} training "
                "pairs.",
                "No alignment can be expected: take another model or task, or go on with --force.",
            )
        )


def values_of(task: Task, pairs: Sequence[Pair]) -> Values:
    """Return the value of each pair's variable on its base, and on its source, by running the causal model."""

    def value(pair: Pair, example: Example) -> Any:
        return task.causal_model.run(example.setting)[pair.variable]

    return [value(pair, pair.base) for pair in pairs], [value(pair, pair.source) for pair in pairs]


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
    spread = getattr(model, "hf_device_map", None)
    if spread:
        from accelerate import dispatch_model  # a model that is spread over devices came by it

        made = dispatch_model(made.to(like.dtype), spread)
        return made.eval()
    return made.to(device=like.device, dtype=like.dtype).eval()
