"""Methods that swap the whole activation or a subspace of given rank, and LoReFT, which swaps nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignments.method import OPTIONS, Method, Setup, one_variable
from alignments.natural import check_divergence, natural_penalty
from intervene import Block, Identity, Intervention, LowRankAffine, Plan, Subspace, Swap


def whole(setup: Setup) -> Plan:
    """Return the swap h' = s of the whole activation, whichever variable a pair interchanges.

    What no subspace can beat by more than chance where the variable is all that base and source differ in, and the
    least that a search should be compared with.
    """
    return (Intervention(setup.site, Swap(), setup.positions, Identity()),)


def subspace(setup: Setup, *, trainable: bool, name: str = "das") -> Plan:
    """Return the swap h' = h + QQ^T(s - h), Q an orthonormal frame of `rank` directions; of several variables each has
    `rank` columns of one frame to itself, and its own source.

    Source: DAS, Geiger et al. 2023 (arXiv 2303.02536). We differ: a thin frame in place of a full rotation, which spans
        the same interventions, see `Subspace`; option "frame" chooses the parametrisation, option "divergence" adds the
        pull towards natural activations of arXiv 2511.04638.
    """
    assert setup.rank is not None
    if trainable:
        check_divergence(setup, name)
    rank, count = setup.rank, setup.variables
    one = Subspace(setup.width, rank * count, seed=setup.seed, trainable=trainable, frame=setup.option("frame"))
    if count == 1:
        return (Intervention(setup.site, Swap(), setup.positions, one),)
    blocks = [Block(one, number * rank, (number + 1) * rank) for number in range(count)]
    return tuple(Intervention(setup.site, Swap(), setup.positions, block) for block in blocks)


def isolate_weights(options: Mapping[str, Any]) -> dict[str, float]:
    """Return the weights of the kinds of pairs that MDAS is fitted with: cause 1, isolate the option's."""
    return {"cause": 1.0, "isolate": float(OPTIONS["isolate_weight"].read(options))}


def loreft(setup: Setup) -> Plan:
    """Return the edit h' = h + Q(Wh + b - Q^T h), which reads no source: it learns the labels, not a variable.

    No interchange, and its score no evidence that a variable is there: it tells what a low-rank edit can do to the
    answer without looking at the source, next to what the methods above do with it.

    Source: LoReFT, Wu et al. 2024 (arXiv 2404.03592), see `LowRankAffine`.
    """
    one_variable(setup, "loreft")
    assert setup.rank is not None
    edit = LowRankAffine(setup.width, setup.rank, seed=setup.seed)
    return (Intervention(setup.site, edit, setup.positions, Identity()),)


FULL_VECTOR = Method("full_vector", "full vector", whole, learned=False, ranked=False, seeded=False)
DAS = Method("das", "DAS", lambda setup: subspace(setup, trainable=True), penalty=natural_penalty)
# MDAS, RAVEL, Huang et al. 2024 (arXiv 2402.17700): DAS whose loss is CE over cause pairs + weight * CE over isolate
# pairs. We differ: theirs weighs them by how many of each are drawn; ours by rows repeated to the ratio of the weights.
# Their sum is divided by 1 + weight, which AdamW without weight decay does not notice.
MDAS = Method(
    "mdas",
    "MDAS",
    lambda setup: subspace(setup, trainable=True, name="mdas"),
    penalty=natural_penalty,
    train_kinds=None,
    kind_weights=isolate_weights,
    needs="cause and isolate pairs, else it is das",
)
RANDOM = Method(
    "control:random_subspace", "random subspace", lambda setup: subspace(setup, trainable=False), learned=False
)
LOREFT = Method("loreft", "LoReFT (no interchange)", loreft, interchange=False)
