"""`Trackers`: rows and losses mirrored to TensorBoard or Weights & Biases while a run goes on.

    with trackers_for(config, say=print) as trackers:
        trackers.row(row)

The run's folder stays the truth. A tracker that fails is told of once and left out from then on; it never stops a run.
One whose package is missing is refused before any work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from alignments.config import RunDas
from alignments.rows import Row
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


class TensorBoard:
    """Scalars as event files in `<out>/tensorboard`."""

    def __init__(self, config: RunDas) -> None:
        from torch.utils.tensorboard import SummaryWriter

        assert config.out is not None
        self.writer: Any = SummaryWriter(str(Path(config.out) / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write `values` at a step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is not written yet."""
        self.writer.close()


class Wandb:
    """A wandb run named as the run's folder, with its configuration."""

    def __init__(self, config: RunDas) -> None:
        wandb: Any = import_module("wandb")  # no dependency: a user who asks for it has it
        name = Path(config.out or "run").name
        self.run: Any = wandb.init(
            project="alignment-search",
            entity=config.wandb_entity,
            name=name,
            dir=str(config.out),
            config=config.to_json(),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send `values`; wandb's own steps only rise, so the step is sent as a value."""
        self.run.log({**values, "step": step})

    def close(self) -> None:
        """Send what is not sent yet."""
        self.run.finish()


MAKERS: dict[str, Callable[[RunDas], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb}


class Trackers:
    """All trackers of a run; with none of them every call does nothing.

    Args:
        makers: name -> function that starts the tracker. say: is told once when one fails.
    """

    def __init__(self, config: RunDas, makers: Mapping[str, Callable[[RunDas], Tracker]], say: Callable[[str], None]):
        self.say = say
        self.running: dict[str, Tracker] = {}
        self.config, self.waiting = config, dict(makers)

    def row(self, row: Row) -> None:
        """Mirror a row: its IIA, interval and baselines at its layer as step, and the numbers its method learned."""
        self._log(scalars_of(row), row.layer or 0)

    def losses(self, name: str, losses: Sequence[float]) -> None:
        """Mirror the losses of a fit, one per step."""
        for step, loss in enumerate(losses, start=1):
            self._log({f"loss/{name}": loss}, step)

    def close(self) -> None:
        """End all trackers."""
        for name, one in list(self.running.items()):
            self._try(name, one.close)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        for name, make in list(self.waiting.items()):  # started by the first number: a refused run leaves nothing
            del self.waiting[name]
            self._try(name, partial(self._start, name, make))
        for name, one in list(self.running.items()):
            self._try(name, partial(one.log, values, step))

    def _start(self, name: str, make: Callable[[RunDas], Tracker]) -> None:
        self.running[name] = make(self.config)

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # other people's code and other people's servers: whatever it is, the run goes on
            self.running.pop(name, None)
            reason = (str(error).splitlines() or [""])[0]
            self.say(f"tracker {name} failed and is left out from here on ({type(error).__name__}: {reason})")


def scalars_of(row: Row) -> dict[str, float]:
    """Return the numbers of a row by names such as "iia/test/das, rank 8/block_output @ last/seed 0"."""
    rank = "" if row.rank is None else f", rank {row.rank}"
    place = f"{row.split}/{row.method}{rank}/{row.component} @ {row.position_label}/seed {row.seed}"
    numbers = {name: getattr(row, name) for name in ("iia", "low", "high", "copy_base", "copy_source", "majority")}
    numbers |= {f"fact.{name}": value for name, value in row.facts.items()}
    return {f"{name}/{place}": float(value) for name, value in numbers.items()}


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        ConfigError: naming the first such, and how to install it.
    """
    for name in names:
        if find_spec(PACKAGES[name]) is None:
            do = f"Run: pip install {PACKAGES[name]}, or leave it out; the run's folder holds every number without it."
            raise ConfigError(asked_found_do(f"trackers {name}", "its package is not installed.", do))


@contextmanager
def trackers_for(config: RunDas, *, say: Callable[[str], None]) -> Iterator[Trackers]:
    """Yield the trackers that `config` names, ended when the block is left.

    Raises:
        ConfigError: see `require_trackers`.
    """
    require_trackers(config.trackers)
    trackers = Trackers(config, {name: MAKERS[name] for name in config.trackers}, say)
    try:
        yield trackers
    finally:
        trackers.close()
