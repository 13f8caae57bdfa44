"""`shared_passes`: several passes over one batch that compute what lies below the directions only once.

    with shared_passes(backend, batch, directions) as shared:
        natural = shared.natural(grad=True)                  # (B, S) token losses, all blocks
        with shared.again():
            injected = token_losses(backend, batch, grad=False)     # only the blocks above the lowest direction

A model that draws random numbers (dropout) is run in full in the later passes too, from the same random state, so that
passes differ by what is injected and by nothing else. Whether it draws any is seen from the natural pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from defenses.backend import Backend
from defenses.batch import Batch
from defenses.errors import BackendError
from defenses.objectives import token_losses
from defenses.plans import Directions, injection
from intervene.errors import asked_found_do
from intervene.families import locate
from intervene.kept_stream import KeptStream, kept_stream
from intervene.suffix import first_block


class SharedPasses:
    """The passes over one batch; `shared_passes` makes it."""

    def __init__(self, backend: Backend, batch: Batch, kept: KeptStream | None) -> None:
        """Hold the stream that later passes start from; None: they are run in full."""
        self.backend, self.batch = backend, batch
        self._kept = kept
        self._stream: Tensor | None = None
        self._before = self._after = RandomState(backend.device)
        self.drew = False

    def natural(self, *, grad: bool) -> Tensor:
        """Return (B, S) token losses without any edit, as `token_losses` does, and keep what later passes share."""
        self._before = RandomState(self.backend.device)
        losses = token_losses(self.backend, self.batch, grad=grad)
        self._after = RandomState(self.backend.device)
        self.drew = not self._before.same(self._after)
        self._stream = None if self._kept is None else self._kept.stream
        return losses

    @contextmanager
    def again(self, *, wide: bool = False) -> Iterator[None]:
        """Let one pass inside the block share with the natural one. Its backward belongs inside too.

        Args:
            wide: start from the stream in the dtype of the weights, for a pass outside of autocast.
        """
        if self._kept is None or self._stream is None or self.drew:
            self._before.restore()
            try:
                yield
            finally:
                self._after.restore()
            return
        # Edits at the kept block are what it would hold now: each pass starts from the natural stream.
        self._kept.stream = self._stream.to(weights_dtype(self.backend.model)) if wide else self._stream
        with self._kept.handed_on():
            yield


@contextmanager
def shared_passes(backend: Backend, batch: Batch, directions: Directions) -> Iterator[SharedPasses]:
    """Keep, in a natural pass inside the block, the stream below the lowest of `directions`, for later passes."""
    after = first_block(injection(directions, 1.0), locate(backend.model).n_layers)
    if after < 0:
        yield SharedPasses(backend, batch, None)
        return
    with kept_stream(backend.model, after) as kept:
        yield SharedPasses(backend, batch, kept)


class Inside:
    """A backend's model inside its wrappers, for passes with gradients that no optimiser is to see.

    `torch.autograd.grad` on the output of DeepSpeed's engine would count as a training pass, and divide.
    """

    def __init__(self, backend: Backend, *, wide: bool = False) -> None:
        """Run as training passes do, or, `wide`, without autocast: in the dtype of the weights."""
        self.model: nn.Module = backend.model
        self._precision = nullcontext if wide else backend.precision

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context passes run in."""
        return self._precision()

    def forward(self, **inputs: Any) -> Any:
        """Return the model's output, with a graph."""
        with self.precision():
            return self.model(**inputs)

    def token_losses(self, batch: Batch) -> Tensor:
        """Return (B, S) token losses, with a graph."""
        return token_losses(cast(Backend, self), batch)


class RandomState:
    """The random state of the CPU and of one device, as it was when this was made."""

    def __init__(self, device: torch.device) -> None:
        """Take it."""
        self.device = device
        self.states = [torch.get_rng_state()]
        if device.type == "cuda":
            self.states.append(torch.cuda.get_rng_state(device))

    def same(self, other: RandomState) -> bool:
        """Return whether nothing was drawn in between."""
        return all(torch.equal(one, two) for one, two in zip(self.states, other.states, strict=True))

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self.states[0])
        if len(self.states) > 1:
            torch.cuda.set_rng_state(self.states[1], self.device)


def weights_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's first floating parameter."""
    return next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)


def require_whole(model: nn.Module, asked: str) -> None:
    """Refuse parameters that are cut over ranks: torch cannot differentiate twice through their gathering (FSDP2 ends
    the process, ZeRO-3 finds them empty).

    Raises:
        BackendError: some parameter is cut.
    """
    cut = next(
        (name for name, one in model.named_parameters() if hasattr(one, "ds_id") or hasattr(one, "to_local")), ""
    )
    if cut:
        found = f"{cut} is cut over ranks, and the backward pass cannot be differentiated through."
        raise BackendError(asked_found_do(asked, found, "Use method=difference, or backend ddp or zero2."))
