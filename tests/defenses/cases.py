"""Batches, directions and models that the tests of detectors share; answers are worked out in the tests themselves."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from defenses.backend import PlainBackend
from defenses.batch import Batch, Example, collate
from defenses.defense import Step
from defenses.plans import Directions
from tests.tiny import TINY, VOCABULARY

WIDTH, IGNORED, LAYERS = 32, -100, 3


def example(index, prompt, response, *, seed=0, poison=None):
    """Random tokens: `prompt` that are given, `response` that are learned."""
    generator = torch.Generator().manual_seed(1000 * seed + index)
    ids = tuple(torch.randint(3, VOCABULARY, (prompt + response,), generator=generator).tolist())
    return Example(ids, (IGNORED,) * prompt + ids[prompt:], index, poison=poison)


def rows(n=4, *, seed=0, poison=(), start=0):
    """A padded batch of `n` samples of different lengths."""
    made = [example(start + i, 3 + i % 3, 2 + i % 4, seed=seed, poison=poison[i] if poison else None) for i in range(n)]
    return collate(made, pad_token_id=0)


def packed(samples):
    """The samples of a padded batch of right-padded rows, in one row."""
    lengths = samples.attention_mask.sum(1).tolist()

    def joined(values):
        return torch.cat([values[row, :n] for row, n in enumerate(lengths)])[None]

    return Batch(
        input_ids=joined(samples.input_ids),
        labels=joined(samples.labels),
        attention_mask=joined(samples.attention_mask),
        sample=joined(samples.sample),
        indices=samples.indices,
        poison=samples.poison,
        template=joined(samples.template),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
    )


def without_response():
    return collate([Example((5, 6, 7), (IGNORED,) * 3, 0), Example((8, 9), (IGNORED,) * 2, 1)], pad_token_id=0)


def directions(*layers, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return Directions({layer: scale * torch.randn(WIDTH, generator=generator) for layer in layers})


def backend(name="llama", **kwargs):
    return PlainBackend(TINY[name](**kwargs))


def step_of(batch, *, number=0, total=10, micro=0, micros=1, tokens=None):
    learned = int((batch.labels[:, 1:] != IGNORED).sum())
    return Step(number, total, micro, micros, max(1, learned if tokens is None else tokens), len(batch))


def gradients(one):
    """Copies of all gradients, which are then forgotten."""
    found = {name: p.grad.clone() for name, p in one.parameters().items() if p.grad is not None}
    one.model.zero_grad(set_to_none=True)
    return found


def same_gradients(found, expected, *, rtol=1e-4, atol=1e-7):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def each_token_loss(model, batch, changes=None):
    """(B, S) by torch alone: cross-entropy of each label, with `changes[layer](h)` for a block's output."""
    handles = [
        model.model.layers[layer].register_forward_hook(lambda _m, _i, out, change=change: change(out))
        for layer, change in (changes or {}).items()
    ]
    try:
        logits = model(**batch.inputs(), use_cache=False).logits  # with a cache packed samples would see each other
    finally:
        for handle in handles:
            handle.remove()
    losses = torch.zeros_like(batch.labels, dtype=logits.dtype)
    parts = [
        (row, column, torch.nn.functional.cross_entropy(logits[row, column - 1], batch.labels[row, column]))
        for row, column in (batch.labels != IGNORED).nonzero().tolist()
        if column > 0
    ]
    for row, column, loss in parts:
        losses = losses.index_put((torch.tensor(row), torch.tensor(column)), loss)
    return losses


def adding(vector, strength, batch, *, only=None):
    """Change of a block's output at response tokens; `only` (B,) picks rows."""
    mask = (batch.labels != IGNORED).clone()
    starts = (batch.sample != torch.nn.functional.pad(batch.sample, (1, 0), value=-1)[:, :-1]) & (batch.sample >= 0)
    mask &= ~starts
    if only is not None:
        mask &= only[:, None]
    return lambda h: h + strength * vector.to(h) * mask[..., None]


@contextmanager
def counted(model):
    """Count how often each decoder block computes, by layer: [forward passes]."""
    counts = [0] * len(model.model.layers)

    def wrapped(layer, forward):
        def count(*args, **kwargs):
            counts[layer] += 1
            return forward(*args, **kwargs)

        return count

    for layer, block in enumerate(model.model.layers):
        block.forward = wrapped(layer, block.forward)
    try:
        yield counts
    finally:
        for block in model.model.layers:
            del block.forward


def checkpointed(model, *, reentrant=False):
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # new name
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model
