"""What a run was made with: commit, versions, platform, command line."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA = 1


def environment_now(packages: Sequence[str]) -> dict[str, Any]:
    """Return schema, time, argv, commit and whether the tree was dirty, and versions of Python and `packages`."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain")
    return {
        "schema": SCHEMA,
        "started_at": now(),
        "argv": list(sys.argv),
        "commit": commit,
        "dirty": None if commit is None or changes is None else bool(changes),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }


def now() -> str:
    """Return the time in UTC to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _git(*arguments: str) -> str | None:
    """Return what git says of the code that runs (not of the working folder); None without git or a repository."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
