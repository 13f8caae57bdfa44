"""Who carries out the jobs of a search: this process, others beside it, Ray's actors, or the ranks of torchrun.

    with executor_for(config, scorer) as executor:
        Search(scorer, cells, executor=executor)

Rows are the same whoever carries them out, in all but `seconds`: jobs are independent, and every worker prepares the
same problem from the same resolved configuration, with `config.threads` threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch

from alignments.config import RunDas
from alignments.executors_ray import RayCrew
from alignments.executors_torchrun import Torchrun
from alignments.fit import Budget
from alignments.original_pairs import prepare_original, read_original_splits
from alignments.pool import Crew, Pool, ProcessCrew
from alignments.problem import Problem, Report, check_rivals, resolve_device, variables_of
from alignments.scoring import Scorer
from alignments.search import Executor, Local
from alignments.text_problem import load_text, loaded_model, prepare_text
from alignments.vector_problem import VECTOR_TASKS, prepare_vectors
from tasks import TASKS

ScorerFrom = Callable[[RunDas], Scorer]


def problem_from(config: RunDas, report: Report = lambda text, done, total: None) -> Problem:
    """Return the prepared problem of a configuration, which need not be resolved: model, task and pairs."""
    if config.task in VECTOR_TASKS:
        return prepare_vectors(config, report)
    if is_file_of_pairs(config.task):
        config = resolve_device(config)
        read_original_splits(config.task)  # a wrong row must not cost the loading of a model
        loaded, words = loaded_model(config)
        check_rivals(config, ())  # the file has no causal model of other variables
        return prepare_original(config, loaded, report, words)
    config, model, tokenizer, task = load_text(config, report)
    return prepare_text(config, model, tokenizer, task, report)


def is_file_of_pairs(task: str) -> bool:
    """Return whether `task` names pairs in the original format: a JSONL file, or a folder with one per split."""
    return task not in TASKS and (task.endswith(".jsonl") or Path(task).is_dir())


def scorer_of(problem: Problem) -> Scorer:
    """Return the scorer of a prepared problem, with the budget and options of its configuration."""
    config = problem.config
    budget = Budget(**{one.name: getattr(config, one.name) for one in fields(Budget)})
    return Scorer(
        problem.model,
        problem.splits,
        problem.where,
        problem.facts,
        budget=budget,
        options=config.options,
        variables=len(variables_of(config)),
        others=problem.others,
        batch_size=config.eval_batch_size,
    )


def scorer_from(config: RunDas) -> Scorer:
    """Return what a worker needs: the scorer of a configuration, prepared from nothing else."""
    return scorer_of(problem_from(config))


@contextmanager
def executor_for(config: RunDas, scorer: Scorer, *, make: ScorerFrom = scorer_from) -> Iterator[Executor]:
    """Yield the executor that `config` names, its workers ended when the block is left.

    Args:
        scorer: of this process. make: what other workers make theirs with; a function that can be pickled.

    Raises:
        InterveneError: Ray is not installed or has no room; torchrun did not start this process.
    """
    if config.executor == "local":
        yield Local(scorer)
        return
    prepare = partial(make, config)
    if config.executor == "torchrun":
        ranks = Torchrun(prepare, scorer=scorer, threads=config.threads)
        try:
            yield ranks
        finally:
            ranks.close()
        return
    crew: Crew
    workers = config.workers
    if config.executor == "ray":
        crew = ray = RayCrew(prepare, config.threads, workers=workers, gpus=str(config.device).startswith("cuda"))
        workers = ray.workers
    else:
        crew = ProcessCrew(prepare, config.threads)
    pool = Pool(crew, workers=workers)
    try:
        yield pool
    finally:
        pool.close()


def work_for(config: RunDas, *, make: ScorerFrom = scorer_from) -> str:
    """Do jobs for rank 0, on every other rank of torchrun; return why it ended early, or ""."""
    return Torchrun(partial(make, _on_own_gpu(config)), threads=config.threads).work()


def _on_own_gpu(config: RunDas) -> RunDas:
    """Return `config` on the GPU of this rank, if it is to run on whichever there is."""
    if config.device not in (None, "cuda") or not torch.cuda.is_available():
        return config
    number = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    return replace(config, device=f"cuda:{number}")
