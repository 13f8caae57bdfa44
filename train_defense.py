"""Defense training from the command line.

\b
    python train_defense.py run --train_data poisoned.jsonl --method injection --vectors evil.safetensors --layers 12
    python train_defense.py run --config run.yaml --set method.detection_alpha=0.1 --dry_run
    python train_defense.py compare --train_data poisoned.jsonl --methods sft,injection --seeds 0,1,2 ...
    torchrun --nproc-per-node 2 train_defense.py run --backend fsdp ...

A run leaves one folder. Ctrl-C and SIGTERM write a checkpoint first: start the same command with --resume.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import Field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.markup import escape

from defenses.commands import Evaluate, ExtractVectors, ProjectData, carry_out
from defenses.compare import compare
from defenses.config import CompareDefenses, TrainDefense, load_config
from defenses.errors import DefenseError
from defenses.launch import leave
from defenses.methods import describe_methods
from defenses.progress import console, say
from defenses.running import run
from intervene.errors import InterveneError
from records.command_line import asked_before
from records.command_line import errors_told as told_errors
from records.config_files import ConfigError
from records.files import RecordError
from records.layered import default_of, describe, keys_of, load_layered

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, help=__doc__,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)  # fmt: skip
MANY = ("train_data", "vectors")  # may be repeated


def flags_of(kind: type) -> list[inspect.Parameter]:
    """Return one option per daily key of a configuration, with the key's own help and default."""
    hints = get_type_hints(kind)
    return [_flag(name, one, hints[name]) for name, one in keys_of(kind).items() if one.metadata["flag"]]


def _flag(name: str, one: Field[Any], hint: Any) -> inspect.Parameter:
    default = default_of(one)
    boolean = hint is bool or hint == bool | None
    shown = "" if default in (None, "", (), {}) else f" [default: {_text(default)}]"
    spelled = f"--{name}/--no_{name}" if boolean else f"--{name}"
    read: Any = bool if boolean else list[str] if name in MANY and hint is not Path else str
    typed = typer.Option(spelled, help=escape(f"{one.metadata['help']}{shown}"), show_default=False)
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=Annotated[read | None, typed])


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def command(name: str, kind: type, act: Callable[[Any], int], load: Callable[..., Any] = load_layered) -> None:
    """Add a subcommand: its flags are the keys of `kind`, and `act` carries out what they say."""

    def main(
        config: Annotated[Path | None, typer.Option("--config", help="YAML or JSON file with any keys")] = None,
        sets: Annotated[list[str] | None, typer.Option("--set", help="key=value, may be repeated")] = None,
        print_config: Annotated[bool, typer.Option("--print_config", help="print the values and sources")] = False,
        **flags: Any,
    ) -> None:
        with errors_told():
            if flags.get("resume") and config is None and flags.get("out") and not flags.get("train_data"):
                config = asked_before(Path(flags["out"]), "")
            chosen = load(kind, config, sets or (), _given(flags))
            if print_config:
                say(describe(chosen))
                return
            status = act(chosen)
            leave(status)
        if status:
            raise typer.Exit(status)

    named = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for one in inspect.signature(main, eval_str=True).parameters.values()
        if one.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    main.__signature__ = inspect.Signature([*flags_of(kind), *named])  # type: ignore[attr-defined]
    app.command(name, help=kind.__doc__)(main)


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that were given; an empty list is what typer makes of none."""
    return {name: value for name, value in flags.items() if value is not None and value != []}


def errors_told() -> AbstractContextManager[None]:
    """Return a context in which what a user can mend is told in a line; see `records.command_line`."""
    kinds = (ConfigError, DefenseError, InterveneError, RecordError)
    return told_errors(console, kinds, "The same command with --resume goes on from the last checkpoint.")


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    list_methods: Annotated[
        bool, typer.Option("--list_methods", help="what there is, and what is known of it")
    ] = False,
) -> None:
    """Print the methods, or go on to the subcommand; the help text is the module's."""
    if list_methods:
        with errors_told():
            say(describe_methods())
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("plot")
def plot(folders: Annotated[list[Path], typer.Argument(help="folders of runs or comparisons")]) -> None:
    """Write report.html into each folder."""
    with errors_told():
        from defenses.report import write_report

        for folder in folders:
            say(f"report: {write_report(folder)}")


def _run(config: TrainDefense) -> int:
    return run(config).exit_code


command("run", TrainDefense, _run, load_config)
command("compare", CompareDefenses, compare, load_config)
command("check", TrainDefense, carry_out, load_config)
command("extract", ExtractVectors, carry_out)
command("build_projections", ProjectData, carry_out)
command("evaluate", Evaluate, carry_out)

if __name__ == "__main__":
    app()
