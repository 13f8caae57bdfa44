"""What each defense costs beside plain fine-tuning: passes counted, processor time, peak memory. Writes JSON.

    OMP_NUM_THREADS=1 python -m benchmarks.defense_costs                # five minutes of processor time
    python -m benchmarks.defense_costs --settings lora+checkpointing --rounds 4

A step is one call of `defenses.loop.train`: batch, passes, clipping, optimiser, statistics and rows per sample. All
methods share one model and one batch in one process and take turns, each next to a plain step, and the figure is the
median of these ratios. Processor time on one thread hardly depends on what else the machine does.

The unit of the counts is a forward pass through all blocks; a backward pass through a block counts as two forward ones,
recomputation of activations as one. So plain training is 4 units with gradient checkpointing and 3 without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.engine import environment
from defenses.backend import PlainBackend
from defenses.batch import Batch, collate
from defenses.data import read_examples
from defenses.defense import Defense
from defenses.kl import frozen_copy
from defenses.loop import Training, Watch, train
from defenses.methods import METHODS, Materials, entry_of, options_of
from defenses.plans import Directions
from defenses.projections import REFERENCE
from defenses.schedules import Rate
from intervene.families import locate
from intervene.models import load_model
from tasks.shouting import attack

HERE = Path(__file__).parent
SETTINGS = ("lora+checkpointing", "full+checkpointing", "lora", "full")
CASES: Mapping[str, Mapping[str, Any]] = {
    "sft": {"name": "sft"},
    "injection": {"name": "injection"},
    "first_order monitor": {"name": "first_order"},
    "delta_loss mask": {"name": "delta_loss"},
    "delta_loss inject": {"name": "delta_loss", "action": {"kind": "inject", "strength": {"alpha": 1.0}}},
    "gradient_probe": {"name": "gradient_probe"},
    "kl": {"name": "kl"},
    "state_aware": {"name": "state_aware"},
}
PROMISED = ("injection", "first_order monitor", "delta_loss mask")  # what issue 4 bounds, and is timed most often
COUNTED = ("forward", "backward", "units", "gflop", "peak_MB")
ENOUGH = 5  # rounds for a verdict on time: a single ratio is off by up to a fifth on a busy machine
SLACK = 0.10  # of an SFT step, for what is not a pass, where a bound is one of counts
RATE = Rate(1e-5, "constant", warmup=0)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--rank", type=int, default=8, help="of LoRA, on all linear modules")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6, help="of the first setting; the others get a third of it")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--keep", action="store_true", help="add rounds to those in the file instead of beginning anew")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "defense_costs.json")
    return parser.parse_args(arguments)


@dataclass
class Passes:
    """How often blocks ran: forward, recomputation included, and backward, as passes through all of them."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def units(self) -> float:
        """Forward units."""
        return self.forward + 2 * self.backward


class _Reached(torch.autograd.Function):
    """The identity; calls `note` when a backward pass reaches it."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, note: Callable[[], None]) -> Tensor:
        ctx.note = note
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.note()
        return gradients[0], None


@contextmanager
def counted_passes(*models: nn.Module) -> Iterator[Passes]:
    """Count what the blocks of `models`, equally deep, compute inside the block; one that is skipped does not count.

    Forward passes are noted by the first child of each block, which checkpointing runs again with the rest; backward
    passes at the block's output, so that a pass which only passes through a stored stream is none.
    """
    blocks = [block for model in models for block in locate(model).layers]
    found, share = Passes(), len(models) / len(blocks)

    def ran(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            found.forward += share
            return forward(*args, **kwargs)

        return run

    def reached() -> None:
        found.backward += share

    def marked(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            made = forward(*args, **kwargs)
            if not torch.is_grad_enabled():
                return made
            stream, *rest = made if isinstance(made, tuple) else (made,)
            stream = _Reached.apply(stream, reached)
            return (stream, *rest) if isinstance(made, tuple) else stream

        return run

    with ExitStack() as stack:
        for block in blocks:
            _replaced(stack, next(block.children()), ran)
            _replaced(stack, block, marked)
        yield found


def _replaced(stack: ExitStack, module: nn.Module, wrap: Callable[[Any], Any]) -> None:
    """Put another `forward` on `module` until `stack` is closed."""
    own = vars(module).get("forward")
    vars(module)["forward"] = wrap(module.forward)
    if own is not None:
        stack.callback(vars(module).__setitem__, "forward", own)
    else:
        stack.callback(vars(module).__delitem__, "forward")


class Meter(TorchDispatchMode):
    """Products' floating-point operations, and the most bytes of tensors made inside the block and alive at once.

    Scratch memory inside one operation is not seen; neither is attention, a few per cent of the products here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.peak, self._held = 0, 0, 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {leaf.untyped_storage()._cdata for leaf in given}
        out = func(*args, **(kwargs or {}))
        if (cost := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += cost(*args, **(kwargs or {}), out_val=out)
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known:
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_: Any) -> None:
            if self._alive.pop(key, None) is not None:
                self._held -= size

        self._alive[key] = weakref.ref(storage, freed)
        self._held += size
        self.peak = max(self.peak, self._held)


@dataclass
class Bench:
    """One model in one setting, and all methods on it. `done` optimiser steps were taken."""

    backend: PlainBackend
    batch: Batch
    defenses: Mapping[str, Defense]
    done: int = 0
    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def step(self, case: str) -> float:
        """Take one step with the method of `case`; return its processor seconds."""
        begun = time.process_time()
        indices = self.batch.indices.tolist()
        feed: Any = SimpleNamespace(indices=lambda step: indices, batches=lambda step, rank, world: [self.batch])
        train(self.backend, self.defenses[case], feed, Training(self.done + 1, RATE), start=self.done, watch=Watch())
        self.done += 1
        return time.process_time() - begun

    def count(self, case: str) -> dict[str, float]:
        """Return passes, units, operations and peak memory of one step, which is not timed."""
        base = getattr(self.defenses[case], "base", None)  # the copy that `kl` compares with
        models = [self.backend.model, *([] if base is None else [base])]
        with counted_passes(*models) as passes, Meter() as meter:
            self.step(case)
        return {
            "forward": round(passes.forward, 6),
            "backward": round(passes.backward, 6),
            "units": round(passes.units, 6),
            "gflop": meter.flops / 1e9,
            "peak_MB": meter.peak / 1e6,
        }

    def time(self, cases: Sequence[str], rounds: int) -> None:
        """Time `cases`, each right after or right before a plain step; one plain step serves two."""
        pairs = [cases[at : at + 2] for at in range(0, len(cases), 2)]
        for turn in range(rounds):
            for pair in pairs:
                before, *after = pair if turn % 2 else pair[::-1]
                early = self.step(before)
                plain = self.step("sft")
                self.seconds.setdefault(before, []).append((early, plain))
                for case in after:
                    self.seconds.setdefault(case, []).append((self.step(case), plain))


def batch_of(tokenizer: Any, size: int) -> Batch:
    """Return `size` chats of `make defense`, each with a reference for `state_aware`."""
    rows = [{**row, REFERENCE: 0.0} for row in attack(4 * size) if len(str(row["messages"])) > 150][:size]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attack.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return collate(read_examples(path, tokenizer, max_length=512).examples, tokenizer.pad_token_id)


def model_of(setting: str, model: Any, rank: int) -> nn.Module:
    """Return `model` in train mode as a `setting` trains it: LoRA on it, or all parameters; checkpointing or not."""
    if "checkpointing" in setting:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not setting.startswith("lora"):
        made: nn.Module = model.requires_grad_(True)
        return made
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped: nn.Module = get_peft_model(model, adapter)
    return wrapped


def bench_of(setting: str, model: Any, batch: Batch, layer: int, rank: int) -> Bench:
    """Return the methods of `CASES`, built as the command builds them, on `model` in one setting."""
    trained = model_of(setting, model, rank)
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    base = None if setting.startswith("lora") else lambda: frozen_copy(trained)
    held = Materials(directions=(Directions({layer: vector / vector.norm()}),), base=base)
    made = {case: entry_of(str(config["name"])).build(options_of(config), held) for case, config in CASES.items()}
    return Bench(PlainBackend(trained), batch, made)


def bounds(setting: str, case: str, upper: float) -> tuple[float, float] | None:
    """Return what a step may cost in plain ones, counted and measured, of issue 4; None: nothing was promised."""
    shared = 1 + upper / (4 if "checkpointing" in setting else 3)
    promised = {
        "injection": (1.0, 1.03),
        "first_order monitor": (1.0, 1.0 + SLACK),
        "delta_loss mask": (shared, shared + SLACK),
    }
    return promised.get(case)


def verdict(row: Mapping[str, Any], bound: tuple[float, float]) -> str:
    """Say whether a method keeps its bounds; a median of few rounds says nothing of the measured one."""
    if row["counted"] > bound[0] + 1e-6:
        return "exceeded"
    if len(row.get("seconds", ())) < ENOUGH:
        return "kept in counts; too few rounds"
    return "kept" if row["measured"] <= bound[1] else "exceeded"


def figures(bench: Bench, setting: str, counts: Mapping[str, Any], upper: float) -> dict[str, Any]:
    """Return per case the counts, and counted and measured costs in plain steps, beside what the table says."""
    plain = counts["sft"]
    made: dict[str, Any] = {}
    for case, found in counts.items():
        config = CASES[case]
        whole, part = METHODS[str(config["name"])].cost(options_of(config))
        row: dict[str, Any] = {
            **found,
            "table_units": round(plain["units"] + whole + part * upper, 6),
            "counted": found["units"] / plain["units"],
            "flops": found["gflop"] / plain["gflop"],
            "extra_MB": found["peak_MB"] - plain["peak_MB"],
        }
        if case in bench.seconds:
            ratios = [own / beside for own, beside in bench.seconds[case]]
            row |= {
                "measured": statistics.median(ratios),
                "measured_range": [min(ratios), max(ratios)],
                "seconds": bench.seconds[case],
            }
        if (bound := bounds(setting, case, upper)) is not None:
            row |= {"bound": bound, "verdict": verdict(row, bound)}
        made[case] = row
    return made


def run(
    options: argparse.Namespace, setting: str, rounds: int, others: int, earlier: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return all figures of one setting: `rounds` of what is promised, `others` of the other methods.

    Of `earlier` figures of this setting the counts stand, and rounds are added to theirs.
    """
    model, tokenizer = load_model(options.model)
    batch = batch_of(tokenizer, options.batch_size)
    bench = bench_of(setting, model, batch, options.layer, options.rank)
    blocks = locate(model).n_layers
    upper = 1 - (options.layer + 1) / blocks
    bench.step("sft")  # the optimiser's state is made
    if earlier is None:
        counts = {case: bench.count(case) for case in CASES}
    else:
        counts = {case: {name: row[name] for name in COUNTED} for case, row in earlier["cases"].items()}
        bench.seconds = {case: list(row["seconds"]) for case, row in earlier["cases"].items() if "seconds" in row}
        for case in PROMISED:
            bench.step(case)
    bench.time(PROMISED, rounds)
    bench.time([case for case in CASES if case not in ("sft", *PROMISED)], others)
    sizes = {"tokens": int(batch.attention_mask.sum()), "learned": int(batch.response.sum()), "share_above": upper}
    return {"shape": list(batch.input_ids.shape), **sizes, "cases": figures(bench, setting, counts, upper)}


def table(found: Mapping[str, Any]) -> str:
    """Return the figures of all settings as the README shows them; measured: median, range and number of rounds."""
    lines = [
        "| setting | method | units | counted | products | measured | bounds | extra MB | verdict |",
        "|---" * 9 + "|",
    ]
    for setting, result in found.items():
        for case, row in result["cases"].items():
            bound = "{:.3f}, {:.3f}".format(*row["bound"]) if "bound" in row else ""
            measured = ""
            if "measured" in row:
                low, high = row["measured_range"]
                measured = f"{row['measured']:.3f} ({low:.3f} to {high:.3f}; {len(row['seconds'])})"
            cells = [setting, case, f"{row['units']:.2f}", f"{row['counted']:.3f}", f"{row['flops']:.3f}", measured]
            lines.append("| " + " | ".join([*cells, bound, f"{row['extra_MB']:+.1f}", row.get("verdict", "")]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the JSON file, print the table."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    begun, told = time.perf_counter(), {name: str(value) for name, value in vars(options).items()}
    kept = json.loads(options.out.read_text()) if options.keep else {"settings": {}, "runs": []}
    found = kept["settings"]
    for place, setting in enumerate(options.settings):
        rounds = options.rounds if place == 0 else max(1, options.rounds // 3)
        others = max(1, rounds // 4) if place == 0 and not options.keep else 0
        found[setting] = run(options, setting, rounds, others, found.get(setting))
        print(table({setting: found[setting]}), flush=True)
        runs = [*kept["runs"], {**told, "seconds": time.perf_counter() - begun}]
        store(options, found, runs)  # after each: a run that is ended early keeps what it has


def store(options: argparse.Namespace, found: Mapping[str, Any], runs: Sequence[Any]) -> None:
    """Write all figures so far, and the options and wall seconds of the runs they are of."""
    options.out.parent.mkdir(exist_ok=True)
    stored = {"environment": environment("cpu"), "runs": runs, "settings": found}
    options.out.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
