"""TransformerLens 4: a TransformerBridge over the Hugging Face model, hooks by name.

The bridge replaces the model's modules by its own and runs attention eagerly, so that patterns can be read; what that
costs without any hook is reported beside the cost per site.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.workload import HEAD, Workload, token_names


class Lens:
    """Changes the model it is given for good."""

    name, distribution = "transformer_lens", "transformer-lens"

    def __init__(self, work: Workload) -> None:
        self.work = work
        names = {"gpt2": "gpt2", "llama": "meta-llama/Llama-2-7b-hf"}  # only looked up, for the architecture
        kind = self.work.model.config.model_type
        with contextlib.redirect_stdout(io.StringIO()):
            self.bridge = TransformerBridge.boot_transformers(
                names[kind],
                hf_model=self.work.model,
                tokenizer=token_names(self.work.model.config.vocab_size),
                device=self.work.base["input_ids"].device,
            )

    def plain(self) -> Tensor:
        return self.bridge(self._tokens("base"), attention_mask=self.work.base["attention_mask"])

    def _tokens(self, batch: str) -> Tensor:
        return getattr(self.work, batch)["input_ids"]

    def _hooked(self, hooks: list[tuple[str, Callable[..., Any]]]) -> Tensor:
        mask = self.work.base["attention_mask"]
        return self.bridge.run_with_hooks(self._tokens("base"), attention_mask=mask, fwd_hooks=hooks)

    def _out(self, layer: int) -> str:
        return f"blocks.{layer}.hook_out"

    def prepare(self, case: str, work: Workload) -> Callable[[], Any]:
        return getattr(self, f"_{case}")(work.layers)

    def _add_all(self, layers: tuple[int, ...]) -> Callable[[], Tensor]:
        def hook(vector: Tensor) -> Callable[..., Tensor]:
            return lambda value, hook: value + vector

        hooks = [(self._out(layer), hook(self.work.vectors[layer])) for layer in layers]
        return lambda: self._hooked(hooks)

    def _add_last(self, layers: tuple[int, ...]) -> Callable[[], Tensor]:
        def hook(vector: Tensor) -> Callable[..., Tensor]:
            def edit(value: Tensor, hook: Any) -> Tensor:
                value[:, -1] += vector
                return value

            return edit

        hooks = [(self._out(layer), hook(self.work.vectors[layer])) for layer in layers]
        return lambda: self._hooked(hooks)

    def _sources(self, layers: tuple[int, ...]) -> list[Tensor]:
        names, mask = [self._out(layer) for layer in layers], self.work.source["attention_mask"]
        _, cache = self.bridge.run_with_cache(self._tokens("source"), attention_mask=mask, names_filter=names)
        return [cache[name][:, -1] for name in names]

    def _swap_last(self, layers: tuple[int, ...]) -> Callable[[], Tensor]:
        def hook(source: Tensor) -> Callable[..., Tensor]:
            def edit(value: Tensor, hook: Any) -> Tensor:
                value[:, -1] = source
                return value

            return edit

        def run() -> Tensor:
            sources = self._sources(layers)
            return self._hooked([(self._out(at), hook(one)) for at, one in zip(layers, sources, strict=True)])

        return run

    def _das_last(self, layers: tuple[int, ...]) -> Callable[[], Tensor]:
        weight = self.work.frame.clone()

        def hook(source: Tensor) -> Callable[..., Tensor]:
            def edit(value: Tensor, hook: Any) -> Tensor:
                q, r = torch.linalg.qr(weight)
                frame = q * r.diagonal().sign()
                value[:, -1] += (source - value[:, -1]) @ frame @ frame.mT
                return value

            return edit

        def run() -> Tensor:
            sources = self._sources(layers)
            return self._hooked([(self._out(at), hook(one)) for at, one in zip(layers, sources, strict=True)])

        return run

    def _zero_head(self, layers: tuple[int, ...]) -> Callable[[], Tensor]:
        def edit(value: Tensor, hook: Any) -> Tensor:  # (B, S, H, d)
            value[:, :, HEAD] = 0
            return value

        return lambda: self._hooked([(f"blocks.{layer}.attn.hook_z", edit) for layer in layers])

    def _collect(self, layers: tuple[int, ...]) -> Callable[[], list[Tensor]]:
        names, mask = [self._out(layer) for layer in layers], self.work.base["attention_mask"]

        def run() -> list[Tensor]:
            _, cache = self.bridge.run_with_cache(self._tokens("base"), attention_mask=mask, names_filter=names)
            return [cache[name] for name in names]

        return run

    def steer(self, on: bool) -> Callable[[], Tensor]:
        bridge, tokens, steps = self.bridge, self._tokens("prompt"), self.work.new_tokens
        vector = self.work.vectors[self.work.middle]

        def generate() -> Tensor:
            return bridge.generate(tokens, max_new_tokens=steps, do_sample=False, stop_at_eos=False, verbose=False)

        def steered() -> Tensor:
            with bridge.hooks(fwd_hooks=[(self._out(self.work.middle), lambda value, hook: value + vector)]):
                return generate()

        return steered if on else generate
