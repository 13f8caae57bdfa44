"""The planted model does its task, and its variables are where it says and nowhere else."""

from __future__ import annotations

import pytest
import torch

from alignments.answers import evaluate
from alignments.planted import FEATURES, WIDTH, planted_frame, planted_model, planted_sites
from alignments.scoring import Cell, Job
from intervene import Intervention, Subspace, Swap
from intervene.marked import Marked
from tasks import UnknownName
from tests.alignments.planted_search import (
    POSITIONS,
    SITES,
    TRIVIAL,
    data_of,
    model_of,
    planted_places,
    scorer_of,
)


def swap(site, where, *lens):
    return (Intervention(site, Swap(), Marked(where), *lens),)


@pytest.mark.parametrize(("variable", "seed"), [("key", 0), ("mark", 0), ("content", 0), ("key", 1)])
def test_it_is_right_on_every_pair_of_words_it_may_see(variable, seed):
    for data in data_of(variable, seed).values():
        assert all(bool(right.all()) for right in data.task_correct())
        assert data.prefix.exact


@pytest.mark.parametrize(("variable", "seed"), [("key", 0), ("mark", 0), ("content", 0), ("key", 1)])
def test_swapping_the_planted_subspace_is_the_interchange_and_swapping_the_rest_does_nothing(variable, seed):
    for one in planted_sites(variable):
        frame = planted_frame(one.feature, seed)
        assert frame.shape == (WIDTH, one.rank)
        data = data_of(variable, seed)["test"]
        assert evaluate(swap(one.site, one.positions, Subspace.from_frame(frame)), data).iia == 1.0


def test_swapping_one_direction_less_is_not_the_interchange():
    for one in planted_sites("key"):
        frame = planted_frame(one.feature)[:, :2]
        score = evaluate(swap(one.site, one.positions, Subspace.from_frame(frame)), data_of("key")["test"])
        assert score.iia < 0.9


@pytest.mark.parametrize("variable", ["key", "mark", pytest.param("content", marks=pytest.mark.slow)])
def test_swapping_whole_vectors_is_right_only_where_the_variable_is_alone(variable):
    """`key` is alone at the second word and at the last before `content` comes; the others never are."""
    alone = {"key": {(1, "second"), (2, "second"), (3, "last")}, "mark": set(), "content": set()}[variable]
    for site in SITES:
        for where in POSITIONS:
            iia = evaluate(swap(site, where), data_of(variable)["test"]).iia
            if (site.layer, where) in alone:
                assert iia == 1.0
            else:
                assert iia <= TRIVIAL
            if variable == "mark" and (site, where) in planted_places("mark"):
                assert iia == 0.0  # below doing nothing: it copies too much


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["key", "mark"])
def test_das_of_the_planted_rank_finds_the_planted_subspace(variable):
    scorer = scorer_of(variable)
    for one in {one.feature: one for one in planted_sites(variable)}.values():
        job = Job(Cell(one.site, one.positions, "das", one.rank), (0,), ("test",))
        assert scorer.rows(job)[0].iia >= 0.99
        learned = scorer.fitted(job)[0][0].featurizer.frame().detach()
        cosines = torch.linalg.svdvals(learned.T @ planted_frame(one.feature))  # of the principal angles
        assert float(cosines.min()) > 0.85
        chance = torch.linalg.svdvals(Subspace(WIDTH, one.rank, seed=9).frame().detach().T @ learned)
        assert float(chance.min()) < 0.4


@pytest.mark.slow
def test_das_finds_nothing_where_nothing_was_planted():
    scorer = scorer_of("key")
    for layer, where in ((0, "second"), (0, "first"), (3, "second"), (2, "third"), (2, "last"), (5, "last")):
        job = Job(Cell(SITES[layer], where, "das", 3), (0,), ("test",))
        assert scorer.rows(job)[0].iia <= TRIVIAL + 0.07, (layer, where)  # half-width of the interval at n = 192


def test_no_direction_lies_along_an_axis_and_all_are_orthogonal():
    frames = torch.cat([planted_frame(feature) for feature in FEATURES], 1)
    torch.testing.assert_close(frames.T @ frames, torch.eye(frames.shape[1]), atol=1e-5, rtol=0)
    assert float(frames.abs().max()) < 0.7
    assert not torch.allclose(planted_frame("key", 0), planted_frame("key", 1), atol=0.1)


def test_it_is_the_same_whenever_it_is_made():
    again, _ = planted_model(0)
    for a, b in zip(model_of()[0].parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_an_unknown_variable_names_the_known_ones():
    with pytest.raises(UnknownName, match="digit"):
        planted_sites("digit")
    with pytest.raises(UnknownName, match="nothing"):
        planted_frame("nothing")
