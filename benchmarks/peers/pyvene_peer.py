"""pyvene: an IntervenableModel per plan, one call per batch.

Sources share one group where the case has sources; `swap_ungrouped` is the same plan without group keys, as in
pyvene's own examples.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.workload import HEAD, RANK, Workload

with contextlib.redirect_stdout(io.StringIO()):  # greets on import
    import pyvene


class Pyvene:
    """Freezes the model it is given and removes every hook on it."""

    name, distribution = "pyvene", "pyvene"
    extra_cases: ClassVar = {"swap_ungrouped": "swap_last"}

    def __init__(self, work: Workload) -> None:
        self.work = work

    def plain(self) -> Tensor:
        return self.work.model(**self.work.base).logits

    def _wrap(self, representations: list[dict[str, Any]], kind: Any) -> Any:
        wrapped = pyvene.IntervenableModel(
            pyvene.IntervenableConfig([{**one, "intervention_type": kind} for one in representations]), self.work.model
        )
        wrapped.set_device(self.work.base["input_ids"].device, set_model=False)
        return wrapped

    def prepare(self, case: str, work: Workload) -> Callable[[], Any]:
        base, source = self.work.base, self.work.source
        last, everywhere = base["input_ids"].shape[1] - 1, None
        sites = [{"layer": layer, "component": "block_output"} for layer in work.layers]
        if case in ("add_all", "add_last"):
            wrapped = self._wrap(
                [{**site, "source_representation": self.work.vectors[site["layer"]]} for site in sites],
                pyvene.AdditionIntervention,
            )
            where = everywhere if case == "add_all" else {"base": last}
            return lambda: wrapped(base, unit_locations=where)[1].logits
        if case in ("swap_last", "swap_ungrouped", "das_last"):
            if case != "swap_ungrouped":
                sites = [{**site, "group_key": 0} for site in sites]
            wrapped = self._swap(case, sites)
            return lambda: wrapped(base, [source], {"sources->base": (last, last)})[1].logits
        if case == "zero_head":
            heads = [{"layer": layer, "component": "head_attention_value_output", "unit": "h"} for layer in work.layers]
            wrapped = self._wrap(heads, pyvene.ZeroIntervention)
            return lambda: wrapped(base, unit_locations={"base": HEAD})[1].logits
        assert case == "collect"
        # it keeps as many numbers as the declared units have, whatever it is given: all tokens must be declared
        tokens = {"max_number_of_units": last + 1}
        wrapped = self._wrap([{**site, **tokens} for site in sites], pyvene.CollectIntervention)
        return lambda: wrapped(base, unit_locations=everywhere)[0][1]

    def _swap(self, case: str, sites: list[dict[str, Any]]) -> Any:
        if case != "das_last":
            return self._wrap(sites, pyvene.VanillaIntervention)
        wrapped = self._wrap(
            [{**site, "low_rank_dimension": RANK} for site in sites], pyvene.LowRankRotatedSpaceIntervention
        )
        for intervention in wrapped.interventions.values():
            with torch.no_grad():
                intervention.rotate_layer.weight = self.work.frame
        return wrapped

    def steer(self, on: bool) -> Callable[[], Tensor]:
        work = self.work
        length = {"max_new_tokens": work.new_tokens, "min_new_tokens": work.new_tokens}
        options = {**length, "do_sample": False, "pad_token_id": 0}
        if not on:
            return lambda: work.model.generate(**work.prompt, **options)
        site = {"layer": work.middle, "component": "block_output", "source_representation": work.vectors[work.middle]}
        wrapped = self._wrap([site], pyvene.AdditionIntervention)
        return lambda: wrapped.generate(work.prompt, intervene_on_prompt=True, **options)[1]
