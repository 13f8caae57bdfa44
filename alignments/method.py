"""`Setup`, `Method` and the options that methods read: what every method of the product table is made of.

The methods themselves are in `methods_subspace`, `methods_boundless`, `methods_masks` and `methods_directions`;
`methods` puts them into one table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from alignments.pairs import PairData
from intervene import Plan, Positions, Site
from intervene.errors import InterveneError, asked_found_do


@dataclass(frozen=True)
class Option:
    """One thing that a configuration may say of methods; None always means the default.

    `kind` is what its value has to be, `low` and `high` its bounds, `choices` the texts it may be.
    """

    name: str
    kind: type
    default: Any
    text: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def read(self, options: Mapping[str, Any]) -> Any:
        """Return this option's value in `options`, its default where there is none.

        Raises:
            InterveneError: a value of another kind, outside of the bounds, or not among the choices.
        """
        value = options.get(self.name)
        if value is None:
            return self.default
        allowed = (int, float) if self.kind is float else (self.kind,)
        right = isinstance(value, allowed) and (self.kind is bool or not isinstance(value, bool))
        inside = right and (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
        if not inside or (self.choices and value not in self.choices):
            raise InterveneError(
                asked_found_do(f"option {self.name}", f"{value!r} was given.", f"Give {self._wanted()}.")
            )
        return value

    def _wanted(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        name = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[self.kind]
        low = "" if self.low is None else f" of at least {self.low:g}"
        return name + low + ("" if self.high is None else f" and at most {self.high:g}")


OPTIONS: dict[str, Option] = {
    option.name: option
    for option in (
        Option(
            "frame",
            str,
            "qr",
            "how learned frames are kept orthonormal",
            choices=("qr", "cayley", "householder", "matrix_exp"),
        ),
        Option("divergence", float, 0.0, "weight of the pull towards natural activations; subspace methods", low=0),
        Option("isolate_weight", float, 1.0, "weight of isolate pairs against cause pairs; mdas", low=0),
        Option("k_max", int, None, "dimensions that boundless may take; default: the width, at most 64", low=1),
        Option("init_fraction", float, None, "share of dimensions that boundless starts with; 0.5", low=0, high=1),
        Option("penalty", float, None, "weight of the boundary in the loss; boundless 0.1, faithful 1.0", low=0),
        Option("soft_eval", bool, False, "score boundless_faithful with its soft mask, as published"),
        Option("gate", str, "sigmoid", "gates of masks", choices=("sigmoid", "hard_concrete", "top_k")),
        Option("budget", int, None, "how many gates of a top_k mask are open; it has to be given there", low=1),
        Option("sparsity", float, 0.1, "weight of the share of open gates in the loss; masks but top_k", low=0),
        Option("components", int, None, "components of mask_pca and mask_svd; default: as many as there are", low=1),
        Option("sae", str, None, "safetensors file of the sparse autoencoder of mask_sae"),
        Option("sae_centred", bool, False, "subtract the decoder's bias before encoding; mask_sae"),
    )
}


@dataclass(frozen=True)
class Setup:
    """All that a method may look at when it makes its plan.

    `width` is that of the site; `rank` None where the method has none; `train` the training pairs, for methods that
    read activations; `variables` the number of variables, each with a block of `rank` dimensions; `options` what the
    configuration says of methods ("frame": "cayley"), read by `option`; `memory` what a penalty keeps between the
    steps of one fit.
    """

    site: Site
    positions: Positions
    width: int
    rank: int | None = None
    seed: int = 0
    train: PairData | None = None
    variables: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def option(self, name: str) -> Any:
        """Return the value of one of `OPTIONS`. Raises InterveneError: it is no value of that option."""
        return OPTIONS[name].read(self.options)

    def pairs(self, method: str) -> PairData:
        """Return the training pairs. Raises InterveneError: there are none, and `method` reads activations."""
        if self.train is None:
            raise InterveneError(f"Method {method}: it reads activations of training pairs. Give Setup(train=pairs).")
        return self.train


@dataclass(frozen=True)
class Method:
    """One method: how its plan is made and fitted.

    Attributes:
        name: as in files and flags. text: as in reports.
        make: setup -> plan.
        learned: fitted by gradient; otherwise `make` returns the final plan.
        ranked: the rank means something.
        seeded: the seed means something. What is neither learned nor random is run once.
        interchange: it puts in what the source has there. What does not can locate nothing, so no verdict chooses it.
        penalty: added to the loss, 0-d; None: nothing.
        anneal: called before each step with the progress in [0, 1].
        rates: end of a parameter's name -> factor on the learning rate.
        facts: what was learned, as numbers for the row ("hard_rank").
        train_kinds: kinds of pairs it is fitted on where the pairs have such kinds; None: all (`training_view`).
        kind_weights: options -> weight of each kind of pairs in the loss; None: each pair weighs the same.
        sites: where it can be used. needs: what it needs beside pairs. Both are for `describe_methods`.
    """

    name: str
    text: str
    make: Callable[[Setup], Plan]
    learned: bool = True
    ranked: bool = True
    seeded: bool = True
    interchange: bool = True
    penalty: Callable[[Plan, Setup], Tensor] | None = None
    anneal: Callable[[Plan, float], None] | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    facts: Callable[[Plan], Mapping[str, float]] | None = None
    train_kinds: tuple[str, ...] | None = ("cause",)
    kind_weights: Callable[[Mapping[str, Any]], Mapping[str, float]] | None = None
    sites: str = "any"
    needs: str = ""


def one_variable(setup: Setup, method: str) -> None:
    """Raise InterveneError if `setup` has several variables, which `method` cannot tell apart."""
    if setup.variables > 1:
        raise InterveneError(f"Method {method}: {setup.variables} variables were asked, it has one. Search them alone.")


def numbered(name: str, values: list[float]) -> dict[str, float]:
    """Return {name: value}, or with several variables {name_1: value, name_2: value ...}."""
    if len(values) == 1:
        return {name: values[0]}
    return {f"{name}_{number}": value for number, value in enumerate(values, start=1)}
