"""The methods and settings that every backend has to train alike, and the training of one of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from defenses.backend import Optimiser
from defenses.batch import Example, collate
from defenses.defense import Defense, Sft, learn
from defenses.launch import make_backend
from defenses.loop import Training, Watch, train
from defenses.objectives import n_tokens, sample_means, spread, token_losses
from defenses.plans import Directions, Scope, injection, scope_columns
from defenses.schedules import Rate
from intervene import intervene
from intervene.kept_stream import kept_stream
from tests.tiny import tiny_model

KINDS = ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")
FEW = ("ddp", "fsdp", "zero2", "zero3")
STEPS, PER_STEP = 3, 8
CLIP = 0.05  # the norms of these models are near 1
LAYER = 1
PROTECTED = "model.layers.1.self_attn.o_proj.weight"


def example(index):
    """Lengths and prompts differ, so that tokens per rank and per micro-batch do."""
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(3, 96, (6 + index % 5,), generator=generator).tolist()
    prompt = 2 + index % 3
    return Example(tuple(ids), tuple([-100] * prompt + ids[prompt:]), index)


class Feed:
    """Each step's 8 examples, cut over ranks, 2 to a micro-batch."""

    def indices(self, step):
        return range(step * PER_STEP, (step + 1) * PER_STEP)

    def batches(self, step, rank, world):
        share = PER_STEP // world
        own = list(self.indices(step))[rank * share : (rank + 1) * share]
        return [collate([example(own[at]), example(own[at + 1])], 0) for at in range(0, share, 2)]


def directions():
    return Directions({LAYER: torch.randn(32, generator=torch.Generator().manual_seed(7))})


class Injected(Defense):
    """Learn while a vector is added on response tokens."""

    def accumulate(self, backend, batch, step):
        columns = scope_columns(batch, Scope.RESPONSE)
        with intervene(backend.model, injection(directions(), 0.5, columns=columns), prompt=batch.prompt(columns)):
            losses = token_losses(backend, batch)
            learn(backend, losses, step)
        return {"loss_sum": losses.detach().sum(), "tokens": n_tokens(batch)}


class Masked(Defense):
    """A pass without gradient that shares the prefix, then samples weighted with 0 or 1."""

    def __init__(self, weight):
        self.weight = weight

    def accumulate(self, backend, batch, step):
        columns = scope_columns(batch, Scope.RESPONSE)
        with kept_stream(backend.model, LAYER) as kept:
            natural = token_losses(backend, batch)
            plan = injection(directions(), 0.5, columns=columns)
            with kept.handed_on(), intervene(backend.model, plan, prompt=batch.prompt(columns)):
                injected = token_losses(backend, batch, grad=False)
        delta = sample_means(injected, batch) - sample_means(natural.detach(), batch)
        weights = torch.tensor([float(self.weight(int(index) % PER_STEP)) for index in batch.indices])
        learn(backend, natural * spread(weights, batch), step)
        sums = {"loss_sum": natural.detach().sum(), "tokens": n_tokens(batch)}
        return {**sums, "delta": delta.sum(), "blocked": (1 - weights).sum()}


class TeacherFirst(Defense):
    """The injected pass without gradient first, whole, and then the one that learns."""

    def accumulate(self, backend, batch, step):
        columns = scope_columns(batch, Scope.RESPONSE)
        with intervene(backend.model, injection(directions(), 0.5, columns=columns), prompt=batch.prompt(columns)):
            injected = token_losses(backend, batch, grad=False)
        natural = token_losses(backend, batch)
        learn(backend, natural, step)
        return {"loss_sum": natural.detach().sum(), "tokens": n_tokens(batch), "delta": injected.sum()}


class TwoPasses(Defense):
    """Two passes with gradients: their losses added up, then one by one."""

    def accumulate(self, backend, batch, step):
        columns = scope_columns(batch, Scope.RESPONSE)
        plan = injection(directions(), 0.5, columns=columns)
        natural = token_losses(backend, batch)
        with intervene(backend.model, plan, prompt=batch.prompt(columns)):
            both = natural.sum() + token_losses(backend, batch).sum()
            backend.backward(both / step.tokens, last=False)
        learn(backend, token_losses(backend, batch), step)
        return {"loss_sum": natural.detach().sum(), "tokens": n_tokens(batch)}


class Projected(Sft):
    """Gradients lose a direction before the step, and weights theirs after it."""

    def start(self, backend, total):
        self.anchor = backend.value(PROTECTED)
        drawn = torch.randn(32, 2, generator=torch.Generator().manual_seed(3))
        self.frame = torch.linalg.qr(drawn)[0]

    def before_step(self, backend, step):
        gradient = backend.gradient(PROTECTED)
        column = self.frame[:, :1]
        backend.write_gradient(PROTECTED, gradient - column @ (column.T @ gradient))

    def after_step(self, backend, step):
        moved = backend.value(PROTECTED) - self.anchor
        backend.write(PROTECTED, self.anchor + moved - self.frame @ (self.frame.T @ moved))


@dataclass(frozen=True)
class Case:
    """A method, and what else is set."""

    defense: object
    clip: float | None = CLIP
    checkpointing: bool = False
    lora: bool = False
    family: str = "llama"
    offload: bool = False
    kinds: tuple[str, ...] = KINDS


CASES = {
    "sft": Case(Sft),
    "unclipped": Case(Sft, clip=None, kinds=("ddp", "zero0", "zero2")),
    "injected": Case(Injected),
    "checkpointed": Case(Injected, checkpointing=True),
    "masked": Case(lambda: Masked(lambda place: place % 3 > 0)),
    "one_sided": Case(lambda: Masked(lambda place: place >= PER_STEP // 2), clip=None),
    "teacher": Case(TeacherFirst, checkpointing=True, kinds=FEW),
    "two_passes": Case(TwoPasses, checkpointing=True, kinds=FEW),
    "projected": Case(Projected),
    "tied": Case(Injected, family="gpt2", kinds=FEW),
    "lora": Case(Injected, lora=True, kinds=("ddp", "fsdp", "zero1", "zero3")),
    "offloaded": Case(Sft, offload=True, kinds=("fsdp", "zero2")),
}


def model_of(case, rank=0):
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if case.family == "gpt2" else {}
    model = tiny_model(case.family, **dropout)
    if case.lora:
        import peft

        torch.manual_seed(rank)  # the ranks draw different adapters, and all have to train those of rank 0
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        for name, one in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(one, std=0.1)
    if case.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def backend_of(kind, case, ranks):
    optimiser = Optimiser(eps=1e-4, weight_decay=0.01, clip=case.clip)
    model = model_of(case, ranks.rank if ranks else 0)
    if kind != "zero3":
        return make_backend(kind, model, optimiser, ranks=ranks, offload=case.offload and kind != "plain")
    from defenses.backend_deepspeed import ZeroBackend

    # 0: parameters as small as these are cut too
    settings = {"stage3_param_persistence_threshold": 0}
    return ZeroBackend(model, optimiser, stage=3, offload=case.offload, settings=settings)


def run_case(kind, name, ranks=None):
    """Train; return rows of every step, and the weights on rank 0."""
    case = CASES[name]
    rows = []
    backend = backend_of(kind, case, ranks)
    rate = Rate(1e-3, shape="constant", warmup=0)
    train(backend, case.defense(), Feed(), Training(STEPS, rate), watch=Watch(row=rows.append))
    for row in rows:
        row.pop("seconds")
    return rows, backend.weights()
