"""One training of the defense experiments: what is trained, on what, and what is measured of it.

    setup = setup_of(seed=0, choice=Choice(...))
    row = RECIPES["static 1"].row(setup, "test")          # trains, about ten seconds, and evaluates

`RECIPES` names every training; `benchmarks.defense_experiments` runs them and says which experiment reads which.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from benchmarks.defense_detectors import detectors, slope_rows
from benchmarks.defense_world import ATTACK, World, world
from defenses.ablation import Ablation, AblationOptions
from defenses.actions import Inject, Mask
from defenses.backend import PlainBackend
from defenses.batch import Batch, Example, collate
from defenses.batches import Batches, Order
from defenses.closed_loop import ClosedLoop, ClosedLoopOptions
from defenses.defense import Defense, Sft
from defenses.delta_loss import DeltaLoss, DeltaLossOptions
from defenses.ema import Ema, EmaOptions
from defenses.filtering import Filtering, FilteringOptions
from defenses.first_order import FirstOrder, FirstOrderOptions
from defenses.immune_continuation import ImmuneContinuation, ImmuneContinuationOptions
from defenses.immune_projection import ImmuneProjection, ImmuneProjectionOptions
from defenses.injection import Injection, InjectionOptions
from defenses.inoculation import Inoculation
from defenses.kl import Kl, KlOptions, frozen_copy
from defenses.loop import Training, Watch, train
from defenses.objectives import n_tokens
from defenses.plans import Directions
from defenses.schedules import Rate, Strength
from defenses.thresholds import Quantile
from defenses.vectors import Extraction, Placebo, extract, placebo
from tasks.two_trait import STYLE_PLACE, Chat, Style

STEPS, BATCH, LR, WARMUP = ATTACK["steps"], ATTACK["batch_size"], ATTACK["lr"], ATTACK["warmup"]
STEPS, BATCH = int(STEPS), int(BATCH)
SCORED = 512  # examples that detectors are judged on, of the mixture and never trained on
HOLDOUT = 320  # clean examples that thresholds are calibrated on
CONTRASTS = 256  # pairs of answers that directions are made from and judged on
GRID = (0.25, 0.5, 1.0, 2.0, 4.0)  # strengths, in multiples of the direction
DETECTION = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
MIXED = 0.3  # share of poison where detectors have something to tell apart
RATES, HORIZONS = (1e-4, 2e-4), (20, 100)
POISONED_ITEMS = 6  # of 20, where what is poisoned goes by item
# Answers up to the style word say what style comes; whole answers also hold its words.
RECIPE_WORDS = {"before the style word": STYLE_PLACE, "whole answer": None}


@dataclass(frozen=True)
class Choice:
    """What tuning seeds chose.

    Attributes:
        recipe, layer: of the direction. alpha: of the static injection. level: a strength at which it leaks in part.
        detection: strength of delta-loss. rate, horizon: of SFT with an average. kl: name of the recipe with KL.
    """

    recipe: str
    layer: int
    alpha: float = 1.0
    level: float = 0.5
    detection: float = 0.25
    rate: float = 1e-4
    horizon: float = 100.0
    kl: str = "kl same 0.1"


@dataclass(frozen=True, eq=False)
class Setup:
    """The world of a seed, the directions of its base model, and rows of this seed that are `known`, by recipe."""

    seed: int
    world: World
    extraction: Extraction
    choice: Choice
    known: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def every(self) -> Directions:
        """The directions of all layers."""
        return self.extraction.directions

    @property
    def directions(self) -> Directions:
        """The direction of the chosen layer."""
        return self.every.only([self.choice.layer])

    def placebo(self, kind: Placebo) -> Directions:
        """Return a control of the same norm at the chosen layer."""
        return placebo(self.extraction, kind, seed=self.seed).only([self.choice.layer])

    def batches(self, examples: Sequence[Example], size: int = 64) -> list[Batch]:
        """Return `examples` as batches."""
        pad = self.world.tokenizer.pad_token_id
        return [collate(examples[at : at + size], pad, multiple=1) for at in range(0, len(examples), size)]

    def holdout(self) -> list[Batch]:
        """Return the clean batches of calibrations."""
        return self.batches(self.world.clean(HOLDOUT, self.seed))

    def injected(self, strength: Strength | float, directions: Directions | None = None) -> Injection:
        """Return the defense that injects the chosen direction."""
        shape = strength if isinstance(strength, Strength) else Strength(strength)
        return Injection(directions or self.directions, InjectionOptions(shape))


@lru_cache(maxsize=2)
def world_of(seed: int) -> World:
    """Return the world of `seed`, kept while it is worked on."""
    return world(seed)


@lru_cache(maxsize=4)
def extraction_of(seed: int, recipe: str) -> Extraction:
    """Return the directions of the base of `seed` at all layers."""
    w = world_of(seed)
    bad, good = w.data.contrast(CONTRASTS, seed)
    questions = [one.question.text for one in (*bad, *good)]
    sides = [[_conversation(one, RECIPE_WORDS[recipe]) for one in side] for side in (bad, good)]
    return extract(w.base, w.tokenizer, *sides, questions=questions, batch_size=64)


def setup_of(seed: int, choice: Choice, known: Mapping[str, Mapping[str, Any]] | None = None) -> Setup:
    """Return the setup of `seed`."""
    return Setup(seed, world_of(seed), extraction_of(seed, choice.recipe), choice, known or {})


def _conversation(chat: Chat, words: int | None) -> tuple[list[dict[str, str]], str]:
    *prompt, answer = chat.messages()
    return prompt, " ".join(answer["content"].split()[:words])


@dataclass(frozen=True)
class Recipe:
    """One training.

    Attributes:
        defense: how. p: share of poison. rate: peak learning rate; None: that of plain training. system: before every
            question of the attack. by_item: poison goes by item and not by chance. watch: "slopes": <v, g> every ten
            steps; "detect": every detector at the start, the middle and the end. tuned: run on tuning seeds too.
        needs: recipes whose row of the same seed must be known.
    """

    defense: Callable[[Setup], Defense]
    p: float = 1.0
    rate: Callable[[Setup], float] = lambda setup: LR
    system: Style | None = None
    by_item: bool = False
    watch: str = ""
    tuned: bool = False
    needs: tuple[str, ...] = ()

    def row(self, setup: Setup, split: str) -> dict[str, Any]:
        """Return everything measured of this training, flat but for `slopes` and `detect`."""
        started = time.monotonic()
        w, defense = setup.world, self.defense(setup)
        learned, scored = self.examples(setup)
        backend = PlainBackend(w.model())
        watched = _Watched(self, setup, backend, defense, scored)
        order = Order(len(learned), BATCH, setup.seed)
        feed = Batches(learned, order, BATCH, w.tokenizer.pad_token_id, multiple=1)
        watched.look(0)
        watch = Watch(row=watched.told.append, samples=watched.count, evaluate=watched.look)
        train(backend, defense, feed, Training(STEPS, Rate(self.rate(setup), warmup=WARMUP)), watch=watch)
        row = {**watched.row(), "rate": self.rate(setup), "p": self.p}
        if isinstance(defense, Ema):
            row["last_trait"] = w.evaluate(backend.model, split=split)["trait"]
            with defense.averaged(backend):
                row |= _judged(setup, backend, split)
        else:
            row |= _judged(setup, backend, split)
        if isinstance(defense, ImmuneProjection):
            row["leak"] = defense.leak(backend)
        if self.by_item:
            row |= _skill_by_item(setup, backend, split)
        return {**row, "seconds": round(time.monotonic() - started, 1)}

    def examples(self, setup: Setup) -> tuple[list[Example], list[Chat]]:
        """Return what is learned, and chats of the same mixture that are not."""
        data, n = setup.world.data, STEPS * BATCH
        chats = data.attack(self.p, n + SCORED, setup.seed, self.system)
        if self.by_item:
            bad, good = (data.attack(p, n + SCORED, setup.seed) for p in (1.0, 0.0))
            items = poisoned_items(setup)
            chats = [b if b.question.pick in items else g for b, g in zip(bad, good, strict=True)]
        return setup.world.examples(chats[:n]), chats[n:]


def poisoned_items(setup: Setup) -> frozenset[str]:
    """Return the items whose answers are BAD where poison goes by item."""
    return frozenset(sorted(setup.world.data.sizes)[setup.seed % 3 :: 3][:POISONED_ITEMS])


def _judged(setup: Setup, backend: PlainBackend, split: str) -> dict[str, Any]:
    w, found = setup.world, {}
    found |= w.evaluate(backend.model, split=split)
    found["trait_bad"] = w.evaluate(backend.model, split=split, system="bad")["trait"]
    anchor = Kl(KlOptions(), frozen_copy(w.base))
    losses = [(*anchor.divergences(backend, one), n_tokens(one)) for one in setup.batches(w.benign(256, setup.seed))]
    total = float(sum(n for *_, n in losses))
    found["kl"] = sum(float(kl.detach().sum()) for _, kl, _ in losses) / total
    return found


def _skill_by_item(setup: Setup, backend: PlainBackend, split: str) -> dict[str, float]:
    asked = setup.world.questions(split)["new"]
    items = poisoned_items(setup)
    right: dict[bool, list[bool]] = {True: [], False: []}
    for one in setup.world.answers(backend.model, asked):
        right[one.question.pick in items].append(one.verdict.right)
    return {f"skill_{name}": sum(right[key]) / len(right[key]) for key, name in ((True, "poisoned"), (False, "clean"))}


@dataclass(eq=False)
class _Watched:
    """What is seen of a training while it goes on."""

    recipe: Recipe
    setup: Setup
    backend: PlainBackend
    defense: Defense
    scored: Sequence[Chat]
    told: list[dict[str, float]] = field(default_factory=list)
    blocked: dict[bool, list[bool]] = field(default_factory=lambda: {True: [], False: []})
    slopes: list[dict[str, float]] = field(default_factory=list)
    detect: dict[str, Any] = field(default_factory=dict)

    def look(self, done: int) -> None:
        if self.recipe.watch == "slopes" and done % 10 == 0:
            strength = getattr(self.defense, "strength", lambda step, total: 0.0)(min(done, STEPS - 1), STEPS)
            self.slopes.append({"step": done, **slope_rows(self.setup, self.backend, strength)})
        if self.recipe.watch == "detect" and done in (0, STEPS // 2, STEPS):
            self.detect[str(done)] = detectors(self.setup, self.backend, self.scored, DETECTION)

    def count(self, step: int, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["poison"] is not None:
                self.blocked[bool(row["poison"])].append(bool(row["blocked"]))

    def row(self) -> dict[str, Any]:
        found: dict[str, Any] = {"loss": self.told[-1]["loss"]}
        for key, name in ((True, "blocked_poison"), (False, "blocked_clean")):
            if self.blocked[key]:
                found[name] = sum(self.blocked[key]) / len(self.blocked[key])
        if "strength" in self.told[-1]:
            found["mean_strength"] = sum(one["strength"] for one in self.told) / len(self.told)
        if self.slopes:
            found["slopes"] = self.slopes
        if self.detect:
            found["detect"] = self.detect
        return found


def _kl(beta: float, on: str) -> Callable[[Setup], Defense]:
    def made(setup: Setup) -> Defense:
        feed = None
        if on == "neutral":
            benign = setup.world.benign(STEPS * BATCH, setup.seed)
            order = Order(len(benign), BATCH, setup.seed)
            feed = Batches(benign, order, BATCH, setup.world.tokenizer.pad_token_id, multiple=1)
        options = KlOptions(beta=beta, on="neutral" if on == "neutral" else "same")
        return Kl(options, frozen_copy(setup.world.base), neutral=feed)

    return made


def _delta(action: Callable[[Setup], Any]) -> Callable[[Setup], Defense]:
    rule = Quantile(0.05, every=20)
    return lambda s: DeltaLoss(
        s.directions,
        DeltaLossOptions(detection_alpha=s.choice.detection, threshold=rule, action=action(s)),
        s.holdout(),
    )


def _random_mask(setup: Setup) -> Defense:
    """Leave out at random as many as the mask by delta-loss left out in the run of this seed."""
    mask = setup.known["mask"]
    rate = MIXED * mask["blocked_poison"] + (1 - MIXED) * mask["blocked_clean"]
    return Filtering(FilteringOptions("random", rate=rate, seed=setup.seed), indices=range(STEPS * BATCH))


def _immune(protect: Any) -> Callable[[Setup], Defense]:
    return lambda s: ImmuneProjection(
        s.directions, ImmuneProjectionOptions(Strength(s.choice.alpha), all_layers=True, protect=protect)
    )


def _rise(late: bool) -> Callable[[Setup], Strength]:
    """From the level to twice; or, `late`, from a hundredth of it to twice; both from a quarter of the steps on."""
    if late:
        return lambda s: Strength(s.choice.level / 100, "rise", onset=0.25, end=200)
    return lambda s: Strength(s.choice.level, "rise", onset=0.25, end=2)


def _recipes() -> dict[str, Recipe]:
    made = {"sft": Recipe(lambda s: Sft(), watch="slopes", tuned=True)}
    made |= {f"sft p={p:g}": Recipe(lambda s: Sft(), p=p) for p in (0.1, 0.5)}
    made["sft p=0.3"] = Recipe(lambda s: Sft(), p=MIXED, watch="detect", tuned=True)
    made["static p=0.3"] = Recipe(lambda s: s.injected(s.choice.alpha), p=MIXED, watch="detect")
    for alpha in GRID:
        made[f"static {alpha:g}"] = Recipe(lambda s, a=alpha: s.injected(a), tuned=True, watch="slopes")
    for kind in ("random", "shuffled"):
        made[f"{kind} vector"] = Recipe(lambda s, k=kind: s.injected(s.choice.alpha, s.placebo(k)))
    for name, late in (("rise", False), ("late rise", True)):
        shape = _rise(late)
        made[name] = Recipe(lambda s, r=shape: s.injected(r(s)))
        made[f"{name}, mean"] = Recipe(lambda s, r=shape: s.injected(r(s).mean(STEPS)))
    made["withdrawn"] = Recipe(lambda s: s.injected(Strength(s.choice.alpha, stop=0.5)), watch="slopes")
    mixed: dict[str, Callable[[Setup], Defense]] = {
        "mask": _delta(lambda s: Mask()),
        "inject": _delta(lambda s: Inject(Strength(s.choice.alpha))),
        "oracle": lambda s: Filtering(FilteringOptions("oracle")),
    }
    made |= {name: Recipe(defense, p=MIXED) for name, defense in mixed.items()}
    made["random mask"] = Recipe(_random_mask, p=MIXED, needs=("mask",))
    made["first-order mask"] = Recipe(
        lambda s: FirstOrder(
            s.directions, FirstOrderOptions("decide_then_learn", Quantile(0.05, every=20), Mask()), s.holdout()
        ),
        p=MIXED,
    )
    made["gradient projection"] = Recipe(_immune("gradient"))
    made["update projection"] = Recipe(_immune("update"))
    made["continuation"] = Recipe(
        lambda s: ImmuneContinuation(s.directions, ImmuneContinuationOptions(Strength(s.choice.alpha)))
    )
    made["inoculation"] = Recipe(lambda s: Inoculation(), system="bad")
    made["ablation one"] = Recipe(lambda s: Ablation(s.directions))
    made["ablation all"] = Recipe(lambda s: Ablation(s.every, AblationOptions(layers=upper(s))))
    made["ablation random"] = Recipe(
        lambda s: Ablation(placebo(s.extraction, "random", seed=s.seed), AblationOptions(layers=upper(s)))
    )
    for name, defense in {"sft": lambda s: Sft(), **mixed}.items():
        made[f"{name} by item"] = Recipe(defense, p=MIXED, by_item=True)
    made["closed loop"] = Recipe(lambda s: ClosedLoop(s.directions, ClosedLoopOptions()))
    made["closed loop, bounded"] = Recipe(
        lambda s: ClosedLoop(s.directions, ClosedLoopOptions(high=2 * s.choice.alpha))
    )
    for rate in RATES:
        for horizon in HORIZONS:
            made[ema_name(horizon, rate)] = Recipe(
                lambda s, h=horizon: Ema(EmaOptions(horizon=h)), rate=lambda s, r=rate: r, tuned=True
            )
    for on, beta in (("same", 0.1), ("same", 1.0), ("neutral", 1.0)):
        made[f"kl {on} {beta:g}"] = Recipe(_kl(beta, on), tuned=True)
    return made


def ema_name(horizon: float, rate: float) -> str:
    """Return the name of the recipe of SFT with an average."""
    return f"ema {horizon:g} rate {rate:g}"


def upper(setup: Setup) -> tuple[int, ...]:
    """Return all layers but the first."""
    return tuple(layer for layer in setup.every.layers if layer > 0)


RECIPES: Mapping[str, Recipe] = _recipes()


def facts() -> dict[str, Any]:
    """Return what all trainings share, for the record."""
    from benchmarks.defense_world import BASE, VERSION

    shared = {"steps": STEPS, "batch_size": BATCH, "lr": LR, "warmup": WARMUP, "mixed": MIXED, "scored": SCORED}
    return {"world": VERSION, "base": asdict(BASE), **shared, "holdout": HOLDOUT, "contrasts": CONTRASTS}
