"""`Scorer`: one job (a cell and its seeds) -> fitted plans -> rows. What executors carry out, wherever they run.

A job is the unit of work: its result depends on nothing but itself, so that rows are the same whatever the order and
whoever runs it. Its seeds are fitted in common forward passes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from alignments import rows as lines
from alignments.answers import Score, predict_together, score
from alignments.controls import complement, shuffled
from alignments.divergence import divergence_facts
from alignments.fit import Budget, FitResult, fit_together
from alignments.methods import METHODS, Method, Setup
from alignments.pairs import PairData
from alignments.parallel import Group
from alignments.random_plans import random_plan
from alignments.rows import CONTROL_PREFIX, Row, RowKey
from alignments.views import training_view
from intervene import Plan, Positions, Site
from intervene.errors import InterveneError
from intervene.families import resolve
from intervene.gates import Gated
from intervene.interventions import placed_for


@dataclass(frozen=True)
class Cell:
    """One place and method: `positions` identifies the tokens, `rank` is None where the whole width is swapped."""

    site: Site
    positions: str
    method: str
    rank: int | None


@dataclass(frozen=True)
class Job:
    """A cell, the seeds to fit there, and the splits to score."""

    cell: Cell
    seeds: tuple[int, ...]
    splits: tuple[str, ...] = ("select", "test")
    steps: int | None = None  # instead of the budget's, for screens

    def __str__(self) -> str:
        seeds = ", ".join(map(str, self.seeds))
        return f"{self.cell.method} {self.cell.site} @ {self.cell.positions}, seed {seeds}"


@dataclass(frozen=True)
class Facts:
    """What all rows of one search share. `baselines` and `accuracy` are per split, on the very pairs that are scored.

    `baselines[split]` has copy_base, copy_source, majority, and the task's own. `labels` shows positions to people.
    """

    task: str
    model: str
    variable: str
    baselines: Mapping[str, Mapping[str, float]]
    accuracy: Mapping[str, float | None]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Elsewhere:
    """Another model or other pairs, on which a control is fitted.

    `facts` None: the search's own, without accuracy. `variables` None: as many as are searched; a rival is one.
    """

    model: nn.Module
    splits: Mapping[str, PairData]
    facts: Facts | None = None
    variables: int | None = None


Other = Callable[[Site], Elsewhere]
MEASURED = 256  # test pairs whose patched activations are compared with natural ones
PLAN_CONTROLS = ("complement", "random_subspace")  # made from a fitted plan, of the same size


class Scorer:
    """Fits and scores jobs on one model with its prepared pairs. `plans` keeps what was fitted.

    Args:
        splits: prepared pairs for "train", "select" and "test".
        where: position name -> the `Positions` value that finds it.
        options: what the configuration says of methods, handed to each `Method.make`.
        variables: how many variables the plans have blocks for.
        others: control name -> function that makes another model or other pairs at a site, called only when needed.
        batch_size: rows per scoring pass, those of all seeds together.

    Two attributes may be looked at or set: `fits`, what each fit went through, by (cell, seed, steps); and `told`,
    which is called with (cell, seeds, step, mean loss) after every step of a fit.
    """

    def __init__(
        self,
        model: nn.Module,
        splits: Mapping[str, PairData],
        where: Callable[[str], Positions],
        facts: Facts,
        *,
        budget: Budget | None = None,
        options: Mapping[str, object] | None = None,
        variables: int = 1,
        others: Mapping[str, Other] | None = None,
        batch_size: int = 96,
    ) -> None:
        self.here = Elsewhere(model, splits, facts)
        self.where = where
        self.facts = facts
        self.budget = budget or Budget()
        self.options = dict(options or {})
        self.variables = variables
        self.others = dict(others or {})
        self.group: Group | None = None  # processes that fit each job together; None: this one alone
        self.batch_size = batch_size
        self.told: Callable[[Cell, Sequence[int], int, float], None] | None = None
        self.plans: dict[tuple[Cell, int, int], Plan] = {}
        self.fits: dict[tuple[Cell, int, int], FitResult] = {}
        self._made: tuple[tuple[str, Site], Elsewhere] | None = None

    def rows(self, job: Job) -> list[Row]:
        """Return the rows of a job: one per seed and split."""
        cell, place = job.cell, self._place(job.cell)
        begun = time.perf_counter()
        plans = self.fitted(job)
        spent = (time.perf_counter() - begun) / len(job.seeds)
        rows = []
        for split in job.splits:
            begun, pairs = time.perf_counter(), place.splits[split]
            answers = predict_together(plans, pairs, batch_size=self.batch_size, group=self.group)
            each = (time.perf_counter() - begun) / len(job.seeds)
            for seed, plan, given in zip(job.seeds, plans, answers, strict=True):
                facts = {**self._learned(cell, plan, place.model), **filtered(given, pairs)}
                if split == "test" and method_of(cell).learned:
                    facts |= self._measured(plan, pairs)
                rows.append(self.row(cell, seed, split, score(given, pairs), spent + each, facts))
            spent = 0.0  # the fit is counted once, in the first split
        return rows

    def fitted(self, job: Job) -> list[Plan]:
        """Return the plans of a job, one per seed, fitting those that were not yet; their seeds are fitted together."""
        steps = job.steps or self.budget.steps
        missing = [seed for seed in job.seeds if (job.cell, seed, steps) not in self.plans]
        if missing:
            for seed, plan in zip(missing, self._fit(job.cell, missing, steps), strict=True):
                self.plans[job.cell, seed, steps] = plan
        return [self.plans[job.cell, seed, steps] for seed in job.seeds]

    def _fit(self, cell: Cell, seeds: Sequence[int], steps: int) -> list[Plan]:
        place, method = self._place(cell), method_of(cell)
        name = control_of(cell)
        if name in PLAN_CONTROLS and method.learned:
            whole = self.fitted(Job(replace(cell, method=method.name), tuple(seeds)))
            if name == "complement":
                return [complement(plan) for plan in whole]
            return [random_plan(plan, seed) for plan, seed in zip(whole, seeds, strict=True)]
        train = training_view(place.splits["train"], method, self.options)
        train = shuffled(train) if name == "shuffled_labels" else train
        setups = [self._setup(cell, seed, place, train) for seed in seeds]
        plans = [placed_for(place.model, method.make(setup)) for setup in setups]
        if not method.learned:
            return plans
        validation = None
        if self.budget.validate_every:
            validation = training_view(place.splits["select"], method, self.options)
        penalty = method.penalty
        penalties = [None if penalty is None else (lambda plan, s=setup: penalty(plan, s)) for setup in setups]
        told = self.told
        fits = fit_together(
            place.model,
            plans,
            train,
            replace(self.budget, steps=steps),
            seeds=seeds,
            penalties=penalties,
            anneal=method.anneal,
            rates=method.rates,
            validation=validation,
            progress=None if told is None else (lambda step, loss: told(cell, seeds, step, loss)),
            group=self.group,
        )
        self.fits |= {(cell, seed, steps): fit for seed, fit in zip(seeds, fits, strict=True)}
        return plans

    def _setup(self, cell: Cell, seed: int, place: Elsewhere, train: PairData) -> Setup:
        width = resolve(place.model, cell.site).width
        if width is None:
            raise InterveneError(f"Site {cell.site}: its width is not known before a forward pass. Name another.")
        where = self.where(cell.positions)
        variables = place.variables or self.variables
        return Setup(cell.site, where, width, cell.rank, seed, train, variables, self.options)

    def _place(self, cell: Cell) -> Elsewhere:
        name = control_of(cell)
        if name is None or name not in self.others:
            return self.here
        if self._made is None or self._made[0] != (name, cell.site):
            self._made = (name, cell.site), self.others[name](cell.site)  # one at a time: each holds activations
        return self._made[1]

    def _learned(self, cell: Cell, plan: Plan, model: nn.Module) -> dict[str, float]:
        method = method_of(cell)
        facts = {} if method.facts is None else {name: float(value) for name, value in method.facts(plan).items()}
        width = resolve(model, cell.site).width
        return facts if width is None else {"width": float(width), **facts}

    def _measured(self, plan: Plan, pairs: PairData) -> dict[str, float]:
        """Return how far patched activations are from natural ones, and for learned gates the IIA with soft ones."""
        rows = torch.arange(min(MEASURED, len(pairs)))
        found = {}
        # With several variables a pair interchanges some of them, which `patched` does not follow.
        one_place = len({(item.site, repr(item.positions)) for item in plan}) == 1
        if one_place and self.variables == 1 and len(rows) >= 8:
            natural, patched = (one.flatten(0, 1).float() for one in self.patched(plan, pairs, rows))
            found = divergence_facts(natural, patched)
        if any(isinstance(item.edit, Gated) for item in plan):
            found["soft_iia"] = score(
                predict_together([plan], pairs, batch_size=self.batch_size, hard=False)[0], pairs
            ).iia
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def row(
        self, cell: Cell, seed: int, split: str, found: Score, seconds: float, facts: Mapping[str, float] | None = None
    ) -> Row:
        """Return the row of one score."""
        elsewhere = control_of(cell) in self.others
        shared = self._place(cell).facts if elsewhere else None
        known = shared or self.facts
        baselines = dict(known.baselines[split])
        # another model's accuracy is not this one's
        accuracy = None if elsewhere and shared is None else known.accuracy.get(split)
        return Row(
            task=self.facts.task,
            model=self.facts.model,
            variable=self.facts.variable,
            site=str(cell.site),
            layer=cell.site.layer,
            component=cell.site.component,
            positions=cell.positions,
            position_label=self.facts.labels.get(cell.positions, cell.positions),
            method=cell.method,
            rank=cell.rank,
            seed=seed,
            split=split,
            n=found.n,
            iia=found.iia,
            low=found.low,
            high=found.high,
            copy_base=baselines.pop("copy_base"),
            copy_source=baselines.pop("copy_source"),
            majority=baselines.pop("majority"),
            task_accuracy=accuracy,
            seconds=seconds,
            extra=baselines,
            kinds=found.kinds,
            facts=dict(facts or {}),
        )

    def key(self, cell: Cell, seed: int, split: str) -> RowKey:
        """Return the key that the row of that score has."""
        named = lines.Cell(
            self.facts.task,
            self.facts.model,
            self.facts.variable,
            str(cell.site),
            cell.positions,
            cell.method,
            cell.rank,
        )
        return RowKey(named, seed, split)

    def patched(self, plan: Plan, pairs: PairData, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return natural and patched activations (b, P, D) of pairs `rows` at the plan's site, which has to be one."""
        item = plan[0]
        base, source = pairs.activations(item.site, item.positions)
        own, other = base[rows], source[rows]
        with torch.no_grad():
            for one in plan:
                lens = one.featurizer.lens()
                read = lens.read(other) if one.edit.needs_source else None
                own = lens.write(own, one.edit(lens.read(own), read))
        return base[rows], own


def filtered(answers: Tensor, pairs: PairData) -> dict[str, float]:
    """Return the IIA on the pairs whose base and source the unedited model answers rightly, and their number."""
    if pairs.correct is None or not bool(pairs.correct.any()):
        return {}
    found = score(answers, pairs, pairs.correct.nonzero()[:, 0])
    return {"iia_filtered": found.iia, "n_filtered": float(found.n)}


def control_of(cell: Cell) -> str | None:
    """Return which control a cell is: "random_model" for "control:random_model/mdas"; None: it is none."""
    if not cell.method.startswith(CONTROL_PREFIX):
        return None
    return cell.method.removeprefix(CONTROL_PREFIX).partition("/")[0]


def applies(control: str, method: Method, variables: int = 1) -> bool:
    """Return whether a control means something for a method.

    The complement is that of one swapped subspace; LoReFT and masks have none. LoReFT swaps nothing at random either.
    """
    if control == "complement":
        return method.name in ("das", "mdas") and variables == 1
    return control != "random_subspace" or method.name != "loreft"


def control_cell(cell: Cell, control: str) -> Cell:
    """Return the cell of a control of `cell`, which is fitted by the same method."""
    method = "" if cell.method == "das" else f"/{cell.method}"
    return replace(cell, method=f"{CONTROL_PREFIX}{control}{method}")


def method_of(cell: Cell) -> Method:
    """Return the method that fits a cell; a control is fitted by the method that it controls."""
    control = control_of(cell)
    if control is None:
        return METHODS[cell.method]
    return METHODS[cell.method.partition("/")[2] or "das"]
