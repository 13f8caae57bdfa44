"""`dry_run`: the plan, the numbers of pairs, the task accuracy and the cost of a run, without searching anything.

Costs are counted in pair-passes (one pair forwards through the whole model; a suffix counts by its share, a step of
learning twice), which a timed pass over a few examples turns into minutes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from alignments.config import RunDas, describe
from alignments.console import progress_bars, say
from alignments.executors import is_file_of_pairs, problem_from, scorer_of
from alignments.methods import METHODS
from alignments.metrics import wilson
from alignments.original_pairs import read_original_splits
from alignments.pairs import LanguagePairs, PairData
from alignments.planner import UNIT, Halving
from alignments.problem import SAMPLE, SPLITS, Problem, Report, check_rank, sites_of, sizes, variables_of
from alignments.scoring import PLAN_CONTROLS, Cell, Facts, Job, applies
from alignments.screens import BACKWARD, Place, share
from alignments.search import Search, cells_of
from alignments.text_problem import check_lengths, draw_text, load_text
from alignments.vector_pairs import VectorPairs
from alignments.vector_problem import VECTOR_TASKS, draw_vectors, network_for, vector_network, vector_pairs
from intervene import AllTokens
from intervene.marked import Marked
from intervene.prefix import positions_of
from intervene.suffix import call_inputs

_VECTORS = 1536  # vector pairs in a sample: every pattern of equalities equally often


@dataclass(frozen=True)
class Cost:
    """What a run costs in pair-passes: running every prompt once, the search, seeds and controls of the best cells."""

    prepare: float
    search: float
    completion: float

    @property
    def total(self) -> float:
        """The sum of the three."""
        return self.prepare + self.search + self.completion


def dry_run(config: RunDas) -> None:
    """Print what a run would do and cost, refusing what it would refuse.

    Raises:
        ConfigError, InterveneError, TaskError: as the run would, except that the gate on task accuracy only warns.
    """
    with progress_bars() as report:
        sampled, counts = sample_of(config, report)
    say(describe(sampled.config))
    sample = sampled.splits["train"]
    search = _search(sampled, counts)
    each = seconds_per_pair(sample)
    rate = seconds_per_pass(sampled, search) or each
    learned = sum(METHODS[cell.method].learned for cell in search.cells)
    say(f"plan: {len(search.cells)} cells, {learned} of them learned, then seeds and controls of the best ones")
    tokens = f", {sample.base.input_ids.shape[1]} tokens at most" if isinstance(sample, LanguagePairs) else ""
    say(f"pairs: {counts}{tokens}")
    say(_accuracy(sampled.config, sample))
    cost = cost_of(search, sampled.config, counts)
    said = f"{cost.total:.0f} pair-passes ({cost.prepare:.0f} to run the prompts once, {cost.search:.0f} search, "
    said += f"{cost.completion:.0f} seeds and controls of the best cells)"
    say(
        f"cost: about {_clock(cost.prepare * each + (cost.search + cost.completion) * rate)}, {said}; "
        f"{1000 * each:.3g} ms per pair and full pass, {1000 * rate:.3g} ms per pair-pass of a fit"
    )
    if sampled.config.strategy == "halving" and learned:
        planned = _planned(search, sampled.config)
        rest = f"{planned.limit:.0f} of the {planned.exhaustive:.0f} that the whole grid takes; {UNIT}"
        if sampled.config.budget_seconds is not None:
            rest = f"at most {sampled.config.budget_seconds:g} s; the whole grid takes about "
            rest += _clock(planned.exhaustive * rate)
        say(f"halving: rungs of {', '.join(map(str, planned.steps))} steps; search {rest}")


def sample_of(config: RunDas, report: Report) -> tuple[Problem, dict[str, int]]:
    """Return the problem with a few pairs alone, under "train", and the numbers of pairs that the run would have."""
    if config.task in VECTOR_TASKS:
        config, task, sites = vector_network(config)
        model, names = network_for(task), variables_of(config)
        drawn = draw_vectors(task, names, "train", _VECTORS)
        pairs: PairData = vector_pairs(task, model, drawn)
        facts = Facts(task.name, "mlp", "+".join(names), {}, {})
        return Problem(config, model, {"train": pairs}, lambda name: AllTokens(), sites, facts, {}, ""), sizes(config)
    if is_file_of_pairs(config.task):
        rows = {split: len(found) for split, found in read_original_splits(config.task).items()}
        small = dict.fromkeys(("n_train", "n_select", "n_test"), SAMPLE)
        sources = {**config.sources, **dict.fromkeys(small, "default")}
        made = problem_from(replace(config, **small, sources=sources), report)  # type: ignore[arg-type]
        kept = {name: getattr(config, name) for name in small}
        counts = {split: min(rows[split], n) for split, n in sizes(config).items()}
        return replace(made, config=replace(made.config, **kept)), counts
    return _text_sample(config, report), sizes(config)


def _text_sample(config: RunDas, report: Report) -> Problem:
    config, model, tokenizer, task = load_text(config, report)
    assert config.variable is not None
    sites = sites_of(config)
    check_rank(config, model, sites)
    drawn = draw_text(config, task)
    check_lengths(config, tokenizer, {split: pairs for split, (pairs, _) in drawn.items()})
    pairs = LanguagePairs(
        model,
        tokenizer,
        task.pairs("train", variable=config.variable, n=max(SAMPLE, 2)),
        sites=sites,
        positions=config.positions or (),
        variables=variables_of(config),
        progress=lambda done, total: report("running a few pairs", done, total),
    )
    facts = Facts(task.name, config.model, config.variable, {}, {})
    return Problem(config, model, {"train": pairs}, Marked, sites, facts, {}, "")


def seconds_per_pair(sample: PairData) -> float:
    """Return the seconds that one pair takes through the whole model, measured on the bases of a sample."""
    assert isinstance(sample, LanguagePairs | VectorPairs)
    with torch.no_grad():
        if isinstance(sample, VectorPairs):
            begun = time.perf_counter()
            sample.model(sample.base)
            return (time.perf_counter() - begun) / len(sample)
        batch: dict[str, Any] = sample.base.batch(slice(None))
        batch["position_ids"] = positions_of(batch["attention_mask"])
        begun = time.perf_counter()
        sample.model(**call_inputs(sample.model, batch))
        return (time.perf_counter() - begun) / len(sample)


def seconds_per_pass(sampled: Problem, search: Search) -> float | None:
    """Return the seconds that one pair-pass of a fit takes, measured on a few steps; None: nothing is learned.

    On small models a step takes longer than its pair-passes, because each call has a cost of its own.
    """
    cell = next((cell for cell in search.cells if METHODS[cell.method].learned), None)
    if cell is None:
        return None
    scorer = scorer_of(replace(sampled, splits=dict.fromkeys(SPLITS, sampled.splits["train"])))
    scorer.fitted(Job(cell, (0,), (), steps=1))  # the first call of all is slower
    begun, steps = time.perf_counter(), 3
    scorer.fitted(Job(cell, (1,), (), steps=steps))
    spent = time.perf_counter() - begun
    pairs = min(scorer.budget.batch_size, len(sampled.splits["train"]))
    return spent / (share(scorer, _place(cell)) * steps * scorer.budget.accumulate * pairs * (1 + BACKWARD))


def cost_of(search: Search, config: RunDas, counts: dict[str, int]) -> Cost:
    """Return what the cells of `search` cost, whose splits have the sizes of the run."""
    once = 2.0 * sum(counts.values())
    learned = [cell for cell in search.cells if METHODS[cell.method].learned]
    fits = Halving(search, seconds=1.0) if learned else None  # knows what a fit costs
    scorer, seeds = search.scorer, len(search.seeds)
    shares = {place: share(scorer, place) for place in dict.fromkeys(map(_place, search.cells))}

    def cost(cell: Cell, n: int, splits: Sequence[str]) -> float:
        if fits is not None and METHODS[cell.method].learned:
            return fits.full_cost(cell, n, splits)
        return n * shares[_place(cell)] * sum(counts[split] for split in splits)

    full = config.strategy == "full"
    grid = sum(cost(cell, seeds if full and METHODS[cell.method].seeded else 1, search.grid_splits)
               for cell in search.cells)  # fmt: skip
    if fits is not None and config.strategy == "halving":
        grid = _planned(search, config).limit
    rest = 0.0
    for method in dict.fromkeys(cell.method for cell in learned):
        dearest = max((cell for cell in learned if cell.method == method), key=lambda cell: cost(cell, 1, ("test",)))
        here = shares[_place(dearest)]
        rest += seeds * here * counts["train"] + (0.0 if full else cost(dearest, seeds - 1, ("select", "test")))
        for name in (one for one in search.controls if applies(one, METHODS[method], scorer.variables)):
            if name in PLAN_CONTROLS:
                rest += seeds * here * (counts["select"] + counts["test"])
            else:
                elsewhere = name == "random_model" or name.startswith("rival:")
                rest += cost(dearest, seeds, ("select", "test")) + (once if elsewhere else 0.0)
    return Cost(once, grid, rest)


def _search(sampled: Problem, counts: dict[str, int]) -> Search:
    """Return the search of a run, its splits made of the sample, as long as those of the run."""
    config, sample = sampled.config, sampled.splits["train"]
    assert config.positions is not None
    splits = {split: _repeated(sample, n) for split, n in counts.items()}
    return Search(
        scorer_of(replace(sampled, splits=splits)),
        cells_of(sampled.sites, config.positions, config.methods, config.rank),
        seeds=config.seeds,
        strategy="full" if config.strategy == "full" else "grid",
        controls=config.controls,
        grid_splits=("select",) if config.grid_splits == "select" else ("select", "test"),
    )


def _repeated(sample: Any, n: int) -> PairData:
    """Return a stand-in for `n` pairs, of which only the length and the labels are looked at."""
    made = copy.copy(sample)
    rows = torch.arange(n, device=sample.labels.device) % len(sample.labels)
    made.labels, made.base_answers = sample.labels[rows], sample.base_answers[rows]
    found: PairData = made
    return found


def _planned(search: Search, config: RunDas) -> Halving:
    return Halving(search, pair_passes=config.budget_forwards, seconds=config.budget_seconds)


def _accuracy(config: RunDas, sample: PairData) -> str:
    if config.task in VECTOR_TASKS:
        return "task accuracy: a small network is trained on the task first (about 10 s, once)"
    if sample.correct is None:
        return "task accuracy: not known, the file does not give the right answers"
    n, hits = len(sample), int(sample.correct.sum())
    low, high = wilson(hits, n)
    told = f"task accuracy on {n} training examples, base and source both right: {hits / n:.2f} [{low:.2f}, {high:.2f}]"
    if hits / n >= config.min_accuracy or config.force:
        return told
    return f"{told}: below min_accuracy {config.min_accuracy:g}, so a run on these would be refused (--force goes on)"


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def _place(cell: Cell) -> Place:
    return Place(cell.site, cell.positions)
