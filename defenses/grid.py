"""Who carries out the cells of a comparison: `one_by_one` here, or `at_once` in several processes of this machine.

Cells are independent and each leaves its own folder, so a comparison says the same whoever made them, up to rounding:
sums over another number of threads round differently. On a CPU two processes of one thread get more done than one of
two threads, because much of a small model's step is spent where a second thread has nothing to do.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from defenses.config import TrainDefense
from defenses.errors import DefenseError, TrainingError
from defenses.loop import StopRequest
from defenses.running import Outcome, run
from intervene.errors import InterveneError
from records.config_files import ConfigError
from records.files import RecordError

Say = Callable[[str], None]
Cell = tuple[str, TrainDefense]
RETRIES = 1  # of a cell whose process died; it goes on from its checkpoint
GRACE = 120.0  # seconds that a process has to write a checkpoint and end


@dataclass(frozen=True)
class Done:
    """A cell that was carried out: its outcome, or the reason why there is none."""

    name: str
    cell: TrainDefense
    outcome: Outcome = field(default_factory=Outcome)
    reason: str = ""


def one_by_one(cells: Sequence[Cell], told: Say) -> Iterator[Done]:
    """Carry out `cells` in this process; one that a signal stops is the last.

    Raises:
        DefenseError, ConfigError, InterveneError, RecordError: a cell that cannot be run.
    """
    for number, (name, cell) in enumerate(cells, start=1):
        told(f"--- {number}/{len(cells)}: {name}, seed {cell.seed}")
        try:
            done = Done(name, cell, run(_begun(cell), told=told))
        except TrainingError as error:  # of this method and rate; the others may be sound
            done = Done(name, cell, reason=str(error))
        yield done
        if done.outcome.stopped:
            return


def _begun(cell: TrainDefense) -> TrainDefense:
    """Return `cell`, to be resumed if it was begun: there is nothing to say of one that was not."""
    assert cell.out is not None
    return replace(cell, resume=cell.out.exists())


def at_once(cells: Sequence[Cell], workers: int, told: Say) -> Iterator[Done]:
    """Carry out `cells` in `workers` processes, in the order they end. A signal is passed on to all of them.

    A cell whose process dies is begun again behind the others, from its checkpoint; a second death is its reason.
    Where `threads` is not given, the processes share this machine's evenly; likewise several GPUs, in turn.

    Raises:
        DefenseError: a cell that cannot be run; the others first write their checkpoints.
    """
    crew, stop = _Crew(min(workers, len(cells))), StopRequest()
    waiting, deaths = deque(range(len(cells))), Counter[int]()
    try:
        with stop.listening():
            while crew.busy or (waiting and not stop.reason):
                while waiting and not stop.reason and crew.has_room():
                    place = waiting.popleft()
                    name, cell = cells[place]
                    told(f"--- {place + 1}/{len(cells)}: {name}, seed {cell.seed}")
                    crew.begin(place, cell)
                if stop.reason:
                    crew.ask_to_stop()
                for place, kind, value in crew.heard():
                    name, cell = cells[place]
                    own = f"{name}, seed {cell.seed}: "
                    if kind == "told":
                        told(own + value.removeprefix(own))
                    elif kind == "refused":
                        raise DefenseError(own + value)
                    elif kind == "died" and (stop.reason or deaths[place] < RETRIES):
                        deaths[place] += 1
                        waiting.append(place)
                    elif kind == "died":
                        yield Done(name, cell, reason=f"its process died {deaths[place] + 1} times: {value}")
                    elif kind == "failed":
                        yield Done(name, cell, reason=value)
                    elif value.stopped:
                        waiting.append(place)
                    else:
                        yield Done(name, cell, value)
    finally:
        crew.close()
    if waiting:
        name, cell = cells[min(waiting)]
        yield Done(name, cell, Outcome(None, stop.reason))


@dataclass(eq=False)
class _Worker:
    """A process, the pipe to it, and the place of the cell it is at; `asked`: it was told to stop."""

    process: BaseProcess
    pipe: Connection
    place: int | None = None
    asked: bool = False


class _Crew:
    """Processes that each do one cell after another."""

    def __init__(self, size: int) -> None:
        self.size, self.workers = size, list[_Worker]()
        self.context = multiprocessing.get_context("spawn")
        self.gpus = visible_gpus(os.environ, torch.cuda.device_count())

    @property
    def busy(self) -> list[_Worker]:
        return [one for one in self.workers if one.place is not None]

    def has_room(self) -> bool:
        return len(self.busy) < self.size

    def begin(self, place: int, cell: TrainDefense) -> None:
        """Give a cell to an idle process, or a new one."""
        worker = next((one for one in self.workers if one.place is None), None) or self._started()
        worker.place = place
        with suppress(OSError):  # it died while it was idle: `heard` says so
            worker.pipe.send(replace(_begun(cell), threads=cell.threads or max(1, cores() // self.size)))

    def _started(self) -> _Worker:
        mine, theirs = self.context.Pipe()
        gpu = self.gpus[len(self.workers) % len(self.gpus)] if len(self.gpus) > 1 else None
        process = self.context.Process(target=_serve, args=(theirs, gpu), daemon=True)
        process.start()
        theirs.close()  # else the end of the process would not end the pipe
        self.workers.append(_Worker(process, mine))
        return self.workers[-1]

    def heard(self) -> Iterator[tuple[int, str, Any]]:
        """Yield (place, kind, value) of what busy processes have said, or ("died", how); wait half a second at most."""
        pipes = {one.pipe: one for one in self.busy}
        for pipe in wait(list(pipes), timeout=0.5):
            assert isinstance(pipe, Connection)
            worker = pipes[pipe]
            assert worker.place is not None
            place = worker.place
            try:
                kind, value = pipe.recv()
            except (EOFError, OSError):
                worker.process.join(GRACE)
                self.workers.remove(worker)
                kind, value = "died", _ending(worker.process.exitcode)
            if kind != "told":
                worker.place = None
            yield place, kind, value

    def ask_to_stop(self) -> None:
        """Send SIGTERM to each busy process, once: a training writes a checkpoint, anything else ends."""
        for one in self.busy:
            if not one.asked:
                one.asked = True
                one.process.terminate()

    def close(self) -> None:
        """End all processes: busy ones get time for a checkpoint."""
        self.ask_to_stop()
        deadline = time.monotonic() + GRACE
        while self.busy and time.monotonic() < deadline:
            for _ in self.heard():
                pass
        for one in self.workers:
            one.pipe.close()
            one.process.kill()
            one.process.join()
        self.workers.clear()


def _serve(pipe: Connection, gpu: str | None) -> None:
    """Carry out the cells that come, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the first one decides
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    with suppress(EOFError, OSError):
        while True:
            cell = pipe.recv()
            try:
                answer: tuple[str, Any] = "done", run(cell, told=lambda text: pipe.send(("told", text)))
            except TrainingError as error:
                answer = "failed", str(error)
            except (ConfigError, DefenseError, InterveneError, RecordError) as error:
                answer = "refused", str(error)
            except ConnectionError:  # the other end of the pipe is gone
                raise
            except Exception:
                answer = "refused", traceback.format_exc()
            pipe.send(answer)


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus(environ: Mapping[str, str], count: int) -> list[str]:
    """Return the `count` GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    named = [one.strip() for one in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    return (named or [str(number) for number in range(count)])[:count]


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return f"exit code {code}"
