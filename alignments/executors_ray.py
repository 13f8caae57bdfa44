"""`RayCrew`: a pool's workers as Ray actors, on this machine or on the cluster that RAY_ADDRESS names.

Ray is an extra: pip install 'interventions-toolkit[ray]'. On a cluster this package has to be installed on every node.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Hashable, Sequence
from typing import Any

from alignments.pool import Answer, Bench, Prepare
from alignments.scoring import Job
from intervene.errors import InterveneError, asked_found_do

STORE_BYTES = 100 * 2**20  # of shared memory: only jobs and rows go through it


class RayCrew:
    """Workers that are Ray actors. `workers` says how many are wanted; it becomes how many the cluster has room for.

    Each takes `threads` of the cluster's CPUs, and one GPU if `gpus` is set. A Ray that was not running is started with
    as many CPUs as are asked for, and shut down by `close()`.
    """

    def __init__(self, prepare: Prepare, threads: int | None = 1, *, workers: int = 2, gpus: bool = False) -> None:
        self.ray = _ray()
        self.prepare = prepare
        self.threads = threads or 1
        self.gpus = gpus
        self.started_here = not self.ray.is_initialized()
        if self.started_here:
            address = os.environ.get("RAY_ADDRESS")
            local = {} if address else {"num_cpus": workers * self.threads, "object_store_memory": STORE_BYTES}
            self.ray.init(
                address=address,
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level="warning",
                **local,
            )
        self.workers = min(workers, self._room())
        self.actors: dict[Hashable, Any] = {}
        self.pending: dict[Hashable, Any] = {}
        self.numbers = itertools.count()

    def _room(self) -> int:
        """Return how many workers fit; more would wait for ever, with a job in hand."""
        has = self.ray.cluster_resources()
        room = int(has.get("CPU", 0)) // self.threads
        if self.gpus:
            room = min(room, int(has.get("GPU", 0)))
        if room < 1:
            wanted = f"{self.threads} CPUs" + (" and a GPU" if self.gpus else "")
            found = f"it has {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs."
            self.close()
            raise InterveneError(asked_found_do(f"Ray worker of {wanted}", found, "Ask for fewer threads."))
        return room

    def start(self) -> Hashable:
        """Return a new actor."""
        options = {"num_cpus": self.threads, "num_gpus": int(self.gpus), "max_restarts": 0}
        number = next(self.numbers)
        self.actors[number] = self.ray.remote(Bench).options(**options).remote(self.prepare, self.threads)
        return number

    def send(self, worker: Hashable, job: Job) -> None:
        """Give an actor a job."""
        self.pending[worker] = self.actors[worker].answer.remote(job)

    def wait(self, workers: Sequence[Hashable]) -> tuple[Hashable, Answer]:
        """Return the first that has answered or died."""
        futures = {self.pending[worker]: worker for worker in workers}
        (ready, *_), _ = self.ray.wait(list(futures), num_returns=1)
        worker = futures[ready]
        try:
            answer: Answer = self.ray.get(ready)
        except self.ray.exceptions.RayError as error:  # what a job raises is told in an answer: this is the actor's end
            answer = Answer(problem="lost", text=f"its worker died ({_first_line(error)})")
        del self.pending[worker]
        return worker, answer

    def stop(self, worker: Hashable) -> None:
        """Kill an actor."""
        self.pending.pop(worker, None)
        self.ray.kill(self.actors.pop(worker))

    def close(self) -> None:
        """Kill what is left, and shut down the Ray that was started here."""
        for worker in list(getattr(self, "actors", ())):
            self.stop(worker)
        if self.started_here:
            self.ray.shutdown()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is to be sent anywhere without being asked for
    try:
        import ray
    except ImportError as error:
        found, do = "it is not installed.", "Run: pip install 'interventions-toolkit[ray]'"
        raise InterveneError(asked_found_do("Executor ray", found, do)) from error
    return ray


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
