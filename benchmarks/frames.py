"""Times a swap through each orthonormal frame, forward and backward, beside torch's own parametrisation.

    OMP_NUM_THREADS=1 python -m benchmarks.frames
    python -m benchmarks.frames --widths 4096 --reference_width 1536      # what costs D^3 is left out beyond

The work is one step of DAS without its model: the frame, a swap of 64 activations through it, and the gradient of the
weight. Ratios are to torch.nn.utils.parametrizations.orthogonal with matrix_exp in the same process, whose cost does
not depend on the rank (it pads to D x D), so that wide ones are timed at one rank only. Writes results/frames.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.engine import HERE, environment
from intervene import Subspace
from intervene.frames import FRAMES

ROWS = 64  # activations in the batch
SQUARE = 256  # a full rotation, timed besides
ONCE = 300  # from this width on, what costs D^3 is timed once

Figures = dict[str, Any]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 576, 768, 1536])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--rounds", type=int, default=7, help="rounds of interleaved timing; medians are written")
    parser.add_argument("--reference_width", type=int, default=1536, help="widest for which what costs D^3 is run")
    parser.add_argument("--name", default="frames", help="of the file in results/")
    return parser.parse_args(arguments)


def torchs(width: int, rank: int) -> Callable[[], Tensor]:
    """Return torch's frame (D, K) as a function that evaluates it, by matrix_exp."""
    linear = nn.Linear(rank, width, bias=False)
    nn.init.orthogonal_(linear.weight)
    torch.nn.utils.parametrizations.orthogonal(linear, orthogonal_map="matrix_exp")
    for weight in linear.parameters():
        moved(weight)
    return lambda: linear.weight


def ours(name: str, width: int, rank: int) -> Callable[[], Tensor]:
    """Return our frame `name` (D, K) as a function that evaluates it."""
    lens = Subspace(width, rank, frame=name)
    moved(lens.weight)
    return lens.frame


def moved(weight: Tensor) -> None:
    """Move a weight off its start, as steps of a fit do: of zero, matrix_exp is cheap."""
    with torch.no_grad():
        weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) / len(weight) ** 0.5


def step(frame: Callable[[], Tensor], width: int) -> Callable[[], None]:
    """Return one forward and backward of a swap of (ROWS, D) activations through `frame`."""
    generator = torch.Generator().manual_seed(0)
    h, source = (torch.randn(ROWS, width, generator=generator) for _ in range(2))

    def run() -> None:
        q = frame()
        (h + (source - h) @ q @ q.mT).square().mean().backward()  # type: ignore[no-untyped-call]

    return run


def timed(runs: dict[str, Callable[[], None]], *, rounds: int) -> dict[str, float]:
    """Return the median wall milliseconds of each run; every round times all of them, in rotating order."""
    names = list(runs)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for run in runs.values():  # the first time pays for memory and code that is loaded late
        run()
    for index in range(rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            begin = time.perf_counter()
            runs[name]()
            taken[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(each) for name, each in taken.items()}


def measured(options: argparse.Namespace) -> list[Figures]:
    """Return one row for each width and rank: milliseconds and ratios by frame."""
    rows = []
    for width, ranks in [*((width, options.ranks) for width in options.widths), (SQUARE, [SQUARE])]:
        costly: dict[str, float] = {}
        for rank in (rank for rank in ranks if rank <= width):
            runs = {
                name: step(ours(name, width, rank), width)
                for name in FRAMES
                if name != "matrix_exp" or width <= options.reference_width
            }
            if width <= options.reference_width:
                runs["torch"] = step(torchs(width, rank), width)
            dear: dict[str, Callable[[], None]] = {
                name: runs.pop(name) for name in ("matrix_exp", "torch") if name in runs and width >= ONCE
            }
            milliseconds = timed(runs, rounds=options.rounds)
            if dear and not costly:
                costly = {**timed(dear, rounds=1), "rank": rank}
            milliseconds |= {name: value for name, value in costly.items() if name != "rank"}
            reference = milliseconds.get("torch")
            ratios = {name: value / reference for name, value in milliseconds.items()} if reference else {}
            rows.append(
                {"width": width, "rank": rank, "milliseconds": milliseconds, "ratios": ratios}
                | ({"costly_at_rank": int(costly["rank"])} if costly else {})
            )
    return rows


def table(rows: Sequence[Figures]) -> str:
    """Return the rows as a Markdown table: milliseconds, and how many times faster than torch's."""
    names = [*FRAMES, "torch"]
    lines = ["| D x K | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for row in rows:
        cells = []
        for name in names:
            value, ratio = row["milliseconds"].get(name), row["ratios"].get(name)
            times = "" if ratio is None or name == "torch" else f" ({1 / ratio:.{0 if ratio < 0.1 else 1}f}x)"
            cells.append("not run" if value is None else f"{value:.2f}{times}")
        lines.append(f"| {row['width']} x {row['rank']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the JSON file, print the table."""
    options = parse(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {key: value for key, value in vars(options).items() if key != "name"}
    rows = measured(options)
    result = {"environment": environment("cpu"), "options": shape, "rows": rows}
    path = HERE / "results" / f"{options.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
