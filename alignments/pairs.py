"""Pairs as tensors: tokenised, left-padded, with their positions marked, run once through the frozen model.

`PairData` is what `fit` and `evaluate` read: labels, and the logits of some pairs under a plan. `LanguagePairs` gives
it for prompts, by suffix recomputation; `VectorPairs` for any module on input vectors, by full passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from intervene import AllTokens, Intervention, Plan, Sources, capture, intervene
from intervene.errors import BadPosition, ShapeMismatch
from intervene.families import resolve
from intervene.marked import Marked
from intervene.sites import Site
from intervene.suffix import Prefix, call_inputs, join, positions_of, prefix_of, suffix_logits
from tasks.base import Example, Pair
from tasks.tokens import token_ids, token_span

Progress = Callable[[int, int], None]  # (batches done, batches in all)


class PairData(Protocol):
    """Base/source pairs ready to be aligned. `labels` (N,) are the counterfactual answers' ids.

    `kinds` names each pair's kind, by which scores are told apart; empty where there is only one.
    """

    labels: Tensor
    kinds: Sequence[str]

    def __len__(self) -> int: ...

    def logits(self, plan: Plan, rows: Tensor) -> Tensor:
        """Return (b, V): the answer logits of pairs `rows` (b,) under `plan`, differentiable in the plan."""
        ...


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokenised examples: ids and mask (N, S) left-padded; marks name -> (N, P) columns; answers (N,)."""

    input_ids: Tensor
    attention_mask: Tensor
    marks: dict[str, Tensor]
    answers: Tensor

    def batch(self, rows: slice) -> dict[str, Any]:
        """Return the inputs of some examples, marks included."""
        marks = {name: columns[rows] for name, columns in self.marks.items()}
        return {"input_ids": self.input_ids[rows], "attention_mask": self.attention_mask[rows], "marks": marks}


def first_token(tokenizer: Any, text: str) -> int:
    """Return the id of the first token of `text`, as it continues a prompt."""
    return token_ids(tokenizer, text)[0]


def encode(tokenizer: Any, examples: Sequence[Example], positions: Sequence[str], device: str | torch.device) -> Tokens:
    """Return `examples` tokenised and left-padded, each of `positions` marked by the last token of its span.

    Raises:
        BadPosition: an example has no span of that name.
    """
    ids = [list(tokenizer(example.prompt)["input_ids"]) for example in examples]
    length = max(map(len, ids))
    pads = [length - len(one) for one in ids]
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    marks: dict[str, Tensor] = {}
    for name in positions:
        columns = [[pad + _mark(tokenizer, example, name)] for example, pad in zip(examples, pads, strict=True)]
        marks[name] = torch.tensor(columns, device=device)
    return Tokens(
        input_ids=torch.tensor([[filler] * pad + one for one, pad in zip(ids, pads, strict=True)], device=device),
        attention_mask=torch.tensor([[0] * pad + [1] * (length - pad) for pad in pads], device=device),
        marks=marks,
        answers=torch.tensor([first_token(tokenizer, example.answer) for example in examples], device=device),
    )


def _mark(tokenizer: Any, example: Example, name: str) -> int:
    if name not in example.spans:
        raise BadPosition(
            f"Position {name!r}: {example.prompt!r} marks only {', '.join(example.spans)}. Name one of those."
        )
    return token_span(tokenizer, example.prompt, example.spans[name])[-1]


class LanguagePairs:
    """Pairs of prompts on a causal language model, with everything that no edit can change computed once.

    Building it costs one full pass over the bases and one over the sources, whose own answers are scored too. After
    that a training step runs only the blocks above the site on the tokens from the edited position on.

    Args:
        sites: residual-stream sites to search, block_output only; their stream is kept for bases and sources.
        positions: names of the tasks' marked tokens.
        kinds: one name per pair, by which scores are told apart.
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
        progress: Progress | None = None,
    ) -> None:
        if isinstance(positions, str):
            raise ShapeMismatch(f"LanguagePairs: positions is the text {positions!r}. Write [{positions!r}].")
        if not len(pairs):
            raise ShapeMismatch("LanguagePairs: no pairs were given. Draw at least one.")
        parsed = [Site.parse(site) for site in sites]
        other = [str(site) for site in parsed if site.component != "block_output"]
        if other:
            raise ShapeMismatch(
                f"Sites {', '.join(other)}: the search keeps block_output only. Name block_output sites."
            )
        self.model = model
        self.kinds: Sequence[str] = tuple(kinds)
        self.sites = tuple(resolve(model, site).site for site in parsed)
        device = next(model.parameters()).device
        base = encode(tokenizer, [pair.base for pair in pairs], positions, device)
        source = encode(tokenizer, [pair.source for pair in pairs], positions, device)
        self.labels = torch.tensor([first_token(tokenizer, pair.label) for pair in pairs], device=device)
        self.base_answers, self.source_answers = base.answers, source.answers
        starts = range(0, len(pairs), batch_size)
        self.prefix: Prefix = self._bases(base, starts, batch_size, progress)
        self.streams, self.source_logits = self._sources(source, starts, batch_size, progress)

    def __len__(self) -> int:
        return len(self.labels)

    def _bases(self, base: Tokens, starts: range, size: int, progress: Progress | None) -> Prefix:
        layers = [site.layer for site in self.sites if site.layer is not None]
        parts = []
        for done, start in enumerate(starts):
            parts.append(prefix_of(self.model, base.batch(slice(start, start + size)), layers))
            _tell(progress, done + 1, 2 * len(starts))
        return join(parts)

    def _sources(
        self, source: Tokens, starts: range, size: int, progress: Progress | None
    ) -> tuple[dict[tuple[Site, str], Tensor], Tensor]:
        """Return the sources' stream at each site and marked position, (N, 1, D), and their own last logits (N, V)."""
        names = list(source.marks)
        found: dict[tuple[Site, str], list[Tensor]] = {(site, name): [] for site in self.sites for name in names}
        logits = []
        for done, start in enumerate(starts):
            batch = source.batch(slice(start, start + size))
            full = {**batch, "position_ids": positions_of(batch["attention_mask"])}
            with torch.no_grad(), capture(self.model, self.sites, prompt=full) as acts:
                logits.append(self.model(**call_inputs(self.model, full), use_cache=False).logits[:, -1])
            row = torch.arange(len(batch["input_ids"]))[:, None]
            for site in self.sites:
                for name in names:
                    found[site, name].append(acts[site][row, batch["marks"][name]])
            _tell(progress, len(starts) + done + 1, 2 * len(starts))
        return {key: torch.cat(parts) for key, parts in found.items()}, torch.cat(logits)

    def task_correct(self) -> tuple[Tensor, Tensor]:
        """Return (N,) bool twice: whether the unedited model's top token answers the base, and the source, rightly."""
        return (
            self.prefix.logits.argmax(-1) == self.base_answers,
            self.source_logits.argmax(-1) == self.source_answers,
        )

    def exactness(self) -> str:
        """Return how far suffix recomputation was from full passes, or that full passes are run instead."""
        measured = f"{self.prefix.difference:.1e} of the logits' spread"
        return measured if self.prefix.exact else f"{measured}: too far, so every pass is a full one (slower)"

    def logits(self, plan: Plan, rows: Tensor) -> Tensor:
        """Return (b, V) under `plan`, whose sources are read at `Marked` positions of the kept sites.

        Raises:
            BadPosition: a source is asked for that was not kept.
        """
        sources = [self._source(item)[rows] if item.edit.needs_source else None for item in plan]
        return suffix_logits(self.model, plan, sources, self.prefix.rows(rows))

    def _source(self, item: Intervention) -> Tensor:
        """Return the sources' activations (N, 1, D) that `item` reads."""
        site = item.site if item.site in self.sites else resolve(self.model, item.site).site
        found = self.streams.get((site, _marked(item)))
        if found is None:
            kept = ", ".join(f"{one} @ {name}" for one, name in self.streams)
            raise BadPosition(f"{item}: these pairs keep only {kept}. Name its site and position when making them.")
        return found


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _marked(item: Intervention) -> str:
    where = item.positions if item.source_positions is None else item.source_positions
    if not isinstance(where, Marked):
        raise BadPosition(f"{item}: a search works on marked positions. Use Marked('<name>').")
    return where.name


class VectorPairs:
    """Pairs of input vectors (N, W) for any module that maps (N, W) to logits (N, V), such as a small MLP."""

    def __init__(self, model: nn.Module, base: Tensor, source: Tensor, labels: Tensor) -> None:
        if not len(base) == len(source) == len(labels) or not len(base):
            raise ShapeMismatch(
                f"VectorPairs: {len(base)} bases, {len(source)} sources, {len(labels)} labels. Give as many of each."
            )
        self.model = model
        self.base = base
        self.source = source
        self.labels = labels
        self.kinds: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def logits(self, plan: Plan, rows: Tensor) -> Tensor:
        """Return (b, V) under `plan`."""
        sources = self._sources(plan, rows)
        with intervene(self.model, plan, sources):
            output: Tensor = self.model(self.base[rows])
        return output

    def _sources(self, plan: Plan, rows: Tensor) -> Sources:
        assert all(isinstance(item.positions, AllTokens) for item in plan)
        wanted = {item.site for item in plan if item.edit.needs_source}
        if not wanted:
            return Sources([None] * len(plan))
        with torch.no_grad(), capture(self.model, list(wanted), stop_after_last=True) as acts:
            self.model(self.source[rows])
        return Sources([acts[item.site] if item.edit.needs_source else None for item in plan])
