"""Views of pairs hold the named rows of everything, and weigh kinds in the ratio asked for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from alignments.controls import shuffled
from alignments.methods import METHODS, Setup
from alignments.views import PairView, only_kinds, training_view, weighted_kinds
from intervene import AllTokens, InterveneError
from tests.alignments.planted_methods import SITE, question_pairs


def test_a_view_has_the_rows_it_names_in_everything():
    pairs = question_pairs(20, 0)
    index = torch.tensor([7, 3, 3, 19])
    view = PairView(pairs, index)
    assert len(view) == 4 and view.model is pairs.model
    assert torch.equal(view.labels, pairs.labels[index]) and torch.equal(view.base_answers, pairs.base_answers[index])
    assert list(view.kinds) == [pairs.kinds[i] for i in index]
    for own, all_of_them in zip(view.values, pairs.values, strict=True):
        assert list(own) == [all_of_them[i] for i in index]
    for own, whole in zip(view.activations(SITE, AllTokens()), pairs.activations(SITE, AllTokens()), strict=True):
        assert torch.equal(own, whole[index])
    plan = METHODS["das"].make(Setup(SITE, AllTokens(), 6, 2))
    assert torch.equal(view.logits(plan, torch.tensor([3, 0])), pairs.logits(plan, torch.tensor([19, 7])))
    with pytest.raises(InterveneError, match=r"View of 1 rows: the pairs have rows 0 to 19\. Name some"):
        PairView(pairs, torch.tensor([20]))


def test_views_of_views_and_shuffled_views_are_pairs_like_others():
    pairs = question_pairs(50, 0)
    causes = only_kinds(pairs, ("cause",))
    assert torch.equal(PairView(causes, torch.tensor([1])).labels, causes.labels[1:2])
    mixed = shuffled(causes)
    assert sorted(mixed.labels.tolist()) == sorted(causes.labels.tolist())
    assert not torch.equal(mixed.labels, causes.labels)


def test_only_kinds_keeps_these_in_order_and_refuses_kinds_that_are_not_there():
    pairs = question_pairs(40, 0)
    rows = [row for row, kind in enumerate(pairs.kinds) if kind == "isolate"]
    assert torch.equal(only_kinds(pairs, ("isolate",)).labels, pairs.labels[rows])
    with pytest.raises(InterveneError, match=r"Pairs of kind other: there are none, the pairs have cause, isolate"):
        only_kinds(pairs, ("other",))


@pytest.mark.parametrize("weight", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_kinds_come_in_the_ratio_of_their_weights_and_no_pair_is_left_out(share, weight):
    pairs = question_pairs(200, 0, cause=share)
    view = weighted_kinds(pairs, {"cause": 1.0, "isolate": weight})
    counts = Counter(view.kinds)
    assert counts["isolate"] / counts["cause"] == pytest.approx(weight, rel=0.05)
    times = Counter(view.index.tolist())
    assert set(times) == set(range(200))
    for kind in ("cause", "isolate"):
        own = {times[row] for row in range(200) if pairs.kinds[row] == kind}
        assert max(own) - min(own) <= 1


def test_weights_that_cannot_be_kept_are_refused():
    pairs = question_pairs(30, 0)
    with pytest.raises(InterveneError, match="Each weighed kind needs pairs"):
        weighted_kinds(pairs, {"cause": 1.0, "other": 1.0})
    with pytest.raises(InterveneError, match="at least a weight above 0"):
        weighted_kinds(pairs, {"cause": 0.0})
    with pytest.raises(InterveneError, match="too unequal"):
        weighted_kinds(pairs, {"cause": 1.0, "isolate": 1e-5})
    assert set(weighted_kinds(pairs, {"cause": 1.0, "isolate": 0.0}).kinds) == {"cause"}


def test_each_method_is_fitted_on_the_kinds_it_wants():
    pairs = question_pairs(60, 0, cause=0.25)
    assert set(training_view(pairs, METHODS["das"], {}).kinds) == {"cause"}
    assert set(training_view(pairs, METHODS["mask_neurons"], {}).kinds) == {"cause"}
    both = Counter(training_view(pairs, METHODS["mdas"], {}).kinds)
    assert both["cause"] == both["isolate"] == Counter(pairs.kinds)["isolate"]
    assert training_view(pairs, METHODS["probe"], {}) is pairs
    pairs.kinds = ["same"] * 60
    assert training_view(pairs, METHODS["das"], {}) is pairs and training_view(pairs, METHODS["mdas"], {}) is pairs
