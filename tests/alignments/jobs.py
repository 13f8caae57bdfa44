"""The jobs that every executor of the tests is given."""

from __future__ import annotations

from alignments import cells_of
from alignments.scoring import Job
from intervene import Site


def some_jobs():
    """Return ten jobs: two sites, two methods, several seeds; each has a first seed of its own."""
    sites = [Site("block_output", layer) for layer in (0, 1)]
    full, das = cells_of(sites[:1], ["input"], ["full_vector"], 1)[0], cells_of(sites, ["input"], ["das"], 1)
    return [Job(full, (0,)), *(Job(das[seed % 2], (seed,)) for seed in range(1, 9)), Job(das[0], (9, 10, 11))]
