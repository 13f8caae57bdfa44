"""`Trackers`: numbers mirrored to TensorBoard or Weights & Biases while a run goes on.

    require_trackers(names)                                      # before any work
    trackers = Trackers(makers(names, Place(folder, "alignment-search", config.to_json())), say=print)
    trackers.log({"loss": 0.5}, step=3)
    trackers.close()

The run's folder stays the truth. A tracker that fails is told of once and left out from then on; it never stops a run.
One whose package is missing is refused before any work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from intervene.errors import asked_found_do
from records.config_files import ConfigError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Tracker(Protocol):
    """What takes scalars."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take `values`, name -> number, at a step."""
        ...

    def close(self) -> None:
        """Write what is not written yet."""
        ...


@dataclass(frozen=True)
class Place:
    """Which run is tracked: its folder, and what a server shows it as.

    Attributes:
        project, entity: of Weights & Biases; None: the user's own. config: plain values that are shown beside the run.
    """

    folder: Path
    project: str
    config: Mapping[str, Any]
    entity: str | None = None


class TensorBoard:
    """Scalars as event files in `<folder>/tensorboard`."""

    def __init__(self, place: Place) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.writer: Any = EventFileWriter(str(place.folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write `values` at a step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        held = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=held)))

    def close(self) -> None:
        """Write what is not written yet."""
        self.writer.close()


class Wandb:
    """A wandb run named as the run's folder, with its configuration; a resumption is a new one."""

    def __init__(self, place: Place) -> None:
        wandb: Any = import_module("wandb")  # no dependency: a user who asks for it has it
        self.run: Any = wandb.init(
            project=place.project,
            entity=place.entity,
            name=place.folder.name,
            dir=str(place.folder),
            config=dict(place.config),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send `values`; wandb's own steps only rise, so the step is sent as a value."""
        self.run.log({**values, "step": step})

    def close(self) -> None:
        """Send what is not sent yet."""
        self.run.finish()


MAKERS: dict[str, Callable[[Place], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb}


class Trackers:
    """All trackers of a run; with none of them every call does nothing.

    Args:
        makers: name -> function that starts the tracker. say: is told once when one fails.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tracker]], say: Callable[[str], None]):
        self.say = say
        self.running: dict[str, Tracker] = {}
        self.waiting = dict(makers)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Mirror `values`, name -> number, at a step."""
        for name, make in list(self.waiting.items()):  # started by the first number: a refused run leaves nothing
            del self.waiting[name]
            self._try(name, partial(self._start, name, make))
        for name, one in list(self.running.items()):
            self._try(name, partial(one.log, values, step))

    def close(self) -> None:
        """End all trackers."""
        for name, one in list(self.running.items()):
            self._try(name, one.close)

    def _start(self, name: str, make: Callable[[], Tracker]) -> None:
        self.running[name] = make()

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # other people's code and other people's servers: whatever it is, the run goes on
            self.running.pop(name, None)
            reason = (str(error).splitlines() or [""])[0]
            self.say(f"tracker {name} failed and is left out from here on ({type(error).__name__}: {reason})")


def makers(names: Sequence[str], place: Place) -> dict[str, Callable[[], Tracker]]:
    """Return for each of `names` the function that starts its tracker."""
    return {name: partial(MAKERS[name], place) for name in names}


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        ConfigError: naming the first such, and how to install it.
    """
    for name in names:
        if find_spec(PACKAGES[name]) is None:
            do = f"Run: pip install {PACKAGES[name]}, or leave it out; the run's folder holds every number without it."
            raise ConfigError(asked_found_do(f"trackers {name}", "its package is not installed.", do))
