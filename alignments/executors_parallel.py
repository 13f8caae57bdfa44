"""Executor `DataParallel`: one job at a time, fitted by all ranks together. See `parallel` for what they share.

    with joined() as group:
        executor = DataParallel(scorer, group)
        if group.rank:
            executor.work()                              # until rank 0 is done
        else:
            try:
                rows = list(Search(scorer, cells, executor=executor).run())
            finally:
                executor.close()

Rank 0 alone searches, records and reports; so the search decides once, whatever it decides by. The other executors give
each rank jobs of its own, which needs no transfers and is faster: this one is for jobs of which one alone is too slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from alignments.parallel import Group
from alignments.rows import Row
from alignments.scoring import Job, Scorer


class DataParallel:
    """On rank 0 an executor; on every other rank what `work()`s with it. All ranks' scorers hold the same pairs."""

    def __init__(self, scorer: Scorer, group: Group) -> None:
        self.scorer, self.group = scorer, group

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, list[Row]]]:
        """Yield (job, rows) in the order of `jobs`; on rank 0 only."""
        assert self.group.rank == 0
        for job in jobs:
            self.group.told(job)
            yield job, self._rows(job)

    def work(self) -> None:
        """Do rank 0's jobs with it, until it closes."""
        assert self.group.rank > 0
        while (job := self.group.told(None)) is not None:
            self._rows(job)

    def close(self) -> None:
        """Tell the other ranks that the search is over."""
        if self.group.rank == 0:
            self.group.told(None)

    def _rows(self, job: Job) -> list[Row]:
        self.scorer.group = self.group  # for this job only: what rank 0 asks for by itself, it fits by itself
        try:
            return self.scorer.rows(job)
        finally:
            self.scorer.group = None
