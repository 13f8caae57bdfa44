"""Every error that `tasks` raises on purpose.

    TaskError
    ├── UnknownName     a task, variable, split or kind that does not exist
    ├── BadModel        a causal model that contradicts itself, or values it cannot be run on
    ├── BadData         pairs or files whose content is wrong
    └── NotEnough       more was asked for than the lists can give

Every message has three parts: what was asked, what was found, what to do. `tasks` knows nothing of `intervene`, so
these stand apart from `intervene.errors`.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class TaskError(Exception):
    """Anything this package refuses."""


class UnknownName(TaskError):
    """A task, variable, split or kind that does not exist."""


class BadModel(TaskError):
    """A causal model that contradicts itself, or values it cannot be run on."""


class BadData(TaskError):
    """Pairs or files whose content is wrong."""


class NotEnough(TaskError):
    """More was asked for than the lists can give."""


def require_known(what: str, name: object, known: Iterable[str]) -> None:
    """Raise `UnknownName`, with the nearest names, unless `name` is among `known`."""
    names = list(known)
    if name in names:
        return
    near = get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(near)}?" if near else f"Known: {', '.join(names)}."
    raise UnknownName(f"{what} {name!r}: there is none of that name. {hint}")
