"""What `run_das.py` does once its configuration is read: prepare, search, record, report, and say so on the console.

Every row is on disk before the next is begun, so that a stop at any moment costs at most the job being carried out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from alignments.answers import predict
from alignments.bundle import save_bundle
from alignments.config import RunDas, describe, with_derived
from alignments.console import accuracy_of, losses_told, print_accuracy, print_table, progress_bars, say
from alignments.dry_run import dry_run
from alignments.executors import executor_for, problem_from, scorer_from, scorer_of, work_for
from alignments.executors_parallel import DataParallel
from alignments.executors_torchrun import rank
from alignments.exports import text_summary, write_csv, write_figures
from alignments.failures import read_examples
from alignments.metrics import NoVerdict, Unfinished, verdict
from alignments.parallel import joined
from alignments.planner import Halving
from alignments.problem import Problem
from alignments.record import RunRecord
from alignments.report import write_report
from alignments.rows import Row
from alignments.scoring import Cell, Scorer
from alignments.search import Executor, Search, cells_of
from alignments.steer import held_features
from alignments.trackers import Mirror, mirror_for
from intervene import Plan
from intervene.errors import InterveneError, asked_found_do
from intervene.store import save_plan
from records.config_files import ConfigError
from records.trackers import require_trackers
from tasks import TaskError

OWN_FILES = ("config.json", "environment.json", "metrics.jsonl", "result.json")  # of a run without rows

Failed = Mapping[Cell, str]  # cell -> why it could not be scored
MakeExecutor = Callable[[RunDas, Scorer], AbstractContextManager[Executor]]


def run(config: RunDas) -> None:
    """Run one search, or with `dry_run` only check and print it; under torchrun, this process's part of it."""
    if config.threads is None:
        config = with_derived(config, threads=torch.get_num_threads())
    torch.set_num_threads(config.threads or 1)
    require_trackers(config.trackers)
    if config.dry_run:
        dry_run(config)
    elif config.parallel == "data":
        run_together(config)
    elif config.executor == "torchrun" and rank():
        trouble = work_for(config)
        if trouble:
            say(f"rank {rank()} ended early: {trouble}")
    else:
        run_recorded(config, executor_for)


def run_together(config: RunDas) -> None:
    """Run one search whose fits all ranks of torchrun share; rank 0 records it.

    Raises:
        ConfigError: another executor was asked for. InterveneError: torchrun did not start this process.
    """
    if config.executor != "local":
        found = "all ranks work on one job at a time."
        asked = f"parallel data with executor {config.executor}"
        raise ConfigError(asked_found_do(asked, found, "Leave --executor out, or use --parallel jobs."))
    with joined() as group:
        if group.device.type == "cuda" and config.device in (None, "cuda"):
            config = replace(config, device=str(group.device))

        @contextmanager
        def shared(asked: RunDas, scorer: Scorer) -> Iterator[Executor]:
            yield DataParallel(scorer, group)

        if group.rank:
            DataParallel(scorer_from(config), group).work()
            return
        try:
            run_recorded(config, shared)
        finally:
            group.told(None)  # that it is over, however it ended


def run_recorded(config: RunDas, make_executor: MakeExecutor) -> None:
    """Run one search in its folder: what is finished there is not done again."""
    assert config.out is not None
    existed = config.out.exists()
    drop_accuracy_only(config)
    with RunRecord.create(config.out, config, resume=config.resume) as record:
        for note in record.notes:
            say(note)
        if record.result is not None:
            say(f"{config.out} is finished: {record.result.get('sentence')}")
            if record.path("report.html").exists():
                say(f"report: {record.path('report.html')}")
            return
        begun = time.perf_counter()
        try:
            search_recorded(config, record, make_executor)
        except (ConfigError, InterveneError, TaskError):
            forget(record, existed)
            raise
        if config.do_align:
            say(f"{time.perf_counter() - begun:.0f} s in all; report: {record.path('report.html')}")


def search_recorded(config: RunDas, record: RunRecord, make_executor: MakeExecutor) -> None:
    """Prepare, search and finish a run whose folder is open."""
    begun = time.perf_counter()
    problem = prepare(config)
    say(f"prepared in {time.perf_counter() - begun:.0f} s")
    record.note_environment(
        model_fingerprint=problem.fingerprint,
        data_digests=problem.digests,
        device=problem.config.device,
        resolved={**problem.config.to_json(), "sources": dict(problem.config.sources)},
    )
    if not config.do_align:
        sentence = "The task accuracy alone was asked for (do_align: false)."
        record.finish({"do_align": False, "sentence": sentence, "task_accuracy": accuracy_of(problem)})
        return
    with mirror_for(config, say=say) as mirror:
        told, failed = search(problem, record, make_executor, mirror)
        finish(problem, record, told, failed)


def drop_accuracy_only(config: RunDas) -> None:
    """Take back a run of the accuracy alone, without any rows, where now with `resume` an alignment is asked for."""
    folder = config.out
    assert folder is not None
    told = read_json(folder / "result.json")
    rows = folder / "metrics.jsonl"
    if config.resume and config.do_align and told.get("do_align") is False and not rows.read_bytes():
        for name in OWN_FILES:
            (folder / name).unlink(missing_ok=True)


def forget(record: RunRecord, existed: bool) -> None:
    """Take back the start of a run that was refused before its first row, so that the mended command may use it."""
    if record.finished():
        return
    for name in OWN_FILES:
        record.path(name).unlink(missing_ok=True)
    if not existed and not any(record.directory.iterdir()):
        record.directory.rmdir()


def prepare(config: RunDas) -> Problem:
    """Return the problem of `config`, its pairs run once, with progress bars; print what is known of it."""
    with progress_bars() as report:
        problem = problem_from(config, report)
    say(describe(problem.config))
    for split, facts in problem.lint.items():
        say(f"{split}: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    print_accuracy(problem)
    return problem


def search(problem: Problem, record: RunRecord, make: MakeExecutor, mirror: Mirror) -> tuple[dict[str, Any], Failed]:
    """Run the cells that `record` does not hold yet, appending each row.

    Return what the planner says of itself, and the cells that could not be scored.

    Raises:
        JobsFailed: that is all of them.
    """
    config, cells, scorer = problem.config, grid(problem), scorer_of(problem)
    scorer.told = losses_told(config.log_every)
    with progress_bars() as report, make(config, scorer) as executor:
        searched = Search(
            scorer,
            cells,
            seeds=config.seeds,
            strategy="full" if config.strategy == "full" else "grid",
            finished=record.finished(),
            controls=config.controls,
            grid_splits=("select",) if config.grid_splits == "select" else ("select", "test"),
            executor=executor,
        )
        planned = None
        if config.strategy == "halving":
            planned = Halving(searched, pair_passes=config.budget_forwards, seconds=config.budget_seconds)
        tell = progress_of(searched, report, halving=planned is not None)
        for row in searched.run() if planned is None else planned.run():
            record.append(row)
            mirror.row(row)
            tell(row)
        searched.require_scored()
    for cell, why in searched.failed.items():
        say(f"could not be scored: {cell_text(cell)}: {why}")
    if searched.failed:
        count = len(searched.failed)
        say(f"{count} cell{'' if count == 1 else 's'} could not be scored and {'is' if count == 1 else 'are'} left out")
    keep_best(problem, searched, record, mirror)
    return {} if planned is None else planned.summary(), searched.failed


def progress_of(searched: Search, report: Any, *, halving: bool) -> Callable[[Row], None]:
    """Return what reports each row: cells of the grid first, of which halving leaves most out, then all rows."""
    total = len(searched.cells)
    if not halving:
        report("cells searched", len(searched.done()), total)

    def tell(row: Row) -> None:
        done = len(searched.done())
        on_grid = not halving and done < total
        phase = "cells searched" if on_grid else "rows" if halving else "more seeds and controls, rows"
        last = f"{phase} (last: {row.method} {row.site} @ {row.positions}, seed {row.seed})"
        report(last, done if on_grid else len(searched.rows), total if on_grid else 0)

    return tell


def keep_best(problem: Problem, searched: Search, record: RunRecord, mirror: Mirror) -> None:
    """Save the learned interchange that is best on select: its plan, fit, bundle, and its answers to test pairs."""
    cell = searched.best_kept()
    if cell is None:
        return
    plan = searched.plan(cell, problem.config.seeds[0])
    save_plan(plan, record.path("plan"), model=problem.model, overwrite=problem.config.resume)
    write_fits(searched.scorer, cell, record.path("fit.jsonl"), mirror)
    write_examples(problem, plan, record.path("examples.jsonl"))
    write_bundle(problem, plan, rows_of(searched, cell), record.path("bundle"))


def rows_of(searched: Search, cell: Cell) -> list[Row]:
    """Return the rows of a cell."""
    key = (str(cell.site), cell.positions, cell.method, cell.rank)
    return [row for row in searched.rows if (row.site, row.positions, row.method, row.rank) == key]


def write_fits(scorer: Scorer, cell: Cell, path: Path, mirror: Mirror) -> None:
    """Write the losses and validations of those fits of `cell` that this process made, one line per step."""
    with path.open("w", encoding="utf-8") as stream:
        for (one, seed, _), fit in scorer.fits.items():
            if one != cell:
                continue
            named = {"site": str(cell.site), "positions": cell.positions, "method": cell.method, "rank": cell.rank}
            lines = [{"step": step, "loss": loss} for step, loss in enumerate(fit.losses, start=1)]
            lines += [{"step": step, "select_iia": iia} for step, iia in fit.validation]
            for line in lines:
                stream.write(json.dumps({**named, "seed": seed, **line}) + "\n")
            mirror.losses(f"{cell.method} {cell.site} @ {cell.positions}, seed {seed}", fit.losses)


def write_bundle(problem: Problem, plan: Plan, rows: list[Row], folder: Path) -> None:
    """Save `plan` as a bundle to steer with, and say how; where it cannot be steered with, nothing is written."""
    data = problem.splits["train"]
    variable = problem.config.variable or ""
    if problem.tokenizer is None or "+" in variable or not len(data.values[1]):
        return
    try:
        for item in plan:
            held_features(item)
        save_bundle(
            folder, plan, problem.model, problem.tokenizer, pairs=data, scores=rows, task=problem.facts.task,
            variable=variable, overwrite=problem.config.resume,
        )  # fmt: skip
    except InterveneError as error:
        say(f"no bundle to steer with: {error}")
        return
    value = str(data.values[1][0])
    say(
        f"steer with it: bundle = load_bundle({str(folder)!r}, model, tokenizer); "
        f"with pin(model, bundle, value={value!r}): model.generate(...)   (alignments.bundle, alignments.steer)"
    )


def write_examples(problem: Problem, plan: Plan, path: Path) -> None:
    """Write one line per test pair: its prompts, label, kind, and what the model answered under `plan`."""
    if not problem.examples:
        return
    answers = predict(plan, problem.splits["test"], batch_size=problem.config.eval_batch_size)
    right = (answers == problem.splits["test"].labels).tolist()
    told = [problem.tokenizer.decode(int(answer)) for answer in answers]
    with path.open("w", encoding="utf-8") as stream:
        for example, answer, hit in zip(problem.examples, told, right, strict=True):
            stream.write(json.dumps({**example, "answer": answer, "right": hit}, ensure_ascii=False) + "\n")


def grid(problem: Problem) -> list[Cell]:
    """Return the cells of the search."""
    config = problem.config
    assert config.positions is not None
    return cells_of(problem.sites, config.positions, config.methods, config.rank)


def in_order(rows: Iterable[Row], problem: Problem) -> tuple[Row, ...]:
    """Return the rows in the order of the grid, then controls: of equal scores the first counts as best.

    Workers finish in any order, and so does halving.
    """
    config, places = problem.config, {}
    for number, cell in enumerate(grid(problem)):
        places[str(cell.site), cell.positions, cell.method, cell.rank] = number

    def key(row: Row) -> tuple[int, int, int]:
        place = places.get((row.site, row.positions, row.method, row.rank), len(places))
        seed = config.seeds.index(row.seed) if row.seed in config.seeds else len(config.seeds)
        return place, seed, ("select", "test", "train").index(row.split)

    plain = [row for row in rows if not row.is_control]
    controls = [row for row in rows if row.is_control]
    return (*sorted(plain, key=key), *sorted(controls, key=lambda row: (row.method, *key(row))))


def cell_text(cell: Cell) -> str:
    """Return a cell as a message names it: "das rank 8 at L1.block_output @ last"."""
    rank = "" if cell.rank is None else f" rank {cell.rank}"
    return f"{cell.method}{rank} at {cell.site} @ {cell.positions}"


def finish(problem: Problem, record: RunRecord, planned: dict[str, Any], failed: Failed) -> None:
    """Write result.json, report.html, rows.csv and figures, and print the table and the verdict.

    Rows of cells that failed later are left out: some of their seeds or splits are missing.

    Raises:
        InterveneError: the cell selected lacks seeds; the run is left unfinished.
    """
    lost = {(str(cell.site), cell.positions, cell.method, cell.rank) for cell in failed}
    whole = [row for row in record.finished() if (row.site, row.positions, row.method, row.rank) not in lost]
    rows = in_order(whole, problem)
    result: dict[str, Any] = {"methods": {}, "task_accuracy_by_split": accuracy_of(problem)}
    result |= {"planner": planned} if planned else {}
    if failed:
        result["failed"] = [
            {
                "site": str(cell.site),
                "positions": cell.positions,
                "method": cell.method,
                "rank": cell.rank,
                "reason": why,
            }
            for cell, why in failed.items()
        ]
    for method in dict.fromkeys(row.method for row in rows if not row.is_control):
        result["methods"][method] = told_of([row for row in rows if row.method == method])
    result = {**told_of(rows), **result}
    environment, told = record.path("environment.json"), record.path("examples.jsonl")
    write_report(
        record.path("report.html"),
        rows,
        config=problem.config,
        environment={name: value for name, value in read_json(environment).items() if name != "resolved"},
        lint=problem.lint,
        examples=read_examples(told) if told.exists() else (),
        failed={cell_text(cell): why for cell, why in failed.items()},
    )
    write_csv(rows, record.path("rows.csv"))
    write_figures(rows, record.path("figures"), formats=("svg",))
    print_table(rows)
    say(text_summary(rows))
    record.finish(result)


def told_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the verdict on `rows` as `result.json` keeps it, or why there is none.

    Raises:
        InterveneError: the cell selected lacks seeds, so that the search is not at its end.
    """
    try:
        return verdict(rows).to_json()
    except Unfinished as error:
        raise InterveneError(str(error)) from None
    except NoVerdict as error:
        return {"sentence": str(error)}


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file, empty if there is none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found
