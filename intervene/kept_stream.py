"""`kept_stream`: what one block returned, handed on in later passes that compute only what is above it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from intervene.errors import ShapeMismatch
from intervene.families import Located, locate, resolve
from intervene.hooks import replaced, watch_call
from intervene.sites import Site


@contextmanager
def skipped(located: Located, count: int, stream: Tensor, tuples: bool) -> Iterator[None]:
    """Make the first `count` blocks return `stream` (B, s, D) without computing, until the block ends."""

    def stored(*_args: object, **_kwargs: object) -> Any:
        return (stream,) if tuples else stream

    with replaced([(block, stored) for block in located.layers[:count]]):
        yield


class KeptStream:
    """The output of one block in the latest pass, without its gradient, and a way to start other passes from it."""

    def __init__(self, located: Located, layer: int) -> None:
        """Hold block `layer` of a located model; `kept_stream` is what makes one."""
        self._located, self._layer = located, layer
        self._tuples = False
        self.stream: Tensor | None = None

    def _take(self, returned: Any) -> None:
        if returned is None:  # the block raised
            return
        self._tuples = isinstance(returned, tuple)
        self.stream = (returned[0] if self._tuples else returned).detach()

    @contextmanager
    def handed_on(self) -> Iterator[None]:
        """Let passes inside the block hand the kept stream on, and compute only what is above it.

        The same batch has to be run. An intervention at the kept block acts on what is handed on; one below it would
        act on nothing.

        Raises:
            ShapeMismatch: no pass was kept.
        """
        if self.stream is None:
            raise ShapeMismatch("Kept stream: no pass has run in its block. Call the model there first.")
        with skipped(self._located, self._layer + 1, self.stream, self._tuples):
            yield


@contextmanager
def kept_stream(model: nn.Module, layer: int) -> Iterator[KeptStream]:
    """Keep what block `layer` returns in each pass inside the block, so that a second pass can share the first one's.

    Raises:
        SiteOutOfRange: the model has no such block.
    """
    located = locate(model)
    kept = KeptStream(located, resolve(model, Site("block_output", layer)).site.layer or 0)
    with ExitStack() as stack:
        watch_call(stack, located.layers[kept._layer], after=kept._take)
        yield kept
