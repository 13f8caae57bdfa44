"""What the ranks of `test_backends.py` run: every case on every backend, and one file of results.

    torchrun --nproc-per-node 2 tests/defenses/rank_script.py --out DIR [--kinds ddp,zero3] [--cases sft,masked]

The test process runs the same cases on `PlainBackend` and compares. Rank 0 writes DIR/facts.json and, for every case,
the trained weights as DIR/{kind}-{case}.safetensors.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from defenses.backend import Optimiser
from defenses.batch import Example, collate
from defenses.defense import Defense, Sft, learn
from defenses.launch import detect, joined, make_backend
from defenses.loop import StopRequest, Training, Watch, train
from defenses.objectives import n_tokens, sample_means, spread, token_losses
from defenses.plans import Directions, Scope, injection, scope_columns
from defenses.schedules import Rate
from intervene import capture, intervene
from intervene.suffix import kept_stream
from tests.tiny import tiny_model

KINDS = ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")
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
    tied: bool = False
    offload: bool = False
    kinds: tuple[str, ...] = KINDS


CASES = {
    "sft": Case(Sft),
    "unclipped": Case(Sft, clip=None),
    "injected": Case(Injected),
    "checkpointed": Case(Injected, checkpointing=True),
    "masked": Case(lambda: Masked(lambda place: place % 3 > 0)),
    "one_sided": Case(lambda: Masked(lambda place: place >= PER_STEP // 2), clip=None),
    "teacher": Case(TeacherFirst, checkpointing=True),
    "two_passes": Case(TwoPasses, checkpointing=True),
    "projected": Case(Projected),
    "tied": Case(Sft, tied=True, kinds=("ddp", "fsdp", "zero2", "zero3")),
    "lora": Case(Injected, lora=True, kinds=("ddp", "fsdp", "zero1", "zero3")),
    "offloaded": Case(Sft, offload=True, kinds=("fsdp", "zero2", "zero3")),
}


def model_of(case, rank=0):
    model = tiny_model("llama", tie_word_embeddings=case.tied)
    if case.lora:
        import peft

        torch.manual_seed(rank)  # the ranks draw different adapters, and all have to train those of rank 0
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        for name, one in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(one, std=0.1)
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def backend_of(kind, case, ranks):
    optimiser = Optimiser(eps=1e-4, weight_decay=0.01, clip=case.clip)
    model = model_of(case, ranks.rank if ranks else 0)
    if kind != "zero3":
        return make_backend(kind, model, optimiser, ranks=ranks, offload=case.offload)
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
    return rows, backend.weights(), backend


def a_step(backend, lr=1e-3, scale=1.0, number=0):
    """One step of SFT."""
    batches = Feed().batches(number, backend.rank, backend.world)
    for at, batch in enumerate(batches):
        loss = token_losses(backend, batch).sum() / 30
        backend.backward(loss * scale, last=at == len(batches) - 1)
    return backend.step(lr)


def text_of(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def logits_of(backend):
    batch = collate([example(1), example(2)], 0)
    with torch.no_grad(), backend.precision():
        return backend.model(**batch.inputs()).logits


def resumed(kind, ranks, folder):
    """Two steps, a file, two more; and the same two from the file in a new backend."""
    case = CASES["sft"]
    backend = backend_of(kind, case, ranks)
    for number in range(2):
        a_step(backend, number=number)
    path = folder / f"{kind}-{ranks.rank}.pt"
    torch.save(backend.state(), path)
    first = [float(torch.rand(())), *(a_step(backend, number=number) for number in (2, 3))]
    before = backend.weights()
    again = backend_of(kind, case, ranks)
    torch.manual_seed(999)
    state = torch.load(path, weights_only=True)
    again.load_state(state)
    second = [float(torch.rand(())), *(a_step(again, number=number) for number in (2, 3))]
    after = again.weights()
    exact = None if before is None else all(torch.equal(before[name], after[name]) for name in before)
    held = sum(one.numel() for one in torch.utils._pytree.tree_leaves(state) if isinstance(one, torch.Tensor))
    other = text_of(lambda: again.load_state({**state, "world": 3}))
    return {"exact": exact, "first": first, "second": second, "numbers": held, "other_world": other}


def refusals(kind, ranks):
    """What is refused, and that nothing is left behind by it."""
    found = {}
    backend = backend_of(kind, CASES["sft"], ranks)
    batch = Feed().batches(0, backend.rank, backend.world)[0]
    first, second = token_losses(backend, batch).mean(), token_losses(backend, batch).mean()
    backend.backward(first, last=False)
    found["two forwards, two backwards"] = text_of(lambda: backend.backward(second, last=True))
    found["no last"] = text_of(lambda: backend.step(1e-3))
    backend = backend_of(kind, CASES["sft"], ranks)
    a_step(backend)
    before = backend.weights()
    found["nan"] = text_of(lambda: a_step(backend, scale=float("nan")))
    after = backend.weights()
    found["nan changed"] = None if before is None else max(float((before[n] - after[n]).abs().max()) for n in before)
    found["after nan"] = a_step(backend)
    return found


def writes(kind, ranks):
    """A write is seen by the next pass, also after a pass that was stopped early, and by every later step."""
    backend = backend_of(kind, CASES["sft"], ranks)
    name, zeros = "model.layers.1.mlp.down_proj.weight", torch.zeros(32, 48)
    norm, norms = "model.norm.weight", torch.full((32,), 0.5)
    a_step(backend, lr=0.0)
    with capture(backend.model, [f"L{LAYER}.mlp_output"], stop_after_last=True), torch.no_grad():
        backend.model(**collate([example(3)], 0).inputs())
    backend.write(name, zeros)
    backend.write(norm, norms)
    seen = logits_of(backend)
    a_step(backend, lr=0.0)
    plain = tiny_model("llama")
    with torch.no_grad():
        plain.get_parameter(name).copy_(zeros)
        plain.get_parameter(norm).copy_(norms)
    batch = collate([example(1), example(2)], 0)
    with torch.no_grad():
        wanted = plain(**batch.inputs()).logits
    return {
        "seen": float((seen - wanted).abs().max()),
        "kept": float(backend.value(name).abs().max()),
        "later": float((logits_of(backend) - wanted).abs().max()),
    }


def gradients(kind, ranks):
    """Sums over ranks and micro-batches, whole, and unscaled also at a leaf that is no parameter."""
    backend = backend_of(kind, CASES["sft"], ranks)
    batches = Feed().batches(0, backend.rank, backend.world)
    leaf = torch.zeros((), requires_grad=True)
    for at, batch in enumerate(batches):
        loss = token_losses(backend, batch).sum() / 30
        backend.backward(loss * (1 + leaf), last=at == len(batches) - 1)
    found = {name: backend.gradient(name) for name in (PROTECTED, "model.norm.weight")}
    total = backend.sum(leaf.grad)
    return found | {"leaf": total, "max": backend.max(torch.tensor([float(backend.rank)]))}


def stopped(kind, ranks, folder):
    """One rank gets SIGTERM; all save and end after the same step."""
    backend = backend_of(kind, CASES["sft"], ranks)
    saved = []

    def told(number, rows):
        if number == 1 and backend.rank == backend.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def save(done):
        torch.save(backend.state(), folder / f"stopped-{backend.rank}.pt")
        saved.append(done)

    with StopRequest().listening() as request:
        watch = Watch(samples=told, save=save, stop=request)
        rate = Rate(1e-3, shape="constant", warmup=0)
        ended = train(backend, Sft(), Feed(), Training(6, rate), watch=watch)
    mine = torch.tensor([float(ended.steps), float(saved[0])])
    return {"steps": backend.sum(mine).tolist(), "reason": ended.reason}


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--local_rank", type=int, default=None)  # the deepspeed launcher gives it
    return parser.parse_args()


def main():
    from safetensors.torch import save_file

    given = arguments()
    torch.set_num_threads(1)
    ranks = detect()
    facts = {"ranks": str(ranks), "local_rank": given.local_rank, "rows": {}, "seconds": {}}
    given.out.mkdir(parents=True, exist_ok=True)
    with joined(ranks, cuda=False):
        for kind in given.kinds.split(","):
            start = time.perf_counter()
            for name in given.cases.split(","):
                if kind not in CASES[name].kinds:
                    continue
                rows, weights, _ = run_case(kind, name, ranks)
                facts["rows"][f"{kind}-{name}"] = rows
                if weights is not None:
                    save_file({key: one.contiguous() for key, one in weights.items()}, given.out / f"{kind}-{name}.safetensors")
            if not given.brief:
                found = gradients(kind, ranks)
                if ranks.rank == 0:
                    save_file(found, given.out / f"{kind}-gradients.safetensors")
                looks = {"resumed": resumed, "stopped": stopped}
                facts[kind] = {name: look(kind, ranks, given.out) for name, look in looks.items()}
                facts[kind] |= {"writes": writes(kind, ranks), "refusals": refusals(kind, ranks)}
            facts["seconds"][kind] = time.perf_counter() - start
        with nullcontext() if ranks.rank else open(given.out / "facts.json", "w") as file:
            if file is not None:
                json.dump(facts, file)


if __name__ == "__main__":
    main()
