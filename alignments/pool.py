"""`Pool`: jobs handed to workers that may die. What is lost is done again elsewhere; what cannot be done is told last.

How workers are started, fed and heard is a `Crew`: `ProcessCrew` here, Ray's in `executors_ray`. A worker prepares a
`Scorer` of its own, with a number of threads of its own: sums over threads round differently, so that rows repeat
exactly only with the same number everywhere.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, Protocol

import torch

from alignments.rows import Row
from alignments.scoring import Job, Scorer
from intervene.errors import InterveneError, asked_found_do

Prepare = Callable[[], Scorer]  # called once in each worker, so it has to be picklable
RETRIES = 2
GRACE = 5.0  # seconds that a worker has to end by itself


class JobsFailed(InterveneError):
    """Some jobs could not be done; all others were, and their rows were given out. `failed` has (job, why)."""

    def __init__(self, failed: Sequence[tuple[Job, str]], total: int) -> None:
        self.failed = list(failed)
        told = "\n".join(f"  {job}: {why}" for job, why in self.failed)
        super().__init__(
            f"Jobs: {len(self.failed)} of {total} could not be done:\n{told}\n"
            "The rows of all others are kept. Mend the cause and go on with --resume."
        )


class WorkersLost(InterveneError):
    """Workers cannot be prepared, or die one after the other with no job done."""


@dataclass(frozen=True)
class Answer:
    """The rows of a job, or why there are none.

    `problem` is "error" where the job itself raised (it would again), "lost" where its worker died, "unprepared" where
    the worker could not make its scorer.
    """

    rows: tuple[Row, ...] = ()
    problem: Literal["", "error", "lost", "unprepared"] = ""
    text: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the answer as plain JSON."""
        return {"rows": [row.to_json() for row in self.rows], "problem": self.problem, "text": self.text}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Answer:
        """Return the answer that `to_json` made."""
        return cls(tuple(map(Row.from_json, values["rows"])), values["problem"], values["text"])


class Bench:
    """What a worker does: makes its scorer when the first job comes, and answers jobs."""

    def __init__(self, prepare: Prepare, threads: int | None) -> None:
        self.prepare = prepare
        self.threads = threads
        self.scorer: Scorer | None = None

    def answer(self, job: Job) -> Answer:
        """Return the rows of a job, or the problem; never raises what can be told."""
        try:
            if self.scorer is None:
                if self.threads is not None:
                    torch.set_num_threads(self.threads)
                self.scorer = self.prepare()
        except Exception as error:
            return Answer(problem="unprepared", text=f"{type(error).__name__}: {error}")
        try:
            return Answer(tuple(self.scorer.rows(job)))
        except Exception as error:
            return Answer(problem="error", text=reason(error))


def reason(error: Exception) -> str:
    """Return why a job failed: a refusal of ours explains itself, another error needs its kind."""
    return str(error) if isinstance(error, InterveneError) else f"{type(error).__name__}: {error}"


class Crew(Protocol):
    """Starts workers, and carries jobs and answers."""

    def start(self) -> Hashable:
        """Return a new worker."""
        ...

    def send(self, worker: Hashable, job: Job) -> None:
        """Give an idle worker a job; if it is dead, `wait` says so."""
        ...

    def wait(self, workers: Sequence[Hashable]) -> tuple[Hashable, Answer]:
        """Return the first of `workers` that has answered or died, with its answer."""
        ...

    def stop(self, worker: Hashable) -> None:
        """End a worker, whatever it is doing."""
        ...

    def close(self) -> None:
        """End whatever all workers share."""
        ...


class Pool:
    """An executor: `workers` workers of a crew, which live from the first job to `close()`.

    A job whose worker dies is put back, behind all others, and given to a fresh worker, at most `retries` times.
    """

    def __init__(self, crew: Crew, *, workers: int = 2, retries: int = RETRIES) -> None:
        if workers < 1 or retries < 0:
            raise InterveneError(f"Pool of {workers} workers and {retries} retries: use at least 1 and 0.")
        self.crew = crew
        self.workers = workers
        self.retries = retries
        self.idle: list[Hashable] = []

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Row]]]:
        """Yield (job, rows) as they are finished.

        Raises:
            JobsFailed: after all others: jobs that raised, or lost their worker too often. WorkersLost: see there.
        """
        failed, total = [], 0
        for job, answer in self.outcomes(jobs):
            total += 1
            if answer.problem:
                failed.append((job, answer.text))
            else:
                yield job, list(answer.rows)
        if failed:
            raise JobsFailed(failed, total)

    def outcomes(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Answer]]:
        """Yield each job with its last answer. A job is taken from `jobs` only when a worker is free for it.

        Raises:
            WorkersLost: a worker could not be prepared, or so many died in a row that it is not the jobs' fault.
        """
        waiting, again = iter(jobs), deque[Job]()
        busy: dict[Hashable, Job] = {}
        losses: Counter[Job] = Counter()
        in_a_row = 0
        try:
            while True:
                while len(busy) < self.workers:
                    job = next(waiting, None) or (again.popleft() if again else None)
                    if job is None:
                        break
                    worker = self.idle.pop() if self.idle else self.crew.start()
                    busy[worker] = job
                    self.crew.send(worker, job)
                if not busy:
                    return
                worker, answer = self.crew.wait(list(busy))
                job = busy.pop(worker)
                if answer.problem in ("lost", "unprepared"):
                    self.crew.stop(worker)
                    in_a_row += 1
                    self._check(answer, in_a_row)
                    losses[job] += 1
                    if losses[job] <= self.retries:
                        again.append(job)
                        continue
                else:
                    in_a_row = 0
                    self.idle.append(worker)
                yield job, answer
        finally:
            for worker in busy:  # an answer that nobody waits for would be taken for the next one
                self.crew.stop(worker)

    def _check(self, answer: Answer, in_a_row: int) -> None:
        asked = f"Search on {self.workers} workers"
        if answer.problem == "unprepared":
            do = "Mend that; it may not show in one process."
            raise WorkersLost(asked_found_do(asked, f"one could not prepare ({answer.text}).", do))
        if in_a_row > (self.retries + 1) * self.workers:
            found = f"{in_a_row} died in a row and no job was done (the last: {answer.text})."
            raise WorkersLost(asked_found_do(asked, found, "Use fewer workers: each holds the model and the pairs."))

    def close(self) -> None:
        """End all workers."""
        while self.idle:
            self.crew.stop(self.idle.pop())
        self.crew.close()


class ProcessCrew:
    """Workers that are processes of this machine, started afresh ("spawn"), fed through pipes."""

    def __init__(self, prepare: Prepare, threads: int | None = 1) -> None:
        self.prepare = prepare
        self.threads = threads
        self.context = multiprocessing.get_context("spawn")
        self.processes: dict[Hashable, tuple[multiprocessing.process.BaseProcess, Connection]] = {}

    def start(self) -> Hashable:
        """Return a new process."""
        mine, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs, self.prepare, self.threads), daemon=True)
        process.start()
        theirs.close()  # else the end of the process would not end the pipe
        assert process.pid is not None
        self.processes[process.pid] = (process, mine)
        return process.pid

    def send(self, worker: Hashable, job: Job) -> None:
        """Give a process a job."""
        with suppress(OSError):  # it died while it was idle
            self.processes[worker][1].send(job)

    def wait(self, workers: Sequence[Hashable]) -> tuple[Hashable, Answer]:
        """Return the first that has answered or died."""
        pipes = {self.processes[worker][1]: worker for worker in workers}
        pipe = wait(list(pipes))[0]
        assert isinstance(pipe, Connection)
        worker = pipes[pipe]
        try:
            answer: Answer = pipe.recv()
        except (EOFError, OSError):
            process = self.processes[worker][0]
            process.join(GRACE)
            answer = Answer(problem="lost", text=_ending(process.exitcode))
        return worker, answer

    def stop(self, worker: Hashable) -> None:
        """Kill a process."""
        process, pipe = self.processes.pop(worker)
        pipe.close()
        process.kill()
        process.join(GRACE)

    def close(self) -> None:
        """Kill what is left."""
        for worker in list(self.processes):
            self.stop(worker)


def _serve(pipe: Connection, prepare: Prepare, threads: int | None) -> None:
    """Answer jobs until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the first one decides
    bench = Bench(prepare, threads)
    with suppress(EOFError, OSError):
        while True:
            pipe.send(bench.answer(pipe.recv()))


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        hint = " (out of memory?)" if code == -9 else ""
        return f"its worker was killed by signal {-code}{hint}"
    return f"its worker ended with code {code}"
