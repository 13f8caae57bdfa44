"""Hierarchical equality: four objects w, x, y, z, and the answer whether (w = x) equals (y = z).

    task = HierarchicalEquality()
    train = task.examples("train", n=100_000)                      # train.inputs (N, 16) float32, train.labels (N,)
    one = task.pairs("train", variables=["left_equal"], n=6400)     # one.base, one.sources["left_equal"], one.labels
    both = task.pairs("test", variables=["left_equal", "right_equal"], n=6400)      # a source for each
    mixed = task.mixed_pairs("test", variables=["left_equal", "right_equal"], n=9600)   # left, right or both, by row

An object is a vector of `width` numbers, uniform in [-1, 1]; an input is the four vectors side by side (see
`tasks/vectors.py`).

Patterns (is w = x? is y = z?) are dealt in equal shares over base and sources together. So where the size is a multiple
of 16 (one variable) or 64 (two), copying the base, copying a source and naming either label are each right on exactly
half of the pairs, for each of `left_equal` and `right_equal` and for both at once.

`first_object` is a control: the identity of w. Its counterfactual is well defined, but a network that computes the two
equalities need not hold w anywhere by itself.

Source: Geiger et al. 2023, "Finding alignments between interpretable causal variables and distributed neural
representations" (arXiv 2303.02536). We differ: patterns are dealt, not drawn; numbers are not rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

from tasks.causal_model import CausalModel
from tasks.vectors import EqualityTask, same

OBJECTS = ("w", "x", "y", "z")

CAUSAL_MODEL = CausalModel(
    variables=(*OBJECTS, "first_object", "left_equal", "right_equal", "answer"),
    parents={
        "first_object": ("w",),
        "left_equal": ("first_object", "x"),
        "right_equal": ("y", "z"),
        "answer": ("left_equal", "right_equal"),
    },
    mechanisms={
        "first_object": lambda w: w,
        "left_equal": same,
        "right_equal": same,
        "answer": lambda left, right: left == right,
    },
)


@dataclass(frozen=True)
class HierarchicalEquality(EqualityTask):
    """The task for objects of `width` numbers; inputs are 4 * width wide."""

    width: int = 4

    name = "hierarchical_equality"
    causal_model = CAUSAL_MODEL
    variables = ("left_equal", "right_equal", "first_object")
    objects = OBJECTS
