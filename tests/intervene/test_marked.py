"""`Marked` finds the columns the batch names, and refuses those it cannot."""

from __future__ import annotations

import pytest
import torch

from intervene import BadPosition, Marked

BATCH = {
    "input_ids": torch.zeros(2, 4, dtype=torch.int64),
    "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
    "marks": {"name": torch.tensor([[1], [0]]), "pad": torch.tensor([[0], [0]]), "far": torch.tensor([[1], [4]])},
}


def test_columns_come_from_the_batch():
    assert Marked("name").resolve(BATCH).tolist() == [[1], [0]]


@pytest.mark.parametrize(
    ("name", "inputs", "text"),
    [
        ("nane", BATCH, r"Marked\('nane'\): the batch marks no such position\. Did you mean name\?"),
        ("name", {"input_ids": BATCH["input_ids"]}, r"Pass prompt=\{\*\*batch, 'marks': \{\.\.\.\}\}"),
        ("pad", BATCH, r"column 0 of example 0 is padding or beyond the batch"),
        ("far", BATCH, r"column 4 of example 1 is padding or beyond the batch"),
        ("one", {**BATCH, "marks": {"one": torch.tensor([[1]])}}, r"1 rows for 2 examples\. Mark each example once"),
    ],
)
def test_refusals(name, inputs, text):
    with pytest.raises(BadPosition, match=text):
        Marked(name).resolve(inputs)
