"""`Halving`: a search that spends its time where it matters, in rungs: all places a little, few places in full.

    planned = Halving(search, pair_passes=9000)        # or seconds=600; default: a tenth of the whole grid
    for row in planned.run(): ...
    planned.summary()                                  # what each rung looked at, what it and the whole grid cost

Rung 0 screens every place without learning: attribution and swaps of the whole vector. The next rungs fit short (an
eta-th of the steps of the one above) at the most promising places, and the last one in full. Each rung gets an equal
part of what is left of the budget, and an eta-th of the places of the one before. The best cell then gets all seeds
and its controls, as in any `Search`. Only train and select play a part in any choice.

What is promising? Swapping whole vectors misses a variable that shares its place with another, so a place is taken up
for any of three reasons (`SIGNALS`), in turn; a share `explore` of each first rung goes to places that none of them
names, of the positions seen least; and no position takes more than half while others are left. A place where the swap
of the whole vector changes no logit comes last. Short fits are compared by the label's cross-entropy on select, which
moves long before any answer does.

Cost is counted in pair-passes: one pair through the whole model forwards. A suffix counts by its share, a step of
learning twice. With such a budget a search is a function of its seeds; with one in seconds it depends on the machine.

Source: successive halving, Jamieson and Talwalkar 2016 (arXiv 1502.07943). We differ: fits start anew in each rung, so
    that a job's rows do not depend on which rungs came before; and rung 0 learns nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from alignments.methods import METHODS
from alignments.promise import SIGNALS, Rung, diverse, order
from alignments.rows import Row
from alignments.scoring import Cell, Job, applies, control_cell
from alignments.screens import (
    BACKWARD,
    Place,
    Screened,
    attribute,
    attribute_cost,
    check,
    first_rows,
    measure,
    screen,
    share,
    strongest,
    unedited,
)
from alignments.search import Search
from intervene.errors import InterveneError

SHARE = 0.1  # of the exhaustive grid, where no budget is given
SCREEN_SHARE = 0.25  # of the budget at most goes into swaps of whole vectors
UNIT = "pair-passes: one pair forwards through the whole model"


class Halving:
    """One planned search over the cells of `search`; its rows are found in `search.rows` too.

    The budget covers finding the best cell: rung 0 to the fits in full. Completing it (all seeds, controls) costs the
    same however it was found and is told apart in `summary()`. A rung that the time runs out in is dropped: the result
    is then that of the last finished one, and `stopped` says so. Unlearned methods are run at the places of the last
    rung only. Of several ranks the largest goes through the short rungs, and all through the last two. `passed_over`
    are the places where a single fit would have been more than the budget.

    Args:
        pair_passes: budget that is kept exactly. seconds: budget on this machine's clock, checked between fits.
        eta: ratio of the steps of one rung to those of the next. least_steps: of the shortest fits.
        explore: share of the first fits that goes to places no signal names. signals: reasons to take up a place.
        screen_pairs: pairs of select on which rung 0 looks. score_pairs: on which short fits are compared.

    Raises:
        InterveneError: two budgets, an eta below 2, a share outside [0, 1); nothing to learn; or fewer pair-passes than
            the screen and the cheapest cell take (the message says how many).
    """

    def __init__(
        self,
        search: Search,
        *,
        pair_passes: float | None = None,
        seconds: float | None = None,
        eta: int = 3,
        explore: float = 0.25,
        signals: Sequence[str] = SIGNALS,
        screen_pairs: int = 32,
        score_pairs: int = 128,
        least_steps: int = 8,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if pair_passes is not None and seconds is not None:
            raise InterveneError(f"Halving: budgets {pair_passes} pair-passes and {seconds} seconds. Give one of them.")
        if eta < 2 or not 0 <= explore < 1:
            raise InterveneError(f"Halving: eta {eta}, explore {explore}. Use eta from 2 and a share from 0, below 1.")
        unknown = [name for name in signals if name not in SIGNALS]
        if unknown:
            raise InterveneError(f"Halving: signal {unknown[0]!r} is unknown. Use some of {', '.join(SIGNALS)}.")
        self.search, self.scorer = search, search.scorer
        self.methods = [name for name in dict.fromkeys(c.method for c in search.cells) if METHODS[name].learned]
        if not self.methods:
            raise InterveneError("Halving: no method of this search learns anything. Use strategy grid: it is cheap.")
        self.seconds, self.eta, self.explore, self.signals = seconds, eta, explore, tuple(signals)
        self.clock, self.screen_pairs = clock, screen_pairs
        self.places = list(dict.fromkeys(map(_place, self._learned())))
        self.shares = {place: share(self.scorer, place) for place in self.places}
        self.rows = first_rows(self.scorer.here.splits["select"], score_pairs)
        self.steps = self._ladder(least_steps)
        self.exhaustive = sum(map(self.full_cost, self._learned()))
        self.limit = self.exhaustive * SHARE if pair_passes is None else float(pair_passes)
        self.rungs: list[Rung] = []
        self.stopped: str | None = None
        self.passed_over: list[Place] = []
        self.completion = 0.0
        self.attribution: str | None = None
        self._begun = 0.0
        if seconds is None:
            self._require_enough(given=pair_passes is not None)

    def run(self) -> Iterator[Row]:
        """Yield the rows of the last rung, of the best cell's other seeds and of its controls, once they are known."""
        self._begun = self.clock()
        seen = self._screen()
        for number, method in enumerate(self.methods):
            yield from self._halve(method, seen, len(self.methods) - number)
            yield from self._complete(method)
        yield from self.search.reported()

    def summary(self) -> dict[str, object]:
        """Return the rungs with their cells, steps and costs, and the share of the exhaustive grid's cost."""
        spent = sum(rung.cost for rung in self.rungs)
        return {
            "strategy": "halving",
            "unit": UNIT,
            "budget": {"seconds": self.seconds} if self.seconds is not None else {"pair_passes": round(self.limit)},
            "rungs": [rung.told() for rung in self.rungs],
            "attribution": self.attribution,
            "search": round(spent),
            "completion": round(self.completion),
            "exhaustive": round(self.exhaustive),
            "share": spent / self.exhaustive,
            "passed over": [str(place) for place in dict.fromkeys(self.passed_over)],
            "stopped": self.stopped,
        }

    def fit_cost(self, cell: Cell, steps: int) -> float:
        """Return the pair-passes of one fit."""
        budget = self.scorer.budget
        pairs = min(budget.batch_size, len(self.scorer.here.splits["train"]))
        validations = -(-steps // budget.validate_every) if budget.validate_every else 0
        learned = steps * budget.accumulate * pairs * (1 + BACKWARD)
        return self.shares[_place(cell)] * (learned + validations * len(self.scorer.here.splits["select"]))

    def full_cost(self, cell: Cell, seeds: int = 1, splits: Iterable[str] | None = None) -> float:
        """Return the pair-passes of a cell as the grid does it: a fit in full for each seed, scored on the splits."""
        scored = sum(len(self.scorer.here.splits[split]) for split in splits or self.search.grid_splits)
        return seeds * (self.fit_cost(cell, self.scorer.budget.steps) + scored * self.shares[_place(cell)])

    def _learned(self) -> list[Cell]:
        return [cell for cell in self.search.cells if METHODS[cell.method].learned]

    def _ladder(self, least: int) -> list[int]:
        """Return the steps of each rung of fits, rising; the last is the budget's."""
        found = [self.scorer.budget.steps]
        while found[0] // self.eta >= least:
            found.insert(0, found[0] // self.eta)
        return found

    def _rung_cost(self, cell: Cell, number: int) -> float:
        if number == len(self.steps) - 1:
            return self.full_cost(cell)
        return self.fit_cost(cell, self.steps[number]) + len(self.rows) * self.shares[_place(cell)]

    def _later(self, cell: Cell, number: int) -> float:
        """Return what `cell` alone costs in the rungs after `number`."""
        return sum(self._rung_cost(cell, later) for later in range(number + 1, len(self.steps)))

    def _require_enough(self, *, given: bool) -> None:
        path = min(self._later(cell, -1) for cell in self._learned()) * len(self.methods)
        least = (path + attribute_cost(self.scorer, self.places, self.screen_pairs)) / (1 - SCREEN_SHARE)
        if self.limit >= least:
            return
        if given:
            raise InterveneError(
                f"Halving with {self.limit:.0f} pair-passes: the screen and the cheapest cell through all rungs take "
                f"{least:.0f}. Give at least that many, or use strategy grid."
            )
        self.limit = least  # a small grid: a tenth of it would be less than one fit

    def _left(self) -> float:
        """Return the pair-passes that are left; of a budget in seconds, by the speed of the last rung."""
        if self.seconds is None:
            return self.limit - sum(rung.cost for rung in self.rungs)
        last = self.rungs[-1]
        rate = max(last.seconds, 1e-9) / max(last.cost, 1e-9)
        return max(0.0, self.seconds - (self.clock() - self._begun)) / rate

    def _late(self) -> bool:
        return self.seconds is not None and self.clock() - self._begun > self.seconds

    def _screen(self) -> tuple[list[Screened], dict[Place, float]]:
        """Return rung 0: exact swaps, in the order of attribution as far as the budget goes, and all attributions."""
        begun, scorer = self.clock(), self.scorer
        rows = first_rows(scorer.here.splits["select"], self.screen_pairs)
        guessed = attribute(scorer, self.places, rows)
        cost = attribute_cost(scorer, self.places, len(rows))
        ordered = strongest(guessed, len(guessed))
        chosen: list[Place] = []
        cost += len(rows) * min(self.shares.values())  # the unedited pass
        for place in ordered:
            each = len(rows) * self.shares[place]
            if self.seconds is None and cost + each > SCREEN_SHARE * self.limit:
                break
            chosen.append(place)
            cost += each
        exact: list[Screened] = []
        for place in chosen:
            if self._late():
                break
            exact += screen(scorer, [place], rows)
        known = check({place: guessed[place] for place in ordered[: max(8, len(ordered) // 4)]}, exact)
        self.attribution = str(known)
        cells = [Cell(one.place.site, one.place.positions, "full_vector", None) for one in exact]
        self.rungs.append(Rung("screen", None, 0, tuple(cells), tuple(exact), cost, self.clock() - begun))
        return exact, guessed

    def _halve(self, method: str, seen: tuple[list[Screened], dict[Place, float]], shares: int) -> Iterator[Row]:
        """Yield the rows of the last rung of a method, after its short rungs; keep to an equal share of the budget."""
        by_place = {place: [c for c in self._learned() if c.method == method and _place(c) == place]
                    for place in self.places}  # fmt: skip
        offered = order(*seen, self.places, self.signals, self.explore, seed=self.search.seeds[0])
        ranked = [max(by_place[place], key=_rank) for place in offered if by_place[place]]
        goal = self._left() / shares
        spent, most = 0.0, len(self.places)
        for number, steps in enumerate(self.steps):
            if self.seconds is not None:
                goal, spent = self._left() / shares, 0.0
            if number >= len(self.steps) - 2:  # the last two rungs see all ranks
                ranked = _with_ranks(ranked, by_place)
            cells = self._affordable(ranked, number, goal - spent, most)
            most = max(2, -(-len(set(map(_place, cells))) // self.eta))
            if number == len(self.steps) - 1:
                yield from self._finals(method, cells)
                return
            rung = self._fits(method, cells, steps)
            if rung is None:
                yield from self._finals(method, [ranked[0]])
                return
            self.rungs.append(rung)
            spent += rung.cost
            ranked = diverse(rung)

    def _affordable(self, cells: Sequence[Cell], number: int, left: float, most: int) -> list[Cell]:
        """Return the first cells that fit into this rung's part of what is left: at least one, at `most` places.

        A cell that could not go through all later rungs alone is passed over; and one is added only if the dearest of
        those chosen still can.
        """
        part = left / (len(self.steps) - number)
        possible = [cell for cell in cells if self._rung_cost(cell, number) + self._later(cell, number) <= left]
        if number == 0:
            self.passed_over += [_place(cell) for cell in cells if cell not in possible]
        possible = possible or list(cells[:1])
        chosen, cost, later = [possible[0]], self._rung_cost(possible[0], number), self._later(possible[0], number)
        for cell in possible[1:]:
            if len({_place(one) for one in (*chosen, cell)}) > most:
                continue
            each, after = self._rung_cost(cell, number), max(later, self._later(cell, number))
            if cost + each <= part and left - cost - each >= after:
                chosen, cost, later = [*chosen, cell], cost + each, after
        return chosen

    def _fits(self, method: str, cells: Sequence[Cell], steps: int) -> Rung | None:
        """Return the rung of short fits; None: the time ran out before it was finished, or none could be fitted."""
        begun, pairs = self.clock(), self.scorer.here.splits["select"]
        found: list[Screened] = []
        fitted: list[Cell] = []
        own = unedited(self.scorer, self.places, self.rows)
        seed = self.search.seeds[0]
        for cell in cells:
            if self._late():
                self.stopped = f"out of time in the rung of {steps} steps: the result is that of the rung before"
                return None
            job = Job(cell, (seed,), (), steps)
            try:
                plan = self.scorer.fitted(job)[0]
            except InterveneError as error:
                self.search.note_failed(job, str(error))
                continue
            fitted.append(cell)
            with torch.no_grad():
                logits = pairs.logits(plan, self.rows)
            found.append(measure(_place(cell), logits, own, pairs, self.rows))
            self.scorer.plans.pop((cell, seed, steps), None)  # only rungs in full are asked for again
        if not fitted:
            return None
        number = self.steps.index(steps)
        cost = sum(self._rung_cost(cell, number) for cell in fitted)
        return Rung(f"{steps} steps", method, steps, tuple(fitted), tuple(found), cost, self.clock() - begun)

    def _finals(self, method: str, cells: Sequence[Cell]) -> Iterator[Row]:
        """Yield the rows of full fits of `cells`, and of the unlearned methods at their places."""
        begun = self.clock()
        done: list[Cell] = []
        for cell in cells:
            if done and self._late():
                self.stopped = f"out of time after {len(done)} of {len(cells)} fits in full"
                break
            yield from self.search.do([Job(cell, self.search.seeds[:1], self.search.grid_splits)])
            done.append(cell)
        cost, steps = sum(map(self.full_cost, done)), self.scorer.budget.steps
        self.rungs.append(Rung(f"{steps} steps", method, steps, tuple(done), (), cost, self.clock() - begun))
        near = {_place(cell) for cell in done}
        plain = [c for c in self.search.cells if not METHODS[c.method].learned and _place(c) in near]
        yield from self.search.do([Job(cell, self.search.seeds[:1], self.search.grid_splits) for cell in plain])

    def _complete(self, method: str) -> Iterator[Row]:
        """Yield what the best cell lacks: seeds until the best one has them all, then its controls."""
        best = self.search.best_or_none(method)
        while best is not None:
            before = len(self.search.rows)
            yield from self.search.do(self.search.complete(best))
            if len(self.search.rows) > before:
                self.completion += self.full_cost(best, len(self.search.seeds) - 1, ("select", "test"))
            again = self.search.best_or_none(method)
            if again == best:
                break
            best = again
        if best is None:
            return
        used = [one for one in self.search.controls if applies(one, METHODS[method], self.scorer.variables)]
        controls = [Job(control_cell(best, name), self.search.seeds) for name in used]
        fitted = [name for name in used if name not in ("random_subspace", "complement")]
        self.completion += self.full_cost(best, len(self.search.seeds), ("select", "test")) * len(fitted)
        yield from self.search.do(controls)


def run_halving(search: Search, *, pair_passes: float | None = None, seconds: float | None = None) -> Iterator[Row]:
    """Yield the rows of `Halving(search, ...)`; use the class where its summary is wanted."""
    return Halving(search, pair_passes=pair_passes, seconds=seconds).run()


def _place(cell: Cell) -> Place:
    return Place(cell.site, cell.positions)


def _rank(cell: Cell) -> int:
    return cell.rank or 0


def _with_ranks(cells: Sequence[Cell], by_place: Mapping[Place, Sequence[Cell]]) -> list[Cell]:
    """Return `cells`, each followed by those of its place with other ranks, largest first."""
    found: dict[Cell, None] = {}
    for cell in cells:
        others = sorted(by_place[_place(cell)], key=_rank, reverse=True)
        found |= dict.fromkeys([cell, *others])
    return list(found)
