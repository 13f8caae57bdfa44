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
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from intervene.errors import BadVector, ShapeMismatch, UnsupportedModel
from intervene.families import Located, locate, located_once, resolve
from intervene.fused import fused
from intervene.fused_loss import plain_head, unembedded_losses
from intervene.hooks import replaced, watch_call
from intervene.interventions import Plan
from intervene.prefix import Prefix, positions_of
from intervene.run import capture, frozen, intervene
from intervene.sites import Site

TOLERANCE = 1e-4  # of the logits' own spread, in fp32: the two ways differ by rounding only
SLOPE_TOLERANCE = 1e-3  # of the gradient's length, the same
FEW, FEW_ROUNDED = 2, 8  # examples on which they are compared in fp32, and in lower precision, where one is not enough


def accepts(model: nn.Module, name: str) -> bool:
    """Return whether the forward of `model` takes an argument of that name."""
    kind: Any = type(model)
    return name in _parameters(kind)


@cache
def _parameters(kind: type) -> frozenset[str]:
    """Return the names of what a model class's forward takes; looking them up costs a millisecond."""
    return frozenset(inspect.signature(getattr(kind, "forward")).parameters)  # noqa: B009 (typed as a plain class)


def call_inputs(model: nn.Module, inputs: Mapping[str, Any], start: int = 0) -> dict[str, Any]:
    """Return the keyword arguments of a forward over the columns from `start`, with logits of the last column only."""
    hf = locate(model).hf
    call: dict[str, Any] = {
        "input_ids": inputs["input_ids"][:, start:],
        "attention_mask": inputs["attention_mask"],
    }
    if accepts(hf, "position_ids"):
        call["position_ids"] = inputs["position_ids"][:, start:]
    if accepts(hf, "logits_to_keep"):
        # As a tensor, not as the number 1: the slice it would make is not contiguous, and the product with the
        # vocabulary then runs example by example (measured: four fifths of a training step).
        call["logits_to_keep"] = torch.tensor([call["input_ids"].shape[1] - 1], device=call["input_ids"].device)
    return call


@located_once()
def prefix_of(model: nn.Module, inputs: Mapping[str, Any], layers: Sequence[int], keep: Sequence[Site] = ()) -> Prefix:
    """Return the prefix of left-padded `inputs` (input_ids, attention_mask (B, S), marks), keeping blocks `layers`.

    Of the sites in `keep`, the activations at every mark are kept too.

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
        acts = stack.enter_context(capture(model, list(dict.fromkeys([*sites, *keep]))))
        logits = located.hf(**call_inputs(model, full), past_key_values=cache, use_cache=True).logits[:, -1]
    prefix = Prefix(
        inputs=full,
        streams={site.layer: acts[site] for site in sites if site.layer is not None},
        cache=tuple((layer.keys, layer.values) for layer in cache.layers),
        logits=logits,
        tuples=isinstance(returned[0], tuple),
        kept={(site, name): at_marks(acts[site], columns) for site in keep for name, columns in _marks(inputs).items()},
    )
    return _proved(model, prefix)


def _marks(inputs: Mapping[str, Any]) -> Mapping[str, Tensor]:
    marks: Mapping[str, Tensor] = inputs.get("marks", {})
    return marks


def at_marks(activations: Tensor, columns: Tensor) -> Tensor:
    """Return activations (B, S, D) at `columns` (B, P): (B, P, D)."""
    rows = torch.arange(len(activations), device=activations.device)[:, None]
    return activations[rows, columns.to(activations.device)]


@torch.no_grad()
def _proved(model: nn.Module, prefix: Prefix) -> Prefix:
    """Return `prefix` with the difference between an unedited suffix and the full pass, on its first examples.

    In fp32 it is the largest over the vocabulary, and has to be rounding. Below, a full pass rounds as much: run on
    other examples beside it, it gives other logits. So there the suffix has to be no farther from the full pass than
    another full pass of each example, run alone, is (or than one rounding): both as root mean square over the
    vocabulary, in units of the logits' spread, averaged over examples. (On SmolLM2 in bf16 it is a third as far;
    positions that are off by one, the least of the mistakes tried, are farther.)
    """
    rounded = prefix.logits.dtype != torch.float32
    few = prefix.rows(torch.arange(min(FEW_ROUNDED if rounded else FEW, len(prefix))))
    logits = prefix.logits[: len(few)]
    start = prefix.inputs["input_ids"].shape[1] // 2
    if not bool(torch.isfinite(prefix.logits).all()):
        raise BadVector(
            "Prefix: the model's own logits are NaN or infinite, so no score would mean anything. "
            "Check the weights and the dtype."
        )
    measure = _typical if rounded else _largest
    layers = list(prefix.streams)[:: max(1, len(prefix.streams) - 1)] or [-1]
    difference = max(measure(_run(model, few, layer, start), logits) for layer in layers)
    noise = _typical(_again(model, few), logits) if rounded else 0.0
    exact = difference <= (max(noise, torch.finfo(logits.dtype).eps) if rounded else TOLERANCE)
    agrees = exact and not rounded and _fused_agrees(model, few, start)
    return replace(prefix, exact=exact, difference=difference, noise=noise, fused=agrees)


_AGREED: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()


def _fused_agrees(model: nn.Module, few: Prefix, start: int) -> bool:
    """Return whether fused blocks give what the model's own do; asked once for its modules and weights as they are.

    The losses are compared through all blocks, because any of them may be run later; the gradient, which has the same
    arithmetic in every block, above the lowest one that is kept.
    """
    weights = tuple(-1 if one.is_inference() else one._version for one in model.parameters())
    state = tuple(map(id, model.modules())), weights
    if model not in _AGREED or _AGREED[model][0] != state:
        _AGREED[model] = state, not few.tuples and _compared(model, few, start)
    return _AGREED[model][1]


def _compared(model: nn.Module, few: Prefix, start: int) -> bool:
    labels = few.inputs["input_ids"][:, 0]
    own, ours = (_run(model, few, -1, start, _Way(fused=fuse, labels=labels)) for fuse in (False, True))
    if not bool((ours - own).abs().max() <= TOLERANCE * own.abs().max().clamp_min(1.0)):
        return False
    layer, slopes = min(few.streams, default=-1), list[Tensor]()
    with frozen(model), torch.enable_grad():
        for fuse in (False, True) if layer >= 0 else ():
            stream = few.stream(layer, start).clone().requires_grad_()
            losses = _run(model, few, layer, start, _Way(stream, fuse, labels))
            slopes += torch.autograd.grad(losses.sum(), stream)
    return not slopes or bool((slopes[1] - slopes[0]).norm() <= SLOPE_TOLERANCE * slopes[0].norm())


def _again(model: nn.Module, few: Prefix) -> Tensor:
    """Return (B, V): each example's logits by a full pass on it alone; of a single example, beside itself."""
    groups = [[row] for row in range(len(few))] if len(few) > 1 else [[0, 0]]
    return torch.cat([_run(model, few.rows(torch.tensor(rows)), -1, 0)[:1] for rows in groups])


def _largest(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.std().clamp_min(1e-6))


def _typical(found: Tensor, expected: Tensor) -> float:
    found, expected = found.float(), expected.float()
    errors = (found - expected).square().mean(-1).sqrt()  # (B,)
    return float((errors / expected.std(-1).clamp_min(1e-6)).mean())


@contextmanager
def _skipped(located: Located, count: int, stream: Tensor, tuples: bool) -> Iterator[None]:
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
        with _skipped(self._located, self._layer + 1, self.stream, self._tuples):
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


def _beside(block: nn.Module, tensor: Tensor) -> Tensor:
    """Return `tensor` where the weights of `block` are; as it is if nobody knows, as of a block that is offloaded."""
    device = next(block.parameters(), tensor).device
    return tensor if device.type == "meta" else tensor.to(device)


def _cache_of(pairs: Sequence[tuple[Tensor, Tensor]], start: int) -> Any:
    """Return a transformers cache of the first `start` keys and values, as they are; its own constructor copies them.

    Layers with more columns hold them in `room`, into which a fused block writes instead of joining two tensors.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in pairs:
        layer: Any = DynamicLayer()  # type: ignore[no-untyped-call]
        layer.keys, layer.values, layer.is_initialized = keys[:, :, :start], values[:, :, :start], True
        layer.room = (keys, values) if keys.shape[2] > start else None
        layer.dtype, layer.device = keys.dtype, keys.device
        cache.layers.append(layer)
    return cache


@dataclass(frozen=True)
class _Way:
    """How a pass is run: from `stream` instead of the kept one, with `fused` blocks, for `labels` (B,) their losses."""

    stream: Tensor | None = None
    fused: bool = False
    labels: Tensor | None = None


def _run(model: nn.Module, prefix: Prefix, after: int, start: int, way: _Way = _Way()) -> Tensor:
    """Return (B, V) logits of the last column from the stream after block `after`, columns from `start`.

    With labels: (B,) their cross-entropy there.
    """
    located = locate(model)
    call = call_inputs(model, prefix.inputs, start)
    if start:
        past = zip(located.layers, prefix.past(after + 1, start), strict=True)
        call["past_key_values"] = _cache_of([(_beside(block, k), _beside(block, v)) for block, (k, v) in past], start)
    head = plain_head(located.hf) if way.fused and way.labels is not None else None
    with ExitStack() as stack:
        if after >= 0:
            stream = prefix.stream(after, start) if way.stream is None else way.stream
            stream = _beside(located.layers[after], stream)
            stack.enter_context(_skipped(located, after + 1, stream, prefix.tuples))
        if way.fused:
            stack.enter_context(fused(located.layers[after + 1 :], last=True))
        if head is not None:
            stack.enter_context(replaced([(head, lambda hidden: hidden)]))
        found: Tensor = located.hf(**call, use_cache=bool(start)).logits
    found = found[:, 0] if found.shape[1] == 1 else found[:, -1]
    if way.labels is None:
        return found
    labels = way.labels.to(found.device)
    if head is not None:
        return unembedded_losses(found, head.weight, labels)
    return nn.functional.cross_entropy(found.float(), labels, reduction="none")


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
def suffix_logits(
    model: nn.Module, plan: Plan, sources: Sequence[Tensor | None], prefix: Prefix, labels: Tensor | None = None
) -> Tensor:
    """Return (B, V): logits at the last column with `plan` applied, equal to the full pass, gradient to the plan.

    With `labels` (B,) int64: the cross-entropy (B,) of these logits in nats, for which they need not be written.

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
    usable = prefix.exact and (after == -1 or after in prefix.streams)
    start = _first_column(plan, prefix) if usable else 0
    way = _Way(fused=prefix.fused and usable, labels=labels)
    with intervene(model, plan, sources, prompt=prefix.inputs):
        return _run(model, prefix, after if usable else -1, start, way)


def _first_column(plan: Plan, prefix: Prefix) -> int:
    found = torch.cat([item.positions.resolve(prefix.inputs).flatten() for item in plan])
    return int(found[found >= 0].min()) if bool((found >= 0).any()) else 0  # none: intervene() says which
