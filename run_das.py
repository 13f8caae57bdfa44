"""Alignment search from the command line.

\b
    python run_das.py --task ioi --layers 11,14,17 --positions subject2,last --out runs/ioi
    python run_das.py --config run.yaml --set steps=200 --dry_run

Reads the configuration, prepares the pairs, searches, records every row as it is finished, and writes report.html.
Ctrl-C loses nothing: start the same command with --resume.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from alignments.config import HELP, RunDas, describe, load_config
from alignments.console import console, say
from alignments.methods import describe_methods, describe_options
from alignments.original import original_flags
from alignments.record import RecordError
from alignments.running import run
from alignments.vector_problem import task_defaults
from intervene.errors import InterveneError
from records.command_line import asked_before
from records.command_line import errors_told as told_errors
from records.config_files import ConfigError
from tasks import TASKS, TaskError
from tasks.user import write_template

DEFAULTS = {
    one.name: ",".join(map(str, one.default)) if isinstance(one.default, tuple) else one.default
    for one in fields(RunDas)
    if one.default is not MISSING
} | {"task": None}
# The keys that are flags, in the order of --help, and how they are read; all others are given by --set or in a file.
FLAGS: dict[str, type] = {
    **dict.fromkeys(("task", "variable", "model", "methods", "controls", "layers", "positions", "component"), str),
    **{"rank": str, "seeds": str, "strategy": str, "budget_seconds": float, "budget_forwards": int},
    **{"grid_splits": str, "min_accuracy": float, "force": bool, "n_train": int, "n_select": int, "n_test": int},
    **{"batch_size": int, "lr": float, "steps": int, "warmup": float, "accumulate": int, "validate_every": int},
    **{"patience": int, "log_every": int, "fast": bool, "executor": str, "workers": int, "parallel": str},
    **{"cache": Path, "device_map": str, "out": Path, "resume": bool, "dry_run": bool, "device": str, "dtype": str},
    **{"threads": int, "trackers": str},
}
ALIASES = {"methods": ("--method",)}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def option(name: str) -> Any:
    """Return the typer option of a configuration key, with the key's own help and default."""
    default = DEFAULTS[name]
    shown_default = "" if default in (None, False, "") else f" [default: {default}]"
    aliases = ALIASES.get(name, ())
    return typer.Option(*aliases, f"--{name}", help=HELP[name] + escape(shown_default), show_default=False)


def main(
    config: Annotated[Path | None, typer.Option("--config", help="YAML or JSON file with any of these keys")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="key=value, may be repeated")] = None,
    print_config: Annotated[bool, typer.Option("--print_config", help="print the values and their sources")] = False,
    list_methods: Annotated[bool, typer.Option("--list_methods", help="print the methods and their options")] = False,
    list_tasks: Annotated[bool, typer.Option("--list_tasks", help="print the tasks and their variables")] = False,
    new_task: Annotated[Path | None, typer.Option("--new_task", help="write a file to define a task in")] = None,
    **flags: Any,
) -> None:
    """Search for a causal variable inside a model; the help text is the module's."""
    with errors_told():
        if list_methods or list_tasks or new_task is not None:
            tell(methods=list_methods, tasks=list_tasks, new_task=new_task)
            return
        if flags["resume"] and flags["out"] is not None and flags["task"] is None and config is None:
            config = asked_before(flags["out"], " with --task")
        chosen = task_defaults(load_config(config, sets or (), flags))
        if print_config:
            say(describe(chosen))
            return
        run(chosen)


def signature() -> inspect.Signature:
    """Return what typer reads the options from: one parameter per key of `FLAGS`, then those that `main` names."""
    keys = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option(name)]
        )
        for name, kind in FLAGS.items()
    ]
    own = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for one in inspect.signature(main, eval_str=True).parameters.values()
        if one.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    return inspect.Signature([*keys, *own])


main.__signature__ = signature()  # type: ignore[attr-defined]
app.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})(main)


def errors_told() -> AbstractContextManager[None]:
    """Return a context in which what a user can mend is told in a line; see `records.command_line`."""
    kinds = (ConfigError, RecordError, InterveneError, TaskError)
    return told_errors(console, kinds, "Finished rows are kept; the same command with --resume goes on.")


def tell(*, methods: bool, tasks: bool, new_task: Path | None) -> None:
    """Print what there is, or write the file of a new task."""
    if methods:
        say(f"{describe_methods()}\n\n{describe_options()}")
    if tasks:
        for name, make in TASKS.items():
            say(f"{name:<22} {', '.join(make().variables)}")
    if new_task is not None:
        write_template(new_task)
        say(f"{new_task} written. Run it: python run_das.py --task {new_task}")


def original(argv: Sequence[str]) -> None:
    """Run what `argv` means to the original run_alignment.py: `python run_das.py original --task_name ...`."""
    with errors_told():
        run(load_config(flags=original_flags(argv)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["original"]:
        try:
            original(sys.argv[2:])
        except typer.Exit as ended:
            sys.exit(ended.exit_code)
    else:
        app()
