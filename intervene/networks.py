"""Two small networks that are no language models: an MLP and a GRU, for toy causal models and for tests.

Their blocks are sites like any other: "L0.block_output". An MLP on vectors (B, W) has one token per example.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class NetworkConfig:
    """What the family table and the fingerprint know of a small network; widths in numbers."""

    model_type: str
    input_size: int
    hidden_size: int
    num_hidden_layers: int
    num_labels: int


class _Dense(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width_out)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.relu(self.linear(hidden_states))


class MLP(nn.Module):
    """`n_layers` ReLU layers of `hidden` units and a linear read-out: (B, W) -> (B, V)."""

    def __init__(self, inputs: int, hidden: int, n_layers: int, labels: int, *, seed: int = 0) -> None:
        super().__init__()
        self.config = NetworkConfig("mlp", inputs, hidden, n_layers, labels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = [inputs] + [hidden] * n_layers
            self.layers = nn.ModuleList(_Dense(a, b) for a, b in itertools.pairwise(widths))
            self.head = nn.Linear(hidden, labels)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, V) of vectors (B, W)."""
        hidden = inputs
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


class GRU(nn.Module):
    """`n_layers` recurrent layers of `hidden` units and a linear read-out of the last step: (B, S, W) -> (B, V).

    A block's output (B, S, D) holds its state at every step. Editing one step changes what the layers above read
    there; within its own layer the later steps are already computed and do not change.
    """

    def __init__(self, inputs: int, hidden: int, n_layers: int, labels: int, *, seed: int = 0) -> None:
        super().__init__()
        self.config = NetworkConfig("gru", inputs, hidden, n_layers, labels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = [inputs] + [hidden] * n_layers
            self.layers = nn.ModuleList(nn.GRU(a, b, batch_first=True) for a, b in itertools.pairwise(widths))
            self.head = nn.Linear(hidden, labels)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, V) of sequences (B, S, W)."""
        hidden = inputs
        for layer in self.layers:
            hidden, _ = layer(hidden)
        logits: Tensor = self.head(hidden[:, -1])
        return logits


def train_classifier(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch_size: int,
    lr: float = 1e-3,
    seed: int = 0,
    weight_decay: float = 0.0,
) -> float:
    """Train `model` in place with Adam on cross-entropy and return the last step's loss in nats; eval mode after.

    Batches are drawn with replacement from `inputs` (N, ...) and `labels` (N,). The learning rate falls linearly to 0.
    `weight_decay` is Adam's: it adds weight_decay * parameter to the gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    model.train()
    loss = torch.tensor(float("nan"))
    for _ in range(steps):
        rows = torch.randint(len(labels), (batch_size,), generator=generator)
        loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimiser.step()
        schedule.step()
    model.eval()
    return float(loss.detach())
