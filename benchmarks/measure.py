"""The figures: operations and host reads per site, times as ratios, import times."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import peers
from benchmarks.counting import Count, ForwardMeter, OpCounter, count, plain_cost
from benchmarks.peers.raw_hooks import RawHooks
from benchmarks.workload import CASES, Workload

TOLERANCE = 1e-3  # of the largest logit: peers may run another attention kernel

Figures = dict[str, Any]


def _distance(found: Any, right: Any) -> float:
    """Return the largest difference of two results relative to the right one's largest entry."""
    if isinstance(right, list):
        return max(_distance(f, r) for f, r in zip(found, right, strict=True))
    if found.shape != right.shape:
        return float("inf")
    return float((found - right).abs().max() / right.abs().max())


def _cases(adapter: Any) -> dict[str, str]:
    """Return the adapter's cases, each with the case whose result is the right answer."""
    return {**{case: case for case in CASES}, **getattr(adapter, "extra_cases", {})}


def _failure(error: Exception) -> Figures:
    return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}


def operations(kind: type[Any], work: Workload) -> Figures:
    """Return per case the operations beyond the model's own, forwards begun and blocks run, and the result's error.

    `per_site` is the difference between all sites and one site, divided by the sites between; `per_call` is what
    remains for one site: the fixed cost. `average` is everything divided by the number of sites.
    """
    adapter, right = kind(work.own_copy()), RawHooks(work)
    parts = adapter.work.parts
    idle, names = plain_cost(parts, adapter.plain)
    hugging_face, _ = plain_cost(work.parts, right.plain)
    figures: Figures = {"idle": idle.total - hugging_face.total, "plain": hugging_face.total, "cases": {}}
    for case, answer in _cases(adapter).items():
        try:
            every = adapter.prepare(case, adapter.work)
            with torch.no_grad():
                error = _distance(every(), right.prepare(answer, work)())
            one = adapter.prepare(case, adapter.work.at(work.layers[-1:]))
            one()
            figures["cases"][case] = _per_site(
                count(parts, idle, names, every), count(parts, idle, names, one), work, error
            )
        except Exception as failure:  # a peer's failure is a finding about that peer, not about the others
            figures["cases"][case] = _failure(failure)
    figures["cases"]["steer"] = _attempt(lambda: _per_step(adapter, OpCounter, lambda c: {"extra": c.total}))
    return figures


def _attempt(measured: Callable[[], Figures]) -> Figures:
    try:
        return measured()
    except Exception as failure:
        return _failure(failure)


def _per_step(adapter: Any, counter: type[Any], read: Callable[[Any], dict[str, int]]) -> Figures:
    """Return what steering one site adds to a whole generation, per forward pass of it."""
    found: list[dict[str, int]] = []
    for on in (True, False):
        with counter():
            run = adapter.steer(on)
        with torch.no_grad():
            with counter():
                run()
            with counter() as seen:
                run()
        found.append(read(seen))
    steps = adapter.work.new_tokens
    return {f"{name}_per_step": (found[0][name] - found[1][name]) / steps for name in found[0]}


def _per_site(every: Count, one: Count, work: Workload, error: float) -> Figures:
    sites = len(work.layers)
    per_site = (every.extra - one.extra) / (sites - 1)
    return {
        "per_site": per_site,
        "per_call": one.extra - per_site,
        "average": every.extra / sites,
        "forwards": every.forwards,
        "block_share": every.blocks / len(work.parts.blocks),
        "error": error,
        "agrees": error < TOLERANCE,
        **{"extra": every.extra, "extra_one_site": one.extra, "names": every.names},
    }


def host_reads(kind: type[Any], work: Workload) -> Figures:
    """Return per case the host's reads of the device and uploads to it beyond a plain forward's, counted as above.

    Must run in a process of its own: see `benchmarks.pretend`.
    """
    from benchmarks.pretend import HostCounter, Remote, to_pretend

    remote = work.moved(to_pretend, Remote)
    with HostCounter():  # not looked at: it lets set-up allocate on the device
        adapter = kind(remote)

    def counted(run: Callable[[], object]) -> dict[str, int]:
        with torch.no_grad(), HostCounter() as counter, ForwardMeter(adapter.work.parts, counter) as meter:
            run()
        return {"reads": counter.reads.total(), "uploads": counter.uploads.total(), "forwards": meter.passes.embedding}

    figures: Figures = {"cases": {}}
    for case in _cases(adapter):
        try:
            with HostCounter():
                runs = [adapter.prepare(case, remote.at(layers)) for layers in (work.layers, work.layers[-1:])]
            figures["cases"][case] = _reads_per_site(*map(counted, runs), counted(adapter.plain), work)
        except Exception as failure:
            figures["cases"][case] = _failure(failure)
    both = lambda seen: {"reads": seen.reads.total(), "uploads": seen.uploads.total()}  # noqa: E731
    figures["cases"]["steer"] = _attempt(lambda: _per_step(adapter, HostCounter, both))
    return figures


def _reads_per_site(every: dict[str, int], one: dict[str, int], plain: dict[str, int], work: Workload) -> Figures:
    sites = len(work.layers)
    figures: Figures = {}
    for name in ("reads", "uploads"):
        beyond = [run[name] - run["forwards"] * plain[name] for run in (every, one)]
        per_site = (beyond[0] - beyond[1]) / (sites - 1)
        figures[f"{name}_per_site"] = per_site
        figures[f"{name}_per_call"] = beyond[1] - per_site
    return figures


def _clock(run: Callable[[], object], device: str) -> tuple[float, float]:
    if device == "cuda":
        torch.cuda.synchronize()
    wall, busy = time.perf_counter(), time.process_time()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - busy


def interleaved(
    runs: dict[str, Callable[[], object]], *, rounds: int, device: str
) -> dict[str, list[tuple[float, float]]]:
    """Return (wall, processor) seconds of each run in each round; every round times all, in rotating order."""
    names = list(runs)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with torch.no_grad():
        for run in runs.values():
            run()
        for index in range(rounds):
            turn = index % len(names)
            for name in names[turn:] + names[:turn]:
                seconds[name].append(_clock(runs[name], device))
    return seconds


def ratio(over: Sequence[tuple[float, float]], under: Sequence[tuple[float, float]]) -> Figures:
    """Return median and quartiles of the rounds' ratios `over` / `under`, of wall time and of processor time."""
    figures: Figures = {"rounds": len(over)}
    for index, clock in enumerate(("wall", "processor")):
        ratios = [a[index] / b[index] for a, b in zip(over, under, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        figures[clock] = {"median": median, "low": low, "high": high}
    return figures


def times(kind: type[Any], work: Workload, *, rounds: int, device: str) -> Figures:
    """Return interchange and collection over a plain Hugging Face forward, and steered over unsteered generation.

    `steer` is the ratio of tokens per second to the peer's own unsteered generation, so 1 means that steering is free;
    `steer_plain` is the ratio to plain Hugging Face generation.
    """
    # both on a copy: where a model lies in memory alone makes a few per cent
    adapter, plain = kind(work.own_copy()), RawHooks(work.own_copy())
    figures: Figures = {}
    try:
        runs = {
            "plain": plain.plain,
            **{case: adapter.prepare(case, adapter.work) for case in ("swap_last", "collect")},
        }
        seconds = interleaved(runs, rounds=rounds, device=device)
        for case in ("swap_last", "collect"):
            figures[case] = ratio(seconds[case], seconds["plain"])
        figures["forward_seconds"] = seconds
    except Exception as failure:
        figures["swap_last"] = figures["collect"] = _failure(failure)
    try:
        steered, right = adapter.steer(True), plain.steer(True)
        with torch.no_grad():
            agrees = bool(torch.equal(steered(), right()))
        runs = {"plain": plain.steer(False), "unsteered": adapter.steer(False), "steered": steered}
        seconds = interleaved(runs, rounds=rounds, device=device)
        figures["steer"] = {**ratio(seconds["unsteered"], seconds["steered"]), "agrees": agrees}
        figures["steer_plain"] = ratio(seconds["plain"], seconds["steered"])
        figures["generation_seconds"] = seconds
    except Exception as failure:
        figures["steer"] = figures["steer_plain"] = _failure(failure)
    return figures


IMPORT = """
import json, sys, time
import torch
before = len(sys.modules)
start = time.perf_counter()
__import__({module!r})
seconds = time.perf_counter() - start
print("\\n" + json.dumps([seconds, len(sys.modules) - before, "transformers" in sys.modules]))
"""


def import_time(module: str, *, repeats: int = 7) -> Figures:
    """Return what importing `module` adds to `import torch`: seconds (median and all), modules, transformers or not."""
    rows = []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", IMPORT.format(module=module)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return {"failed": done.stderr.strip().splitlines()[-1]}
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    seconds = [row[0] for row in rows]
    return {
        "median": statistics.median(seconds),
        "low": min(seconds),
        "high": max(seconds),
        "modules": rows[0][1],
        "transformers": rows[0][2],
        "seconds": seconds,
    }


def imports(names: Sequence[str]) -> Figures:
    """Return `import_time` for each installed peer."""
    modules = {"hooks": None, "intervene": "intervene"}
    return {
        name: import_time(modules.get(name, name) or name)
        for name in names
        if name != "hooks" and peers.load(name)[0] is not None
    }


def cuda_syncs(kind: type[Any], work: Workload) -> Figures:
    """Return per case how often CUDA itself reports a synchronisation, beyond a plain forward; needs a GPU."""
    import warnings

    adapter = kind(work.own_copy())

    def counted(run: Callable[[], object]) -> int:
        run()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(one.message) for one in caught)

    plain = counted(adapter.plain)
    return {case: {"syncs": counted(adapter.prepare(case, adapter.work)), "plain": plain} for case in _cases(adapter)}
