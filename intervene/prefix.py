"""What one full pass over the bases leaves behind, for passes that recompute only a part (`suffix`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from intervene.model_state import ModelState
from intervene.sites import Site


@dataclass(frozen=True, eq=False)
class Prefix:
    """Bases after their one full pass, left-padded, scored at the last column.

    `inputs` (input_ids, attention_mask, position_ids: (B, S); marks), `streams` block -> its output (N, S, D),
    `cache` per layer keys and values (N, G, S, d), `logits` (B, V) of the last column without any edit, `kept`
    (site, name of a mark) -> activation there (N, P, D). `index` (B,) picks the examples out of streams and cache,
    which are copied only where a pass needs them (of `logits` it picks nothing); None: all. They may lie on the CPU,
    mapped from disk, while the model is elsewhere. `exact` is False if only full passes are right for this model;
    `difference` is what was measured, and `noise`, below fp32, how far two full passes differ. `fused` are the
    blocks that have been shown to give the same in few passes over memory (`intervene.fused`). `state` is how the model
    computed; None: nobody looks whether it still does.
    """

    inputs: dict[str, Any]
    streams: dict[int, Tensor]
    cache: tuple[tuple[Tensor, Tensor], ...]
    logits: Tensor
    tuples: bool
    exact: bool = True
    difference: float = 0.0
    noise: float = 0.0
    fused: frozenset[int] = frozenset()
    state: ModelState | None = None
    index: Tensor | None = None
    kept: dict[tuple[Site, str], Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])

    def rows(self, index: Tensor) -> Prefix:
        """Return the prefix of some examples; `index` (b,) int64."""
        chosen = index if self.index is None else self.index[index]
        return replace(self, inputs=_rows(self.inputs, index), index=chosen)

    def stream(self, layer: int, start: int) -> Tensor:
        """Return the output of block `layer` (B, s, D) on the columns from `start`."""
        return self._picked(self.streams[layer][:, start:])

    def past(self, first: int, start: int) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values (B, G, start, d) per layer, before column `start`.

        Layers below `first` are skipped in the pass that reads this: they get the right shape without a copy. Others
        may have all S columns where that is a copy of the caller's own, who then puts the new ones into it.
        """
        rows = len(self)
        made = []
        for layer, pair in enumerate(self.cache):
            if layer < first:
                keys, values = (part[:1, :, :start].expand(rows, -1, -1, -1) for part in pair)
            else:
                keys, values = (self._picked(part if self._roomy(start) else part[:, :, :start]) for part in pair)
            made.append((keys, values))
        return made

    def _roomy(self, start: int) -> bool:
        return self.index is not None and 2 * start >= self.inputs["input_ids"].shape[1]

    def _picked(self, part: Tensor) -> Tensor:
        """Return the examples of `part` (N, ...) that this prefix is of; only they are copied."""
        return part if self.index is None else torch.index_select(part, 0, self.index.to(part.device))


def _rows(inputs: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in inputs.items():
        made[name] = _rows(value, index) if isinstance(value, Mapping) else value[index.to(value.device)]
    return made


def tensors_of(prefix: Prefix) -> dict[str, Tensor]:
    """Return all that a full pass has computed, by name, the examples first in each."""
    made = {f"stream/{layer}": stream for layer, stream in prefix.streams.items()}
    for layer, (keys, values) in enumerate(prefix.cache):
        made |= {f"keys/{layer}": keys, f"values/{layer}": values}
    return (
        made | {"logits": prefix.logits} | {f"kept/{site}/{name}": acts for (site, name), acts in prefix.kept.items()}
    )


def prefix_from(
    inputs: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    tuples: bool,
    exact: bool,
    difference: float,
    noise: float = 0.0,
    fused: Iterable[int] = (),
    state: ModelState | None = None,
) -> Prefix:
    """Return the prefix of `inputs` whose `tensors_of` these are; other names among `tensors` are passed over."""
    streams, cache, kept = {}, [], {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "stream":
            streams[int(rest)] = tensor
        elif kind == "keys":
            cache.append((tensor, tensors[f"values/{rest}"]))
        elif kind == "kept":
            site, _, mark = rest.partition("/")
            kept[Site.parse(site), mark] = tensor
    full = {**inputs, "position_ids": positions_of(inputs["attention_mask"])}
    return Prefix(
        full, streams, tuple(cache), tensors["logits"], tuples, exact, difference, noise, frozenset(fused), state,
        kept=kept,
    )  # fmt: skip


def positions_of(attention_mask: Tensor) -> Tensor:
    """Return (B, S) position ids that count real tokens only, as `generate` derives them."""
    return (attention_mask.long().cumsum(1) - 1).clamp_min(0)
