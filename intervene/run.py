"""The functions users call: `capture`, `intervene`, `interchange`, `collect_sources`, `activations`, `frozen`.

None of them wraps or alters the model. A block registers its own hooks, does its work in every forward pass inside,
and removes exactly those hooks, also after an exception.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from intervene.applied import Applied, Recorder
from intervene.block import Batch, Block, check_axes
from intervene.captured import Captured, Sources
from intervene.errors import NotApplied, ShapeMismatch
from intervene.families import fingerprint, located_once, resolve
from intervene.firing import Firing, Reader, Stop
from intervene.hooks import watch_tap
from intervene.interventions import Bound, Plan, bind
from intervene.passes import Target, valid_slots
from intervene.positions import AllTokens, Positions
from intervene.sites import Site
from intervene.vectors import Activations, Pooling, pool


@contextmanager
def intervene(
    model: nn.Module, plan: Plan, sources: Sequence[Tensor | None] | None = None, *, prompt: Batch | None = None
) -> Iterator[Applied]:
    """Make `plan` true for every forward pass inside the block; undo exactly its own hooks afterwards.

    Args:
        model: a Hugging Face model, a PEFT or DDP wrapper of one, or any module for "path:" sites.
        plan: interventions; two at one site apply in plan order, and inner blocks after outer ones.
        sources: activations of a source run in plan order, (B, P, D) as `collect_sources` returns them, None where the
            edit needs none.
        prompt: the tokenised prompt batch. Needed only where the passes do not show where the prompt ends: chunked
            prefill and assisted decoding.

    Yields:
        An `Applied`, whose `report()` says what each intervention did.

    Raises:
        NotApplied: on leaving, if some intervention touched no token. All of `bind`'s errors before any hook exists;
        BadPosition, ShapeMismatch, AmbiguousForward during the forward pass they concern.
    """
    with located_once():
        bounds = bind(model, plan)
        for bound in bounds:
            check_axes(model, bound.tap)
        checked = _checked_sources(bounds, sources)
        recorders = [Recorder(bound) for bound in bounds]
        valid = sources.valid if isinstance(sources, Sources) else [None] * len(bounds)
        block = Block(model, [_target(*parts) for parts in zip(bounds, checked, valid, strict=True)], prompt)
    with ExitStack() as stack:
        block.enter(stack)
        for number, bound in enumerate(bounds):
            firing = Firing(number, bound, _as_tensor(checked[number], bound), block, recorders[number])
            watch_tap(stack, bound.tap, firing)
        applied = Applied(recorders)
        yield applied
        applied.check(block.passes)


def _target(bound: Bound, source: Tensor | None, valid: Tensor | None) -> Target:
    item = bound.intervention
    phase, counts = item.resolved_phase, [bound.edit.rows, None if source is None else len(source)]
    counts.append(getattr(item.positions, "rows", None))
    written = {count for count in counts if count is not None}
    if len(written) > 1:
        raise ShapeMismatch(f"{item}: edit, source and positions are written for {sorted(written)} examples.")
    return Target(
        name=str(item),
        positions=item.positions,
        prompt=phase in ("prompt", "both"),
        decode=phase in ("decode", "both"),
        dense=source is None and bound.edit.slots is None,
        rows=next(iter(written), None),
        slots=bound.edit.slots if source is None else source.shape[1],
        expected=None if valid is None else valid.cpu(),
    )


def _as_tensor(source: Tensor | None, bound: Bound) -> Tensor | None:
    if source is None:
        return None
    parameter = next(bound.tap.module.parameters(), None)
    return source if parameter is None else source.to(parameter.device)


def _checked_sources(bounds: Sequence[Bound], sources: Sequence[Tensor | None] | None) -> list[Tensor | None]:
    if isinstance(sources, Tensor):
        raise ShapeMismatch("Sources: one tensor was given, not a list. Write [tensor], one per intervention.")
    given: list[Tensor | None] = [None] * len(bounds) if sources is None else list(sources)
    if len(given) != len(bounds):
        raise ShapeMismatch(
            f"Plan of {len(bounds)} interventions: {len(given)} sources were given. "
            "Give one per intervention, None where its edit needs none."
        )
    for bound, source in zip(bounds, given, strict=True):
        item = bound.intervention
        if source is None and bound.edit.needs_source:
            raise ShapeMismatch(
                f"{item}: it needs a source activation and none was given. "
                "Pass sources=collect_sources(model, plan, source_batch), or call interchange()."
            )
        if source is not None and not bound.edit.needs_source:
            raise ShapeMismatch(f"{item}: it uses no source, but one was given. Put None in its place.")
        if source is not None and (source.dim() != 3 or bound.tap.width not in (None, source.shape[-1])):
            raise ShapeMismatch(
                f"{item}: the source has shape {tuple(source.shape)}, the site asks (B, P, {bound.tap.width}). "
                "Collect it at the same site, before any featurizer."
            )
    return given


@contextmanager
def capture(
    model: nn.Module,
    sites: Sequence[Site | str] | Site | str,
    positions: Positions | Sequence[Positions] | None = None,
    *,
    stop_after_last: bool = False,
    prompt: Batch | None = None,
) -> Iterator[Captured]:
    """Yield a mapping that fills with the activations of `sites` during the forward passes inside the block.

    Args:
        positions: which tokens, one for all sites or one per site; None keeps every column, (B, S, D), padding too.
            What is yielded are copies: changing them changes nothing in the model, and a gradient is had not from them
            but from `Add(torch.zeros(D), trainable=True)` at the site.
        stop_after_last: end the forward pass once all sites are read. The block ends there: nothing after the model's
            call is run.

    Raises:
        NotApplied: on leaving, if some site was never computed.
    """
    if isinstance(positions, str) or not (isinstance(sites, (Site, str)) or len(sites)):
        asked = f"positions {positions!r}" if isinstance(positions, str) else "no sites"
        raise ShapeMismatch(f"Capture with {asked}: name at least one site, and positions as in LastToken() or At(3).")
    wanted = [Site.parse(site) for site in ([sites] if isinstance(sites, (Site, str)) else sites)]
    where = list(positions) if isinstance(positions, Sequence) else [positions] * len(wanted)
    if len(where) != len(wanted):
        raise ShapeMismatch(f"Capture of {len(wanted)} sites: {len(where)} positions. Give one for all or one each.")
    with located_once():
        taps = [resolve(model, site) for site in wanted]
        for tap in taps:
            check_axes(model, tap)
        resolved = [tap.site for tap in taps]
        for site, tap in zip(wanted, taps, strict=True):
            if resolved.count(tap.site) > 1:
                raise ShapeMismatch(f"Capture of {site}: it is named twice. Name it once, or capture in nested blocks.")
        targets = [
            Target(
                f"Capture at {site}",
                AllTokens() if p is None else p,
                dense=p is None,
                padding=p is None,
                rows=getattr(p, "rows", None),
            )
            for site, p in zip(wanted, where, strict=True)
        ]
        captured = Captured(wanted, resolved)
        block = Block(model, targets, prompt)
    with ExitStack() as stack:
        block.enter(stack)
        for number, (site, tap) in enumerate(zip(wanted, taps, strict=True)):
            stop_at = len(wanted) if stop_after_last else None
            watch_tap(stack, tap, Reader(number, site, tap, block, captured, stop_at))
        with suppress(Stop):
            yield captured
        missing = [str(site) for site in wanted if not captured.every(site)]
        if missing:
            raise NotApplied(
                f"Capture of {', '.join(missing)}: no forward pass computed it ({block.passes} passes ran in the "
                "block). Call the model inside the block."
            )


@located_once()
def collect_sources(model: nn.Module, plan: Plan, source: Batch | Sequence[Batch | None]) -> Sources:
    """Return what `plan` needs of the source run: one truncated forward per distinct source batch, without gradient.

    A batch is run again only where two interventions read one site at different positions.

    Args:
        source: one batch for all interventions, or one per intervention (None where it needs none); a batch that
            appears several times is run once.
    """
    batches = [source] * len(plan) if isinstance(source, Mapping) else list(source)
    if len(batches) != len(plan):
        raise ShapeMismatch(f"Plan of {len(plan)} interventions: {len(batches)} source batches. Give one, or one each.")
    values: list[Tensor | None] = [None] * len(plan)
    valid: list[Tensor | None] = [None] * len(plan)
    needing = [number for number, item in enumerate(plan) if item.edit.needs_source]
    for batch in {id(batches[number]): batches[number] for number in needing}.values():
        if batch is None:
            continue
        members = [number for number in needing if batches[number] is batch]
        # one capture per distinct (site, positions), so that interventions may share a site
        keys = {n: (resolve(model, plan[n].site).site, _source_positions(plan[n])) for n in members}
        distinct = list(dict.fromkeys(keys.values()))
        for group in _without_repeated_sites(distinct):
            acts = _captured(model, group, batch)
            for number in members:
                if keys[number] in group:
                    values[number] = acts[keys[number][0]]
                    valid[number] = acts.valid(keys[number][0])
    return Sources(values, valid)


def _source_positions(item: Any) -> Positions:
    positions: Positions = item.positions if item.source_positions is None else item.source_positions
    return positions


def _without_repeated_sites(keys: list[tuple[Site, Positions]]) -> list[list[tuple[Site, Positions]]]:
    """Return `keys` in as few groups as hold each site once."""
    groups: list[list[tuple[Site, Positions]]] = []
    for key in keys:
        home = next((group for group in groups if all(site != key[0] for site, _ in group)), None)
        if home is None:
            groups.append([key])
        else:
            home.append(key)
    return groups


def _captured(model: nn.Module, group: list[tuple[Site, Positions]], batch: Batch) -> Captured:
    sites, positions = [site for site, _ in group], [where for _, where in group]
    with torch.no_grad(), capture(model, sites, positions, stop_after_last=True) as acts:
        model(**batch)
    return acts


@located_once()
def interchange(model: nn.Module, plan: Plan, base: Batch, source: Batch | Sequence[Batch | None]) -> Any:
    """Return the model's output on `base` with `plan` applied, its sources taken from running `source`.

    The source run is truncated after the last site and carries no gradient; the base run carries whatever the plan and
    the model require.
    """
    sources = collect_sources(model, plan, source)
    with intervene(model, plan, sources):
        return model(**base)


def activations(
    model: nn.Module,
    batches: Iterable[Batch],
    site: Site | str,
    positions: Positions | None = None,
    *,
    pooling: Pooling = "mean",
) -> Activations:
    """Return pooled activations (N, D) of `site` over `batches`, for the direction functions of `intervene.vectors`.

    Args:
        pooling: "mean" over the selected tokens, "last" or "first" of them, or "tokens" to keep each as a row.
    """
    where = AllTokens() if positions is None else positions
    rows = []
    for batch in batches:
        with torch.no_grad(), capture(model, [site], where, stop_after_last=True) as acts:
            model(**batch)
        value = acts[site]
        rows.append(pool(value, valid_slots(where, batch).to(value.device), pooling).float())
    if not rows:
        raise NotApplied(f"Activations of {site}: no batch was given. Pass at least one.")
    resolved = resolve(model, Site.parse(site)).site
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    return Activations(torch.cat(rows), resolved, fingerprint(model), name, pooling)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn `requires_grad` off for every parameter of `model` inside the block, and restore what it was."""
    changed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in changed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)
