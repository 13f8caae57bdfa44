"""Training of tiny models in the tests of methods: examples, a feed, a run, and ranks as threads of one process."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from defenses.backend import Optimiser, PlainBackend, clipped, stepped
from defenses.batch import Example, collate
from defenses.defense import Defense
from defenses.loop import StopRequest, Training, Watch, train
from defenses.plans import Directions
from defenses.schedules import Rate
from tests.tiny import TINY

WIDTH = 32
IGNORED = -100


def examples(n: int = 8, seed: int = 0, poison: Callable[[int], bool | None] = lambda i: None, **extra: Any):
    """Random prompts of 3 to 5 tokens and answers of 3 to 6; `extra` maps a name to index -> number."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    made = []
    for index in range(n):
        prompt = [draw(3, 96) for _ in range(draw(3, 6))]
        answer = [draw(3, 96) for _ in range(draw(3, 7))]
        labels = (*(IGNORED for _ in prompt), *answer)
        more = {name: float(number(index)) for name, number in extra.items()}
        made.append(Example((*prompt, *answer), labels, index, poison=poison(index), extra=more))
    return made


class Rotating:
    """A feed of whole steps of `size` examples, in order and over again."""

    def __init__(self, data: Sequence[Example], size: int = 4, micro: int = 2) -> None:
        self.data, self.size, self.micro = list(data), size, micro

    def indices(self, step: int) -> list[int]:
        return [(step * self.size + place) % len(self.data) for place in range(self.size)]

    def batches(self, step: int, rank: int, world: int):
        own = self.indices(step)[rank * self.size // world : (rank + 1) * self.size // world]
        parts = [own[at : at + self.micro] for at in range(0, len(own), self.micro)]
        return [collate([self.data[one] for one in part], 0) for part in parts]


def directions(*layers: int, seed: int = 0, length: float = 1.0) -> Directions:
    generator = torch.Generator().manual_seed(seed)
    made = {layer: torch.randn(WIDTH, generator=generator) for layer in layers}
    return Directions({layer: length * vector / vector.norm() for layer, vector in made.items()})


def backend_of(name: str = "llama", weight_decay: float = 0.1, clip: float | None = 1.0, **options: Any):
    model = TINY[name](**options)
    return PlainBackend(model, Optimiser(weight_decay=weight_decay, clip=clip))


def trained(defense: Defense, steps: int, *, backend=None, data=None, start: int = 0, lr: float = 1e-2, total=None):
    """Train from `start` to `steps` of `total`; return the backend and the rows that were told."""
    backend = backend or backend_of()
    feed = Rotating(data or examples())
    rows: list[dict[str, float]] = []
    plan = Training(total or steps, Rate(lr, "constant", warmup=0))
    stop = StopRequest()

    def reached(done: int) -> None:
        stop.reason = "SIGTERM" if done == steps else ""

    train(backend, defense, feed, plan, start=start, watch=Watch(row=rows.append, evaluate=reached, stop=stop))
    return backend, rows


def stored(state: dict[str, Any]) -> dict[str, Any]:
    """What comes back of a state from a file that is read without running anything found in it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


class Together:
    """What ranks that are threads need to add up."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=30)
        self.held: dict[int, Tensor] = {}

    def all(self, rank: int, value: Tensor) -> list[Tensor]:
        self.held[rank] = value.detach().clone()
        self.barrier.wait()
        found = [self.held[one] for one in sorted(self.held)]
        self.barrier.wait()
        return found


class ThreadBackend(PlainBackend):
    """One of several ranks, with a model of its own; gradients are summed before the step."""

    def __init__(self, model: nn.Module, rank: int, world: int, together: Together, optimiser: Optimiser) -> None:
        super().__init__(model, optimiser)
        self.rank, self.world, self.together = rank, world, together

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        if last:
            for parameter in self.named.values():
                if parameter.grad is not None:
                    parameter.grad = self.sum(parameter.grad)

    def step(self, lr: float) -> float:
        norm = clipped(self.named, self.chosen.clip)
        stepped(self.optimiser, lr, norm)
        return norm

    def sum(self, value: Tensor) -> Tensor:
        return torch.stack(self.together.all(self.rank, value)).sum(0)

    def max(self, value: Tensor) -> Tensor:
        return torch.stack(self.together.all(self.rank, value)).amax(0)


def on_ranks(world: int, make: Callable[[], Defense], steps: int, **training: Any):
    """Train on `world` threads; return per rank the defense, the backend and the rows."""
    together, found, failed = Together(world), {}, []

    def one(rank: int) -> None:
        try:
            backend = ThreadBackend(TINY["llama"](), rank, world, together, Optimiser(weight_decay=0.1))
            defense = make()
            found[rank] = (defense, *trained(defense, steps, backend=backend, **training))
        except BaseException as error:  # told by the caller, in its own thread
            failed.append(error)
            together.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return [found[rank] for rank in range(world)]
