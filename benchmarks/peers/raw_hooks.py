"""The least that can do the work: hand-written torch hooks, registered and removed for each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.workload import Workload


def _replace(output: Any, new: Tensor) -> Any:
    return (new, *output[1:]) if isinstance(output, tuple) else new


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _hooks(modules: list[Any], hooks: list[Callable[..., Any]], pre: bool = False) -> Iterator[None]:
    handles = []
    try:
        for module, hook in zip(modules, hooks, strict=True):
            handles.append((module.register_forward_pre_hook if pre else module.register_forward_hook)(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


class RawHooks:
    """No checks, no padding, the last column taken for the last token: a floor, not a tool."""

    name, distribution = "hooks", "torch"

    def __init__(self, work: Workload) -> None:
        self.work = work

    def plain(self) -> Tensor:
        return self.work.model(**self.work.base).logits

    def prepare(self, case: str, work: Workload) -> Callable[[], Tensor]:
        return getattr(self, f"_{case}")(work)

    def _run(self, work: Workload, hooks: list[Callable[..., Any]]) -> Tensor:
        with _hooks([work.blocks[layer] for layer in work.layers], hooks):
            return work.model(**work.base).logits

    def _add_all(self, work: Workload) -> Callable[[], Tensor]:
        def hook(vector: Tensor) -> Callable[..., Any]:
            return lambda module, args, output: _replace(output, _tensor(output) + vector)

        hooks = [hook(work.vectors[layer]) for layer in work.layers]
        return lambda: self._run(work, hooks)

    def _add_last(self, work: Workload) -> Callable[[], Tensor]:
        def hook(vector: Tensor) -> Callable[..., Any]:
            def edit(module: Any, args: Any, output: Any) -> Any:
                new = _tensor(output).clone()
                new[:, -1].add_(vector)
                return _replace(output, new)

            return edit

        hooks = [hook(work.vectors[layer]) for layer in work.layers]
        return lambda: self._run(work, hooks)

    def _sources(self, work: Workload) -> list[Tensor]:
        kept: list[Tensor] = []
        with _hooks(
            [work.blocks[layer] for layer in work.layers],
            [lambda module, args, output: kept.append(_tensor(output)[:, -1])] * len(work.layers),
        ):
            work.model(**work.source)
        return kept

    def _swap_last(self, work: Workload) -> Callable[[], Tensor]:
        def hook(source: Tensor) -> Callable[..., Any]:
            def edit(module: Any, args: Any, output: Any) -> Any:
                new = _tensor(output).clone()
                new[:, -1].copy_(source)
                return _replace(output, new)

            return edit

        return lambda: self._run(work, [hook(source) for source in self._sources(work)])

    def _das_last(self, work: Workload) -> Callable[[], Tensor]:
        weight = work.frame.clone()

        def hook(source: Tensor, frame: Tensor) -> Callable[..., Any]:
            def edit(module: Any, args: Any, output: Any) -> Any:
                new = _tensor(output).clone()
                last = new[:, -1]
                last.add_((source - last) @ frame @ frame.mT)
                return _replace(output, new)

            return edit

        def frame() -> Tensor:
            q, r = torch.linalg.qr(weight)  # learned, so it has to be made orthonormal in every run
            return q * r.diagonal().sign()

        return lambda: self._run(work, [hook(source, frame()) for source in self._sources(work)])

    def _zero_head(self, work: Workload) -> Callable[[], Tensor]:
        columns = work.head_columns

        def edit(module: Any, args: Any) -> Any:
            new = args[0].clone()
            new[..., columns].zero_()
            return (new, *args[1:])

        def run() -> Tensor:
            with _hooks([work.out_projections[i] for i in work.layers], [edit] * len(work.layers), pre=True):
                return work.model(**work.base).logits

        return run

    def _collect(self, work: Workload) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            kept: list[Tensor] = []
            self._run(work, [lambda module, args, output: kept.append(_tensor(output))] * len(work.layers))
            return kept

        return run

    def steer(self, on: bool) -> Callable[[], Tensor]:
        work = self.work
        vector = work.vectors[work.middle]

        def run() -> Tensor:
            return generate(work.model, work)

        def steered() -> Tensor:
            with _hooks(
                [work.blocks[work.middle]],
                [lambda module, args, output: _replace(output, _tensor(output) + vector)],
            ):
                return generate(work.model, work)

        return steered if on else run


def generate(model: Any, work: Workload) -> Tensor:
    """Return `work.new_tokens` greedy tokens (B, S + new) after the prompt, with the key/value cache."""
    length = {"max_new_tokens": work.new_tokens, "min_new_tokens": work.new_tokens}
    return model.generate(**work.prompt, **length, do_sample=False, pad_token_id=0)
