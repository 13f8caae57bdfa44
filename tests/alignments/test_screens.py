"""Screens: swaps are those of a plain interchange, attribution is the gradient by finite differences."""

from __future__ import annotations

import pytest
import torch

from alignments.answers import evaluate
from alignments.screens import (
    Place,
    attribute,
    attribute_cost,
    check,
    first_rows,
    plan_at,
    rank_correlation,
    screen,
    screen_cost,
    share,
    strongest,
)
from intervene import Add, InterveneError, Intervention, Site
from intervene.marked import Marked
from tests.alignments.planted_search import POSITIONS, SITES, data_of, planted_places, scorer_of

PLACES = [Place(site, where) for site in SITES for where in POSITIONS]


@pytest.fixture(scope="module", params=["key", "mark"])
def screened(request):
    scorer = scorer_of(request.param)
    rows = first_rows(scorer.here.splits["select"], 32)
    return request.param, scorer, rows, screen(scorer, PLACES, rows), attribute(scorer, PLACES, rows)


def test_first_pairs_hold_both_kinds_and_pairs_without_a_difference_are_refused():
    data = data_of("key")["select"]
    rows = first_rows(data, 32)
    assert rows.tolist() == list(range(32))
    assert int((data.labels[rows] != data.base_answers[rows]).sum()) == 16
    with pytest.raises(InterveneError, match=r"Screen of 1 pairs: the label is the base's own answer in all"):
        first_rows(data, 1)  # kinds are dealt in turn, "same" first


def test_a_screen_of_all_pairs_is_the_score_of_the_full_vector():
    scorer = scorer_of("key")
    data = scorer.here.splits["select"]
    for one in screen(scorer, PLACES[::7], torch.arange(len(data))):
        assert one.iia == pytest.approx(evaluate(plan_at(scorer, one.place), data).iia)
        assert one.n == len(data)


def test_gain_moved_and_loss_by_hand(screened):
    """Where nothing reads the stream any more nothing changes, and the loss is that of the unedited pass."""
    _, scorer, rows, exact, _ = screened
    data = scorer.here.splits["select"]
    own = data.prefix.logits[rows]
    loss = -own.log_softmax(-1)[torch.arange(32), data.labels[rows]].mean()
    by_place = {one.place: one for one in exact}
    idle = by_place[Place(SITES[5], "second")]
    assert (idle.iia, idle.gain, idle.moved) == (0.5, pytest.approx(0, abs=1e-3), pytest.approx(0, abs=1e-4))
    assert idle.loss == pytest.approx(float(loss), abs=1e-3)


def test_gain_sees_the_variable_where_whole_vectors_copy_too_much(screened):
    variable, _, _, exact, _ = screened
    by_place = {one.place: one for one in exact}
    planted = [by_place[Place(*place)] for place in planted_places(variable)]
    assert all(one.gain > 5 for one in planted)
    if variable == "mark":
        assert {one.iia for one in planted} == {0.0}  # the worst of all 48
        others = [one.gain for one in exact if one.place not in {one.place for one in planted}]
        assert max(others) < 0.1 < 19 < min(one.gain for one in planted)


def test_attribution_is_the_derivative_of_the_gain(screened):
    """Central differences along source - base, at one place at a time."""
    _, scorer, rows, _, guessed = screened
    data = scorer.here.splits["select"]
    told = rows[data.labels[rows] != data.base_answers[rows]]
    each = torch.arange(len(told))
    for site, where in [(SITES[1], "second"), (SITES[0], "third"), (SITES[4], "last"), (SITES[2], "noise1")]:
        base, source = data.activations(site, Marked(where))

        def contrast(size, site=site, where=where, towards=(source - base)[told]):
            plan = (Intervention(site, Add(size * towards, trainable=True), Marked(where)),)
            with torch.no_grad():
                logits = data.logits(plan, told)
            return (logits[each, data.labels[told]] - logits[each, data.base_answers[told]]).mean()

        slope = (contrast(0.01) - contrast(-0.01)) / 0.02
        assert guessed[Place(site, where)] == pytest.approx(float(slope), rel=0.02, abs=0.05)


def test_attribution_leaves_the_model_as_it_was_and_does_not_depend_on_batches():
    scorer = scorer_of("key")
    rows = first_rows(scorer.here.splits["select"], 32)
    flags = [parameter.requires_grad for parameter in scorer.here.model.parameters()]
    whole, parts = (attribute(scorer, PLACES, rows, batch_size=size) for size in (32, 5))
    assert [parameter.requires_grad for parameter in scorer.here.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in scorer.here.model.parameters())
    assert all(whole[place] == pytest.approx(parts[place], abs=1e-3) for place in PLACES)


def test_the_strongest_attributions_are_checked_exactly(screened):
    variable, scorer, rows, _, guessed = screened
    best = strongest(guessed, 12)
    found = check(guessed, screen(scorer, best, rows))
    assert set(found.places) == set(best)
    assert {place for place in map(tuple, best)} >= planted_places(variable)
    assert found.correlation is not None and found.correlation > 0.2
    assert "12 places: rank correlation 0." in str(found)


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(3**0.5 / 2)  # ranks 0.5 0.5 2 and 0 1 2
    assert rank_correlation([1, 1], [1, 2]) is None


def test_shares_by_hand():
    """Seven units of depth (six blocks and the head), eight tokens."""
    scorer = scorer_of("key")
    assert share(scorer, Place(Site("block_output", 5), "last")) == pytest.approx(1 / 7 / 8)
    assert share(scorer, Place(Site("block_output", 0), "start")) == pytest.approx(6 / 7)
    assert share(scorer, Place(Site("block_output", 2), "second")) == pytest.approx(4 / 7 * 4 / 8)
    assert screen_cost(scorer, PLACES, 10) == pytest.approx(10 * (21 / 7) * (36 / 8))  # 6..1 blocks, 8..1 tokens
    assert attribute_cost(scorer, PLACES, 10) == pytest.approx(10 * 2 * 6 / 7)
