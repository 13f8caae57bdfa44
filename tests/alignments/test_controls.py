"""Controls do what they say: labels dealt anew, the complement of a subspace, and which of them mean something."""

from __future__ import annotations

import pytest
import torch

from alignments import METHODS, Cell, Setup, evaluate, predict
from alignments.controls import Complement, complement, shuffled
from alignments.scoring import applies, control_cell, control_of, method_of
from intervene import AllTokens, InterveneError, Intervention, Site, Subspace, Swap
from tests.alignments.planted import DIRECTION, WIDTH, planted_mlp, planted_pairs

SITE = Site("block_output", 0)


def test_shuffled_labels_are_the_same_labels_in_another_order():
    pairs = planted_pairs(planted_mlp(), 200, 0)
    before = pairs.labels.clone()
    dealt = shuffled(pairs)
    assert torch.equal(pairs.labels, before)  # the pairs themselves are untouched
    assert torch.equal(dealt.labels.sort().values, before.sort().values) and not torch.equal(dealt.labels, before)
    assert torch.equal(shuffled(pairs).labels, dealt.labels)


def test_the_complement_of_the_planted_direction_copies_the_base():
    model = planted_mlp()
    pairs = planted_pairs(model, 300, 2)
    plan = (Intervention(SITE, Swap(), AllTokens(), Subspace.from_frame(DIRECTION[:, None])),)
    rest = complement(plan)
    assert evaluate(plan, pairs).iia == 1.0
    assert torch.equal(predict(rest, pairs), model(pairs.base).argmax(-1))


def test_a_subspace_and_its_complement_make_up_the_whole():
    lens = Subspace(WIDTH, 2, seed=3)
    h, source = torch.randn(4, 1, WIDTH), torch.randn(4, 1, WIDTH)
    rest = Complement(lens)
    swapped = lens.write(rest.write(h, rest.read(source)), lens.read(source))
    torch.testing.assert_close(swapped, source)
    torch.testing.assert_close(rest.write(h, rest.read(h)), h)
    torch.testing.assert_close(lens.read(rest.write(h, rest.read(source))), lens.read(h))


def test_what_has_no_complement_is_refused():
    with pytest.raises(InterveneError, match="only swaps of a subspace have one"):
        complement(METHODS["full_vector"].make(Setup(SITE, AllTokens(), WIDTH)))


def test_controls_know_their_method():
    cell = Cell(SITE, "last", "mdas", 4)
    control = control_cell(cell, "random_model")
    assert control.method == "control:random_model/mdas" and control_of(control) == "random_model"
    assert method_of(control).name == "mdas"
    assert control_cell(Cell(SITE, "last", "das", 4), "shuffled_labels").method == "control:shuffled_labels"
    assert control_of(cell) is None
    assert applies("complement", METHODS["das"]) and not applies("complement", METHODS["boundless"])
    assert not applies("complement", METHODS["das"], variables=2) and applies("random_model", METHODS["boundless"])
