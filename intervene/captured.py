"""What `capture` and `collect_sources` return: activations by site, and sources in plan order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from intervene.errors import NotApplied, asked_found_do
from intervene.sites import Site


class Sources(Sequence["Tensor | None"]):
    """Source activations in plan order, (B, P, D) each or None, with which of their slots hold a token."""

    def __init__(self, values: Sequence[Tensor | None], valid: Sequence[Tensor | None] | None = None) -> None:
        self.values = list(values)
        self.valid = list(valid) if valid is not None else [None] * len(self.values)

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]

    def __len__(self) -> int:
        return len(self.values)


class Captured(Mapping["Site | str", Tensor]):
    """Activations by site: `acts["L3.mlp_output"]` is the (B, P, D) tensor of the block's only forward pass.

    Padding columns of an AllTokens capture hold what the model computed there. `every(site)` lists the tensors of all
    passes, in order (None where a pass held none of the positions).
    """

    def __init__(self, sites: Sequence[Site], resolved: Sequence[Site] | None = None) -> None:
        self._values: dict[Site, list[Tensor | None]] = {site: [] for site in sites}
        self._valid: dict[Site, list[Tensor | None]] = {site: [] for site in sites}
        self._names = dict(zip(sites if resolved is None else resolved, sites, strict=True))  # "L2..." of "L-1..."

    def add(self, site: Site, value: Tensor | None, valid: Tensor | None) -> None:
        """Append one pass's activations of `site`, (B, P, D), and which slots hold a token (B, P)."""
        self._values[site].append(value)
        self._valid[site].append(valid)

    def _key(self, site: Site | str) -> Site:
        parsed = Site.parse(site)
        parsed = parsed if parsed in self._values else self._names.get(parsed, parsed)
        if parsed not in self._values:
            raise KeyError(f"{parsed} was not captured; these were: {', '.join(map(str, self._values))}")
        return parsed

    def every(self, site: Site | str) -> list[Tensor | None]:
        """Return one tensor per forward pass."""
        return self._values[self._key(site)]

    def valid(self, site: Site | str) -> Tensor | None:
        """Return (B, P) bool of the only pass: which slots hold a token; None if all do."""
        return self._valid[self._key(site)][-1]

    def __getitem__(self, site: Site | str) -> Tensor:
        every = self._values[self._key(site)]
        values = [value for value in every if value is not None]
        if len(values) == 1:
            return values[0]
        if values:
            found, do = f"{len(values)} forward passes computed it.", "Use acts.every(site) for all of them."
        elif every:
            found = f"its module ran {len(every)} times, but none of those passes held the positions."
            do = "Choose positions that the inputs contain."
        else:
            found, do = "no forward pass computed it.", "Run the model inside the block."
        raise NotApplied(asked_found_do(f"Capture of {site}", found, do))

    def __iter__(self) -> Iterator[Site]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
