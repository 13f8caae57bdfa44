"""Things of the wrong kind, as people pass them by mistake, are answered in words and not in attribute errors."""

from __future__ import annotations

import pytest
import torch

from intervene import (
    Add,
    BadPosition,
    DecodeSteps,
    InterveneError,
    Intervention,
    ShapeMismatch,
    Site,
    Swap,
    UnsupportedModel,
    Zero,
    capture,
    intervene,
)
from tests.tiny import tiny_batch, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def enter(manager):
    with manager:
        pass


CASES = {
    "a number for a site": (
        lambda model: Site.parse(3),
        InterveneError,
        r"Site 3: a text or a Site is needed\. Write e\.g\. 'L3\.block_output'",
    ),
    "a text in a plan": (
        lambda model: enter(intervene(model, ["L0.block_output"])),
        TypeError,
        r"item 0 is 'L0\.block_output'\. Write Intervention\(site, edit\)",
    ),
    "one intervention for a plan": (
        lambda model: enter(intervene(model, Intervention("L0.block_output", Zero()))),
        TypeError,
        r"found one Intervention\. Write \[intervention\]",
    ),
    "no model": (
        lambda model: enter(intervene(None, [Intervention("L0.block_output", Zero())])),
        UnsupportedModel,
        "a torch module is needed, found NoneType",
    ),
    "a tensor for an edit": (
        lambda model: Intervention("L0.block_output", torch.ones(32)),
        ShapeMismatch,
        r"edit is no Edit, found a Tensor\. Write Add\(tensor\)",
    ),
    "a tensor for sources": (
        lambda model: enter(intervene(model, [Intervention("L0.block_output", Swap())], torch.ones(2, 1, 32))),
        ShapeMismatch,
        r"one tensor was given, not a list\. Write \[tensor\]",
    ),
    "a list for a strength": (
        lambda model: Add(torch.ones(32), strength=[1.0, 2.0]),
        ShapeMismatch,
        r"strength \[1\.0, 2\.0\] is no number.*torch\.tensor",
    ),
    "a text for positions": (
        lambda model: enter(capture(model, ["L0.block_output"], positions="last")),
        ShapeMismatch,
        r"positions 'last': name at least one site, and positions as in LastToken\(\)",
    ),
    "no site to capture": (lambda model: enter(capture(model, [])), ShapeMismatch, "Capture with no sites"),
    "a step before the first": (lambda model: DecodeSteps(-1), BadPosition, "selects no step"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_error_names_what_was_passed_and_what_to_write(name, model):
    act, error, text = CASES[name]
    with pytest.raises(error, match=text):
        act(model)


def test_an_empty_batch_is_refused_before_it_divides_by_zero(model):
    batch = {name: value[:0] for name, value in tiny_batch(model, padding=None, seed=0).items()}
    with (
        pytest.raises(ShapeMismatch, match=r"Forward pass on 0 examples of \d+ tokens: nothing to act on"),
        intervene(model, [Intervention("L0.block_output", Zero())]),
    ):
        model(**batch)
