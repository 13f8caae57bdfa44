"""pyvene's unit locations as positions. Needs no pyvene."""

from __future__ import annotations

import pytest
import torch

from intervene import At
from intervene.errors import BadPosition, Unsupported
from intervene.pyvene_compat import Location, positions_from_pyvene


@pytest.mark.parametrize(
    ("locations", "units", "wanted"),
    [
        (None, ["pos"], [Location()]),
        ({"base": 3}, ["pos"], [Location(At(3))]),
        ({"base": [3, 5]}, ["pos"] * 2, [Location(At(3, 5))] * 2),
        ({"base": [[[1], [2]]]}, ["pos"], [Location(At([[1], [2]]))]),
        ({"base": [[[1, 2], [1, 2]]]}, ["pos"], [Location(At(1, 2))]),
        ({"sources->base": 3}, ["pos"], [Location(At(3), At(3))]),
        ({"sources->base": (2, 4)}, ["pos"], [Location(At(4), At(2))]),
        ({"sources->base": ([[[1], [2]]], [[[3], [4]]])}, ["pos"], [Location(At([[3], [4]]), At([[1], [2]]))]),
        ({"sources->base": (None, [[[3]], [[4]]])}, ["pos"] * 2, [Location(At(3)), Location(At(4))]),
        ({"base": [[[2], [2]]]}, ["h"], [Location(heads=(2,))]),
        ({"base": [[[[2, 1]], [[5]]]]}, ["h.pos"], [Location(At(5), heads=(2, 1))]),
    ],
)
def test_positions_from_pyvene(locations, units, wanted):
    assert positions_from_pyvene(locations, units) == tuple(wanted)


def test_columns_of_a_padded_batch_become_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"attention_mask": mask}
    (location,) = positions_from_pyvene({"base": [[[3], [1]]]}, inputs=inputs)
    assert location.positions == At([[1], [1]])
    assert location.positions.resolve(inputs).tolist() == [[3], [1]]
    with pytest.raises(BadPosition, match="padding"):
        positions_from_pyvene({"base": 4}, inputs=inputs)


@pytest.mark.parametrize(
    ("locations", "units", "error", "message"),
    [
        ({"source_0->base": 1}, ["pos"], Unsupported, "source_0->base"),
        ({"base": [[[1], [2]]]}, ["h"], Unsupported, "differ between examples"),
        ({"sources->base": ([[[1]]], [[[2]]])}, ["h"], Unsupported, r"heads \(1,\) read into \(2,\)"),
        ({"base": [[[1]], [[2]]]}, ["pos"], BadPosition, "for 2 interventions: there are 1"),
        ({"base": 3}, ["h.pos"], BadPosition, r"need \[heads, positions\]"),
        ({"base": [[[1], [2, 3]]]}, ["pos"], BadPosition, "ragged"),
    ],
)
def test_refused_locations(locations, units, error, message):
    with pytest.raises(error, match=message):
        positions_from_pyvene(locations, units)
