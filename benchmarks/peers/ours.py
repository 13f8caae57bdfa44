"""This toolkit: a plan per case, one `with` block (or `interchange`) per batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.peers.raw_hooks import generate
from benchmarks.workload import HEAD, Workload
from intervene import Add, AllTokens, Intervention, LastToken, Subspace, Swap, Zero, capture, interchange, intervene


class Ours:
    """The model is used as it is."""

    name, distribution = "intervene", "interventions-toolkit"

    def __init__(self, work: Workload) -> None:
        self.work = work

    def plain(self) -> Tensor:
        return self.work.model(**self.work.base).logits

    def prepare(self, case: str, work: Workload) -> Callable[[], Any]:
        model, base, source = self.work.model, self.work.base, self.work.source
        sites = [f"L{layer}.block_output" for layer in work.layers]
        if case == "collect":

            def collect() -> list[Tensor]:
                with capture(model, sites, positions=AllTokens()) as acts:
                    model(**base)
                return [acts[site] for site in sites]

            return collect
        plan = self._plan(case, work, sites)
        if case in ("swap_last", "das_last"):
            return lambda: interchange(model, plan, base=base, source=source).logits

        def run() -> Tensor:
            with intervene(model, plan):
                return model(**base).logits

        return run

    def _plan(self, case: str, work: Workload, sites: list[str]) -> list[Intervention]:
        if case == "zero_head":
            heads = [f"L{layer}.head_output[{HEAD}]" for layer in work.layers]
            return [Intervention(head, Zero(), AllTokens()) for head in heads]
        if case == "swap_last":
            return [Intervention(site, Swap(), LastToken()) for site in sites]
        if case == "das_last":
            return [Intervention(site, Swap(), LastToken(), self._learned(work.frame)) for site in sites]
        positions = AllTokens() if case == "add_all" else LastToken()
        vectors = [work.vectors[layer] for layer in work.layers]
        return [Intervention(site, Add(vector), positions) for site, vector in zip(sites, vectors, strict=True)]

    @staticmethod
    def _learned(frame: Tensor) -> Subspace:
        # learned, so the frame is made orthonormal in every run
        return Subspace.from_frame(frame, trainable=True).to(frame.device)

    def steer(self, on: bool) -> Callable[[], Tensor]:
        work = self.work
        plan = [Intervention(f"L{work.middle}.block_output", Add(work.vectors[work.middle]), AllTokens())]

        def steered() -> Tensor:
            with intervene(work.model, plan):
                return generate(work.model, work)

        return steered if on else lambda: generate(work.model, work)
