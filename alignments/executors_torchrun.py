"""`Torchrun`: one search on all processes that torchrun (or srun, or you) started with RANK and WORLD_SIZE.

Rank 0 runs the search and does jobs between the others' answers; the other ranks only `work()`. Jobs are claimed one by
one at a counter in torch's key-value store: no collective operation, so nobody waits for the dead. Each other rank has
its jobs done by a process of its own, because torchrun ends every rank of a node when one of them dies: a worker that
runs out of memory then costs its job, which is given to a fresh one. A rank that dies all the same stops beating, and
rank 0 does its jobs.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from alignments.parallel import launched
from alignments.pool import RETRIES, Answer, Bench, JobsFailed, Pool, Prepare, ProcessCrew, WorkersLost
from alignments.rows import Row
from alignments.scoring import Cell, Job, Scorer
from intervene import Site
from intervene.errors import InterveneError, asked_found_do

BEAT = 1.0  # seconds between two signs of life
PATIENCE = 30.0  # seconds without one after which a rank counts as dead
POLL = 0.1


def rank() -> int:
    """Return the rank of this process, 0 where nothing like torchrun started it."""
    return int(os.environ.get("RANK", "0"))


class Torchrun:
    """On rank 0 an executor; on every other rank what `work()`s for it.

    Args:
        prepare: makes the scorer of the other ranks. scorer: that of rank 0. threads: of every worker.
        patience: seconds after which a silent rank counts as dead; what it did by then is not lost.

    Raises:
        InterveneError: this process was not started by torchrun.
    """

    def __init__(
        self,
        prepare: Prepare,
        *,
        scorer: Scorer | None = None,
        threads: int | None = None,
        retries: int = RETRIES,
        patience: float = PATIENCE,
    ) -> None:
        if not launched():
            found, do = (
                "RANK, WORLD_SIZE and MASTER_ADDR are not set.",
                "Run: torchrun --nproc-per-node 2 run_das.py ...",
            )
            raise InterveneError(asked_found_do("Executor torchrun", found, do))
        self.prepare, self.scorer = prepare, scorer
        self.threads, self.retries, self.patience = threads, retries, patience
        self.store, self.rank, self.world = next(rendezvous("env://"))
        self.rounds = count()
        self.beats: dict[int, tuple[int, float]] = {}  # rank -> its last count, when it was first seen
        self.unowned: dict[str, float] = {}  # claim without a name -> since when

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Row]]]:
        """Yield (job, rows) as they are finished, by whomever; on rank 0 only.

        Raises:
            JobsFailed: after all others: jobs that raised, or ended their workers.
        """
        assert self.rank == 0 and self.scorer is not None
        scorer = self.scorer
        bench = Bench(lambda: scorer, None)
        todo = list(dict.fromkeys(jobs))
        if not todo:
            return
        number = next(self.rounds)
        self.store.set(f"{number}/jobs", json.dumps([_plain(job) for job in todo]))
        claims = self._claims(number, len(todo))
        left, failed = set(range(len(todo))), []
        while left:
            arrived = list(self._arrived(number, left))
            if not arrived:
                index = next(claims, None)
                if index is None:
                    index = self._orphan(number, left)
                if index is None:
                    time.sleep(POLL)
                    continue
                arrived = [(index, bench.answer(todo[index]))]
            for index, answer in arrived:
                left.discard(index)
                if answer.problem:
                    failed.append((todo[index], answer.text))
                else:
                    yield todo[index], list(answer.rows)
        if failed:
            raise JobsFailed(failed, len(todo))

    def work(self) -> str:
        """Do jobs for rank 0 until it ends or is gone; return why, if it was before the end."""
        assert self.rank > 0
        ended = threading.Event()
        threading.Thread(target=self._beat, args=(ended,), daemon=True).start()
        pool = Pool(ProcessCrew(self.prepare, self.threads), workers=1, retries=self.retries)
        try:
            for number in self.rounds:
                text = self._wait_for(f"{number}/jobs")
                if text is None:
                    return ""
                self._work_round(pool, number, [_job(values) for values in json.loads(text)])
            return ""
        except WorkersLost as error:
            return str(error)
        except dist.DistError as error:
            return f"Rank {self.rank}: rank 0 is gone ({str(error).partition(chr(10))[0]})."
        finally:
            ended.set()
            pool.close()

    def _work_round(self, pool: Pool, number: int, jobs: Sequence[Job]) -> None:
        mine: dict[Job, int] = {}

        def claimed() -> Iterator[Job]:
            for index in self._claims(number, len(jobs)):
                mine[jobs[index]] = index
                yield jobs[index]

        try:
            for job, answer in pool.outcomes(claimed()):
                self.store.set(f"{number}/answer/{mine.pop(job)}", json.dumps(answer.to_json()))
        except WorkersLost as error:
            for index in mine.values():  # rank 0 need not wait for what will not come
                self.store.set(f"{number}/answer/{index}", json.dumps(Answer((), "unprepared", str(error)).to_json()))
            raise

    def _claims(self, number: int, total: int) -> Iterator[int]:
        """Yield the jobs of a round that nobody else has, each claimed when it is asked for."""
        while (index := self.store.add(f"{number}/next", 1) - 1) < total:
            self.store.set(f"{number}/owner/{index}", str(self.rank))
            yield index

    def _arrived(self, number: int, left: set[int]) -> Iterator[tuple[int, Answer]]:
        for index in sorted(left):
            if self.store.check([f"{number}/answer/{index}"]):
                answer = Answer.from_json(json.loads(self.store.get(f"{number}/answer/{index}")))
                if answer.problem != "unprepared":
                    yield index, answer

    def _orphan(self, number: int, left: set[int]) -> int | None:
        """Return a job that will not be done elsewhere: its rank is dead, or gave up."""
        for index in sorted(left):
            if self.store.check([f"{number}/answer/{index}"]) or self._is_dead(number, index):
                return index
        return None

    def _is_dead(self, number: int, index: int) -> bool:
        now, key = time.monotonic(), f"{number}/owner/{index}"
        if not self.store.check([key]):  # it died between claiming and signing, or is about to sign
            return now - self.unowned.setdefault(key, now) > self.patience
        owner = int(self.store.get(key))
        beats = self.store.add(f"beat/{owner}", 0)
        if self.beats.get(owner, (-1, 0.0))[0] != beats:
            self.beats[owner] = beats, now
        return now - self.beats[owner][1] > self.patience

    def _beat(self, ended: threading.Event) -> None:
        with suppress(dist.DistError):
            while not ended.wait(BEAT):
                self.store.add(f"beat/{self.rank}", 1)

    def _wait_for(self, key: str) -> str | None:
        """Return what is stored under `key` once it is; None: the search is over."""
        while not self.store.check([key]):
            if self.store.check(["end"]):
                return None
            time.sleep(POLL)
        found: bytes = self.store.get(key)
        return found.decode()

    def close(self) -> None:
        """Tell all ranks that the search is over."""
        if self.rank == 0:
            with suppress(dist.DistError):
                self.store.set("end", "1")


def _plain(job: Job) -> dict[str, Any]:
    return {**vars(job), "cell": {**vars(job.cell), "site": str(job.cell.site)}}


def _job(values: Mapping[str, Any]) -> Job:
    cell = Cell(**{**values["cell"], "site": Site.parse(values["cell"]["site"])})
    return Job(cell, tuple(values["seeds"]), tuple(values["splits"]), values["steps"])
