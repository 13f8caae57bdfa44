"""Alignment search from the command line.

\b
    python run_das.py --task ioi --layers 11,14,17 --positions subject2,last --out runs/ioi
    python run_das.py --config run.yaml --set steps=200 --dry_run

Reads the configuration, prepares the pairs, searches, records every row as it is finished, and writes report.html.
Ctrl-C loses nothing: start the same command with --resume.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from alignments.config import HELP, ConfigError, RunDas, describe, load_config, with_derived
from alignments.fit import predict
from alignments.metrics import NoVerdict, SeedMean, mean_over_seeds, verdict
from alignments.pairs import encode
from alignments.problem import (
    EQUALITY,
    SAMPLE,
    Problem,
    check_rank,
    draw_text,
    equality_network,
    prepare_equality,
    prepare_text,
    resolve_config,
    resolve_device,
    sizes,
    task_defaults,
    text_positions,
    text_task,
)
from alignments.record import RecordError, RunRecord
from alignments.report import write_report
from alignments.rows import Row
from alignments.search import Budget, Cell, Search, cells_of
from intervene import Plan, Site
from intervene.errors import InterveneError, asked_found_do
from intervene.families import locate
from intervene.models import load_model
from intervene.store import save_plan
from intervene.suffix import call_inputs, positions_of
from tasks import TaskError, task_named

DEFAULTS = {
    one.name: ",".join(map(str, one.default)) if isinstance(one.default, tuple) else one.default
    for one in fields(RunDas)
    if one.default is not MISSING
} | {"task": None}
console = Console(width=None if sys.stdout.isatty() else 120)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def option(name: str, *aliases: str) -> Any:
    """Return the typer option of a configuration key, with the key's own help and default."""
    default = DEFAULTS[name]
    shown_default = "" if default in (None, False) else f" [default: {default}]"
    return typer.Option(*aliases, f"--{name}", help=HELP[name] + escape(shown_default), show_default=False)


@app.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main(
    task: Annotated[str | None, option("task")] = None,
    variable: Annotated[str | None, option("variable")] = None,
    model: Annotated[str | None, option("model")] = None,
    method: Annotated[str | None, option("methods", "--method")] = None,
    controls: Annotated[str | None, option("controls")] = None,
    layers: Annotated[str | None, option("layers")] = None,
    positions: Annotated[str | None, option("positions")] = None,
    rank: Annotated[int | None, option("rank")] = None,
    seeds: Annotated[str | None, option("seeds")] = None,
    n_train: Annotated[int | None, option("n_train")] = None,
    n_select: Annotated[int | None, option("n_select")] = None,
    n_test: Annotated[int | None, option("n_test")] = None,
    batch_size: Annotated[int | None, option("batch_size")] = None,
    lr: Annotated[float | None, option("lr")] = None,
    steps: Annotated[int | None, option("steps")] = None,
    out: Annotated[Path | None, option("out")] = None,
    resume: Annotated[bool | None, option("resume")] = None,
    dry_run: Annotated[bool | None, option("dry_run")] = None,
    device: Annotated[str | None, option("device")] = None,
    dtype: Annotated[str | None, option("dtype")] = None,
    threads: Annotated[int | None, option("threads")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML or JSON file with any of these keys")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="key=value, may be repeated")] = None,
    print_config: Annotated[bool, typer.Option("--print_config", help="print the values and their sources")] = False,
) -> None:
    """Search for a causal variable inside a model; the help text is the module's."""
    flags = {key: value for key, value in locals().items() if key in HELP} | {"methods": method}
    try:
        if resume and out is not None and task is None and config is None:
            config = out / "config.json"  # a run knows what it was asked
            if not config.exists():
                found = "it holds no run (no config.json)."
                raise ConfigError(
                    asked_found_do(f"Resuming {out}", found, "Name a run's folder, or start one with --task.")
                )
        chosen = task_defaults(load_config(config, sets or (), flags))
        if print_config:
            console.print(describe(chosen), highlight=False, soft_wrap=True)
            return
        run(chosen)
    except (ConfigError, RecordError, InterveneError, TaskError) as error:
        console.print(f"[red]{type(error).__name__}[/red]: {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        console.print("Stopped. Finished rows are kept; the same command with --resume goes on.", highlight=False)
        raise typer.Exit(130) from None


def run(config: RunDas) -> None:
    """Run one search, or with `dry_run` only check and print it."""
    if config.threads is None:
        config = with_derived(config, threads=torch.get_num_threads())
    torch.set_num_threads(config.threads or 1)
    if config.dry_run:
        dry_run(config)
        return
    assert config.out is not None
    existed = config.out.exists()
    with RunRecord.create(config.out, config, resume=config.resume) as record:
        for note in record.notes:
            console.print(note, highlight=False)
        if record.result is not None:
            console.print(f"{config.out} is finished: {record.result.get('sentence')}", highlight=False)
            console.print(f"report: {record.path('report.html')}", highlight=False)
            return
        begun = time.perf_counter()
        try:
            problem = prepare(config)
        except (ConfigError, InterveneError, TaskError):
            forget(record, existed)
            raise
        prepared = time.perf_counter() - begun
        record.note_environment(
            model_fingerprint=problem.fingerprint,
            device=problem.config.device,
            resolved={**problem.config.to_json(), "sources": dict(problem.config.sources)},
        )
        search(problem, record)
        finish(problem, record)
        console.print(
            f"prepared in {prepared:.0f} s, {time.perf_counter() - begun:.0f} s in all; "
            f"report: {record.path('report.html')}",
            highlight=False,
        )


def forget(record: RunRecord, existed: bool) -> None:
    """Take back the start of a run that was refused before its first row, so that the mended command may use it."""
    if record.finished():
        return
    for name in ("config.json", "environment.json", "metrics.jsonl"):
        record.path(name).unlink(missing_ok=True)
    if not existed:
        record.directory.rmdir()


def prepare(config: RunDas) -> Problem:
    """Return the problem of `config`, its pairs run once, with progress bars."""
    with progress_bars() as report:
        if config.task == EQUALITY:
            problem = prepare_equality(config, report)
        else:
            config, model, tokenizer, task = load_text(config)
            problem = prepare_text(config, model, tokenizer, task, report)
    console.print(describe(problem.config), highlight=False, soft_wrap=True)
    for split, facts in problem.lint.items():
        console.print(
            f"{split}: " + ", ".join(f"{name} {value}" for name, value in facts.items()),
            highlight=False,
            soft_wrap=True,
        )
    return problem


def load_text(config: RunDas) -> tuple[RunDas, torch.nn.Module, Any, Any]:
    """Return the resolved configuration, the loaded model, its tokenizer and the task."""
    task_named(config.task)  # a wrong name must not cost the loading of a model
    config = resolve_device(config)
    console.print(f"loading {config.model} on {config.device}", highlight=False)
    model, tokenizer = load_model(config.model, dtype=getattr(torch, config.dtype), device=str(config.device))
    task = text_task(config, tokenizer)
    marked = text_positions(task, config.variable or task.variables[0])
    resolved = resolve_config(config, locate(model).n_layers, task.variables, marked)
    return resolved, model, tokenizer, task


def search(problem: Problem, record: RunRecord) -> None:
    """Run the cells that `record` does not hold yet, appending each row as it is finished."""
    config = problem.config
    cells = grid(problem)
    with progress_bars() as report:
        searched = Search(
            problem.model,
            problem.splits,
            problem.where,
            cells,
            problem.facts,
            seeds=config.seeds,
            budget=Budget(config.steps, config.batch_size, config.lr),
            finished=record.finished(),
            others=problem.others,
            controls=config.controls,
        )
        report("cells searched", len(searched.done()), len(cells))
        methods = {cell.method for cell in cells if cell.rank is not None}
        extra = len(methods) * (len(config.seeds) - 1 + len(config.seeds) * len(config.controls))
        for row in searched.run():
            record.append(row)
            last = f"(last: {row.method} {row.site} @ {row.positions}, seed {row.seed})"
            fits = len({(one.cell, one.seed) for one in searched.rows}) - len(cells)
            if fits < 1:
                report(f"cells searched {last}", len(searched.done()), len(cells))
            else:
                report(f"more seeds and controls {last}", min(fits, extra), extra)
    learned = [cell for cell in cells if cell.rank is not None]
    if learned:
        best = searched.best_cell(learned[0].method)
        plan = searched.plan(best, config.seeds[0])
        save_plan(plan, record.path("plan"), model=problem.model, overwrite=config.resume)
        write_examples(problem, plan, record.path("examples.jsonl"))


def write_examples(problem: Problem, plan: Plan, path: Path) -> None:
    """Write one line per test pair: its prompts, label, kind, and what the model answered under `plan`."""
    if not problem.examples:
        return
    answers = predict(plan, problem.splits["test"])
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


def finish(problem: Problem, record: RunRecord) -> None:
    """Write result.json and report.html, and print the table and the verdict."""
    rows = record.finished()
    environment = record.path("environment.json")
    write_report(
        record.path("report.html"),
        rows,
        config=problem.config,
        environment={name: value for name, value in read_json(environment).items() if name != "resolved"},
        lint=problem.lint,
    )
    print_table(rows)
    result: dict[str, Any] = {"methods": {}}
    for method in dict.fromkeys(row.method for row in rows if not row.is_control):
        found = verdict([row for row in rows if row.method == method])
        result["methods"][method] = found.to_json()
        console.print(found.sentence, highlight=False, soft_wrap=True)
    for control in mean_over_seeds(row for row in rows if row.is_control and row.split == "test"):
        console.print(f"{str(control)[0].upper()}{str(control)[1:]}", highlight=False, soft_wrap=True)
    try:
        result = {**verdict(rows).to_json(), **result}
    except NoVerdict as error:
        result["sentence"] = str(error)
    record.finish(result)


def print_table(rows: tuple[Row, ...]) -> None:
    """Print test IIA with interval by cell, and the baselines on the same pairs."""
    means = [mean for mean in mean_over_seeds(rows) if mean.split == "test" and not mean.is_control]
    places = list(dict.fromkeys((mean.cell.site, mean.position_label) for mean in means))
    methods = list(dict.fromkeys(mean.method_text for mean in means))
    table = Table(title="IIA on test, with 95 % interval (mean over seeds)")
    for heading in ("site", "position", *methods):
        table.add_column(heading, justify="left" if heading in ("site", "position") else "right")
    by_place = {(mean.cell.site, mean.position_label, mean.method_text): mean for mean in means}
    for site, label in places:
        table.add_row(site, label, *(shown(by_place.get((site, label, method))) for method in methods))
    console.print(table)
    if means:
        console.print("baselines on the same pairs: " + ", ".join(map(str, means[0].baselines)), highlight=False)


def shown(mean: SeedMean | None) -> str:
    """Return one cell of the table."""
    return "-" if mean is None else f"{mean.iia:.3f} [{mean.low:.3f}, {mean.high:.3f}]"


def dry_run(config: RunDas) -> None:
    """Print the plan, the pair counts, the task accuracy on a few examples, and a cost estimate."""
    if config.task == EQUALITY:
        console.print(describe(equality_network(config)[0]), highlight=False)
        console.print("plan: train an MLP (about 10 s), then search its layers; pairs: " + str(sizes(config)))
        return
    config, model, tokenizer, task = load_text(config)
    console.print(describe(config), highlight=False, soft_wrap=True)
    assert config.positions is not None and isinstance(config.layers, tuple) and config.variable is not None
    sites = [Site("block_output", layer) for layer in config.layers]
    check_rank(config, model, sites)
    draw_text(config, task)
    cells = cells_of(sites, config.positions, config.methods, config.rank)
    learned = sum(cell.rank is not None for cell in cells)
    pairs = task.pairs("train", variable=config.variable, n=max(SAMPLE, 2))
    examples = [pair.base for pair in pairs]
    tokens = encode(tokenizer, examples, config.positions, next(model.parameters()).device)
    batch = {**tokens.batch(slice(None)), "position_ids": positions_of(tokens.attention_mask)}
    begun = time.perf_counter()
    with torch.no_grad():
        right = model(**call_inputs(model, batch)).logits[:, -1].argmax(-1) == tokens.answers
    each = (time.perf_counter() - begun) / len(examples)
    accuracy = float(right.float().mean())
    n = sum(sizes(config).values())
    # A fit step runs about half of the blocks on part of the tokens, forwards and backwards; a score only forwards.
    steps = (learned + 2 * len(config.seeds)) * config.steps * config.batch_size
    scores = (len(cells) + 2 * len(config.seeds)) * (config.n_select + config.n_test)
    seconds = each * (2 * n + 0.5 * steps + 0.25 * scores)
    console.print(f"plan: {len(cells)} cells, {learned} of them learned, then seeds and controls of the best ones")
    console.print(f"pairs: {sizes(config)}, {tokens.input_ids.shape[1]} tokens at most")
    gate = "" if accuracy >= 0.5 else "  The model mostly cannot do the task: no alignment can be expected."
    console.print(f"task accuracy on {len(examples)} training examples: {accuracy:.2f}{gate}", highlight=False)
    console.print(f"cost: about {seconds / 60:.1f} minutes at {1000 * each:.0f} ms per example and full pass")


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file, empty if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


@contextmanager
def progress_bars() -> Iterator[Any]:
    """Yield report(text, done, total), shown as one bar per phase on a terminal and as lines elsewhere."""
    if not sys.stdout.isatty():
        shown_at: dict[str, float] = {}

        def line(text: str, done: int, total: int) -> None:
            phase = text.split(" (")[0]
            if done >= total or time.monotonic() - shown_at.get(phase, -1e9) > 10:
                shown_at[phase] = time.monotonic()
                console.print(f"{text}: {done}/{total}", highlight=False)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def bar(text: str, done: int, total: int) -> None:
            phase = text.split(" (")[0]
            if phase not in tasks:
                tasks[phase] = bars.add_task(text, total=total)
            bars.update(tasks[phase], completed=done, total=total, description=text)

        yield bar


if __name__ == "__main__":
    app()
