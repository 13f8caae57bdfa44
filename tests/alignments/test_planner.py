"""Halving on the planted model: the right place for a tenth of the grid, whole vectors that mislead, budgets kept."""

from __future__ import annotations

import itertools

import pytest

from alignments.metrics import verdict
from alignments.planner import Halving, run_halving
from alignments.promise import DEAD, Rung, diverse, order
from alignments.scoring import Cell
from alignments.screens import Place, Screened, first_rows, screen
from alignments.search import Search
from intervene import InterveneError, Site
from tests.alignments.planted_search import POSITIONS, SITES, planted_places, scorer_of, search_of

PLACES = [Place(site, where) for site in SITES for where in POSITIONS]


def seen(layer, where, iia=0.5, gain=0.0, moved=1.0, loss=1.0):
    return Screened(Place(Site("block_output", layer), where), 32, iia, loss, gain, moved)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "seed"), [("key", 0), ("key", 1), ("key", 2), ("mark", 0), ("mark", 1), ("mark", 2), ("content", 0)]
)
def test_the_planted_place_is_found_within_a_tenth_of_the_grid(variable, seed):
    """Another model, another search each: `seed` draws the rotation, the frames and what is explored."""
    search = search_of(variable, seed)
    planned = Halving(search)
    rows = list(planned.run())
    best = search.best_cell("das")
    assert (best.site, best.positions) in planted_places(variable)
    assert min(row.iia for row in rows if row.method == "das" and row.split == "test" and row.seed == seed) >= 0.99
    told = planned.summary()
    assert told["stopped"] is None
    assert told["share"] <= 0.1
    assert told["search"] == pytest.approx(sum(rung["pair_passes"] for rung in told["rungs"]), abs=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_variable_that_whole_vectors_hide_is_not_lost(seed):
    """Every place of `mark` has IIA 0 when whole vectors are swapped: of 48 the worst. No other signal is let in."""
    scorer = scorer_of("mark", seed)
    exact = screen(scorer, PLACES, first_rows(scorer.here.splits["select"], 32))
    best_half = sorted(exact, key=lambda one: -one.iia)[:24]
    assert {tuple(one.place) for one in exact if one.iia == 0} >= planted_places("mark")
    assert not {tuple(one.place) for one in best_half} & planted_places("mark")  # lost in any plain cut

    search = search_of("mark", seed)
    planned = Halving(search, pair_passes=4500, signals=("iia",))  # a twentieth of the grid
    assert list(planned.run())
    best = search.best_cell("das")
    assert (best.site, best.positions) in planted_places("mark")
    assert planned.summary()["share"] <= 0.0506


@pytest.mark.slow
def test_the_rows_are_complete_and_the_same_again():
    searches = [search_of("key", 0), search_of("key", 0)]
    first, second = ([(row.key, row.iia) for row in Halving(one, pair_passes=5000).run()] for one in searches)
    assert first == second
    rows, best = searches[0].rows, searches[0].best_cell("das")
    mine = [row for row in rows if row.site == str(best.site) and row.positions == best.positions]
    for split in ("select", "test"):
        learned = {row.seed for row in mine if row.method == "das" and row.split == split}
        control = {row.seed for row in mine if row.method == "control:random_subspace" and row.split == split}
        assert learned == control == {0, 10}
    assert {row.method for row in rows} == {"das", "full_vector", "control:random_subspace"}
    assert verdict(rows).reported.iia >= 0.99


@pytest.mark.slow
def test_several_ranks_are_tried_where_it_matters_only():
    search = search_of("key", 0, ranks=(1, 3, 6))
    planned = Halving(search)
    assert list(planned.run())
    rungs = planned.summary()["rungs"]
    assert [{cell["rank"] for cell in rung["cells"]} for rung in rungs] == [{None}, {6}, {1, 3, 6}, {1, 3, 6}]
    best = search.best_cell("das")
    assert (best.site, best.positions) in planted_places("key") and best.rank in (3, 6)
    assert planned.summary()["share"] <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("rung", [1, 2, 3])
def test_time_that_runs_out_leaves_the_result_of_the_last_finished_rung(rung):
    """A clock that jumps to the end once the fits of that rung begin."""
    search = search_of("key", 0)
    planned = Halving(search, seconds=100.0, clock=lambda: 0.0)
    ticks = itertools.count()

    def clock():
        late = len(planned.rungs) == rung and next(ticks) > 4
        return 200.0 if late else 0.001 * len(planned.rungs)

    planned.clock = clock
    rows = list(planned.run())
    told = planned.summary()
    assert "out of time" in told["stopped"]
    best = search.best_cell("das")
    mine = {(row.seed, row.split) for row in rows if row.method == "das" and row.site == str(best.site)}
    assert mine >= {(seed, split) for seed in (0, 10) for split in ("select", "test")}
    assert (best.site, best.positions) in planted_places("key")
    assert told["rungs"][-1]["steps"] == 100


def test_places_are_named_by_each_signal_in_turn_and_by_position():
    places = [Place(Site("block_output", layer), where) for where in "abc" for layer in range(3)]
    exact = [
        seen(0, "a", iia=0.9, gain=1),
        seen(1, "a", iia=0.8, gain=2),
        seen(2, "a", iia=0.7, gain=3),
        seen(0, "b", iia=0.1, gain=9),
        seen(1, "b", iia=0.1, gain=8),
        seen(2, "b", iia=0.0, moved=DEAD / 2),
        *(seen(layer, "c", iia=0.5, gain=0) for layer in range(3)),
    ]
    guessed = dict.fromkeys(places, 0.0) | {places[7]: 5.0}
    named = [f"{one.site.layer}{one.positions}" for one in order(exact, guessed, places, explore=0.0)]
    assert named[:3] == ["0a", "0b", "1c"]  # best IIA, best gain, best attribution
    assert named[-1] == "2b"  # nothing happens there: last, but not dropped
    assert sorted(named) == sorted(f"{one.site.layer}{one.positions}" for one in places)
    only = [one.positions for one in order(exact, guessed, places, ("iia",), explore=0.0)]
    assert only[:4].count("a") == 2 and set(only[:4]) == {"a", "c"}  # half of them, not three
    explored = [one.positions for one in order(exact, guessed, places, ("iia",), explore=0.25)]
    assert explored[3] == "b"  # the position that was named least


def test_what_is_kept_of_a_rung_has_two_positions():
    found = (seen(0, "a", loss=0.1), seen(1, "a", loss=0.2), seen(0, "b", loss=0.9), seen(1, "b", loss=0.8))
    cells = tuple(Cell(one.place.site, one.place.positions, "das", 1) for one in found)
    rung = Rung("9 steps", "das", 9, cells, found, 1.0, 1.0)
    assert [(cell.site.layer, cell.positions) for cell in diverse(rung)] == [(0, "a"), (1, "b"), (1, "a"), (0, "b")]


def test_the_ladder_and_the_costs_by_hand():
    search = search_of("key", 0)
    planned = Halving(search)
    assert planned.steps == [11, 33, 100]
    cell = next(c for c in search.cells if c.method == "das" and c.positions == "last" and c.site.layer == 3)
    one = 3 / 7 / 8  # blocks 4 and 5 and the head, one token
    assert planned.fit_cost(cell, 11) == pytest.approx(11 * 32 * 2 * one)
    assert planned.full_cost(cell) == pytest.approx((100 * 32 * 2 + 96 + 192) * one)
    assert planned.exhaustive == pytest.approx((6400 + 288) * 21 / 7 * 36 / 8)
    assert planned.limit == pytest.approx(planned.exhaustive / 10)
    assert planned.summary()["budget"] == {"pair_passes": round(planned.limit)}


def test_the_first_row_comes_from_the_function_too():
    assert iter(run_halving(search_of("key", 0), pair_passes=5000))


def test_budgets_that_cannot_be_kept_are_refused():
    search = search_of("key", 0)
    with pytest.raises(InterveneError, match=r"Halving with 50 pair-passes: .* Give at least that many"):
        Halving(search, pair_passes=50)
    with pytest.raises(InterveneError, match=r"5 pair-passes and 6 seconds\. Give one of them"):
        Halving(search, pair_passes=5, seconds=6)
    with pytest.raises(InterveneError, match=r"eta 1, explore 0.25\. Use eta from 2"):
        Halving(search, eta=1)
    with pytest.raises(InterveneError, match=r"signal 'loss' is unknown\. Use some of iia, gain, attribution"):
        Halving(search, signals=("loss",))
    plain = Search(search.scorer, [cell for cell in search.cells if cell.method == "full_vector"], seeds=(0,))
    with pytest.raises(InterveneError, match=r"no method of this search learns anything\. Use strategy grid"):
        Halving(plain)


@pytest.mark.slow
def test_places_too_dear_for_the_budget_are_passed_over_and_told():
    search = search_of("key", 0)
    planned = Halving(search, pair_passes=2000)
    assert list(planned.run())
    told = planned.summary()
    assert told["search"] <= 2000
    assert "L0.block_output @ start" in told["passed over"]
    assert "L3.block_output @ last" not in told["passed over"]
    best = search.best_cell("das")
    assert (best.site, best.positions) in planted_places("key")
