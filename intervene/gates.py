"""Swaps that learn which features to take from the source: a gate per feature, group of features, or a boundary.

Every gate is soft while `training` and 0 or 1 after `.eval()`, so that what is scored is what could be deployed.
`penalty()` is what a fit adds to its loss to keep the swap small, `size()` how many features are swapped when hard.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from intervene.edits import Edit
from intervene.errors import BadVector, ShapeMismatch


class Gated(Edit):
    """z' = (1 - g) z + g source with a gate per feature: soft while `training`, hard after `.eval()`."""

    needs_source = True

    def __init__(self, features: int, temperature: float) -> None:
        super().__init__()
        self.count = features
        self.temperature = temperature

    @property
    def features(self) -> int | None:
        return self.count

    @property
    def temperature(self) -> float:
        """Softness of the gate, at least 1e-8; set it to anneal."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = max(float(value), 1e-8)

    @property
    def decided(self) -> bool:
        """Whether the gate is 0 or 1 now."""
        return not self.training

    @abstractmethod
    def soft(self) -> Tensor:
        """Return the gate (K,) or (1,) between 0 and 1, differentiable."""

    @abstractmethod
    def hard(self) -> Tensor:
        """Return the gate (K,) or (1,) as booleans."""

    def gate(self) -> Tensor:
        """Return the gate (K,) or (1,): soft while training, 0 or 1 after `.eval()`."""
        return self.hard().to(next(self.parameters()).dtype) if self.decided else self.soft()

    def penalty(self) -> Tensor:
        """Return the mean of the soft gate (0-d, 0 to 1), differentiable, also after `.eval()`."""
        return self.soft().mean()

    def size(self) -> int:
        """Return how many features are swapped when the gate is hard; reads from the device."""
        return int(self.hard().expand(self.count).sum())

    def forward(self, z: Tensor, source: Tensor | None) -> Tensor:
        return self._mixed(z, source, self.gate())

    def _mixed(self, z: Tensor, source: Tensor | None, gate: Tensor) -> Tensor:
        assert source is not None
        other = source.to(z.dtype)
        if self.decided:
            return torch.where(gate > 0, other, z)  # exact: no product that rounds
        return z + gate.to(z.dtype) * (other - z)


class _Grouped(Gated):
    """One logit per feature, or per group of features: `groups` (K,) holds the group of each feature, from 0."""

    groups: Tensor | None

    def __init__(self, features: int, temperature: float, groups: Tensor | None, *, tied: bool = False) -> None:
        super().__init__(features, temperature)
        if groups is not None:
            _check_groups(groups, features, type(self).__name__, tied)
        self.register_buffer("groups", None if groups is None else groups.detach().to(torch.int64, copy=True))
        logits = 1 if tied else features if groups is None else int(groups.max()) + 1
        self.logits = nn.Parameter(torch.zeros(logits))

    def spread(self, values: Tensor) -> Tensor:
        """Return `values` per group (G,) as values per feature (K,)."""
        return values if self.groups is None else values[self.groups]

    def hard(self) -> Tensor:
        return self.spread(self.logits.detach() > 0)


def _check_groups(groups: Tensor, features: int, name: str, tied: bool) -> None:
    if tied:
        raise ShapeMismatch(f"{name}: groups and tied together, which is one group. Leave one of them out.")
    if groups.shape != (features,) or groups.is_floating_point() or groups.dtype == torch.bool:
        raise ShapeMismatch(
            f"{name}: groups of shape {tuple(groups.shape)}, {groups.dtype}. Give {features} whole numbers, the group "
            "of each feature."
        )
    found = torch.unique(groups).tolist()
    if found != list(range(len(found))):
        raise ShapeMismatch(f"{name}: groups are numbered {found}. Number them from 0 without gaps.")


class GatedSwap(_Grouped):
    """z' = (1 - g) z + g source, g = sigmoid(logit / temperature) per feature; hard (logit > 0) after `.eval()`.

    Args:
        features: K. temperature: of the sigmoid, at least 1e-8; set the attribute to anneal it. tied: one gate for
            all features (selects whole heads or sites). groups: (K,) whole numbers, one gate for each of them.

    Source: binary masks as in desiderata-based masking, De Cao et al. 2022, Davies et al. 2023. Gates start at 1/2.
    """

    def __init__(
        self, features: int, *, temperature: float = 1.0, tied: bool = False, groups: Tensor | None = None
    ) -> None:
        super().__init__(features, temperature, groups, tied=tied)
        self.tied = tied

    def soft(self) -> Tensor:
        return self.spread(torch.sigmoid(self.logits / self.temperature))


class HardConcreteSwap(_Grouped):
    """A gate that is exactly 0 or 1 with some probability, sampled once per forward pass while training.

    g = clamp(s (high - low) + low, 0, 1), s = sigmoid((log u - log(1 - u) + logit) / temperature), u uniform; all
    tokens and examples of a pass share the sample. After `.eval()`, 1 where the gate without noise is above 1/2.
    `penalty` is the probability that a gate is not 0, the expected L0 norm divided by K.

    Args:
        features: K. temperature: beta. stretch: (low, high), low < 0 and high > 1. groups: as in `GatedSwap`.
        seed: of the samples, which come from this edit's own generator.

    Source: Louizos et al. 2018 (arXiv 1712.01312), equations 10 to 13; their test gate stays soft, ours is cut at 1/2.
    """

    draws = True

    def __init__(
        self,
        features: int,
        *,
        temperature: float = 2 / 3,
        stretch: tuple[float, float] = (-0.1, 1.1),
        groups: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(features, temperature, groups)
        low, high = (float(end) for end in stretch)
        if not (-float("inf") < low < 0 and 1 < high < float("inf")):
            raise BadVector(
                f"HardConcreteSwap: stretch ({low}, {high}). The first must be below 0, the second above 1."
            )
        self.stretch = (low, high)
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, z: Tensor) -> Tensor:
        """Return the logistic noise (G,) of one pass; none, and no draw, after `.eval()`."""
        if not self.training:
            return self.logits.new_empty(0)
        uniform = torch.rand(self.logits.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6)  # same on every device
        return uniform.logit().to(self.logits)

    def _stretched(self, sigmoid: Tensor) -> Tensor:
        low, high = self.stretch
        return sigmoid * (high - low) + low

    def soft(self) -> Tensor:
        return self.spread(self._stretched(torch.sigmoid(self.logits)).clamp(0, 1))

    def hard(self) -> Tensor:
        return self.spread(self._stretched(torch.sigmoid(self.logits.detach())) > 0.5)

    def sampled(self, noise: Tensor) -> Tensor:
        """Return the gate (K,) that logistic `noise` (G,) makes."""
        return self.spread(self._stretched(torch.sigmoid((self.logits + noise) / self.temperature)).clamp(0, 1))

    def penalty(self) -> Tensor:
        """Return the expected share of gates that are not 0 (0-d)."""
        low, high = self.stretch
        return self.spread(torch.sigmoid(self.logits - self.temperature * math.log(-low / high))).mean()

    def forward(self, z: Tensor, source: Tensor | None, drawn: Tensor | None = None) -> Tensor:
        if not self.training:
            return self._mixed(z, source, self.gate())
        return self._mixed(z, source, self.sampled(self.draw(z) if drawn is None else drawn))


class BudgetSwap(_Grouped):
    """Swaps a given number of features: g = sigmoid((logit + c) / temperature), with c such that the gates sum to it.

    After `.eval()`, exactly those with the largest logits (the first of equal ones). The gradient is that of the
    constrained gates: c moves with the logits, so that raising one gate lowers the others.

    Args:
        features: K. budget: how many features, or with `groups` how many groups, 1 to their number.
        temperature, groups: as in `GatedSwap`.

    Raises:
        ShapeMismatch: the budget is not 1 to the number of gates.
    """

    def __init__(self, features: int, budget: int, *, temperature: float = 1.0, groups: Tensor | None = None) -> None:
        super().__init__(features, temperature, groups)
        if not 1 <= budget <= len(self.logits):
            raise ShapeMismatch(f"BudgetSwap: budget {budget}, there are {len(self.logits)} gates. Give 1 to that.")
        self.budget = budget

    def _shift(self, x: Tensor) -> Tensor:
        """Return c (0-d) where sigmoid(x + c) sums to the budget, with the gradient that this equation implies.

        Of F(c, x) = sum sigmoid(x_i + c) - budget = 0, dc/dx_j = -g_j' / sum g_i' with g' = g (1 - g).
        """
        fixed = x.detach()
        reach = 20 + math.log(len(x))  # so far from x the gates sum to less than e^-20, or to that less than all
        low, high = -fixed.max() - reach, -fixed.min() + reach
        for _ in range(64):  # halvings: to the last digit, and nothing is read from the device
            middle = (low + high) / 2
            above = torch.sigmoid(fixed + middle).sum() > self.budget
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        shift = (low + high) / 2
        gates = torch.sigmoid(x + shift)
        slope = (gates * (1 - gates)).sum().detach().clamp_min(torch.finfo(x.dtype).tiny)
        return shift - (gates.sum() - gates.sum().detach()) / slope

    def soft(self) -> Tensor:
        # in fp64: logits over a small temperature are large, and c must meet them to less than one
        x = self.logits.to(torch.float32 if self.logits.device.type == "mps" else torch.float64) / self.temperature
        return self.spread(torch.sigmoid(x + self._shift(x)).to(self.logits.dtype))

    def hard(self) -> Tensor:
        order = self.logits.detach().argsort(descending=True, stable=True)
        chosen = torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[: self.budget], True)
        return self.spread(chosen)


class _UnitInterval(torch.autograd.Function):
    """clamp(x, 0, 1) that drops only a gradient whose descent would push x further out.

    The gradient of a plain clamp is zero outside, so that a boundary which overshot once could never come back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad.masked_fill(((x >= 1) & (grad < 0)) | ((x <= 0) & (grad > 0)), 0)


class BoundarySwap(Gated):
    """Swaps the first features up to a learned boundary: g_i = sigmoid((b - (i + 1/2)) / (temperature * K)).

    b = fraction * K with the learned fraction clamped to [0, 1]; after `.eval()` the first round(b) features are
    swapped whole. We differ from Boundless DAS (Wu et al. 2023, arXiv 2305.08809): the half index (their feature 0
    keeps mask 1/2 for ever), a temperature in units of K instead of indices, hard evaluation, and a clamp that lets
    the gradient bring an overshot boundary back. `FaithfulBoundarySwap` is theirs.
    """

    def __init__(self, features: int, *, fraction: float = 0.5, temperature: float = 0.05) -> None:
        super().__init__(features, temperature)
        self.fraction = nn.Parameter(torch.tensor(float(fraction)))

    def _clamped(self) -> Tensor:
        clamped: Tensor = _UnitInterval.apply(self.fraction)  # type: ignore[no-untyped-call]
        return clamped

    def boundary(self) -> Tensor:
        """Return b (0-d), in features, 0 to K."""
        return self._clamped() * self.count

    def rank(self) -> Tensor:
        """Return the hard boundary: how many features are swapped after `.eval()` (0-d, integer valued)."""
        return self.boundary().detach().round()

    def penalty(self) -> Tensor:
        """Return the learned fraction, clamped to [0, 1] (0-d)."""
        return self._clamped()

    def soft(self) -> Tensor:
        return torch.sigmoid((self.boundary() - (self._index() + 0.5)) / (self.temperature * self.count))

    def hard(self) -> Tensor:
        return self._index() < self.rank()

    def _index(self) -> Tensor:
        return torch.arange(self.count, device=self.fraction.device, dtype=self.fraction.dtype)
