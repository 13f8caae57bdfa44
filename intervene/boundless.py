"""Boundless DAS as its authors published it, to compare with `BoundarySwap`, our corrected form.

edit = FaithfulBoundarySwap(D)                       # temperature 50, to be annealed to 0.1 by the fit
first = FaithfulBoundarySwap(D, variables=2)         # two variables under one boundary: [0, b] and [b, 2b]
second = SecondBoundarySwap(first)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from intervene.edits import Edit
from intervene.errors import ShapeMismatch
from intervene.gates import Gated


def boundary_mask(index: Tensor, left: Tensor | float, right: Tensor, temperature: float) -> Tensor:
    """Return sigmoid((i - left) / temperature) sigmoid((right - i) / temperature) for each `index` i."""
    return torch.sigmoid((index - left) / temperature) * torch.sigmoid((right - index) / temperature)


class FaithfulBoundarySwap(Gated):
    """Swaps features 0 to b: g_i = sigmoid(i / T) sigmoid((b - i) / T), soft also after `.eval()`, as published.

    b = beta n for one variable and beta floor(n / 2) for the first of two, beta = clamp(fraction, 0.001, 1), n the
    number of features. T (`temperature`) is in units of features; the authors go from 50 to 0.1 linearly. What is
    published includes that g_0 stays at most 1/2 and that a fraction outside of the clamp gets no gradient through it.
    With `hard_eval` set, features 0 to round(b) are swapped whole after `.eval()`: score both and report both.

    Args:
        features: n. variables: 1 or 2. fraction: the boundary's start (1.0 for two variables in the original).

    Raises:
        ShapeMismatch: variables are neither 1 nor 2, or there are fewer features than variables.

    Source: Wu et al. 2023 (arXiv 2305.08809), the one-variable form as in pyvene's BoundlessRotatedSpaceIntervention,
        the two-variable one ("unified boundary") as in the released LLaMA code. There the second variable's own
        fraction is never used but is penalised; here there is none.
    """

    def __init__(
        self,
        features: int,
        *,
        variables: int = 1,
        fraction: float = 0.5,
        temperature: float = 50.0,
        hard_eval: bool = False,
    ) -> None:
        super().__init__(features, temperature)
        if variables not in (1, 2) or features < variables:
            raise ShapeMismatch(
                f"FaithfulBoundarySwap of {variables} variables in {features} features: the original has 1 or 2, each "
                "of one feature at least."
            )
        self.variables = variables
        self.hard_eval = hard_eval
        self.fraction = nn.Parameter(torch.tensor(float(fraction)))

    @property
    def decided(self) -> bool:
        return not self.training and self.hard_eval

    def boundary(self) -> Tensor:
        """Return b (0-d), in features."""
        reach = self.count if self.variables == 1 else self.count // 2
        return self.fraction.clamp(1e-3, 1) * reach

    def edges(self) -> tuple[Tensor | float, Tensor]:
        """Return where the swapped features begin and end."""
        return 0.0, self.boundary()

    def index(self) -> Tensor:
        """Return 0 to n - 1, in the fraction's dtype and on its device."""
        return torch.arange(self.count, device=self.fraction.device, dtype=self.fraction.dtype)

    def soft(self) -> Tensor:
        return boundary_mask(self.index(), *self.edges(), self.temperature)

    def hard(self) -> Tensor:
        return _between(self.index(), *self.edges())

    def penalty(self) -> Tensor:
        """Return the raw fraction (0-d), which the original adds to its loss with weight 1."""
        return self.fraction.clone()


class SecondBoundarySwap(Edit):
    """Swaps features b to 2b for the second of two variables, b being the boundary that the first one learns.

    Fraction, temperature, `hard_eval` and whether it trains are those of `first`; set them there.

    Raises:
        ShapeMismatch: `first` is not made for two variables.
    """

    needs_source = True

    def __init__(self, first: FaithfulBoundarySwap) -> None:
        super().__init__()
        if first.variables != 2:
            raise ShapeMismatch("SecondBoundarySwap: the first is made for one variable. Make it with variables=2.")
        self.first = first

    @property
    def features(self) -> int | None:
        return self.first.count

    def edges(self) -> tuple[Tensor, Tensor]:
        """Return where the swapped features begin and end."""
        boundary = self.first.boundary()
        return boundary, 2 * boundary

    def soft(self) -> Tensor:
        """Return the gate (K,) between 0 and 1, differentiable."""
        return boundary_mask(self.first.index(), *self.edges(), self.first.temperature)

    def hard(self) -> Tensor:
        """Return the gate (K,) as booleans."""
        return _between(self.first.index(), *self.edges())

    def gate(self) -> Tensor:
        """Return the gate (K,), as soft or hard as the first one's is."""
        return self.hard().to(self.first.fraction.dtype) if self.first.decided else self.soft()

    def penalty(self) -> Tensor:
        """Return zero (0-d): the first one counts the boundary."""
        return self.first.fraction.new_zeros(())

    def size(self) -> int:
        """Return how many features are swapped when the gate is hard; reads from the device."""
        return int(self.hard().sum())

    def forward(self, z: Tensor, source: Tensor | None) -> Tensor:
        return self.first._mixed(z, source, self.gate())


def _between(index: Tensor, left: Tensor | float, right: Tensor) -> Tensor:
    begins = left.detach().round() if isinstance(left, Tensor) else left
    return (index >= begins) & (index < right.detach().round())


def boundless_temperature(progress: float, ends: Sequence[float] = (50.0, 0.1)) -> float:
    """Return the temperature at `progress` (0 to 1) of a fit, linear between its `ends`."""
    start, end = ends
    return start + (end - start) * progress
