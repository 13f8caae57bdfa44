"""Which examples a step learns from, and how they come to the model: order, cut over ranks, padding or packing.

    order = Order(len(data), batch_size=16, seed=0, lengths=[len(one.input_ids) for one in data.examples], bucket=8)
    feed = Batches(data.examples, order, micro_batch_size=4, pad_token_id=tokenizer.pad_token_id)
    feed.batches(step, rank, world)

A step is a pure function of its number: a run that resumes needs nothing else, and the number of ranks changes nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from defenses.batch import NO_SAMPLE, Batch, Example, collate, extras_of, poison_of
from defenses.errors import DataError
from intervene.content import IGNORED_LABEL
from intervene.errors import asked_found_do


class Order:
    """The examples of every step: each epoch a fresh shuffle, epochs one after another without a gap.

    The last, incomplete batch of an epoch is filled with the first examples of the next, so that within E epochs each
    example comes exactly E times. `bucket` > 0 puts examples of like length into the same step: each epoch's shuffle
    is sorted by length within windows of `bucket` steps, and the steps of a window come in random order.

    Args:
        n: examples. batch_size: of one step, over all ranks. lengths: (n,) tokens of each, for `bucket`.

    Raises:
        DataError: no examples, no batch, or a `bucket` without one length per example.
    """

    def __init__(
        self, n: int, batch_size: int, seed: int, *, lengths: Sequence[int] | None = None, bucket: int = 0
    ) -> None:
        if n < 1 or batch_size < 1 or bucket < 0:
            raise DataError(
                f"Order of n={n} in batches of {batch_size}, bucket={bucket}: give at least one example and one per "
                "batch, and a bucket of 0 (none) or more steps."
            )
        if bucket and (lengths is None or len(lengths) != n):
            found = "no lengths" if lengths is None else f"{len(lengths)} lengths"
            raise DataError(f"bucket={bucket} with {found} for {n} examples. Give the tokens of each, or bucket=0.")
        self.n, self.batch_size, self.seed, self.bucket = n, batch_size, seed, bucket
        self._lengths = list(lengths or ())
        self._epochs: dict[int, list[int]] = {}

    def step(self, number: int) -> list[int]:
        """Return the examples of a step, counted from 0."""
        if number < 0:
            raise DataError(f"Step {number}: steps are counted from 0.")
        start = number * self.batch_size
        places = (divmod(at, self.n) for at in range(start, start + self.batch_size))
        return [self._epoch(epoch)[at] for epoch, at in places]

    def steps(self, epochs: float) -> int:
        """Return the steps that show every example at least `epochs` times; the last may go on into the next epoch."""
        return max(1, math.ceil(epochs * self.n / self.batch_size - 1e-9))

    def _epoch(self, epoch: int) -> list[int]:
        """Return one epoch's order; the two that were asked for last are kept."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self._shuffled(epoch)
        return self._epochs[epoch]

    def _shuffled(self, epoch: int) -> list[int]:
        """Return a permutation of the examples, the same on every machine and in every version of torch."""
        draw = random.Random(f"order {self.seed} {epoch}")  # a text seed goes through sha512: seeds are unrelated
        order = list(range(self.n))
        draw.shuffle(order)
        if not self.bucket:
            return order
        # What fills the last epoch's open batch, and what stays open at the end of this one, is left as it fell.
        head = min(-epoch * self.n % self.batch_size, self.n)
        tail = self.n - (self.n - head) % self.batch_size
        done, window = order[:head], self.bucket * self.batch_size
        for start in range(head, tail, window):
            near = sorted(order[start : min(start + window, tail)], key=self._lengths.__getitem__)
            steps = [near[at : at + self.batch_size] for at in range(0, len(near), self.batch_size)]
            draw.shuffle(steps)
            done += [one for step in steps for one in step]
        return done + order[tail:]


def check_cut(batch_size: int, world: int, micro_batch_size: int) -> int:
    """Return how many micro-batches of `micro_batch_size` each of `world` ranks makes of a step.

    Raises:
        DataError: the batch cannot be cut so that every rank gets as many; with the sizes that can.
    """
    if min(batch_size, world, micro_batch_size) > 0 and batch_size % (world * micro_batch_size) == 0:
        return batch_size // (world * micro_batch_size)
    each = max(1, world) * max(1, micro_batch_size)
    fitting = [size for size in range(1, batch_size // max(1, world) + 1) if batch_size % (max(1, world) * size) == 0]
    micro = (
        f"micro_batch_size {', '.join(map(str, fitting))}"
        if fitting
        else f"a number of ranks that divides {batch_size}"
    )
    near = sorted({each * max(1, batch_size // each), each * (batch_size // each + 1)})
    raise DataError(
        asked_found_do(
            f"batch_size={batch_size} over {world} ranks in micro-batches of {micro_batch_size}",
            f"{batch_size} is not a multiple of {world} x {micro_batch_size} = {world * micro_batch_size}.",
            f"Choose {micro}, or batch_size {' or '.join(map(str, near))}.",
        )
    )


def micro_batches(indices: Sequence[int], rank: int, world: int, micro_batch_size: int) -> list[list[int]]:
    """Return one rank's part of a step, cut into micro-batches; every rank gets as many, each as large.

    Raises:
        DataError: as `check_cut`, or there is no such rank.
    """
    count = check_cut(len(indices), world, micro_batch_size)
    if not 0 <= rank < world:
        raise DataError(f"Rank {rank} of {world}: ranks go from 0 to {world - 1}.")
    own = list(indices[rank * count * micro_batch_size : (rank + 1) * count * micro_batch_size])
    return [own[at : at + micro_batch_size] for at in range(0, len(own), micro_batch_size)]


@dataclass(frozen=True, eq=False)
class Batches:
    """The micro-batches of every step: what a training loop is fed with.

    Attributes:
        examples: `examples[i]` is what `order` calls i. width: columns of packed rows; None: one example per row,
            padded to the longest of its micro-batch, rounded up to a `multiple`.
    """

    examples: Sequence[Example]
    order: Order
    micro_batch_size: int
    pad_token_id: int
    width: int | None = None
    multiple: int = 8

    def __post_init__(self) -> None:
        if len(self.examples) != self.order.n:
            raise DataError(f"Order of {self.order.n} examples over {len(self.examples)}. Make it of len(examples).")

    def indices(self, step: int) -> list[int]:
        """Return the examples of a step, of all ranks."""
        return self.order.step(step)

    def batches(self, step: int, rank: int, world: int) -> list[Batch]:
        """Return one rank's micro-batches of a step."""
        parts = micro_batches(self.indices(step), rank, world, self.micro_batch_size)
        return [self._batch([self.examples[index] for index in part]) for part in parts]

    def _batch(self, examples: Sequence[Example]) -> Batch:
        if self.width is None:
            return collate(examples, self.pad_token_id, multiple=self.multiple)
        return pack(examples, self.width, self.pad_token_id)


@dataclass(eq=False)
class _Row:
    """A packed row while it fills up: which samples, and how many columns they take."""

    samples: list[int]
    used: int


def pack(examples: Sequence[Example], width: int, pad_token_id: int) -> Batch:
    """Return several examples per row of `width` columns, each put where it first fits.

    `position_ids` start again at 0 with every sample and with the padding behind the last, so that transformers keeps
    all of them apart (`require_packing`). The first token of a sample loses its label: nothing predicts it.

    Raises:
        DataError: there are no examples, or one is longer than a row.
    """
    if not examples:
        raise DataError("Pack no examples: nothing could be learned. Give at least one.")
    rows: list[_Row] = []
    for at, one in enumerate(examples):
        n = len(one.input_ids)
        if not 0 < n <= width:
            raise DataError(
                f"Pack example {one.index} (line {one.line}): {n} tokens into rows of {width}. Give a width of at "
                "least max_length."
            )
        row = next((row for row in rows if row.used + n <= width), None)
        if row is None:
            rows.append(row := _Row([], 0))
        row.samples.append(at)
        row.used += n
    return _packed(examples, rows, width, pad_token_id)


def _packed(examples: Sequence[Example], rows: Sequence[_Row], width: int, pad_token_id: int) -> Batch:
    """Return the rows as a batch."""
    shape = (len(rows), width)
    input_ids, labels = torch.full(shape, pad_token_id), torch.full(shape, IGNORED_LABEL)
    sample, template = torch.full(shape, NO_SAMPLE), torch.zeros(shape, dtype=torch.bool)
    position_ids = torch.zeros(shape, dtype=torch.long)
    for at, row in enumerate(rows):
        start = 0
        for which in row.samples:
            one = examples[which]
            stop = start + len(one.input_ids)
            input_ids[at, start:stop] = torch.tensor(one.input_ids)
            labels[at, start + 1 : stop] = torch.tensor(one.labels[1:], dtype=torch.long)
            sample[at, start:stop] = which
            position_ids[at, start:stop] = torch.arange(stop - start)
            if one.template:
                template[at, start:stop] = torch.tensor(one.template)
            start = stop
        position_ids[at, start:] = torch.arange(width - start)
    return Batch(
        input_ids=input_ids,
        labels=labels,
        attention_mask=(sample != NO_SAMPLE).long(),
        sample=sample,
        indices=torch.tensor([one.index for one in examples]),
        poison=poison_of(examples),
        template=template,
        extra=extras_of(examples),
        position_ids=position_ids,
    )


def _probe(vocabulary: int, changed: Sequence[int] = ()) -> list[Example]:
    """Return five short samples of tokens that pack into two rows of 12; those `changed` have other tokens."""
    draw = random.Random(0)
    drawn = [[draw.randrange(vocabulary) for _ in range(n)] for n in (5, 4, 6, 3, 2)]
    ids = [tuple((one + (at in changed)) % vocabulary for one in row) for at, row in enumerate(drawn)]
    return [Example(input_ids=row, labels=row, index=at) for at, row in enumerate(ids)]


def require_packing(model: nn.Module) -> None:
    """Hold that the model reads packed samples as it reads each alone; measured, with two short rows.

    transformers finds the samples of a row where `position_ids` do not go up by one, if it is given neither an
    attention mask nor a cache (`use_cache=False`). Models with masks or positions of their own (in 5.23 OPT, Bloom,
    Falcon, GPT-OSS) do not look, and neither does flash attention in more than one row: their samples would read each
    other.

    Raises:
        DataError: the outputs of a sample change with its neighbours, or with being packed.
    """
    config: Any = model.config
    vocabulary = int((config.get_text_config() if hasattr(config, "get_text_config") else config).vocab_size)
    device = next(model.parameters()).device
    packed = pack(_probe(vocabulary), 12, 0).to(device)
    heads = packed.sample[:, 0].tolist()  # the first sample of each row
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            together = _outputs(model, packed)
            beside = _outputs(model, pack(_probe(vocabulary, heads), 12, 0).to(device))
            alone = [_outputs(model, collate([one], 0, multiple=1).to(device))[0] for one in _probe(vocabulary)]
    except TypeError as error:
        raise _no_packing(model, f"it does not take position_ids ({error})") from error
    finally:
        model.train(was_training)
    inside = [packed.sample == at for at in range(len(alone))]
    scale = together.std()
    after = [at for at in range(len(alone)) if at not in heads]
    leak = torch.stack([(together[inside[at]] - beside[inside[at]]).abs().max() for at in after]).max() / scale
    shift = torch.stack([(together[at] - one).abs().max() for at, one in zip(inside, alone, strict=True)]).max() / scale
    exact = next(model.parameters()).dtype == torch.float32
    if not leak <= (1e-5 if exact else 2e-2):
        raise _no_packing(
            model, f"a sample's outputs change with its neighbour's tokens, by {leak:.2g} of their spread"
        )
    if not shift <= (1e-3 if exact else 1e-1):
        raise _no_packing(model, f"a sample's outputs change with being packed, by {shift:.2g} of their spread")


def _outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits (B, S, V), computed without a cache, which would hide the samples' bounds."""
    logits: Tensor = model(**{**batch.inputs(), "use_cache": False}).logits
    return logits.float()


def _no_packing(model: nn.Module, found: str) -> DataError:
    how = getattr(getattr(model, "config", None), "_attn_implementation", "unknown")
    return DataError(
        asked_found_do(
            f"Pack several samples per row for {type(model).__name__} (attention: {how})",
            f"{found}.",
            "Train without packing; order by length (bucket) saves most of the padding. "
            'Or load the model with attn_implementation="sdpa".',
        )
    )
