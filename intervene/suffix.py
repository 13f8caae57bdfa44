"""Exact recomputation of only the layers and tokens that an edit can change.

The model is frozen and attention is causal, so an edit at block l and column p changes nothing below block l and
nothing before column p. `prefix_of` runs the bases once and keeps the residual stream at some blocks and all keys and
values. `suffix_logits` then hands the stored stream on from block l (its skipped blocks return what is stored, for the
duration of the call) and runs the model's *own* forward on the tokens from p on, with the prefix in its key/value
cache. No family code: exact wherever the model's cached forward is. `prefix_of` proves it on each batch, by comparing
an unedited suffix with the full pass, and refuses otherwise; the caller then runs full passes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from intervene.errors import BadVector, ShapeMismatch, UnsupportedModel
from intervene.families import Located, locate, located_once
from intervene.hooks import watch_call
from intervene.interventions import Plan
from intervene.run import capture, intervene
from intervene.sites import Site

TOLERANCE = 1e-4  # of the logits' own spread, in fp32: the two ways differ by rounding only


@dataclass(frozen=True, eq=False)
class Prefix:
    """Bases after their one full pass, left-padded, scored at the last column.

    `inputs` (input_ids, attention_mask, position_ids: (B, S); marks), `streams` block -> its output (N, S, D),
    `cache` per layer keys and values (N, G, S, d), `logits` (B, V) of the last column without any edit. `index` (B,)
    picks the examples out of streams and cache, which are copied only where a pass needs them; None: all. `exact` is
    False if only full passes are right for this model; `difference` is what was measured.
    """

    inputs: dict[str, Any]
    streams: dict[int, Tensor]
    cache: tuple[tuple[Tensor, Tensor], ...]
    logits: Tensor
    tuples: bool
    exact: bool = True
    difference: float = 0.0
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.logits)

    def rows(self, index: Tensor) -> Prefix:
        """Return the prefix of some examples; `index` (b,) int64."""
        chosen = index if self.index is None else self.index[index]
        return replace(self, inputs=_rows(self.inputs, index), logits=self.logits[index], index=chosen)

    def stream(self, layer: int, start: int) -> Tensor:
        """Return the output of block `layer` (B, s, D) on the columns from `start`."""
        part = self.streams[layer][:, start:]
        return part if self.index is None else part[self.index]

    def past(self, first: int, start: int) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values (B, G, start, d) per layer, before column `start`.

        Layers below `first` are skipped in the pass that reads this: they get the right shape without a copy.
        """
        rows = len(self)
        made = []
        for layer, pair in enumerate(self.cache):
            if layer < first:
                keys, values = (part[:1, :, :start].expand(rows, -1, -1, -1) for part in pair)
            else:
                keys, values = (
                    part[:, :, :start] if self.index is None else part[self.index, :, :start] for part in pair
                )
            made.append((keys, values))
        return made


def _rows(inputs: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in inputs.items():
        made[name] = _rows(value, index) if isinstance(value, Mapping) else value[index.to(value.device)]
    return made


def join(parts: Sequence[Prefix]) -> Prefix:
    """Return one prefix of all examples; the parts must be padded to one length."""
    first = parts[0]
    return replace(
        first,
        inputs=_join_inputs([part.inputs for part in parts]),
        streams={layer: torch.cat([part.streams[layer] for part in parts]) for layer in first.streams},
        cache=tuple(
            (torch.cat([part.cache[i][0] for part in parts]), torch.cat([part.cache[i][1] for part in parts]))
            for i in range(len(first.cache))
        ),
        logits=torch.cat([part.logits for part in parts]),
        exact=all(part.exact for part in parts),
        difference=max(part.difference for part in parts),
    )


def _join_inputs(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in parts[0].items():
        values = [part[name] for part in parts]
        made[name] = _join_inputs(values) if isinstance(value, Mapping) else torch.cat(values)
    return made


def positions_of(attention_mask: Tensor) -> Tensor:
    """Return (B, S) position ids that count real tokens only, as `generate` derives them."""
    return (attention_mask.long().cumsum(1) - 1).clamp_min(0)


def _accepts(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def call_inputs(model: nn.Module, inputs: Mapping[str, Any], start: int = 0) -> dict[str, Any]:
    """Return the keyword arguments of a forward over the columns from `start`, with logits of the last column only."""
    hf = locate(model).hf
    call: dict[str, Any] = {
        "input_ids": inputs["input_ids"][:, start:],
        "attention_mask": inputs["attention_mask"],
    }
    if _accepts(hf, "position_ids"):
        call["position_ids"] = inputs["position_ids"][:, start:]
    if _accepts(hf, "logits_to_keep"):
        # As a tensor, not as the number 1: the slice it would make is not contiguous, and the product with the
        # vocabulary then runs example by example (measured: four fifths of a training step).
        call["logits_to_keep"] = torch.tensor([call["input_ids"].shape[1] - 1], device=call["input_ids"].device)
    return call


@located_once()
def prefix_of(model: nn.Module, inputs: Mapping[str, Any], layers: Sequence[int]) -> Prefix:
    """Return the prefix of left-padded `inputs` (input_ids, attention_mask (B, S), marks), keeping blocks `layers`.

    Raises:
        ShapeMismatch: some example's last column is padding, where its answer would be scored.
        BadVector: the model's own logits there are NaN or infinite.
    """
    from transformers import DynamicCache  # only language models come here

    if not bool(inputs["attention_mask"][:, -1].all()):
        raise ShapeMismatch("Prefix: the last column of some example is padding. Pad on the left.")
    located = locate(model)
    full = {**inputs, "position_ids": positions_of(inputs["attention_mask"])}
    cache: Any = DynamicCache()
    sites = [Site("block_output", layer) for layer in sorted(set(layers))]
    returned: list[Any] = []
    with ExitStack() as stack:
        watch_call(stack, located.layers[0], after=returned.append)
        stack.enter_context(torch.no_grad())
        acts = stack.enter_context(capture(model, sites))
        logits = located.hf(**call_inputs(model, full), past_key_values=cache, use_cache=True).logits[:, -1]
    prefix = Prefix(
        inputs=full,
        streams={site.layer: acts[site] for site in sites if site.layer is not None},
        cache=tuple((layer.keys, layer.values) for layer in cache.layers),
        logits=logits,
        tuples=isinstance(returned[0], tuple),
    )
    return _proved(model, prefix)


def _proved(model: nn.Module, prefix: Prefix) -> Prefix:
    """Return `prefix` with the difference between an unedited suffix and the full pass, on its first examples."""
    few = prefix.rows(torch.arange(min(2, len(prefix))))
    start = prefix.inputs["input_ids"].shape[1] // 2
    if not bool(torch.isfinite(prefix.logits).all()):
        raise BadVector(
            "Prefix: the model's own logits are NaN or infinite, so no score would mean anything. "
            "Check the weights and the dtype."
        )
    difference = 0.0
    for layer in list(prefix.streams)[:: max(1, len(prefix.streams) - 1)]:
        with torch.no_grad():
            again = _run(model, few, layer, start)
        difference = max(difference, float((again - few.logits).abs().max() / few.logits.std().clamp_min(1e-6)))
    tolerance = TOLERANCE if prefix.logits.dtype == torch.float32 else 0.05
    return replace(prefix, exact=difference <= tolerance, difference=difference)


@contextmanager
def _skipped(located: Located, count: int, stream: Tensor, tuples: bool) -> Iterator[None]:
    """Make the first `count` blocks return `stream` (B, s, D) without computing, until the block ends."""

    def stored(*_args: object, **_kwargs: object) -> Any:
        return (stream,) if tuples else stream

    blocks = located.layers[:count]
    try:
        for block in blocks:
            block.forward = stored  # an instance attribute: the class and the module tree stay as they are
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _run(model: nn.Module, prefix: Prefix, after: int, start: int) -> Tensor:
    """Return (B, V) logits of the last column from the stream after block `after`, columns from `start`."""
    from transformers import DynamicCache

    located = locate(model)
    call = call_inputs(model, prefix.inputs, start)
    if start:
        call["past_key_values"] = DynamicCache(prefix.past(after + 1, start))
    with ExitStack() as stack:
        if after >= 0:
            stack.enter_context(_skipped(located, after + 1, prefix.stream(after, start), prefix.tuples))
        logits: Tensor = located.hf(**call, use_cache=bool(start)).logits[:, -1]
    return logits


def first_block(plan: Plan, n_layers: int) -> int:
    """Return the last block whose output no edit of `plan` precedes: the stream after it can be handed on; -1: none."""
    ends = []
    for item in plan:
        site = item.site
        if site.layer is None:
            return -1 if site.component != "final_norm_output" else n_layers - 1
        layer = site.layer % n_layers
        ends.append(layer if site.component == "block_output" else layer - 1)
    return min(ends)


@located_once()
def suffix_logits(model: nn.Module, plan: Plan, sources: Sequence[Tensor | None], prefix: Prefix) -> Tensor:
    """Return (B, V): logits at the last column with `plan` applied, equal to the full pass, gradient to the plan.

    Only blocks above the lowest site and columns from the first edited one on are computed; a full pass is run where
    the prefix is not `exact` or does not hold the block that is needed.

    Raises:
        ShapeMismatch: the plan is empty.
        UnsupportedModel: the plan acts on tokens that are generated later, which a single pass has none of.
    """
    located = locate(model)
    if not plan:
        raise ShapeMismatch("Suffix: the plan holds no intervention. Give at least one.")
    if any(item.resolved_phase == "decode" for item in plan):
        raise UnsupportedModel("Suffix: an intervention of phase 'decode' has no tokens here. Use phase 'prompt'.")
    after = first_block(plan, located.n_layers)
    usable = prefix.exact and (after in prefix.streams)
    start = _first_column(plan, prefix) if usable else 0
    with intervene(model, plan, sources, prompt=prefix.inputs):
        return _run(model, prefix, after if usable else -1, start)


def _first_column(plan: Plan, prefix: Prefix) -> int:
    found = torch.cat([item.positions.resolve(prefix.inputs).flatten() for item in plan])
    return int(found[found >= 0].min()) if bool((found >= 0).any()) else 0  # none: intervene() says which
