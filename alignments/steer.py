"""`pin`: hold a variable at a value while a model runs, through the place and subspace where a bundle found it.

    bundle = load_bundle("shared/ioi", model=model, tokenizer=tokenizer)
    with pin(model, bundle, value=2, prompt=batch) as applied:      # batch: encode(...).batch(...), which marks tokens
        out = model(**inputs)
    with pin(model, bundle, value=2, positions=Match(" Bob", tokenizer=tokenizer, occurrence=-1)):
        text = model.generate(**tokenizer(prompt, return_tensors="pt"))

The edit is h' = h + Q (z - Q^T h), z being the features of the value's prototype, or of a source prompt. What it does
besides is measured by `steering_report` in `steer_report`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignments.bundle import Bundle
from alignments.tokens import is_column
from intervene import At, Intervention, LastToken, Positions, Set, Swap, capture, intervene
from intervene.applied import Applied
from intervene.boundless import SecondBoundarySwap
from intervene.errors import BadPosition, ShapeMismatch, Unsupported, asked_found_do
from intervene.featurizers import PCA, Block, Coordinates, Featurizer, Identity, Subspace
from intervene.gates import Gated
from intervene.interventions import Phase
from intervene.marked import Marked
from intervene.positions import Inputs

Batch = Mapping[str, Any]


@contextmanager
def pin(
    model: nn.Module,
    bundle: Bundle,
    value: Any = None,
    *,
    source: Batch | None = None,
    positions: Positions | None = None,
    source_positions: Positions | None = None,
    prompt: Batch | None = None,
    phase: Phase = "prompt",
) -> Iterator[Applied]:
    """Hold the bundle's variable at `value` in every forward pass inside the block, also those of `generate()`.

    Args:
        value: one of `bundle.values`, itself or its name: its prototype is put in.
        source: instead, a tokenised batch of one prompt (with "marks" if its position is a marked one), whose own
            activation is put in.
        positions: the tokens to hold it at; None: where the bundle was fitted, the last token for "last", else the
            columns that `prompt` marks under that name.
        source_positions: likewise for the source; None: as `positions`.
        prompt: the tokenised batch with "marks"; needed only for marked positions.
        phase: "prompt" edits prompt tokens alone, whose keys and values generated tokens then read.

    Raises:
        WrongModel: the bundle is of another model. StoreError: it has no such value.
        ShapeMismatch: both or neither of value and source, or a source of several prompts.
        BadPosition: the position is a marked one and no marks were given; see `Marked`.
        Unsupported: the plan has an edit or featurizer that cannot be held at a value.
    """
    bundle.check(model)
    if (value is None) == (source is None):
        raise ShapeMismatch(f"Pin {bundle.variable}: give either value= or source=, and not both.")
    if source is None:
        plan = pinned(bundle, value, positions=positions, phase=phase)
    else:
        states = _states(model, bundle, source, source_positions or positions)
        plan = _plan(bundle, states, positions, phase)
    with intervene(model, plan, prompt=prompt) as applied:
        yield applied


def pinned(
    bundle: Bundle, value: Any, *, positions: Positions | None = None, phase: Phase = "prompt"
) -> tuple[Intervention, ...]:
    """Return the plan that holds the variable at `value`; see `pin`."""
    return _plan(bundle, bundle.prototypes[bundle.named(value).name], positions, phase)


def pinned_rows(
    bundle: Bundle, values: Sequence[Any], *, positions: Positions | None = None
) -> tuple[Intervention, ...]:
    """Return the plan that holds the variable at another value in each example of a batch, one of `values` each."""
    named = [bundle.prototypes[bundle.named(value).name] for value in values]
    states = tuple(torch.stack(parts) for parts in zip(*named, strict=True))  # (B, P, D) each
    return _plan(bundle, states, positions, "prompt")


def place_of(item: Intervention) -> Positions:
    """Return where to edit at inference: what marked "last" and absolute columns mean without any marks."""
    where = item.positions
    if isinstance(where, Marked) and where.name == "last":
        return LastToken()
    if isinstance(where, Marked) and is_column(where.name):
        return At(int(where.name))
    return where


@dataclass(frozen=True)
class Slot(Positions):
    """The `index`-th of the tokens that `where` selects in each example.

    Raises:
        BadPosition: on resolving, an example has fewer.
    """

    where: Positions
    index: int

    def resolve(self, inputs: Inputs) -> Tensor:
        columns = self.where.resolve(inputs)
        if columns.shape[1] <= self.index or bool((columns[:, self.index] < 0).any()):
            raise BadPosition(
                f"{self.where!r}: it selects {columns.shape[1]} tokens, and number {self.index + 1} is to be held. "
                "Select as many tokens as the alignment was fitted on."
            )
        return columns[:, self.index : self.index + 1]


def _plan(
    bundle: Bundle, states: Sequence[Tensor], positions: Positions | None, phase: Phase
) -> tuple[Intervention, ...]:
    """Return the plan that sets the features of `states`, (P, D) or (B, P, D) per intervention that needs a source."""
    made: list[Intervention] = []
    waiting = list(states)
    for item in bundle.plan:
        if not item.edit.needs_source:
            made.append(item)
            continue
        state = waiting.pop(0)
        where = place_of(item) if positions is None else positions
        lens = held_features(item)
        with torch.no_grad():
            features = lens.read(state[None] if state.dim() == 2 else state)  # (1 or B, P, K)
        for slot in range(features.shape[1]):
            vector = features[0, slot] if state.dim() == 2 else features[:, slot]
            at = where if features.shape[1] == 1 else Slot(where, slot)
            made.append(Intervention(item.site, Set(vector), at, lens, phase=phase, when=item.when))
    return tuple(made)


def held_features(item: Intervention) -> Featurizer:
    """Return the features that `item` takes from its source, as a featurizer of their own that learns nothing.

    Gates are taken hard, as scores take them.

    Raises:
        Unsupported: its edit mixes base and source in another way, or its gate chooses among features that cannot be
            had apart.
    """
    edit, lens = item.edit, item.featurizer
    columns: Tensor | None = None
    if isinstance(edit, Gated | SecondBoundarySwap):
        columns = edit.hard().bool().nonzero().flatten().cpu()
        if not len(columns):
            raise Unsupported(asked_found_do(f"Pin {item}", "its gate is closed everywhere.", "Fit it again."))
    elif not isinstance(edit, Swap):
        found = f"{type(edit).__name__} does more than put in the source's features."
        raise Unsupported(asked_found_do(f"Pin {item}", found, "Use a plan of Swap or of a gate."))
    chosen = _chosen(lens, columns)
    if chosen is None:
        found = f"the gate chooses among the features of {type(lens).__name__}."
        raise Unsupported(asked_found_do(f"Pin {item}", found, "Use Identity, Coordinates, a Subspace or PCA."))
    return chosen


def _chosen(lens: Featurizer, columns: Tensor | None) -> Featurizer | None:
    if isinstance(lens, Subspace | Block):
        frame = lens.frame().detach()
        return Subspace.from_frame(frame if columns is None else frame[:, columns.to(frame.device)])
    if columns is None:
        fixed = copy.deepcopy(lens)
        return fixed.requires_grad_(False)
    if isinstance(lens, Identity):
        return Coordinates(columns.tolist())
    if isinstance(lens, Coordinates):
        return Coordinates(lens.indices.cpu()[columns].tolist())
    if isinstance(lens, PCA):
        return PCA(lens.mean, lens.components[:, columns.to(lens.components.device)])
    return None


def _states(model: nn.Module, bundle: Bundle, source: Batch, positions: Positions | None) -> list[Tensor]:
    """Return the activation (P, D) of one source prompt for each intervention that needs a source."""
    inputs = {name: value for name, value in source.items() if name != "marks"}
    found = []
    for item in bundle.plan:
        if not item.edit.needs_source:
            continue
        where = place_of(item) if positions is None else positions
        with torch.no_grad(), capture(model, [item.site], where, stop_after_last=True, prompt=source) as acts:
            model(**inputs)
        if len(acts[item.site]) != 1:
            raise ShapeMismatch(f"Pin {bundle.variable}: the source has {len(acts[item.site])} prompts. Give one.")
        found.append(acts[item.site][0].float().cpu())
    return found
