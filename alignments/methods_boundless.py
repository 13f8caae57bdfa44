"""Methods that learn how many dimensions they swap: Boundless DAS, corrected and as published."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from alignments.method import Method, Setup, numbered
from alignments.natural import check_divergence, natural_penalty
from alignments.schedules import geometric
from intervene import Block, FaithfulBoundarySwap, Featurizer, Intervention, Plan, SecondBoundarySwap, Subspace
from intervene.boundless import boundless_temperature
from intervene.errors import InterveneError, ShapeMismatch
from intervene.gates import BoundarySwap

K_MAX = 64  # columns of the frame unless options say otherwise
FIRST_TEMPERATURE = 0.1  # in units of the columns: the edge is soft over about half of them
LAST_TEMPERATURE = 0.1  # in columns: the edge is hard but for the column it is at
PENALTY, FAITHFUL_PENALTY = 0.1, 1.0


def boundless(setup: Setup) -> Plan:
    """Return the swap of the first b columns of a learned frame, b learned too; what was published, with faults mended:

        h' = h + Q diag(g) Q^T (s - h),   g_i = sigmoid((b - (i + 1/2)) / T),   loss = CE + penalty * b / K

    Q is D x K with K = "k_max" (the width, at most 64), divided evenly between several variables; b = fraction * K
    starts at "init_fraction" (0.5). T goes from 0.1 K to 0.1 in equal factors. Scored hard: round(b) columns swapped.

    Source: Boundless DAS, Wu et al. 2023 (arXiv 2305.08809). We differ: the half index (their column 0 keeps gate 1/2),
        T in proportion to K instead of 50 at any width, hard scores, K columns instead of a full rotation, a clamp that
        lets an overshot boundary back, a lighter penalty, and for several variables blocks with a boundary each.
    """
    check_divergence(setup, "boundless")
    asked = setup.option("k_max")
    total = min(setup.width, K_MAX) if asked is None else asked
    if total > setup.width or total < setup.variables:
        raise ShapeMismatch(
            f"Boundless of k_max {total} for {setup.variables} variables in width {setup.width}: it must be at least "
            "the first and at most the second. Leave the option out."
        )
    each = total // setup.variables
    start = setup.option("init_fraction")
    frame = Subspace(setup.width, each * setup.variables, seed=setup.seed, frame=setup.option("frame"))
    plan = []
    for number in range(setup.variables):
        edit = BoundarySwap(each, fraction=0.5 if start is None else start, temperature=FIRST_TEMPERATURE)
        keep_start(edit)
        one: Featurizer = frame if setup.variables == 1 else Block(frame, number * each, (number + 1) * each)
        plan.append(Intervention(setup.site, edit, setup.positions, one))
    return tuple(plan)


def faithful(setup: Setup) -> Plan:
    """Return Boundless DAS as published, to compare with: a full D x D frame, and the gates

        g_i = sigmoid(i / T) sigmoid((b - i) / T),   b = clamp(theta, 0.001, 1) D,   loss = CE + 1.0 theta

    with T linear from 50 to 0.1, in columns, and theta learning 10 times as fast as the frame. Two variables share the
    boundary: columns 0 to b and b to 2b, b = clamp(theta, 0.001, 1) floor(D / 2). Scored hard like every method here;
    published scores are soft: option "soft_eval" gives them, or `softly` of a fitted plan.

    Source: Wu et al. 2023 (arXiv 2305.08809), see `FaithfulBoundarySwap`. We differ: the rotation is a square QR frame
        by default, which costs far less than their matrix exponential (option "frame": "matrix_exp" is theirs) and
        starts elsewhere; T is not rounded to bf16; every batch counts.
    """
    check_divergence(setup, "boundless_faithful")
    if setup.variables > 2:
        raise InterveneError(
            f"Method boundless_faithful: {setup.variables} variables were asked, it was published for 1 and 2. "
            "Use boundless."
        )
    start = setup.option("init_fraction")
    if start is None:
        start = 0.5 if setup.variables == 1 else 1.0  # as released: half of the columns for each, either way
    rotation = Subspace(setup.width, setup.width, seed=setup.seed, frame=setup.option("frame"))
    hard = not setup.option("soft_eval")
    first = FaithfulBoundarySwap(setup.width, variables=setup.variables, fraction=start, hard_eval=hard)
    keep_start(first)
    plan = [Intervention(setup.site, first, setup.positions, rotation)]
    if setup.variables == 2:
        plan.append(Intervention(setup.site, SecondBoundarySwap(first), setup.positions, rotation))
    return tuple(plan)


def softly(plan: Plan) -> Plan:
    """Return a copy of a fitted `boundless_faithful` plan that is scored with its soft mask, as published.

    Raises:
        InterveneError: it is no such plan.
    """
    made = copy.deepcopy(tuple(plan))
    edits = [item.edit for item in made if isinstance(item.edit, FaithfulBoundarySwap)]
    if not edits:
        raise InterveneError("Soft scores: the plan has no FaithfulBoundarySwap. Give one of boundless_faithful.")
    for edit in edits:
        edit.hard_eval = False
    return made


def keep_start(edit: BoundarySwap | FaithfulBoundarySwap) -> None:
    """Let `edit` remember the boundary it starts from, for the facts; it is not stored with the plan."""
    vars(edit)["started"] = float(edit.boundary().detach())  # no buffer: those are stored


def _boundaries(plan: Plan) -> Iterator[BoundarySwap | FaithfulBoundarySwap]:
    for item in plan:
        if isinstance(item.edit, BoundarySwap | FaithfulBoundarySwap):
            yield item.edit


def boundary_facts(plan: Plan) -> dict[str, float]:
    """Return for each boundary: hard_rank, the columns swapped when scored hard; boundary, the learned edge in columns;
    initial_rank, where it started; soft_rank, the sum of the soft gates at the last temperature.

    A boundary that is still where it started tells of the start, not of the model: fit from others too.
    """
    edits = list(_boundaries(plan))
    with torch.no_grad():
        told = {
            "hard_rank": [float(edit.size()) for edit in edits],
            "boundary": [float(edit.boundary()) for edit in edits],
            "soft_rank": [float(edit.soft().sum()) for edit in edits],
        }
    if all("started" in vars(edit) for edit in edits):  # a stored plan has forgotten
        told["initial_rank"] = [float(round(vars(edit)["started"])) for edit in edits]
    return {key: value for name, values in told.items() for key, value in numbered(name, values).items()}


def _penalty(default: float) -> Callable[[Plan, Setup], Tensor]:
    def penalty(plan: Plan, setup: Setup) -> Tensor:
        asked = setup.option("penalty")
        shares = torch.stack([edit.penalty() for edit in _boundaries(plan)])
        return (default if asked is None else asked) * shares.mean() + natural_penalty(plan, setup).to(shares)

    return penalty


def _anneal(plan: Plan, progress: float) -> None:
    for edit in _boundaries(plan):
        edit.temperature = geometric(progress, FIRST_TEMPERATURE, min(FIRST_TEMPERATURE, LAST_TEMPERATURE / edit.count))


def _anneal_faithful(plan: Plan, progress: float) -> None:
    for edit in _boundaries(plan):
        edit.temperature = boundless_temperature(progress)


BOUNDLESS = Method(
    "boundless",
    "Boundless DAS (corrected)",
    boundless,
    ranked=False,
    penalty=_penalty(PENALTY),
    anneal=_anneal,
    rates={"fraction": 3.0},
    facts=boundary_facts,
)
FAITHFUL = Method(
    "boundless_faithful",
    "Boundless DAS (as published)",
    faithful,
    ranked=False,
    penalty=_penalty(FAITHFUL_PENALTY),
    anneal=_anneal_faithful,
    rates={"fraction": 10.0},
    facts=boundary_facts,
    needs="time: a square frame of the site's width",
)
