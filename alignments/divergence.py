"""How far patched activations are from natural ones, and a penalty that keeps them near.

    divergence_facts(natural, patched)       # {"divergence": ..., "divergence_natural": ..., ...}
    target = counterfactual_targets(counterfactual_means(acts, values), wanted)      # (B, D)
    loss = loss + epsilon * divergence_penalty(patched, target)

A swap may write vectors that the model never makes by itself; what it then does is no evidence of what it does. Every
distance is told next to the same distance between two halves of the natural set, which is what nothing at all gives.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Distance = Callable[[Tensor, Tensor], float]


def energy_distance(a: Any, b: Any, *, unbiased: bool = True, chunk: int = 1024) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'| of two sets of vectors (Euclidean), 0 for equal distributions.

    Unbiased leaves each vector's distance to itself out, so that sets of any size are comparable; two sets of one
    distribution then give values around 0, some negative. Shapes: (N, D), (M, D). `chunk` bounds memory at chunk x M.

    Raises:
        ValueError: the shapes do not fit, or a set is too small.
    Source: Szekely & Rizzo 2013. scipy's `energy_distance` is the square root of the biased form in one dimension.
    """
    first, second = _checked(a, b, least=2 if unbiased else 1)
    n, m = len(first), len(second)
    across = _distance_sum(first, second, chunk) / (n * m)
    within = [
        _distance_sum(one, one, chunk) / (len(one) * (len(one) - 1 if unbiased else len(one)))
        for one in (first, second)
    ]
    return 2 * across - within[0] - within[1]


def sliced_wasserstein(a: Any, b: Any, *, projections: int = 128, seed: int = 0, order: float = 1.0) -> float:
    """Return the Wasserstein (earth mover's) distance averaged over random directions, which `seed` fixes.

    (mean over directions u of W_p(a u, b u)^p)^(1/p), each W exact, for sets of unequal size too. It is never negative
    and has a positive bias in small sets: compare sets of one size only. In one dimension there is one direction, and
    the distance is exact. Shapes: (N, D), (M, D).

    Raises:
        ValueError: the shapes do not fit, no projections, or an order below 1.
    Source: Bonneel et al. 2015, J. Math. Imaging Vis. 51:22-45.
    """
    first, second = _checked(a, b)
    if projections < 1 or order < 1:
        raise ValueError(f"Sliced Wasserstein of {projections} projections, order {order}: both must be at least 1.")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(first.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = functional.normalize(directions, dim=0).to(first.device)  # (D, R)
    left = (first @ directions).sort(dim=0).values  # (N, R)
    right = (second @ directions).sort(dim=0).values  # (M, R)
    n, m = len(left), len(right)
    # Both quantile functions are constant between these levels, counted in whole units of 1 / (n m).
    ends = torch.unique(torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]))
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    gaps = (left[starts // m] - right[starts // n]).abs() ** order  # (E, R)
    weights = ((ends - starts).double() / (n * m)).to(gaps.device)
    return float((weights[:, None] * gaps).sum(dim=0).mean() ** (1 / order))


def mahalanobis_ratio(natural: Any, patched: Any, *, shrinkage: float = 0.1, seed: int = 0) -> float:
    """Return how much farther from the natural mean patched vectors lie than natural ones, in natural units.

    Mean squared Mahalanobis distance of `patched` over that of natural vectors: about 1 if alike, large if off the
    natural directions. Mean and covariance come from one random half of `natural` and the yardstick from the other,
    because vectors lie too near to a covariance they were fitted with. The covariance is shrunk towards its mean
    variance, (1 - s) C + s tr(C)/D I, so that fewer vectors than dimensions are enough. Shapes: (N, D), (M, D); if M is
    N, patched vector i is taken to be made of natural vector i, and those of the first half are left out.

    Raises:
        ValueError: the shapes do not fit, fewer than 4 natural vectors, a shrinkage outside 0..1, no variance.
    """
    known, other = _checked(natural, patched)
    if len(known) < 4 or not 0 < shrinkage <= 1:
        raise ValueError(
            f"Mahalanobis ratio of {len(known)} natural vectors, shrinkage {shrinkage}: needs at least 4, 0 < s <= 1."
        )
    fitted, held = _halves(known, seed)
    other = _apart(other, len(known), seed)
    mean = fitted.mean(dim=0)
    covariance = (fitted - mean).T @ (fitted - mean) / (len(fitted) - 1)  # (D, D)
    level = covariance.diagonal().mean()
    if float(level) == 0:
        raise ValueError("Mahalanobis ratio: the natural vectors are all alike, so they have no unit of distance.")
    shrunk = (1 - shrinkage) * covariance + shrinkage * level * torch.eye(len(mean), dtype=level.dtype).to(level.device)
    factor = torch.linalg.cholesky(shrunk)

    def squared(vectors: Tensor) -> float:
        white = torch.linalg.solve_triangular(factor, (vectors - mean).T, upper=False)  # (D, N)
        return float((white**2).sum(dim=0).mean())

    return squared(other) / squared(held)


def natural_baseline(natural: Any, distance: Distance = energy_distance, *, seed: int = 0) -> float:
    """Return `distance` between two random halves of the natural set: the yardstick for a patched set of that size.

    Raises:
        ValueError: fewer than 4 vectors.
    """
    (vectors,) = _as_sets(natural)
    if len(vectors) < 4:
        raise ValueError(f"Natural baseline of {len(vectors)} vectors: two halves of at least 2 are needed. Give more.")
    return distance(*_halves(vectors, seed))


def divergence_facts(natural: Any, patched: Any, *, seed: int = 0) -> dict[str, float]:
    """Return the distances of a patched set as numbers for a row: "divergence" and "divergence_natural", and more.

    One random half of `natural` is the reference. "divergence" is the energy distance of `patched` to it,
    "divergence_natural" that of the other half; with "_sliced" they are sliced Wasserstein distances, of patched
    vectors drawn to the other half's size; "divergence_mahalanobis" is `mahalanobis_ratio`, left out where the natural
    vectors are all alike. Shapes: (N, D), (M, D); if M is N, patched vector i is taken to be made of natural
    vector i, and those made of the reference are left out.

    Raises:
        ValueError: the shapes do not fit, or fewer than 4 natural or 2 patched vectors.
    """
    known, other = _checked(natural, patched, least=2)
    if len(known) < 4:
        raise ValueError(f"Divergence from {len(known)} natural vectors: at least 4 are needed. Give more.")
    reference, held = _halves(known, seed)
    patched, other = other, _apart(other, len(known), seed)
    order = torch.randperm(len(other), generator=torch.Generator().manual_seed(seed))
    drawn = other[order[: len(held)].to(other.device)]
    held = held[: len(drawn)]
    found = {
        "divergence": energy_distance(reference, other),
        "divergence_natural": natural_baseline(known, seed=seed),
        "divergence_sliced": sliced_wasserstein(reference, drawn, seed=seed),
        "divergence_sliced_natural": sliced_wasserstein(reference, held, seed=seed),
    }
    if bool((reference != reference[0]).any()):  # else natural vectors have no unit of distance
        found["divergence_mahalanobis"] = mahalanobis_ratio(known, patched, seed=seed)
    return found


def counterfactual_means(activations: Tensor, values: Sequence[Hashable]) -> dict[Hashable, Tensor]:
    """Return value -> mean (D,) of the natural activations (N, D) that have it, in order of first appearance.

    `values` has one entry per activation: the searched variable's value there, or a tuple of all variables' values.

    Raises:
        ValueError: not one value per activation, or none.
    """
    if activations.ndim != 2 or len(activations) != len(values) or not len(values):
        raise ValueError(
            f"Counterfactual means: {tuple(activations.shape)} activations, {len(values)} values. Give (N, D)."
        )
    rows: dict[Hashable, list[int]] = {}
    for index, value in enumerate(values):
        rows.setdefault(value, []).append(index)
    return {value: activations[torch.tensor(own, device=activations.device)].mean(dim=0) for value, own in rows.items()}


def counterfactual_targets(means: Mapping[Hashable, Tensor], values: Sequence[Hashable]) -> Tensor:
    """Return the mean of each wanted value, (B, D): what `divergence_penalty` pulls towards.

    Raises:
        ValueError: a value was never seen among the natural activations.
    """
    unseen = sorted({str(value) for value in values if value not in means})
    if unseen:
        raise ValueError(
            f"Counterfactual targets: no natural activation has {', '.join(unseen)}; there are "
            f"{', '.join(map(str, means))}. Take the means over more examples."
        )
    return torch.stack([means[value] for value in values])


def divergence_penalty(patched: Tensor, target: Tensor) -> Tensor:
    """Return the mean over B of 1/2 |h' - h|^2 - 1/2 cos(h', h), 0-d and differentiable in `patched`.

    Shapes: (B, D) both; the target takes no gradient. Its least value is -1/2, at h' = h. The paper weighs it by an
    epsilon of its own and adds it to the loss of the fit.

    Raises:
        ValueError: the shapes differ.
    Source: the counterfactual latent loss of arXiv 2511.04638, whose target is `counterfactual_targets`.
    """
    if patched.shape != target.shape or patched.ndim != 2:
        raise ValueError(
            f"Divergence penalty: {tuple(patched.shape)} against {tuple(target.shape)}. Give (B, D) twice."
        )
    fixed = target.detach().to(patched)
    squares = (patched - fixed).square().sum(dim=1)
    return (squares - functional.cosine_similarity(patched, fixed, dim=1)).mean() / 2


def _halves(vectors: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed)).to(vectors.device)
    return vectors[order[: len(order) // 2]], vectors[order[len(order) // 2 :]]


def _apart(patched: Tensor, n: int, seed: int) -> Tensor:
    """Return the patched vectors that were not made of `_halves`' first half: near their own origin by making."""
    return _halves(patched, seed)[1] if len(patched) == n else patched


def _distance_sum(a: Tensor, b: Tensor, chunk: int) -> float:
    # Not by matrix products: they cancel, and near vectors are what this is about.
    parts = torch.split(a, max(1, chunk))
    sums = [torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist").sum() for part in parts]
    return float(torch.stack(sums).sum())


def _as_sets(*given: Any) -> list[Tensor]:
    sets = [torch.as_tensor(one).detach().double() for one in given]
    for one in sets:
        if one.ndim != 2 or not one.numel() or not bool(one.isfinite().all()):
            raise ValueError(f"Divergence: a set of shape {tuple(one.shape)}. Give finite vectors as (N, D).")
    return sets


def _checked(a: Any, b: Any, least: int = 1) -> tuple[Tensor, Tensor]:
    first, second = _as_sets(a, b)
    if first.shape[1] != second.shape[1] or min(len(first), len(second)) < least:
        raise ValueError(
            f"Divergence of {tuple(first.shape)} from {tuple(second.shape)}: both need the same width and at least "
            f"{least} vectors."
        )
    return first, second
