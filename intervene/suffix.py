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
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from intervene.errors import BadVector, ShapeMismatch, UnsupportedModel
from intervene.families import Located, locate, located_once
from intervene.fused import forget_copies, fused, watched
from intervene.fused_loss import plain_head, unembedded_losses
from intervene.hooks import replaced, watch_call
from intervene.interventions import Plan
from intervene.kept_stream import skipped
from intervene.locate import walk
from intervene.model_state import ModelState
from intervene.precision import forget_rounded
from intervene.prefix import Prefix, positions_of
from intervene.run import capture, frozen, intervene
from intervene.sites import Site

TOLERANCE = 1e-4  # of the logits' own spread, in fp32: the two ways differ by rounding only
SLOPE_TOLERANCE = 1e-3  # of the gradient's length, the same
FEW_ROUNDED = 8  # examples on which they are compared in lower precision, where two are not enough


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
@torch.inference_mode(False)  # what is kept must be fit for a fit
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
    state = ModelState(model)
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
        state=state,
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
    """Return `prefix` with the difference between an unedited suffix and the full pass, on few examples.

    In fp32 it is the largest over the vocabulary, and has to be rounding. Below, a full pass rounds as much: run on
    other examples beside it, it gives other logits. So there the suffix has to be no farther from the full pass than
    another full pass of each example, run alone, is (or than one rounding): both as root mean square over the
    vocabulary, in units of the logits' spread, averaged over examples. (On SmolLM2 in bf16 it is a third as far;
    positions that are off by one, the least of the mistakes tried, are farther.)
    """
    rounded = prefix.logits.dtype != torch.float32
    forget_copies(model)
    forget_rounded(model)
    chosen = torch.arange(min(FEW_ROUNDED, len(prefix))) if rounded else _longest_and_shortest(prefix)
    few, logits = prefix.rows(chosen), prefix.logits[chosen.to(prefix.logits.device)]
    start = prefix.inputs["input_ids"].shape[1] // 2
    if not bool(torch.isfinite(prefix.logits).all()):
        raise BadVector(
            "Prefix: the model's own logits are NaN or infinite, so no score would mean anything. "
            "Check the weights and the dtype."
        )
    measure = _typical if rounded else _largest
    layers = list(prefix.streams)[:: max(1, len(prefix.streams) - 1)] or [-1]
    difference = max(measure(_run(model, few, layer, start), logits) for layer in layers)
    if not rounded:  # of the shortest alone: rotary angles may depend on what else is in the batch
        alone = prefix.rows(chosen[-1:])
        difference = max(difference, measure(_run(model, alone, layers[0], start), logits[-1:]))
    noise = _typical(_again(model, few), logits) if rounded else 0.0
    exact = difference <= (max(noise, torch.finfo(logits.dtype).eps) if rounded else TOLERANCE)
    agreeing = _agreeing(model, few, start) if exact and not rounded else frozenset[int]()
    return replace(prefix, exact=exact, difference=difference, noise=noise, fused=agreeing)


def _longest_and_shortest(prefix: Prefix) -> Tensor:
    """Return the examples with most and fewest tokens, (2,) int64 (if alike, first and last), or the only one."""
    tokens = prefix.inputs["attention_mask"].sum(1)
    return torch.tensor([int(tokens.argmax()), len(tokens) - 1 - int(tokens.flip(0).argmin())][: len(tokens)])


def _agreeing(model: nn.Module, few: Prefix, start: int) -> frozenset[int]:
    """Return the blocks that give the same fused as by themselves, in all passes that are compared, or none.

    Losses are compared through all blocks, because any of them may be run later; the gradient, which has the same
    arithmetic in every block, above the lowest one that is kept. And logits must be what the unembedding returned.
    """
    located, labels, none = locate(model), few.inputs["input_ids"][:, 0], frozenset[int]()
    if few.tuples or not _ends_in_its_head(model, few):
        return none
    blocks = frozenset(_fusable_blocks(model))
    if not blocks:
        return none
    own, ours = (_run(model, few, -1, start, _way(located, chosen, labels)) for chosen in (none, blocks))
    if not bool((ours - own).abs().max() <= TOLERANCE * own.abs().max().clamp_min(1.0)):
        return none
    layer, slopes = min(few.streams, default=-1), list[Tensor]()
    with frozen(model), torch.enable_grad():
        for chosen in (none, blocks) if layer >= 0 else ():
            stream = few.stream(layer, start).clone().requires_grad_()
            losses = _run(model, few, layer, start, _way(located, chosen, labels, stream))
            slopes += torch.autograd.grad(losses.sum(), stream)
    near = not slopes or bool((slopes[1] - slopes[0]).norm() <= SLOPE_TOLERANCE * slopes[0].norm())
    return blocks if near else none


def _fusable_blocks(model: nn.Module) -> list[int]:
    with torch.no_grad(), fused(locate(model).layers) as found:
        return found


def _ends_in_its_head(model: nn.Module, few: Prefix) -> bool:
    """Return whether the model's logits are what its unembedding returns, to the last bit: not scaled or capped."""
    with frozen(model):
        head = plain_head(locate(model).hf)
    if head is None:
        return True  # then nobody takes its place
    returned: list[Any] = []
    with ExitStack() as stack:
        watch_call(stack, head, after=returned.append)
        logits = _run(model, few, -1, 0)
    return len(returned) == 1 and torch.equal(returned[0].reshape(logits.shape[0], -1, logits.shape[-1])[:, -1], logits)


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
    """How a pass is run: from `stream` instead of the kept one, for `labels` (B,) their losses, with `fused` blocks.

    `head` is the unembedding whose place the fused losses take. `alone`: nobody reads columns that have no logits.
    """

    stream: Tensor | None = None
    labels: Tensor | None = None
    fused: frozenset[int] = frozenset()
    head: nn.Linear | None = None
    alone: bool = False


def _way(located: Located, fused: frozenset[int], labels: Tensor | None = None, stream: Tensor | None = None) -> _Way:
    """Return how to run with these `fused` blocks, before interventions of ours watch the model."""
    if not fused:
        return _Way(stream, labels)
    # A label below 0 is cross_entropy's own affair: it is left out, or an error.
    told = labels is not None and bool((labels >= 0).all())
    outside = [located.hf]
    for module in outside:
        outside += [child for child in module.children() if not isinstance(child, nn.ModuleList)]
    return _Way(stream, labels, fused, plain_head(located.hf) if told else None, not any(map(watched, outside)))


def _run(model: nn.Module, prefix: Prefix, after: int, start: int, way: _Way = _Way()) -> Tensor:
    """Return (B, V) logits of the last column from the stream after block `after`, columns from `start`.

    With labels: (B,) their cross-entropy there.
    """
    located = locate(model)
    call = call_inputs(model, prefix.inputs, start)
    if start:
        past = zip(located.layers, prefix.past(after + 1, start), strict=True)
        call["past_key_values"] = _cache_of([(_beside(block, k), _beside(block, v)) for block, (k, v) in past], start)
    head = way.head
    with ExitStack() as stack:
        if after >= 0:
            stream = prefix.stream(after, start) if way.stream is None else way.stream
            stream = _beside(located.layers[after], stream)
            stack.enter_context(skipped(located, after + 1, stream, prefix.tuples))
        if way.fused:
            blocks = [block for layer, block in enumerate(located.layers) if layer > after and layer in way.fused]
            stack.enter_context(fused(blocks, last=located.layers[-1] if way.alone else None))
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


def _shared(located: Located) -> list[nn.Module]:
    """Return the modules whose work on earlier columns or lower blocks a suffix takes from the prefix."""
    norm = located.family.final_norm
    after = None if norm is None else walk(located.backbone, norm)
    return [one for one in located.backbone.children() if one is not after]


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
        ModelChanged: the model does not compute as it did when the prefix was made.
    """
    located = locate(model)
    if not plan:
        raise ShapeMismatch("Suffix: the plan holds no intervention. Give at least one.")
    if any(item.resolved_phase == "decode" for item in plan):
        raise UnsupportedModel("Suffix: an intervention of phase 'decode' has no tokens here. Use phase 'prompt'.")
    after = first_block(plan, located.n_layers)
    usable = prefix.exact and (after == -1 or after in prefix.streams)
    if prefix.state is not None:
        prefix.state.require_same(_shared(located) if usable else ())
    start = _first_column(plan, prefix) if usable else 0
    way = _way(located, prefix.fused if usable else frozenset(), labels)
    with intervene(model, plan, sources, prompt=prefix.inputs):
        return _run(model, prefix, after if usable else -1, start, way)


def _first_column(plan: Plan, prefix: Prefix) -> int:
    found = torch.cat([item.positions.resolve(prefix.inputs).flatten() for item in plan])
    return int(found[found >= 0].min()) if bool((found >= 0).any()) else 0  # none: intervene() says which
