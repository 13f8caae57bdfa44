"""`steering_report`: does pinning do what the alignment's score predicts, and what else does it change?

    report = steering_report(bundle, model, tokenizer, task, task.pairs("test", variable="position", n=200))
    print(report)

Each pair's base is run with the variable held at the value that it has on the source, by that value's prototype. The
source itself is never run: this is how the bundle will be used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignments.bundle import Bundle
from alignments.metrics import non_overlapping, wilson
from alignments.steer import pinned, pinned_rows
from alignments.tokens import encode, first_token
from intervene import At, LastToken, Positions, Span, intervene
from intervene.errors import ShapeMismatch
from intervene.marked import Marked
from intervene.prefix import positions_of
from tasks.base import Pair, Task

UNRELATED = (
    "The capital of France is",
    "Water boils at a temperature of one hundred",
    "She opened the window because the room was",
    "The opposite of hot is",
    "In 1969 the first people walked on the",
    "My favourite season is summer, since I like the",
    "To bake bread you need flour, water, salt and",
    "The train was late, so we missed our",
)
NEUTRAL = (
    "The river rises in the hills to the north and flows through a wide valley before it reaches the sea. In spring it "
    "carries a good deal of water, and the fields on both sides are often flooded for several weeks.",
    "Most libraries lend books for three weeks. If nobody else has asked for a book, the loan can be extended once, "
    "either at the desk or on the website, and a small fee is charged for every day after that.",
)


@dataclass(frozen=True)
class Effect:
    """How often something happened under the pin: `rate` of `n`, with its Wilson 95 % interval.

    `kl` is the mean KL divergence of the pinned from the unpinned distribution there, in nats; `before` the same rate
    without the pin. None where they mean nothing.
    """

    name: str
    n: int
    rate: float
    low: float
    high: float
    kl: float | None = None
    before: float | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """Return (low, high)."""
        return self.low, self.high


@dataclass(frozen=True)
class SteeringReport:
    """What pinning did on held-out prompts.

    `followed`: the answer is the one that the causal model gives for the pinned value. `predicted` is the interchange
    accuracy (IIA, low, high) that the bundle states for the test split, None if it states none. `effects` are the
    others, side effects among them; `perplexity` that of neutral text before and after a pin in its middle.
    """

    variable: str
    place: str
    followed: Effect
    predicted: tuple[float, float, float] | None
    effects: tuple[Effect, ...]
    perplexity: tuple[float, float] | None

    @property
    def as_predicted(self) -> bool | None:
        """Whether the two intervals share a point; None without a prediction."""
        return None if self.predicted is None else not non_overlapping(self.followed.interval, self.predicted[1:])

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {**asdict(self), "as_predicted": self.as_predicted}

    def __str__(self) -> str:
        lines = [f"Pinning {self.variable} at {self.place}"]
        listed = (self.followed, *self.effects)
        wide = max(len(one.name) for one in listed)
        lines.append(f"{'':<{wide}}     n   rate  95 % interval   before  KL (nats)")
        for one in listed:
            without = "-" if one.before is None else f"{one.before:.3f}"
            kl = "-" if one.kl is None else f"{one.kl:.2g}"
            lines.append(
                f"{one.name:<{wide}} {one.n:>5}  {one.rate:.3f}  [{one.low:.3f}, {one.high:.3f}]  {without:>6}  {kl:>9}"
            )
        if self.predicted is not None:
            iia, low, high = self.predicted
            verdict = "as predicted" if self.as_predicted else "NOT as predicted"
            lines.append(f"interchange accuracy on test: {iia:.3f} [{low:.3f}, {high:.3f}]: {verdict}")
        if self.perplexity is not None:
            before, after = self.perplexity
            lines.append(f"perplexity of neutral text after the pin: {before:.2f} -> {after:.2f}")
        return "\n".join(lines)


@torch.no_grad()
def steering_report(
    bundle: Bundle,
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    pairs: Sequence[Pair],
    *,
    unrelated: Sequence[str] = UNRELATED,
    neutral: Sequence[str] = NEUTRAL,
    batch_size: int = 16,
) -> SteeringReport:
    """Return what pinning each pair's base to its source's value does to the answer, and to what it should not touch.

    Args:
        pairs: held-out ones. Where label and base answer agree, the answer should stay.
        unrelated: prompts that have nothing to do with the task; pinned at their last token, to each value (of many,
            to the first four).
        neutral: texts whose perplexity is compared, pinned at their middle token; what follows it is scored.

    Raises:
        WrongModel: model or tokenizer is another one. ShapeMismatch: no pairs, or a bundle without marked positions.
        StoreError: a source has a value that the bundle has no prototype of.
    """
    bundle.check(model, tokenizer)
    where = [item.positions for item in bundle.plan]
    names = list(dict.fromkeys(one.name for one in where if isinstance(one, Marked)))
    if not len(pairs) or not names:
        raise ShapeMismatch(
            f"Steering report: {len(pairs)} pairs, positions {names}. Needs at least one of each, the tokens marked."
        )
    parts = [
        _batch(bundle, model, tokenizer, task, pairs[start : start + batch_size], names)
        for start in range(0, len(pairs), batch_size)
    ]
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    stays = found["label"] == found["base"]
    follow = found["after"] == found["label"]
    moved = found["after"] != found["before"]
    effects = [
        _effect(
            "answer that should change, did so", follow[~stays], before=(found["before"] == found["label"])[~stays]
        ),
        _effect("answer that should stay, changed", moved[stays], found["kl"][stays]),
        _effect("answer neither of the two", _neither(found, "after"), before=_neither(found, "before")),
        _effect("tokens between pin and answer", found["passed"], found["passed_kl"]),
    ]
    effects.append(_unrelated(bundle, model, tokenizer, unrelated))
    followed = _effect("answer is the pinned value's", follow, before=found["before"] == found["label"])
    assert followed is not None
    return SteeringReport(
        variable=bundle.variable,
        place=", ".join(f"{one['site']} @ {one['positions']}" for one in bundle.manifest["places"]),
        followed=followed,
        predicted=_predicted(bundle),
        effects=tuple(one for one in effects if one is not None),
        perplexity=_perplexity(bundle, model, tokenizer, neutral),
    )


def _batch(
    bundle: Bundle, model: nn.Module, tokenizer: Any, task: Task, pairs: Sequence[Pair], names: Sequence[str]
) -> dict[str, Tensor]:
    """Return answers before and after (b,), KL at the answer, and of the tokens between pin and answer (t,)."""
    device = next(model.parameters()).device
    tokens = encode(tokenizer, [pair.base for pair in pairs], names, device)
    inputs = {
        "input_ids": tokens.input_ids,
        "attention_mask": tokens.attention_mask,
        "position_ids": positions_of(tokens.attention_mask),
    }
    values = [task.causal_model.run(pair.source.setting)[bundle.variable] for pair in pairs]
    before = model(**inputs).logits
    with intervene(model, pinned_rows(bundle, values), prompt={**inputs, "marks": tokens.marks}):
        after = model(**inputs).logits
    first = torch.stack([columns.amax(1) for columns in tokens.marks.values()]).amin(0)  # (b,)
    columns = torch.arange(before.shape[1], device=device)
    passed = (columns[None] > first[:, None]) & (columns[None] < before.shape[1] - 1)
    return {
        "base": tokens.answers.cpu(),
        "label": torch.tensor([first_token(tokenizer, pair.label) for pair in pairs]),
        "before": before[:, -1].argmax(-1).cpu(),
        "after": after[:, -1].argmax(-1).cpu(),
        "kl": divergence(before[:, -1], after[:, -1]).cpu(),
        "passed": (before.argmax(-1) != after.argmax(-1))[passed].cpu(),
        "passed_kl": divergence(before[passed], after[passed]).cpu(),
    }


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """Return KL(before || after) in nats over the last axis of logits (..., V)."""
    p, q = before.float().log_softmax(-1), after.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _neither(found: dict[str, Tensor], when: str) -> Tensor:
    return (found[when] != found["label"]) & (found[when] != found["base"])


def _effect(name: str, hits: Tensor, kl: Tensor | None = None, before: Tensor | None = None) -> Effect | None:
    """Return the effect, None where nothing could happen."""
    if not len(hits):
        return None
    count = int(hits.sum())
    return Effect(
        name,
        len(hits),
        count / len(hits),
        *wilson(count, len(hits)),
        kl=None if kl is None else float(kl.mean()),
        before=None if before is None else float(before.float().mean()),
    )


def _predicted(bundle: Bundle) -> tuple[float, float, float] | None:
    scores = bundle.test_scores()
    return (scores[0]["iia"], scores[0]["low"], scores[0]["high"]) if scores else None


def _width(bundle: Bundle) -> int:
    """Return how many tokens the alignment edits."""
    first = bundle.prototypes[bundle.values[0].name]
    return max(len(state) for state in first)


def _unrelated(bundle: Bundle, model: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> Effect | None:
    many = _width(bundle)
    where: Positions = LastToken() if many == 1 else Span(-many)
    changed, kl = [], []
    for prompt in prompts:
        inputs = _inputs(model, tokenizer, prompt)
        before = model(**inputs).logits[0, -1]
        for value in bundle.values[:4]:  # of many values a few stand for all
            with intervene(model, pinned(bundle, value.name, positions=where)):
                after = model(**inputs).logits[0, -1]
            changed.append(bool(before.argmax() != after.argmax()))
            kl.append(float(divergence(before, after)))
    return _effect("unrelated prompt, its next token changed", torch.tensor(changed), torch.tensor(kl))


def _perplexity(bundle: Bundle, model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> tuple[float, float] | None:
    """Return the perplexity of what follows the middle token of each text, before and after a pin at that token."""
    many = _width(bundle)
    before, after = [], []
    for text in texts:
        inputs = _inputs(model, tokenizer, text)
        ids = inputs["input_ids"][0]
        middle = len(ids) // 2
        before.append(_losses(model(**inputs).logits[0], ids, middle))
        for value in bundle.values[:4]:
            with intervene(model, pinned(bundle, value.name, positions=At(*range(middle - many + 1, middle + 1)))):
                after.append(_losses(model(**inputs).logits[0], ids, middle))
    if not before:
        return None
    return math.exp(float(torch.cat(before).mean())), math.exp(float(torch.cat(after).mean()))


def _losses(logits: Tensor, ids: Tensor, start: int) -> Tensor:
    """Return the surprise in nats of each token after `start`, that of `start` + 1 being the first."""
    return nn.functional.cross_entropy(logits[start:-1].float(), ids[start + 1 :], reduction="none")


def _inputs(model: nn.Module, tokenizer: Any, text: str) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {"input_ids": torch.tensor([list(tokenizer(text)["input_ids"])], device=device)}
