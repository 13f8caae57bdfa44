"""The product table of methods: a `Method` makes a plan from a `Setup`, and says how that plan is fitted.

    plan = METHODS["das"].make(Setup(site, Marked("last"), width=576, rank=8, seed=0))
    print(describe_methods())

`METHODS` holds them all by name. What each learns, and from which paper, stands at the function that makes it:
`methods_subspace`, `methods_boundless`, `methods_masks`, `methods_directions`. What they can be told is in `OPTIONS`.
"""

from __future__ import annotations

from alignments.method import OPTIONS, Method, Option, Setup
from alignments.methods_boundless import BOUNDLESS, FAITHFUL
from alignments.methods_directions import LDA, MEAN_DIFFERENCE, PRINCIPAL, PROBE
from alignments.methods_masks import HEADS, MASK_PCA, MASK_SAE, MASK_SVD, NEURONS
from alignments.methods_subspace import DAS, FULL_VECTOR, LOREFT, MDAS, RANDOM

__all__ = ["METHODS", "OPTIONS", "Method", "Option", "Setup", "describe_methods", "describe_options"]

# In the order in which they are shown: the whole, subspaces, masks, directions, the control, what is no interchange.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        FULL_VECTOR,
        DAS,
        MDAS,
        BOUNDLESS,
        FAITHFUL,
        NEURONS,
        HEADS,
        MASK_PCA,
        MASK_SVD,
        MASK_SAE,
        PRINCIPAL,
        MEAN_DIFFERENCE,
        LDA,
        PROBE,
        RANDOM,
        LOREFT,
    )
}


def describe_methods() -> str:
    """Return the methods as a table in text: name, what it is, sites, learned, rank, what it needs."""
    header = ("method", "what it is", "sites", "learned", "rank", "needs")
    lines = [
        (
            method.name,
            method.text,
            method.sites,
            "yes" if method.learned else "no",
            "given" if method.ranked else "-",
            method.needs or "-",
        )
        for method in METHODS.values()
    ]
    return _table([header, *lines])


def describe_options() -> str:
    """Return the options of methods as a table in text: name, default, what it is."""
    shown = [
        (option.name, "-" if option.default is None else str(option.default), option.text)
        for option in OPTIONS.values()
    ]
    return _table([("option", "default", "what it is"), *shown])


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
