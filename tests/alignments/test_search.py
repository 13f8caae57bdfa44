"""A search over a planted network: the right cell wins on select, is reported on test, and nothing is run twice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from alignments import Budget, Elsewhere, Facts, Scorer, Search, cells_of, verdict
from alignments.pool import JobsFailed
from alignments.scoring import Cell
from intervene import AllTokens, InterveneError, Site
from intervene.networks import MLP
from tests.alignments.planted import WIDTH, planted_mlp, planted_pairs

BASELINES = {
    split: {"copy_base": 0.5, "copy_source": 1.0, "majority": 0.5, "flip": 0.5} for split in ("train", "select", "test")
}
FACTS = Facts("planted", "mlp", "sign", BASELINES, {"train": 1.0, "select": 1.0, "test": None})
BOTH = ("random_subspace", "random_model")
SITES = [Site("block_output", 0), Site("block_output", 1)]


def search(model=None, *, finished=(), others=None, cells=None, seeds=(0, 1), controls=("random_subspace",), **more):
    model = model or planted_mlp()
    splits = {
        split: planted_pairs(model, n, i)
        for i, (split, n) in enumerate({"train": 256, "select": 64, "test": 96}.items())
    }
    cells = cells_of(SITES, ["input"], ["das", "full_vector"], 1) if cells is None else cells
    budget = Budget(steps=60, batch_size=64, lr=0.05)
    scorer = Scorer(model, splits, lambda name: AllTokens(), FACTS, budget=budget, others=others)
    return Search(scorer, cells, seeds=seeds, finished=finished, controls=controls, **more)


def test_the_grid_puts_methods_without_learning_first():
    cells = cells_of(SITES, ["a", "b"], ["das", "full_vector"], 4)
    assert [cell.method for cell in cells] == ["full_vector"] * 4 + ["das"] * 4
    assert {cell.rank for cell in cells[:4]} == {None} and {cell.rank for cell in cells[4:]} == {4}


def test_rows_cover_the_grid_the_seeds_of_the_best_cell_and_its_control():
    rows = list(search().run())
    assert len({row.key for row in rows}) == len(rows)
    das = [row for row in rows if row.method == "das"]
    best = verdict(das).chosen.cell
    assert {(row.site, row.seed) for row in das} >= {(str(site), 0) for site in SITES} | {(best.site, 1)}
    controls = [row for row in rows if row.is_control]
    assert {(row.site, row.method, row.rank) for row in controls} == {(best.site, "control:random_subspace", 1)}
    assert {row.seed for row in controls} == {0, 1}
    assert all(row.extra == {"flip": 0.5} and row.copy_source == 1.0 for row in rows)
    assert {row.task_accuracy for row in rows if row.split == "test"} == {None}


def test_the_learned_cell_is_above_its_random_control():
    rows = list(search().run())
    learned = verdict([row for row in rows if row.method == "das"]).reported
    control = [row.iia for row in rows if row.is_control and row.split == "test"]
    assert learned.iia > 0.95 > max(control)


def test_the_choice_is_made_on_select_alone():
    made = search()
    for _row in made.run():
        pass
    best = made.best_cell("das")
    scores = {row.site: row.iia for row in made.rows if row.method == "das" and row.split == "select" and row.seed == 0}
    tie = [site for site, score in scores.items() if score == max(scores.values())]
    assert str(best.site) == tie[0] or scores[str(best.site)] == max(scores.values())


def test_finished_rows_are_not_run_again_and_the_rest_is_the_same():
    whole = list(search().run())
    for cut in (1, 5, len(whole) - 1, len(whole)):
        rest = list(search(finished=whole[:cut]).run())
        assert [(row.key, row.iia) for row in rest] == [(row.key, row.iia) for row in whole[cut:]]


def test_other_models_are_fitted_only_when_needed_and_named_as_controls():
    made = []

    def random_model(site):
        network = MLP(WIDTH, WIDTH, 2, 2, seed=7).eval()
        made.append(network)
        return Elsewhere(network, {split: planted_pairs(network, 64, 9) for split in ("train", "select", "test")})

    assert not [row for row in search(others={"random_model": random_model}).run() if "model" in row.method]
    rows = list(search(others={"random_model": random_model}, controls=BOTH).run())
    assert len(made) == 1
    assert {row.seed for row in rows if row.method == "control:random_model"} == {0, 1}
    assert {row.task_accuracy for row in rows if row.method == "control:random_model"} == {None}
    assert not list(search(finished=rows, others={"random_model": random_model}, controls=BOTH).run())
    assert len(made) == 1


def test_an_empty_grid_is_refused():
    with pytest.raises(InterveneError, match=r"0 cells and 2 seeds: give at least one of each"):
        search(cells=[])


def test_a_job_that_is_refused_is_noted_and_the_others_go_on():
    made = search(cells=cells_of(SITES, ["input"], ["mean_difference", "full_vector"], 1))
    found = list(made.run())
    assert {row.method for row in found} == {"full_vector"} and {row.site for row in found} == set(map(str, SITES))
    assert {cell.site for cell in made.failed} == set(SITES)
    assert all("the pairs do not say the variable's values" in why for why in made.failed.values())
    with pytest.raises(InterveneError, match=r"no cell of mean_difference is scored"):
        made.best_cell("mean_difference")


def test_a_search_of_which_no_cell_can_be_scored_says_why_of_each():
    made = search(cells=cells_of(SITES, ["input"], ["mean_difference"], 1))
    with pytest.raises(JobsFailed, match=r"2 of 2 could not be done:\n.*L0.*do not say.*\n.*L1.*do not say"):
        list(made.run())


def test_of_equal_cells_the_smaller_rank_is_best_as_in_the_verdict():
    first = search(cells=[Cell(SITES[0], "input", "das", 2)], seeds=(0,), controls=())
    found = list(first.run())
    tied = [replace(row, rank=rank, site=str(site)) for site, rank in ((SITES[0], 2), (SITES[0], 1), (SITES[1], 1))
            for row in found]  # fmt: skip
    cells = [Cell(SITES[0], "input", "das", 2), Cell(SITES[0], "input", "das", 1), Cell(SITES[1], "input", "das", 1)]
    made = search(cells=cells, finished=tied, seeds=(0,))
    best = made.best_cell("das")
    assert (best.site, best.rank) == (SITES[0], 1) and made.best_kept() == best
    chosen = verdict(tied).chosen.cell
    assert (chosen.site, chosen.rank) == (str(best.site), best.rank)


def test_a_cell_whose_other_seed_fails_leaves_the_search_to_the_next():
    made = search(controls=())
    whole = made.scorer.rows
    begun = []

    def refusing(job):
        begun.append(job)
        if job.cell.method == "das" and 1 in job.seeds and len({one.cell for one in begun if 1 in one.seeds}) == 1:
            raise InterveneError("on purpose")
        return whole(job)

    made.scorer.rows = refusing
    found = list(made.run())
    (lost,) = made.failed
    best = made.best_cell("das")
    assert best != lost and {row.seed for row in found if row.site == str(best.site) and row.method == "das"} == {0, 1}
