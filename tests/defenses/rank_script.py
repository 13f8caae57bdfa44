"""What the ranks of `test_backends.py` run: every case on every backend, and one file of results.

    PYTHONPATH=. torchrun --nproc-per-node 2 tests/defenses/rank_script.py --out DIR [--kinds ddp,zero3] [--cases sft]

The test process runs the same cases on `PlainBackend` and compares. Rank 0 writes DIR/facts.json and, for every case,
the trained weights as DIR/{kind}-{case}.safetensors.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path

import torch

from defenses.batch import collate
from defenses.defense import Sft
from defenses.launch import detect, joined, leave
from defenses.loop import StopRequest, Training, Watch, train
from defenses.objectives import token_losses
from defenses.schedules import Rate
from intervene import capture, fingerprint
from tests.defenses.rank_cases import CASES, KINDS, LAYER, PROTECTED, Feed, backend_of, example, run_case
from tests.tiny import tiny_model


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


def wrapped(kind, ranks):
    """The wrapper itself can be given to `capture`; a fingerprint of cut parameters is refused."""
    backend = backend_of(kind, CASES["sft"], ranks)
    outer = getattr(backend, "engine", getattr(backend, "wrapped", backend.model))
    batch = collate([example(1), example(2)], 0)
    sites = [f"L{LAYER}.block_output", f"L{LAYER}.head_output[1]", f"L{LAYER}.mlp_neurons", "final_norm_output"]
    plain = tiny_model("llama")
    with torch.no_grad(), capture(outer, sites) as found:
        outer(**batch.inputs())
    with torch.no_grad(), capture(plain, sites) as wanted:
        plain(**batch.inputs())
    return {
        "difference": max(float((found[site] - wanted[site]).abs().max()) for site in sites),
        "fingerprint": text_of(lambda: fingerprint(backend.model)),
    }


def unused(kind, ranks):
    """A loss that most parameters take no part in."""
    backend = backend_of(kind, CASES["sft"], ranks)
    backend.forward(**collate([example(3)], 0).inputs())
    return text_of(lambda: backend.backward(backend.model.get_input_embeddings().weight.sum(), last=True))


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
                rows, weights = run_case(kind, name, ranks)
                facts["rows"][f"{kind}-{name}"] = rows
                if weights is not None:
                    # safetensors refuses the two names of a tied weight, unless each has its own values
                    whole = {key: one.clone(memory_format=torch.contiguous_format) for key, one in weights.items()}
                    save_file(whole, given.out / f"{kind}-{name}.safetensors")
            if not given.brief:
                found = gradients(kind, ranks)
                if ranks.rank == 0:
                    save_file(found, given.out / f"{kind}-gradients.safetensors")
                looks = {"resumed": resumed, "stopped": stopped}
                facts[kind] = {name: look(kind, ranks, given.out) for name, look in looks.items()}
                looks = {"writes": writes, "refusals": refusals, "wrapped": wrapped}
                facts[kind] |= {name: look(kind, ranks) for name, look in looks.items()}
                if kind == "ddp":
                    facts[kind]["unused"] = unused(kind, ranks)
            facts["seconds"][kind] = time.perf_counter() - start
        if ranks.rank == 0:
            (given.out / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
    leave(0)
