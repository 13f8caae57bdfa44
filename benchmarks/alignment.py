"""Compares one DAS fit with pyvene's: time per step and per sweep, peak memory, final IIA. Writes JSON.

    OMP_NUM_THREADS=1 python -m benchmarks.alignment                    # embedded model, IOI, 14 tokens
    OMP_NUM_THREADS=1 python -m benchmarks.alignment --tokens 82        # the same pairs behind a preamble
    python -m benchmarks.alignment --sites 3,9,15,21,27 --positions subject2,last

Both get the same model, pairs, batches, starting frame, optimiser and number of steps, in one process; each pass of
one is followed by one of the other, so that noise on a shared machine falls on both. pyvene is asked in its own
cheapest form (low-rank rotation, frozen model, logits of all columns, which it cannot leave out). "joined" is the
fit of three seeds in common passes, per seed: what a search really pays. Times are processor time; keep one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

from alignments import METHODS, Setup, wilson
from alignments.answers import together
from alignments.fit import _batches
from alignments.pairs import LanguagePairs
from benchmarks.engine import environment
from intervene import Plan, Site, frozen
from intervene.interventions import modules_of
from intervene.locate import located_once
from intervene.marked import Marked
from intervene.models import load_model
from intervene.precision import fast_products
from tasks import Pair, task_named

HERE = Path(__file__).parent
SEEDS = 3
FILLER = "Here is a short story about some friends who live in the same town and often meet."


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=0, help="pad every prompt in front to so many; 0: as they are")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--position", default="last")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=128, help="training pairs")
    parser.add_argument("--test_pairs", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="of the fits that are scored")
    parser.add_argument("--timed", type=int, default=5, help="of these, steps that are timed alternately")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default=None, help="of the file in results/")
    return parser.parse_args(arguments)


def lengthened(pairs: Sequence[Pair], tokenizer: Any, tokens: int) -> list[Pair]:
    """Return `pairs` with words put in front of both prompts until each has `tokens` tokens; 0: as they are."""
    if not tokens:
        return list(pairs)
    words = (FILLER + " ") * 20
    made = []
    for pair in pairs:
        sides = []
        for example in (pair.base, pair.source):
            missing = tokens - len(tokenizer(example.prompt)["input_ids"])
            ids = tokenizer(words)["input_ids"]
            front = tokenizer.decode(ids[:missing]) + " "
            found = len(tokenizer(front + example.prompt)["input_ids"])
            while found != tokens:  # the seam may merge tokens
                missing += tokens - found
                front = tokenizer.decode(ids[:missing]) + " "
                found = len(tokenizer(front + example.prompt)["input_ids"])
            spans = {name: (a + len(front), b + len(front)) for name, (a, b) in example.spans.items()}
            sides.append(replace(example, prompt=front + example.prompt, spans=spans))
        made.append(replace(pair, base=sides[0], source=sides[1]))
    return made


class Ours:
    """The fit of `alignments`, one step at a time."""

    def __init__(self, model: nn.Module, data: LanguagePairs, plan: Plan, lr: float, *, fast: bool = False) -> None:
        self.model, self.data, self.plan, self.fast = model, data, plan, fast
        self.optimiser = torch.optim.AdamW([p for m in modules_of(plan) for p in m.parameters()], lr, weight_decay=0.0)

    def step(self, rows: Tensor) -> float:
        """Run one step; return its loss."""
        with fast_products() if self.fast else nullcontext():
            loss = self._loss(rows)
        self.optimiser.step()
        return loss

    def _loss(self, rows: Tensor) -> float:
        self.optimiser.zero_grad()
        loss = self.data.losses(self.plan, rows, self.data.labels[rows]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    @torch.no_grad()
    def right(self, data: LanguagePairs) -> int:
        """Return how many of `data` are answered as their label says."""
        parts = torch.split(torch.arange(len(data)), 64)
        return sum(int((data.logits(self.plan, rows).argmax(-1) == data.labels[rows]).sum()) for rows in parts)


class Pyvene:
    """The same fit with pyvene: base and source run whole in every step."""

    def __init__(self, model: nn.Module, layer: int, frame: Tensor, lr: float) -> None:
        import pyvene

        kind = pyvene.LowRankRotatedSpaceIntervention
        representation = {"layer": layer, "component": "block_output", "low_rank_dimension": frame.shape[1]}
        config = pyvene.IntervenableConfig([{**representation, "intervention_type": kind}])
        self.wrapped = pyvene.IntervenableModel(config, model)
        self.wrapped.set_device("cpu", set_model=False)
        self.wrapped.disable_model_gradients()
        for intervention in self.wrapped.interventions.values():
            with torch.no_grad():
                intervention.rotate_layer.weight = frame
        parameters = [p for one in self.wrapped.interventions.values() for p in one.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(parameters, lr, weight_decay=0.0)

    def logits(self, data: LanguagePairs, rows: Tensor, name: str) -> Tensor:
        """Return (b, V) at the last column."""
        inputs = []
        for tokens in (data.base, data.source):
            inputs.append({"input_ids": tokens.input_ids[rows], "attention_mask": tokens.attention_mask[rows]})
        where = [[tokens.marks[name][rows].tolist()] for tokens in (data.source, data.base)]
        _, output = self.wrapped(inputs[0], [inputs[1]], {"sources->base": (where[0], where[1])})
        logits: Tensor = output.logits[:, -1]
        return logits

    def step(self, data: LanguagePairs, rows: Tensor, name: str) -> float:
        """Run one step; return its loss."""
        self.optimiser.zero_grad()
        loss = nn.functional.cross_entropy(self.logits(data, rows, name), data.labels[rows])
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())

    @torch.no_grad()
    def right(self, data: LanguagePairs, name: str) -> int:
        """Return how many of `data` are answered as their label says."""
        parts = torch.split(torch.arange(len(data)), 32)
        return sum(int((self.logits(data, rows, name).argmax(-1) == data.labels[rows]).sum()) for rows in parts)


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Yield a dict that receives "MB": how far the process's resident memory rose above where it began."""
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    begun, found, over = resident(), {"MB": 0.0}, threading.Event()

    def watch() -> None:
        while not over.is_set():
            found["MB"] = max(found["MB"], (resident() - begun) / 1e6)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def timed(work: Any) -> tuple[float, Any]:
    """Return the processor seconds that `work` took, and what it returned.

    On one thread they are the wall time of a machine that does nothing else.
    """
    begun = time.process_time()
    made = work()
    return time.process_time() - begun, made


def compare(options: argparse.Namespace, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """Return all figures of one comparison."""
    task = task_named("ioi").for_tokenizer(tokenizer)
    site, name = Site("block_output", options.layer), options.position
    drawn = {
        split: lengthened(task.pairs(split, variable="position", n=n), tokenizer, options.tokens)
        for split, n in (("train", options.pairs), ("test", options.test_pairs))
    }
    with peak_memory() as prepared:
        seconds, data = timed(
            lambda: {
                split: LanguagePairs(model, tokenizer, pairs, sites=[site], positions=[name])
                for split, pairs in drawn.items()
            }
        )
    width = model.config.hidden_size
    plans = [METHODS["das"].make(Setup(site, Marked(name), width, options.rank, 0)) for _ in range(2)]
    train, test = data["train"], data["test"]
    ours = Ours(model, train, plans[0], options.lr)
    fast = Ours(model, train, plans[1], options.lr, fast=True)
    seeds = [METHODS["das"].make(Setup(site, Marked(name), width, options.rank, seed)) for seed in range(SEEDS)]
    joined = Ours(model, train, together(seeds), options.lr)
    theirs = Pyvene(copy.deepcopy(model), options.layer, plans[0][0].featurizer.frame().detach().clone(), options.lr)
    batches = _batches(len(train), options.batch_size, options.steps, 0)
    figures: dict[str, list[float]] = {"ours": [], "fast": [], "joined": [], "pyvene": []}
    losses: dict[str, list[float]] = {"ours": [], "fast": [], "pyvene": []}
    with peak_memory() as our_memory:
        ours_warm = timed(lambda: ours.step(batches[0]))
        fast_warm = timed(lambda: fast.step(batches[0]))
    with peak_memory() as their_memory:
        their_warm = timed(lambda: theirs.step(train, batches[0], name))
    for key, (_, loss) in (("ours", ours_warm), ("fast", fast_warm), ("pyvene", their_warm)):
        losses[key].append(loss)
    for index, rows in enumerate(batches[1:]):
        steps = {
            "ours": lambda rows=rows: ours.step(rows),
            "fast": lambda rows=rows: fast.step(rows),
            "pyvene": lambda rows=rows: theirs.step(train, rows, name),
        }
        for key, work in steps.items():
            taken, loss = timed(work)
            losses[key].append(loss)
            figures[key].append(taken)
        if index < options.timed:
            figures["joined"].append(timed(lambda rows=rows: joined.step(rows.repeat(SEEDS)))[0] / SEEDS)
    hits = {"ours": ours.right(test), "fast": fast.right(test), "pyvene": theirs.right(test, name)}
    medians = {key: statistics.median(values) for key, values in figures.items()}
    return {
        "tokens": int(train.base.input_ids.shape[1]),
        "prepare_seconds": seconds,
        "prepare_peak_MB": prepared["MB"],
        "seconds_per_step": figures,
        "median_seconds_per_step": medians,
        "times_faster": {key: medians["pyvene"] / medians[key] for key in ("ours", "fast", "joined")},
        "peak_MB_of_a_step": {"ours": our_memory["MB"], "pyvene": their_memory["MB"]},
        "losses": losses,
        "first_loss_difference": abs(losses["ours"][0] - losses["pyvene"][0]),  # one frame; then they learn apart
        "iia": {key: [count / len(test), *wilson(count, len(test))] for key, count in hits.items()},
        "suffix_against_full_pass": train.prefix.difference,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, write the JSON file, print the ratios."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model)
    with frozen(model), located_once():
        found = {"environment": environment("cpu"), "options": vars(options), **compare(options, model, tokenizer)}
    name = options.name or f"alignment-{found['tokens']}-tokens"
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    medians = found["median_seconds_per_step"]
    print(f"{found['tokens']} tokens, layer {options.layer} @ {options.position}, rank {options.rank}")
    for key in ("ours", "fast", "pyvene"):
        score, low, high = found["iia"][key]
        print(f"  {key:<7} {medians[key]:.3f} s per step   IIA {score:.3f} [{low:.3f}, {high:.3f}]")
    faster = found["times_faster"]
    print(
        f"  {faster['ours']:.1f} times faster, {faster['fast']:.1f} with fast products, "
        f"{faster['joined']:.1f} per seed of {SEEDS} that are fitted together"
    )
    print(f"  difference of the first step's loss {found['first_loss_difference']:.1e}")
    print(f"  memory above the model: {found['peak_MB_of_a_step']}, prepared {found['prepare_peak_MB']:.0f} MB")


if __name__ == "__main__":
    main()
