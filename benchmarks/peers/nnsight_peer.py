"""nnsight: a trace per batch, whose body is ordinary Python on the values of the running forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nnsight
import torch
from torch import Tensor

from benchmarks.workload import Workload, token_names


class Nnsight:
    """Wraps the model; a trace's body is compiled once and kept by nnsight."""

    name, distribution = "nnsight", "nnsight"

    def __init__(self, work: Workload) -> None:
        self.work = work
        tokenizer = token_names(self.work.model.config.vocab_size)
        self.model = nnsight.TransformersModel(self.work.model, tokenizer=tokenizer, device=self.work.vectors.device)
        inner = self.model.transformer if hasattr(self.work.model, "transformer") else self.model.model
        self.blocks = list(inner.h if hasattr(self.work.model, "transformer") else inner.layers)
        gpt2 = hasattr(self.work.model, "transformer")
        self.out_projections = [block.attn.c_proj if gpt2 else block.self_attn.o_proj for block in self.blocks]

    def plain(self) -> Tensor:
        return self.work.model(**self.work.base).logits

    def prepare(self, case: str, work: Workload) -> Callable[[], Any]:
        return getattr(self, f"_{case}")(work.layers)

    def _add_all(self, layers: tuple[int, ...]) -> Callable[[], Tensor]:
        model, blocks, work, vectors = self.model, self.blocks, self.work, list(self.work.vectors)

        def run() -> Tensor:
            with model.trace(work.base):
                for layer in layers:
                    blocks[layer].output = blocks[layer].output + vectors[layer]
                logits = model.output.logits.save()
            return logits

        return run

    def _add_last(self, layers: tuple[int, ...]) -> Callable[[], Tensor]:
        model, blocks, work, vectors = self.model, self.blocks, self.work, list(self.work.vectors)

        def run() -> Tensor:
            with model.trace(work.base):
                for layer in layers:
                    blocks[layer].output[:, -1] += vectors[layer]
                logits = model.output.logits.save()
            return logits

        return run

    def _sources(self, layers: tuple[int, ...]) -> list[Tensor]:
        model, blocks, work = self.model, self.blocks, self.work
        with model.trace(work.source) as tracer:
            kept = nnsight.save([])
            for layer in layers:
                kept.append(blocks[layer].output[:, -1])
            tracer.stop()
        return kept

    def _swap_last(self, layers: tuple[int, ...]) -> Callable[[], Tensor]:
        model, blocks, work = self.model, self.blocks, self.work

        def run() -> Tensor:
            sources = self._sources(layers)
            with model.trace(work.base):
                for layer, source in zip(layers, sources, strict=True):
                    blocks[layer].output[:, -1] = source
                logits = model.output.logits.save()
            return logits

        return run

    def _das_last(self, layers: tuple[int, ...]) -> Callable[[], Tensor]:
        model, blocks, work = self.model, self.blocks, self.work
        weight = self.work.frame.clone()

        def run() -> Tensor:
            sources = self._sources(layers)
            with model.trace(work.base):
                for layer, source in zip(layers, sources, strict=True):
                    q, r = torch.linalg.qr(weight)
                    frame = q * r.diagonal().sign()
                    last = blocks[layer].output[:, -1]
                    blocks[layer].output[:, -1] = last + (source - last) @ frame @ frame.mT
                logits = model.output.logits.save()
            return logits

        return run

    def _zero_head(self, layers: tuple[int, ...]) -> Callable[[], Tensor]:
        model, projections, work, columns = self.model, self.out_projections, self.work, self.work.head_columns

        def run() -> Tensor:
            with model.trace(work.base):
                for layer in layers:
                    projections[layer].input[..., columns] = 0
                logits = model.output.logits.save()
            return logits

        return run

    def _collect(self, layers: tuple[int, ...]) -> Callable[[], list[Tensor]]:
        model, blocks, work = self.model, self.blocks, self.work

        def run() -> list[Tensor]:
            with model.trace(work.base) as tracer:
                kept = nnsight.save([])
                for layer in layers:
                    kept.append(blocks[layer].output)
                tracer.stop()
            return kept

        return run

    def steer(self, on: bool) -> Callable[[], Tensor]:
        model, work = self.model, self.work
        block, vector, steps = self.blocks[work.middle], work.vectors[work.middle], work.new_tokens
        length = {"max_new_tokens": steps, "min_new_tokens": steps}
        options = {**length, "do_sample": False, "pad_token_id": 0}
        if not on:
            return lambda: work.model.generate(**work.prompt, **options)

        def run() -> Tensor:
            with model.generate(work.prompt, **options) as tracer:
                for _step in tracer.iter[:steps]:
                    block.output = block.output + vector
                ids = tracer.result.save()
            return ids

        return run
