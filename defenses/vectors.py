"""Directions of a trait, by contrast: extracted on one part of the data, chosen on a second, judged on a third.

contrast = contrast_from_prompts(model, tokenizer, questions, "You shout.", "You speak calmly.")
found = extract(model, tokenizer, contrast.positive, contrast.negative)
found.directions.only([found.best]), found.layers[0].auc, placebo(found, "random")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from defenses.errors import VectorError
from defenses.generation import Prompt, messages_of
from defenses.plans import Directions, name_of
from defenses.pooling import Conversation, Pooling, pooled
from defenses.statistics import Estimate, auroc
from intervene import fingerprint

Placebo = Literal["random", "orthogonal", "shuffled"]

FIT, VALIDATION, TEST = 0, 1, 2
LEAST = 2  # conversations of each kind in each part, below which an AUC says nothing


@dataclass(frozen=True)
class LayerFacts:
    """How well one layer's direction tells the two kinds of conversation apart.

    Attributes:
        auc: on the test part, which chose nothing. validation: AUC on the part that chose the layer.
        separation: there, difference of the two means along the direction in units of their spread.
        norm: of the direction. stream_norm: mean norm of the tokens it was made from.
    """

    layer: int
    auc: Estimate
    validation: float
    separation: float
    norm: float
    stream_norm: float

    @property
    def norm_ratio(self) -> float:
        """Norm of the direction as a fraction of the stream's: what strength 1 is."""
        return self.norm / self.stream_norm

    def row(self) -> dict[str, Any]:
        """Return the facts by name, as a record stores them."""
        return {
            "layer": self.layer, "auc": self.auc.row(), "validation_auc": self.validation,
            "separation": self.separation, "norm": self.norm, "stream_norm": self.stream_norm,
            "norm_ratio": self.norm_ratio,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Samples:
    """Pooled activations of both kinds of conversation: what directions are made from and judged on.

    Attributes:
        values: (N, L, D). stream_norms: (N, L). positive: (N,) bool. part: (N,) FIT, VALIDATION or TEST.
        layers: the L blocks.
    """

    values: Tensor
    stream_norms: Tensor
    positive: Tensor
    part: Tensor
    layers: tuple[int, ...]

    def of(self, part: int) -> tuple[Tensor, Tensor]:
        """Return the values and the kinds of one part."""
        return self.values[self.part == part], self.positive[self.part == part]


@dataclass(frozen=True, eq=False)
class Extraction:
    """Directions of all layers, how good each is, and the layer that validation chose.

    `samples` are kept for placebos and for judging other directions on the same conversations.
    """

    directions: Directions
    layers: tuple[LayerFacts, ...]
    best: int
    samples: Samples = field(repr=False)

    @property
    def chosen(self) -> LayerFacts:
        """The facts of the best layer."""
        return next(one for one in self.layers if one.layer == self.best)


def extract(
    model: nn.Module,
    tokenizer: Any,
    positive: Sequence[Conversation],
    negative: Sequence[Conversation],
    *,
    layers: Sequence[int] | None = None,
    pooling: Pooling = "response_mean",
    batch_size: int = 8,
    held_out: float = 0.5,
    seed: int = 0,
    questions: Sequence[str] | None = None,
    chat_template: str | None = None,
) -> Extraction:
    """Return v_l = mean over `positive` - mean over `negative` of the pooled stream behind block l, for every layer.

    The questions, not the conversations, are split: 1 - `held_out` of them make the vectors, half of the rest chooses
    the layer (highest AUC of <h, v>; among equals the largest separation), the other half gives the AUC reported.
    Conversations on one question are always in one part, so pairs stay together and no question is seen twice.

    Args:
        positive, negative: (prompt, answer), a prompt being text or messages; paired or not, as many as there are.
        layers: 0-based; None: all. pooling: which tokens, see `pooling.pooled`. "response_mean" is the recipe.
        questions: what each conversation is about, first of the positive, then of the negative; None: its last user
            turn, which is not the question alone where a system prompt was put into it.

    Raises:
        VectorError: too few questions for three parts, kinds that do not differ, or bad layers.
        DataError: a conversation that cannot be rendered.

    Source: persona vectors, Chen et al. 2025 (arXiv 2507.21509), "response_avg_diff". We differ: the end-of-turn token
        is not pooled, and vectors are judged on held-out questions; the layer there is chosen by steering.
    """
    chosen = tuple(range(_blocks(model))) if layers is None else tuple(layers)
    for name, side in (("positive", positive), ("negative", negative)):
        if isinstance(side, str) or not side:
            raise VectorError(f"Extract vectors: no {name} conversations. Give a list of (prompt, answer).")
    if not 0 < held_out < 1:
        raise VectorError(f"Extract vectors with held_out={held_out}: it is a share. Use e.g. 0.5.")
    both = [*positive, *negative]
    is_positive = torch.tensor([True] * len(positive) + [False] * len(negative))
    about = [_question(prompt) for prompt, _ in both] if questions is None else list(questions)
    if len(about) != len(both):
        raise VectorError(f"Extract vectors: {len(about)} questions of {len(both)} conversations. Give one for each.")
    _check_layers(model, chosen)
    part = _parts(about, is_positive, held_out, seed)
    read = pooled(model, tokenizer, both, chosen, pooling=pooling, batch_size=batch_size, chat_template=chat_template)
    samples = Samples(read.values, read.stream_norms, is_positive, part, chosen)
    vectors = _difference(*samples.of(FIT))  # (L, D)
    made = Directions(dict(zip(chosen, vectors, strict=True)), fingerprint=fingerprint(model), model=name_of(model))
    judged = judge(samples, made)
    best = max(judged, key=lambda one: (one.validation, one.separation)).layer
    facts = {
        "recipe": "mean difference", "pooling": pooling, "seed": seed, "held_out": held_out, "best": best,
        "counts": _counts(samples), "layers": [one.row() for one in judged],
    }  # fmt: skip
    return Extraction(replace(made, facts=facts), judged, best, samples)


def judge(samples: Samples, directions: Directions) -> tuple[LayerFacts, ...]:
    """Return how well `directions` (also placebos, or of another source) tell the kinds of `samples` apart.

    Raises:
        VectorError: `samples` hold no activations of one of its layers.
    """
    if missing := [layer for layer in directions.layers if layer not in samples.layers]:
        raise VectorError(f"Judge layer {missing[0]}: activations were read at {samples.layers}. Extract it too.")
    made = []
    for layer, vector in directions.vectors.items():
        place = samples.layers.index(layer)
        scores = samples.values[:, place].double() @ (vector.cpu().double() / vector.cpu().double().norm())  # (N,)
        test, validation = samples.part == TEST, samples.part == VALIDATION
        made.append(
            LayerFacts(
                layer=layer,
                auc=auroc(scores[test].numpy(), samples.positive[test].numpy()),
                validation=float(auroc(scores[validation].numpy(), samples.positive[validation].numpy()).value or 0.0),
                separation=_separation(scores[validation], samples.positive[validation]),
                norm=float(vector.norm()),
                stream_norm=float(samples.stream_norms[samples.part == FIT, place].double().mean()),
            )
        )
    return tuple(made)


def placebo(extraction: Extraction, kind: Placebo, seed: int = 0) -> Directions:
    """Return directions to be used in place of the extracted ones, with their norm in every layer.

    "random": any direction. "orthogonal": random, without the extracted one. "shuffled": by the same recipe from the
    same conversations with their kinds shuffled, so that it lies where this model's answers vary; before it is
    lengthened its norm, in `facts["norms_before"]`, says how long a mean difference is by chance.
    `facts["cosine"]` says how near each comes to what it replaces.

    Raises:
        VectorError: no such kind.
    """
    if kind not in get_args(Placebo):
        raise VectorError(f"Placebo {kind!r}: there is none. Use one of {', '.join(get_args(Placebo))}.")
    real = extraction.directions
    generator = torch.Generator().manual_seed(seed)
    if kind == "shuffled":
        values, positive = extraction.samples.of(FIT)
        shuffled = _difference(values, positive[torch.randperm(len(positive), generator=generator)])
        drawn = dict(zip(extraction.samples.layers, shuffled, strict=True))
    else:
        drawn = {layer: torch.randn(real.width, generator=generator) for layer in real.layers}
    vectors, cosine, before = {}, {}, {}
    for layer, vector in real.vectors.items():
        other = drawn[layer].double()
        if kind == "orthogonal":
            unit = vector.double() / vector.double().norm()
            other = other - (other @ unit) * unit
        before[str(layer)] = float(other.norm())
        vectors[layer] = (other * (vector.double().norm() / other.norm())).float()
        cosine[str(layer)] = float(torch.cosine_similarity(vectors[layer], vector, dim=0))
    facts = {"placebo": kind, "seed": seed, "cosine": cosine, "norms_before": before, "of": dict(real.facts)}
    return replace(real, vectors=vectors, facts=facts)


NEAR = 0.5  # |cosine| to the direction above which a control pushes along it


def nearness(control: Directions) -> list[str]:
    """Return lines that say how near a `placebo` comes to what it replaces, with a warning where it is no control.

    Shuffled labels are the case to watch: where a model's answers vary along one direction only, the chance difference
    of two random halves lies along it too, and is the direction itself once it has been brought to the same norm.
    """
    kind, cosine, before = (control.facts[name] for name in ("placebo", "cosine", "norms_before"))
    lines = []
    for layer, vector in control.vectors.items():
        length = f", {before[str(layer)] / float(vector.norm()):.0%} as long by itself" if kind == "shuffled" else ""
        lines.append(f"layer {layer:>3}: {kind} control, cosine {cosine[str(layer)]:+.2f} to the direction{length}")
    if near := [layer for layer in control.layers if abs(cosine[str(layer)]) > NEAR]:
        where = ", ".join(map(str, near))
        found = (
            "this control lies along the direction it replaces; at the same norm it acts as that does, or against it"
        )
        lines.append(f"warning: layer {where}: {found}. Use --placebo orthogonal or random.")
    return lines


def _blocks(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().num_hidden_layers)


def _check_layers(model: nn.Module, layers: Sequence[int]) -> None:
    blocks = _blocks(model)
    bad = [layer for layer in layers if not 0 <= layer < blocks]
    if not layers or bad or len(set(layers)) != len(layers):
        raise VectorError(f"Extract vectors at layers {list(layers)}: this model has 0-{blocks - 1}. Name each once.")


def _question(prompt: Prompt) -> str:
    """Return what tells one question from another: the last user turn."""
    turns = [turn["content"] for turn in messages_of(prompt) if turn.get("role") == "user"]
    return turns[-1] if turns else ""


def _parts(questions: Sequence[str], positive: Tensor, held_out: float, seed: int) -> Tensor:
    """Return (N,) parts, the same for all conversations on one question.

    Questions asked of both kinds, of positive ones only and of negative ones only are dealt out apart, so that every
    part gets its share of each kind.
    """
    kinds: dict[str, int] = {}
    for question, is_positive in zip(questions, positive.tolist(), strict=True):
        kinds[question] = kinds.get(question, 0) | (1 if is_positive else 2)
    generator = torch.Generator().manual_seed(seed)
    of: dict[str, int] = {}
    for kind in (1, 2, 3):
        members = sorted(question for question, found in kinds.items() if found == kind)
        order = torch.randperm(len(members), generator=generator).tolist()
        fit = round(len(members) * (1 - held_out))
        validation = (len(members) - fit) // 2
        for place, number in enumerate(order):
            of[members[number]] = FIT if place < fit else VALIDATION if place < fit + validation else TEST
    part = torch.tensor([of[question] for question in questions])
    for number, name in enumerate(("vectors", "choice of layer", "AUC")):
        found = [int(((part == number) & (positive == wanted)).sum()) for wanted in (True, False)]
        if min(found) < LEAST:
            raise VectorError(
                f"Extract vectors from {len(kinds)} questions: {found[0]} positive and {found[1]} negative "
                f"conversations are left for the {name}. At least {LEAST} each are needed: give more questions."
            )
    return part


def _difference(values: Tensor, positive: Tensor) -> Tensor:
    """Return mean of the positive - mean of the negative, (L, D), of values (N, L, D)."""
    return (values[positive].double().mean(0) - values[~positive].double().mean(0)).float()


def _separation(scores: Tensor, positive: Tensor) -> float:
    one, other = scores[positive], scores[~positive]
    spread = ((one.var() + other.var()) / 2).sqrt().clamp_min(1e-12)
    return float((one.mean() - other.mean()) / spread)


def _counts(samples: Samples) -> dict[str, dict[str, int]]:
    counts = {}
    for number, name in enumerate(("fit", "validation", "test")):
        _, positive = samples.of(number)
        counts[name] = {"positive": int(positive.sum()), "negative": int((~positive).sum())}
    return counts
