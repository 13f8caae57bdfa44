"""The same jobs by any executor: the same rows; a dead worker costs its job at most, and that one is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from alignments.config import RunDas
from alignments.executors import executor_for
from alignments.executors_torchrun import Torchrun, _job, _plain
from alignments.pool import Answer, JobsFailed, Pool, ProcessCrew, WorkersLost
from alignments.scoring import Cell, Job
from alignments.search import Local, Search, cells_of
from intervene import InterveneError, Site
from tests.alignments import ray_worker
from tests.alignments.jobs import some_jobs

ROOT = Path(__file__).parents[2]


def config(folder, executor="processes", task="planted", workers=2, **options):
    return RunDas(task=task, out=folder, executor=executor, workers=workers, threads=1, options=options)


def told(rows):
    """Rows by key, without the time they took."""
    return sorted(json.dumps({**row, "seconds": 0}, sort_keys=True) for row in rows)


def by(asked, jobs=None):
    """Rows and the failure, if any, of an executor's run."""
    rows, failure = [], None
    with executor_for(asked, ray_worker.scorer(asked), make=ray_worker.scorer) as executor:
        try:
            for _, found in executor.run(some_jobs() if jobs is None else jobs):
                rows += [row.to_json() for row in found]
        except JobsFailed as error:
            failure = error
    return rows, failure


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    rows, failure = by(config(tmp_path_factory.mktemp("local"), "local"))
    assert failure is None and len(rows) == 2 * 12  # select and test, of twelve seeds
    return told(rows)


def who(folder):
    """Which process began which job, by first seed."""
    return [tuple(map(int, line.split())) for line in (folder / "who").read_text().splitlines()]


class ByHand:
    """A crew without processes, whose workers answer as a script says: the pool's own rules, nothing else."""

    def __init__(self, script):
        self.script = {seed: list(answers) for seed, answers in script.items()}
        self.jobs, self.started, self.stopped, self.order = {}, 0, [], []

    def start(self):
        self.started += 1
        return self.started

    def send(self, worker, job):
        assert worker not in self.jobs and worker not in self.stopped
        self.jobs[worker] = job

    def wait(self, workers):
        job = self.jobs.pop(workers[0])
        self.order.append(job.seeds[0])
        problem = self.script.get(job.seeds[0], [])
        return workers[0], Answer(problem=problem.pop(0), text="on purpose") if problem else Answer()

    def stop(self, worker):
        self.jobs.pop(worker, None)
        self.stopped.append(worker)

    def close(self):
        assert not self.jobs


def seeds_of(jobs):
    return sorted(job.seeds[0] for job, _ in jobs)


def test_a_lost_job_goes_behind_all_others_and_to_a_fresh_worker():
    crew = ByHand({2: ["lost"]})
    pool = Pool(crew, workers=2)
    assert seeds_of(pool.run(some_jobs())) == list(range(10))
    assert crew.order.count(2) == 2 and crew.order[-1] == 2
    assert crew.started == 3 and len(crew.stopped) == 1
    pool.close()
    assert len(crew.stopped) == 3


def test_a_job_that_kills_every_worker_is_told_last_and_the_others_are_done():
    crew = ByHand({2: ["lost"] * 9, 5: ["error"]})
    pool, done = Pool(crew, workers=2, retries=2), []
    with pytest.raises(
        JobsFailed, match=r"2 of 10 could not be done:\n.*seed 5: on purpose\n.*seed 2: on purpose\n"
    ) as e:
        done.extend(pool.run(some_jobs()))
    assert seeds_of(done) == [0, 1, 3, 4, 6, 7, 8, 9]
    assert crew.order.count(2) == 3 and crew.order.count(5) == 1  # an error would be the same again
    assert [job.seeds for job, _ in e.value.failed] == [(5,), (2,)]


def test_workers_that_only_die_end_the_search():
    crew = ByHand({seed: ["lost"] * 99 for seed in range(10)})
    with pytest.raises(WorkersLost, match=r"5 died in a row and no job was done \(the last: on purpose\)\. Use fewer"):
        list(Pool(crew, workers=2, retries=1).run(some_jobs()))
    assert len(crew.order) == 5 and not crew.jobs


def test_leaving_early_ends_the_busy_workers_and_the_pool_can_be_used_again():
    crew = ByHand({})
    pool = Pool(crew, workers=3)
    running = pool.run(some_jobs())
    first = next(running)[0]
    running.close()
    assert not crew.jobs and len(crew.stopped) == 2
    assert seeds_of(pool.run([job for job in some_jobs() if job != first])) == list(range(1, 10))


def test_no_workers_are_refused():
    with pytest.raises(InterveneError, match=r"Pool of 0 workers and 2 retries: use at least 1 and 0"):
        Pool(ByHand({}), workers=0)


def test_jobs_and_answers_survive_json(tmp_path):
    head = Cell(Site.parse("L1.head_output[2,5]"), "last", "das", None)
    jobs = [*some_jobs(), Job(head, (3, 4), ("test",), steps=7)]
    assert [_job(json.loads(json.dumps(_plain(job)))) for job in jobs] == jobs
    answer = Answer(tuple(ray_worker.scorer(config(tmp_path)).rows(some_jobs()[3])))
    assert Answer.from_json(json.loads(json.dumps(answer.to_json()))) == answer


def test_torchrun_and_ray_say_what_they_need(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InterveneError, match=r"are not set\. Run: torchrun --nproc-per-node 2 run_das\.py"):
        Torchrun(partial(ray_worker.scorer, config(tmp_path)))
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(InterveneError, match=r"Run: pip install 'interventions-toolkit\[ray\]'"):
        by(config(tmp_path, "ray"))


@pytest.mark.slow
def test_processes_give_the_same_rows_and_name_the_jobs_that_cannot_be_done(tmp_path, local):
    rows, failure = by(config(tmp_path, bad={3: "kills once", 4: "raises", 5: "kills"}))
    assert {job.seeds: why for job, why in failure.failed} == {
        (4,): "ValueError: bad on purpose",
        (5,): "its worker was killed by signal 9 (out of memory?)",
    }
    assert told(rows) == [row for row in local if json.loads(row)["seed"] not in (4, 5)]
    begun = [seed for _, seed in who(tmp_path)]
    assert begun.count(3) == 2 and begun.count(5) == 3 and len(begun) == 13
    assert os.getpid() not in {pid for pid, _ in who(tmp_path)}


@pytest.mark.slow
def test_a_worker_that_cannot_prepare_ends_the_search(tmp_path):
    with pytest.raises(WorkersLost, match=r"one could not prepare \(ValueError: no model on purpose\)"):
        list(Pool(ProcessCrew(partial(ray_worker.scorer, config(tmp_path, task="unprepared")))).run(some_jobs()))


@pytest.mark.slow
def test_a_search_on_processes_is_the_search(tmp_path):
    cells = cells_of([Site("block_output", 0), Site("block_output", 1)], ["input"], ["das", "full_vector"], 1)
    found = []
    for executor in ("local", "processes"):
        asked = config(tmp_path, executor)
        scorer = ray_worker.scorer(asked)
        with executor_for(asked, scorer, make=ray_worker.scorer) as made:
            assert isinstance(made, Local) == (executor == "local")
            search = Search(scorer, cells, seeds=(0, 1), executor=made)
            found.append((told(row.to_json() for row in search.run()), search.best_cell("das")))
    assert found[0] == found[1] and len(found[0][0]) > 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own, on import and at the end
def test_ray_gives_the_same_rows_whoever_dies(tmp_path, local):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    try:
        rows, failure = by(config(tmp_path, "ray", workers=5, bad={3: "kills once", 4: "raises"}))
        assert ray.is_initialized()  # it was not started by the executor
    finally:
        ray.shutdown()
    assert [(job.seeds, why) for job, why in failure.failed] == [((4,), "ValueError: bad on purpose")]
    assert told(rows) == [row for row in local if json.loads(row)["seed"] != 4]
    begun = who(tmp_path)
    assert [seed for _, seed in begun].count(3) == 2 and len({pid for pid, _ in begun}) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_is_started_where_it_is_not_and_ended_again(tmp_path, local):
    ray = pytest.importorskip("ray")
    rows, failure = by(config(tmp_path, "ray", workers=1), some_jobs()[:2])
    assert failure is None and not ray.is_initialized()
    assert told(rows) == [row for row in local if json.loads(row)["seed"] in (0, 1)]


def ranks(folder, launcher, task="planted", **options):
    """Start two ranks; return rank 0's rows and what was written to stderr."""
    script, environment = (
        str(Path(ray_worker.__file__).with_name("torchrun_script.py")),
        {**os.environ, "OMP_NUM_THREADS": "1"},
    )
    arguments = [script, task, str(folder), json.dumps(options)]
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads((folder / "rows.json").read_text()), done.stderr
    started = []
    for rank in ("0", "1"):  # as srun would: nobody ends one because the other has
        own = {**environment, "RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": launcher}
        started.append(subprocess.Popen([sys.executable, *arguments], env=own, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert started[0].returncode == 0, errors
    return json.loads((folder / "rows.json").read_text()), errors


def free_port():
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


@pytest.mark.slow
def test_torchrun_gives_the_same_rows_though_a_worker_of_rank_1_dies(tmp_path, local):
    rows, _ = ranks(tmp_path, "torchrun", rank_1="dies once", sleep0=1.0)
    assert told(rows) == local
    begun = who(tmp_path)
    assert len(begun) == 11 and len({pid for pid, _ in begun}) == 3  # rank 0, the worker that died, the one after it


@pytest.mark.slow
def test_the_jobs_of_a_rank_that_was_killed_are_done_by_rank_0(tmp_path, local):
    rows, _ = ranks(tmp_path, free_port(), rank_1="ends its rank", sleep0=1.0)
    assert told(rows) == local
    begun = who(tmp_path)
    assert len(begun) == 11 and len({pid for pid, _ in begun}) == 2


@pytest.mark.slow
def test_a_rank_that_cannot_prepare_leaves_the_jobs_to_rank_0(tmp_path, local):
    rows, errors = ranks(tmp_path, free_port(), task="unprepared", sleep0=0.5)
    assert told(rows) == local
    assert "no model on purpose" in errors[1]
