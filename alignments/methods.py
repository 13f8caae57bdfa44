"""Methods as cells of the product table: (site, positions, rank, seed) -> a plan of one intervention."""

from __future__ import annotations

from collections.abc import Callable

from intervene import Identity, Intervention, Plan, Positions, Site, Subspace, Swap

Method = Callable[[Site, Positions, int, int, int], Plan]


def full_vector(site: Site, positions: Positions, width: int, rank: int, seed: int) -> Plan:
    """Swap the whole activation: nothing is learned, and rank and seed do not matter."""
    return (Intervention(site, Swap(), positions, Identity()),)


def das(site: Site, positions: Positions, width: int, rank: int, seed: int) -> Plan:
    """Swap a learned subspace of `rank` dimensions (DAS, Geiger et al. 2023, arXiv 2303.02536)."""
    return (Intervention(site, Swap(), positions, Subspace(width, rank, seed=seed)),)


def random_subspace(site: Site, positions: Positions, width: int, rank: int, seed: int) -> Plan:
    """Swap a random subspace of `rank` dimensions: the control that a learned one has to beat."""
    return (Intervention(site, Swap(), positions, Subspace(width, rank, seed=seed, trainable=False)),)


METHODS: dict[str, Method] = {
    "full_vector": full_vector,
    "das": das,
    "control:random_subspace": random_subspace,
}
LEARNED = frozenset({"das"})
RANKLESS = frozenset({"full_vector"})
