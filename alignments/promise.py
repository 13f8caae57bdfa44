"""Which places are worth a fit: the order in which `Halving` takes them up, and what it keeps of a rung."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from alignments.scoring import Cell
from alignments.screens import Place, Screened

# Reasons to take up a place: the swap of its whole vector gives the label; it moves the answer towards the label;
# or a first-order guess says that it would.
SIGNALS = ("iia", "gain", "attribution")
DEAD = 0.01  # of the logits' spread: no answer hangs on it


@dataclass(frozen=True)
class Rung:
    """One rung: its cells, what was measured of each on select (nothing in the last: see the rows), and its cost.

    `cost` is in pair-passes, `seconds` on the machine it ran on; `method` is None for the screen, which learns nothing.
    """

    name: str
    method: str | None
    steps: int
    cells: tuple[Cell, ...]
    found: tuple[Screened, ...]
    cost: float
    seconds: float

    def told(self) -> dict[str, object]:
        """Return the rung as plain values, for a report."""
        cells = []
        for number, cell in enumerate(self.cells):
            one: dict[str, object] = {"site": str(cell.site), "positions": cell.positions, "rank": cell.rank}
            if self.found:
                seen = self.found[number]
                one |= {"iia": round(seen.iia, 4), "loss": round(seen.loss, 4), "gain": round(seen.gain, 4)}
            cells.append(one)
        return {
            "name": self.name,
            "method": self.method,
            "steps": self.steps,
            "cells": cells,
            "pair_passes": round(self.cost),
            "seconds": round(self.seconds, 3),
        }


def order(
    exact: Sequence[Screened],
    guessed: Mapping[Place, float],
    places: Sequence[Place],
    signals: Sequence[str] = SIGNALS,
    explore: float = 0.25,
    seed: int = 0,
) -> list[Place]:
    """Return all of `places`, most promising first.

    The signals name places in turn, each its best that is left. Every (1 / explore)-th place is instead one of the
    position that was named least, drawn by `seed`. No position has more than half of any beginning of the list, or two,
    while another has a living place. Places without any effect come last, in the order of `places`.
    """
    known = {one.place: one for one in exact}
    dead = {place for place, one in known.items() if one.moved < DEAD}
    alive = [place for place in places if place not in dead]
    named = _in_turn([_by(signal, known, guessed, alive) for signal in signals])
    named += [place for place in alive if place not in named]
    drawn = random.Random(seed).sample(alive, len(alive))
    every = round(1 / explore) if explore > 0 else 0
    found: list[Place] = []
    counts: Counter[str] = Counter()
    while len(found) < len(alive):
        slot = len(found) + 1
        if every and slot % every == 0:
            place = min((one for one in drawn if one not in found), key=lambda one: counts[one.positions])
        else:
            left = [one for one in named if one not in found]
            most = max(2, -(-slot // 2))
            place = next((one for one in left if counts[one.positions] < most), left[0])
        found.append(place)
        counts[place.positions] += 1
    return [*found, *(place for place in places if place in dead)]


def diverse(rung: Rung) -> list[Cell]:
    """Return the cells of a rung by their loss, but second the best one of another position than the first's."""
    ranked = [cell for _, cell in sorted(zip(rung.found, rung.cells, strict=True), key=lambda pair: pair[0].loss)]
    other = next((cell for cell in ranked if cell.positions != ranked[0].positions), None)
    if other is None:
        return ranked
    return [ranked[0], other, *(cell for cell in ranked[1:] if cell != other)]


def _by(
    signal: str, known: Mapping[Place, Screened], guessed: Mapping[Place, float], places: Sequence[Place]
) -> list[Place]:
    """Return those of `places` that a signal knows, best first; of equals the earlier one."""
    if signal == "attribution":
        return sorted((one for one in places if one in guessed), key=lambda one: -guessed[one])
    first = 1.0 if signal == "iia" else 0.0  # equal shares are told apart by the gain
    return sorted((one for one in places if one in known), key=lambda one: (-first * known[one].iia, -known[one].gain))


def _in_turn(lists: Sequence[Sequence[Place]]) -> list[Place]:
    return list(dict.fromkeys(place for some in zip_longest(*lists) for place in some if place is not None))
