"""Every error this package raises on purpose.

    InterveneError
    ├── UnknownFamily        the model is of no registered family
    ├── UnknownComponent     the component's name is wrong, or this family does not have it
    ├── SiteOutOfRange       layer, head, neuron or expert beyond what the model has
    ├── BadPosition          positions that are ragged, empty, padding, out of range or not found
    ├── ShapeMismatch        a vector, source or featurizer of another width or shape
    ├── WrongModel           a saved vector or plan made for another model, layer or component
    ├── BadVector            NaN, infinite or zero where a direction is needed
    ├── NotApplied           an intervention or a capture that never fired
    ├── ModelChanged         activations kept of a model that computes otherwise by now
    ├── UnsupportedModel     a wrapper that has not been shown to work (compiled, FSDP, ...)
    ├── AmbiguousForward     a pass whose place in the generation cannot be known
    ├── StoreError           a plan folder that is half written, foreign or of a newer schema
    ├── Unsupported          a pyvene kind that has no counterpart here
    └── ModelNotFound        the weights can be had neither from a hub nor from a package registry

Every message has three parts: what was asked, what was found, what to do.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class InterveneError(Exception):
    """Anything this package refuses."""


class UnknownFamily(InterveneError):
    """The model is of no registered family."""


class UnknownComponent(InterveneError):
    """The component's name is wrong, or this family does not have it."""


class SiteOutOfRange(InterveneError):
    """A layer, head, neuron or expert beyond what the model has."""


class BadPosition(InterveneError):
    """Positions that are ragged, empty, padding, out of range or not found."""


class ShapeMismatch(InterveneError):
    """A vector, source or featurizer whose shape does not fit the site."""


class WrongModel(InterveneError):
    """A saved value that was made for another model, layer or component."""


class BadVector(InterveneError):
    """NaN, infinite or zero values where a direction is needed."""


class ModelChanged(InterveneError):
    """Activations were kept of a model that computes otherwise by now."""


class NotApplied(InterveneError):
    """An intervention or a capture that never fired."""


class UnsupportedModel(InterveneError):
    """A wrapper or a configuration that has not been shown to work."""


class AmbiguousForward(InterveneError):
    """A forward pass whose place in the generation cannot be known."""


class StoreError(InterveneError):
    """A plan folder that is half written, foreign or of a newer schema."""


class Unsupported(InterveneError):
    """A kind of pyvene intervention that has no counterpart here."""


class ModelNotFound(InterveneError):
    """Weights that can be had neither from a hub nor from a package registry."""


def asked_found_do(asked: str, found: str, do: str) -> str:
    """Return one message in the three parts every error here has."""
    return f"{asked}: {found} {do}"


def close_names(name: str, known: Iterable[str]) -> str:
    """Return "Did you mean a, b?" for the known names nearest to `name`, else the whole list."""
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    return f"Did you mean {', '.join(near)}?" if near else f"Known: {', '.join(names)}."
