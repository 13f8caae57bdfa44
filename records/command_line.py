"""What both scripts do alike on the command line: tell errors in a line, and find what a run was asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from intervene.errors import asked_found_do
from records.config_files import ConfigError


def asked_before(out: Path, start: str) -> Path:
    """Return the configuration of the run in `out`, which knows what it was asked. `start`: how one is begun.

    Raises:
        ConfigError: no run is there.
    """
    if not (out / "config.json").exists():
        found = "it holds no run (no config.json)."
        raise ConfigError(asked_found_do(f"Resuming {out}", found, f"Name a run's folder, or start one{start}."))
    return out / "config.json"


@contextmanager
def errors_told(console: Console, kinds: tuple[type[Exception], ...], kept: str) -> Iterator[None]:
    """Print errors of `kinds`, which a user can mend, in one line and end with status 2; Ctrl-C ends with 130.

    Other errors are our bugs. `kept` says what a stop leaves to go on from.
    """
    try:
        yield
    except kinds as error:
        console.print(f"[red]{type(error).__name__}[/red]: {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        console.print(f"Stopped. {kept}", highlight=False)
        raise typer.Exit(130) from None
