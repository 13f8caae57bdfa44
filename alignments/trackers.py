"""`Mirror`: rows and losses of a search as numbers with names, for the trackers of `records.trackers`.

with mirror_for(config, say=print) as mirror:
    mirror.row(row)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from alignments.config import RunDas
from alignments.rows import Row
from records.trackers import Place, Trackers, makers, require_trackers


class Mirror:
    """Rows and losses, mirrored to `trackers`."""

    def __init__(self, trackers: Trackers) -> None:
        self.trackers = trackers

    def row(self, row: Row) -> None:
        """Mirror a row: its IIA, interval and baselines at its layer as step, and the numbers its method learned."""
        self.trackers.log(scalars_of(row), row.layer or 0)

    def losses(self, name: str, losses: Sequence[float]) -> None:
        """Mirror the losses of a fit, one per step."""
        for step, loss in enumerate(losses, start=1):
            self.trackers.log({f"loss/{name}": loss}, step)


def scalars_of(row: Row) -> dict[str, float]:
    """Return the numbers of a row by names such as "iia/test/das, rank 8/block_output @ last/seed 0"."""
    rank = "" if row.rank is None else f", rank {row.rank}"
    place = f"{row.split}/{row.method}{rank}/{row.component} @ {row.position_label}/seed {row.seed}"
    numbers = {name: getattr(row, name) for name in ("iia", "low", "high", "copy_base", "copy_source", "majority")}
    numbers |= {f"fact.{name}": value for name, value in row.facts.items()}
    return {f"{name}/{place}": float(value) for name, value in numbers.items()}


@contextmanager
def mirror_for(config: RunDas, *, say: Callable[[str], None]) -> Iterator[Mirror]:
    """Yield what mirrors to the trackers that `config` names, ended when the block is left.

    Raises:
        ConfigError: see `require_trackers`.
    """
    require_trackers(config.trackers)
    place = Place(Path(config.out or "run"), "alignment-search", config.to_json(), config.wandb_entity)
    trackers = Trackers(makers(config.trackers, place), say)
    try:
        yield Mirror(trackers)
    finally:
        trackers.close()
