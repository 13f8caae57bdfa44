"""Pairs as tensors, run once through the frozen model, so that a fit recomputes only what its plan can change.

`PairData` is what `fit`, `evaluate` and the methods read: labels, the logits of some pairs under a plan, activations,
and the values of the searched variable. `LanguagePairs` gives it for prompts, by suffix recomputation; `VectorPairs`
(its own file) for any module on input vectors, by full passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alignments.space import Draft, Held, Memory, Space, activation_key
from alignments.tokens import Tokens, encode, first_token
from intervene import Intervention, Plan, Positions, Zero, capture
from intervene.errors import BadPosition, ShapeMismatch
from intervene.families import locate, resolve
from intervene.marked import Marked
from intervene.model_state import ModelState
from intervene.parts import Rows
from intervene.prefix import Prefix, positions_of, prefix_from, tensors_of
from intervene.sites import Site
from intervene.suffix import at_marks, call_inputs, first_block, prefix_of, suffix_logits
from tasks.base import Pair

Progress = Callable[[int, int], None]  # (batches done, batches in all)
Values = tuple[Sequence[Any], Sequence[Any]]
ROW_BY_ROW = ("stream/", "keys/", "values/")


class PairData(Protocol):
    """Base/source pairs ready to be aligned.

    `labels` (N,) are the counterfactual answers' ids. `kinds` names each pair's kind, by which scores are told apart;
    empty where there is only one. `values` are those of the searched variable on each base and each source, empty if
    unknown. `base_answers` (N,) are the ids of the bases' own right answers. `correct` (N,) bool says of which pairs
    the unedited model answers base and source rightly; None: not known.
    """

    labels: Tensor
    base_answers: Tensor
    kinds: Sequence[str]
    values: Values
    correct: Tensor | None

    def __len__(self) -> int: ...

    def logits(self, plan: Plan, rows: Tensor) -> Tensor:
        """Return (b, V): the answer logits of pairs `rows` (b,) under `plan`, differentiable in the plan."""
        ...

    def losses(self, plan: Plan, rows: Tensor, labels: Tensor) -> Tensor:
        """Return (b,): the cross-entropy in nats of these logits at `labels` (b,), differentiable in the plan."""
        ...

    def activations(self, site: Site, positions: Positions) -> tuple[Tensor, Tensor]:
        """Return the activations of bases and of sources, (N, P, D) each."""
        ...


class LanguagePairs:
    """Pairs of prompts on a causal language model, with everything that no edit can change computed once.

    Building it costs one full pass over the bases and one over the sources, whose own answers are scored too. After
    that a training step runs only the blocks above the site on the tokens from the edited position on.

    Args:
        sites: sites to search; their activations are kept for bases and sources, at the marked positions.
        positions: names of the tasks' marked tokens, or absolute columns.
        kinds: one name per pair, by which scores are told apart.
        values: the searched variable's value on each base and on each source.
        variables: with several variables, their names in the order of the plan's interventions. A pair then changes
            only the one it names (`Pair.variable`): the others' interventions get the base itself as source.
        space: where the activations live; with `Disk` the passes are left out if an earlier run has made them.
            `cached` says whether they were.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        pairs: Sequence[Pair],
        *,
        sites: Sequence[Site | str],
        positions: Sequence[str],
        batch_size: int = 32,
        kinds: Sequence[str] = (),
        values: Values = ((), ()),
        variables: Sequence[str] = (),
        space: Space | None = None,
        progress: Progress | None = None,
    ) -> None:
        if isinstance(positions, str):
            raise ShapeMismatch(f"LanguagePairs: positions is the text {positions!r}. Write [{positions!r}].")
        if not len(pairs):
            raise ShapeMismatch("LanguagePairs: no pairs were given. Draw at least one.")
        device = next(model.parameters()).device
        base = encode(tokenizer, [pair.base for pair in pairs], positions, device)
        source = encode(tokenizer, [pair.source for pair in pairs], positions, device)
        labels = [first_token(tokenizer, pair.label, pair.base.prompt) for pair in pairs]
        self.kinds: Sequence[str] = tuple(kinds)
        self.values = values
        self.variables = tuple(variables)
        self.changed = None if len(variables) < 2 else _named_variables([pair.variable for pair in pairs], variables)
        self._prepare(model, base, source, torch.tensor(labels, device=device), sites, batch_size, space, progress)

    @classmethod
    def from_tokens(
        cls,
        model: nn.Module,
        base: Tokens,
        source: Tokens,
        labels: Tensor,
        *,
        sites: Sequence[Site | str],
        changed: Sequence[str] = (),
        variables: Sequence[str] = (),
        batch_size: int = 32,
        kinds: Sequence[str] = (),
        space: Space | None = None,
        progress: Progress | None = None,
    ) -> LanguagePairs:
        """Return pairs of prompts that are tokens already, on the model's device; nothing is decoded or encoded.

        `labels` (N,) are the counterfactual answers, `changed` names the variable that each pair interchanges, which
        is read where there are several. Answers of -1 in base or source are unknown: `correct` then is None, and the
        model's own top tokens stand in for `base_answers` and `source_answers`.
        """
        made = cls.__new__(cls)
        made.kinds, made.values, made.variables = tuple(kinds), ((), ()), tuple(variables)
        made.changed = None if len(variables) < 2 else _named_variables(changed, variables)
        made._prepare(model, base, source, labels, sites, batch_size, space, progress)
        return made

    def _prepare(
        self,
        model: nn.Module,
        base: Tokens,
        source: Tokens,
        labels: Tensor,
        sites: Sequence[Site | str],
        batch_size: int,
        space: Space | None,
        progress: Progress | None,
    ) -> None:
        """Run bases and sources once."""
        _same_marks(base, source)
        device = labels.device
        self.model, self.base, self.source, self.labels = model, base, source, labels
        self.sites = tuple(resolve(model, site).site for site in map(Site.parse, sites))
        self.base_answers, self.source_answers = base.answers, source.answers
        state = ModelState(model)
        held = self._held(space or Memory(), batch_size, progress)
        # What methods read whole lies where the model is; streams, keys and values are fetched row by row.
        far = device.type != "cpu"
        near = {
            name: one.to(device) if far and one.device.type == "cpu" and not name.startswith(ROW_BY_ROW) else one
            for name, one in held.tensors.items()
        }
        self.prefix: Prefix = prefix_from(self.base.batch(slice(None)), near, **held.facts, state=state)
        self.source_logits = near["source_logits"]
        base_right, source_right = self.task_correct()
        known = bool((base.answers >= 0).all() and (source.answers >= 0).all())
        self.correct: Tensor | None = base_right & source_right if known else None
        if not known:
            self.base_answers, self.source_answers = self.prefix.logits.argmax(-1), self.source_logits.argmax(-1)
        self.streams = {
            (site, name): near[f"source/{site}/{name}"] for site in self.sites for name in self.source.marks
        }

    def __len__(self) -> int:
        return len(self.labels)

    def _held(self, space: Space, size: int, progress: Progress | None) -> Held:
        """Return the activations that `space` has of an earlier run, or those of passes that are run now."""
        key, total = "", 2 * len(range(0, len(self), size))
        if space.keeps:
            key = activation_key(self.model, self.base, self.source, self.sites, batch_size=size)
        found = space.find(key)
        self.cached = found is not None
        if found is not None:
            _tell(progress, total, total)
            return found
        first = self._base(slice(0, size))
        like = tensors_of(first)
        like |= {f"source/{name.removeprefix('kept/')}": like[name] for name in list(like) if name[:5] == "kept/"}
        like["source_logits"] = first.logits
        layout = {name: ((len(self), *one.shape[1:]), one.dtype) for name, one in like.items()}
        draft = space.begin(key, layout, {name: one.device for name, one in like.items()})
        try:
            return self._filled(draft, first, size, progress)
        except BaseException:
            draft.abandon()
            raise

    def _filled(self, draft: Draft, first: Prefix, size: int, progress: Progress | None) -> Held:
        """Run all bases but the `first` batch, and all sources, into `draft`."""
        starts = range(0, len(self), size)
        exact, difference, noise, fused = True, 0.0, 0.0, first.fused
        for done, start in enumerate(starts):
            rows = slice(start, start + size)
            part = self._base(rows) if start else first
            for name, one in tensors_of(part).items():
                draft.tensors[name][rows] = one
            exact, difference, noise = exact and part.exact, max(difference, part.difference), max(noise, part.noise)
            fused = fused & part.fused
            _tell(progress, done + 1, 2 * len(starts))
        for done, start in enumerate(starts):
            rows = slice(start, start + size)
            for name, one in self._sources(rows).items():
                draft.tensors[name][rows] = one
            _tell(progress, len(starts) + done + 1, 2 * len(starts))
        return draft.finish(
            {"tuples": first.tuples, "exact": exact, "difference": difference, "noise": noise, "fused": sorted(fused)}
        )

    def _base(self, rows: slice) -> Prefix:
        depth = locate(self.model).n_layers
        ends = {first_block([Intervention(site, Zero())], depth) for site in self.sites}
        return prefix_of(self.model, self.base.batch(rows), sorted(ends - {-1}), keep=self.sites)

    def _sources(self, rows: slice) -> dict[str, Tensor]:
        """Return the sources' activations at each site and mark, (b, P, D), and their own last logits (b, V)."""
        batch = self.source.batch(rows)
        full = {**batch, "position_ids": positions_of(batch["attention_mask"])}
        with torch.inference_mode(False), torch.no_grad(), capture(self.model, self.sites, prompt=full) as acts:
            logits: Tensor = self.model(**call_inputs(self.model, full), use_cache=False).logits[:, -1]
        found = {
            f"source/{site}/{name}": at_marks(acts[site], columns)
            for site in self.sites
            for name, columns in batch["marks"].items()
        }
        return {**found, "source_logits": logits}

    def task_correct(self) -> tuple[Tensor, Tensor]:
        """Return (N,) bool twice: whether the unedited model's top token answers the base, and the source, rightly."""
        return (
            self.prefix.logits.argmax(-1).to(self.labels.device) == self.base_answers,
            self.source_logits.argmax(-1).to(self.labels.device) == self.source_answers,
        )

    def exactness(self) -> str:
        """Return how far suffix recomputation was from full passes, or that full passes are run instead."""
        measured = f"{self.prefix.difference:.1e} of the logits' spread"
        if self.prefix.logits.dtype != torch.float32:
            kind = str(self.prefix.logits.dtype).removeprefix("torch.")
            measured += f" (two full passes in {kind}: {self.prefix.noise:.1e})"
        return measured if self.prefix.exact else f"{measured}: too far, so every pass is a full one (slower)"

    def logits(self, plan: Plan, rows: Tensor) -> Tensor:
        """Return (b, V) under `plan`, whose sources are read at `Marked` positions of the kept sites.

        Raises:
            BadPosition: a source is asked for that was not kept.
        """
        return self._passed(plan, rows, None)

    def losses(self, plan: Plan, rows: Tensor, labels: Tensor) -> Tensor:
        """Return (b,): the cross-entropy of `logits` at `labels` (b,), without writing them where that is faster."""
        return self._passed(plan, rows, labels)

    def _passed(self, plan: Plan, rows: Tensor, labels: Tensor | None) -> Tensor:
        sources = [self._source(item)[rows] if item.edit.needs_source else None for item in plan]
        done = interchanging(plan, None if self.changed is None else self.changed[rows])
        return suffix_logits(self.model, done, sources, self.prefix.rows(rows), labels)

    def activations(self, site: Site, positions: Positions) -> tuple[Tensor, Tensor]:
        """Return the activations of bases and sources at a kept site and mark: (N, P, D) each.

        Raises:
            BadPosition: that site or position was not kept.
        """
        key = resolve(self.model, site).site, _name(positions, f"Activations of {site}")
        return self._kept(self.prefix.kept, key, f"Activations of {site}"), self.streams[key]

    def _source(self, item: Intervention) -> Tensor:
        """Return the sources' activations (N, P, D) that `item` reads."""
        site = item.site if item.site in self.sites else resolve(self.model, item.site).site
        where = item.positions if item.source_positions is None else item.source_positions
        return self._kept(self.streams, (site, _name(where, str(item))), str(item))

    def _kept(self, held: dict[tuple[Site, str], Tensor], key: tuple[Site, str], what: str) -> Tensor:
        found = held.get(key)
        if found is None:
            kept = ", ".join(f"{one} @ {name}" for one, name in self.streams)
            raise BadPosition(f"{what}: these pairs keep only {kept}. Name its site and position when making them.")
        return found


def interchanging(plan: Plan, changed: Tensor | None) -> Plan:
    """Return `plan` with each variable's intervention acting only on the pairs that interchange it.

    `changed` (b, number of variables) bool; None, or a plan with a single swap: nothing is held back.

    Raises:
        ShapeMismatch: the plan has neither one intervention that needs a source nor one per variable.
    """
    needing = [number for number, item in enumerate(plan) if item.edit.needs_source]
    if changed is None or changed.shape[1] < 2 or len(needing) < 2:
        return plan
    if len(needing) != changed.shape[1]:
        raise ShapeMismatch(
            f"Plan with {len(needing)} interventions that need a source: the pairs interchange {changed.shape[1]} "
            "variables. Give one intervention for each, or one for all."
        )
    held = list(plan)
    for column, number in enumerate(needing):
        item = plan[number]
        edit = Rows(item.edit, changed[:, column])
        held[number] = Intervention(
            item.site, edit, item.positions, item.featurizer, item.phase, item.source_positions, item.when
        )
    return tuple(held)


def _named_variables(changed: Sequence[str], variables: Sequence[str]) -> Tensor:
    """Return (N, number of variables) bool: which of them each pair interchanges."""
    return torch.tensor([[name == one for name in variables] for one in changed])


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _same_marks(base: Tokens, source: Tokens) -> None:
    for name, columns in base.marks.items():
        if columns.shape[1] != source.marks[name].shape[1]:
            raise BadPosition(
                f"Position {name!r}: {columns.shape[1]} tokens in the bases and {source.marks[name].shape[1]} in the "
                "sources. Use its last token, without [:]."
            )


def _name(where: Positions, what: str) -> str:
    if not isinstance(where, Marked):
        raise BadPosition(f"{what}: a search works on marked positions. Use Marked('<name>').")
    return where.name
