"""Compares the engine with its peers: counts, times as ratios, import time. Writes JSON and the README's table.

    python -m benchmarks.engine                                  # random GPT-2, 12 layers, all peers that are installed
    python -m benchmarks.engine --model smollm2-135m --rounds 15
    python -m benchmarks.engine --what counts --peers intervene hooks

A peer that cannot be imported is reported as not installed; one that fails, as failed, with its error.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded here; one peer would retry for a minute

import torch

from benchmarks import measure, peers
from benchmarks.tables import tables, update_readme
from benchmarks.workload import Workload, make_model, make_workload

HERE = Path(__file__).parent
NARROW = 64  # counts do not depend on the width of a random model
PARTS = ("counts", "reads", "times", "imports")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", help="gpt2, llama (random), or a name that load_model knows")
    parser.add_argument("--width", type=int, default=768, help="of a random model that is timed")
    parser.add_argument("--layers", type=int, default=12, help="of a random model")
    parser.add_argument("--vocabulary", type=int, default=8192, help="of a random model")
    parser.add_argument("--batch", type=int, default=2, help="examples in a forward")
    parser.add_argument("--length", type=int, default=16, help="tokens in an example")
    parser.add_argument("--prompts", type=int, default=1, help="examples in a generation")
    parser.add_argument("--new_tokens", type=int, default=16, help="tokens generated for each")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of interleaved timing")
    parser.add_argument("--peers", nargs="+", default=list(peers.PEERS), choices=list(peers.PEERS))
    parser.add_argument("--what", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--name", default=None, help="of the file in results/ (default: model and device)")
    parser.add_argument("--keep", action="store_true", help="keep what the file has and is not measured now")
    parser.add_argument("--readme", action="store_true", help="put the tables into benchmarks/README.md")
    parser.add_argument("--reads_only", type=Path, default=None, help=argparse.SUPPRESS)  # the child process's output
    return parser.parse_args(arguments)


def work_of(options: argparse.Namespace, device: str, *, width: int) -> Workload:
    """Return the work these options describe, a random model being `width` wide."""
    model = make_model(options.model, width=width, layers=options.layers, vocabulary=options.vocabulary)
    sizes = {name: getattr(options, name) for name in ("batch", "length", "prompts", "new_tokens")}
    return make_workload(model, device=device, **sizes)


def now() -> str:
    """Return the date and time, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def environment(device: str) -> dict[str, Any]:
    """Return the machine, the versions and the date."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.split(":", 1) for line in info.read_text().splitlines()]
        cpu = next((line[1].strip() for line in lines if line[0].startswith("model name")), cpu)
    return {
        "date": now(),
        "processor": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
        "versions": {name: peers.version(name) for name in ("torch", "transformers")},
    }


def each(options: argparse.Namespace, measured: Callable[[type[Any]], Any]) -> dict[str, Any]:
    """Return `measured` of each peer that is installed, or why there is no figure for it."""
    found: dict[str, Any] = {}
    date = now()
    for name in options.peers:
        kind, reason = peers.load(name)
        if kind is None:
            found[name] = {"status": reason}
            continue
        try:
            found[name] = {"status": "measured", "date": date, **measured(kind)}
        except Exception as error:
            found[name] = {"status": f"failed ({type(error).__name__}: {error})"}
        print(f"  {name}: {found[name]['status']}", file=sys.stderr, flush=True)
    return found


def reads(options: argparse.Namespace) -> dict[str, Any]:
    """Return the host reads, measured in a child process: the pretend device cannot be taken back."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "reads.json"
        sizes = ("model", "width", "layers", "vocabulary", "batch", "length", "prompts", "new_tokens")
        command = [sys.executable, "-m", "benchmarks.engine", "--reads_only", str(out), "--peers", *options.peers]
        for name in sizes:
            command += [f"--{name}", str(getattr(options, name))]
        done = subprocess.run(command, check=False, cwd=HERE.parent, stderr=subprocess.PIPE, text=True)
        if done.returncode:  # torch before 2.10 cannot pretend
            reason = f"failed ({done.stderr.strip().splitlines()[-1]})"
            return {name: {"status": reason} for name in options.peers}
        return dict(json.loads(out.read_text()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the options ask for, write the JSON file, print the tables."""
    warnings.filterwarnings("ignore")  # the peers' own
    options = parse(arguments)
    if options.reads_only is not None:
        from benchmarks.pretend import register

        work = work_of(options, "cpu", width=NARROW)
        register()
        options.reads_only.write_text(json.dumps(each(options, lambda kind: measure.host_reads(kind, work))))
        return
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    versions = {name: peers.load(name)[1] for name in options.peers}
    passing = ("readme", "reads_only", "name", "keep", "peers", "what")
    shape = {key: value for key, value in vars(options).items() if key not in passing}
    name = options.name or f"{options.model}-{device}"
    path = HERE / "results" / f"{name}.json"
    before = json.loads(path.read_text()) if options.keep and path.exists() else {}
    result: dict[str, Any] = {"environment": environment(device), "options": shape, "peers": versions}
    if "counts" in options.what:
        narrow = work_of(options, device, width=NARROW)
        result["counts"] = each(options, lambda kind: measure.operations(kind, narrow))
        if device == "cuda":
            result["cuda_syncs"] = each(options, lambda kind: measure.cuda_syncs(kind, narrow))
    if "reads" in options.what:
        result["reads"] = reads(options)
    if "times" in options.what:
        work = work_of(options, device, width=options.width)
        result["times"] = each(options, lambda kind: measure.times(kind, work, rounds=options.rounds, device=device))
    if "imports" in options.what:
        result["imports"] = measure.imports(options.peers)
    for part, old in before.items():
        if part in ("counts", "cuda_syncs", "reads", "times", "imports", "peers"):
            result[part] = {**old, **result.get(part, {})}  # in the order of the first run
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))
    if options.readme:
        update_readme(HERE / "README.md", name, tables(result))


if __name__ == "__main__":
    main()
