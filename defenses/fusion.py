"""Several traits at once: one direction that stands for all, or orthogonal ones that keep every trait's dose apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from defenses.errors import VectorError
from defenses.plans import Directions

Mode = Literal["norm_aligned", "mean", "subspace"]

OPPOSING = -0.5  # cosine of two directions below which their mean stands for neither
COHERENCE = 0.2  # |sum of vectors| / sum of norms: 1 if all agree, 1/sqrt(K) if orthogonal and equally long
INDEPENDENCE = 0.1  # smallest singular value of the unit vectors that are to be kept apart: for two, a cosine of .99


def fuse(directions: Sequence[Directions], mode: Mode = "norm_aligned") -> tuple[Directions, ...]:
    """Return what to inject for all of `directions`: one for the first two modes, as many as given for "subspace".

    Per layer, of v_1 ... v_K:
        "norm_aligned": u/|u| * mean |v_k| with u = mean v_k. Of the raw vectors, so a longer one weighs more.
        "mean": mean v_k. Of orthogonal vectors it is shorter, by 1/sqrt(K).
        "subspace": each v_k moved to the nearest orthonormal set, U (U^T U)^(-1/2) of the unit vectors U (Loewdin's
            symmetric orthogonalisation, in which no trait comes first), with its own length again. A dose of one is
            then no dose of another. `facts["cosine"]` says per layer how far each moved.
    One direction is returned unchanged in every mode.

    Raises:
        VectorError: none; other layers, widths, components or models; in the first two modes two of them with a cosine
            below -0.5 or a sum below 0.2 of the sum of norms, which would be noise at full strength; in "subspace"
            unit vectors with a singular value below 0.1.

    Source: the first two are the modes 0 and 1 of the PIS code (Guan et al. 2026), which accept opposing vectors;
        Loewdin 1950 for the third.
    """
    if mode not in get_args(Mode):
        raise VectorError(f"Fusion {mode!r}: there is none. Use one of {', '.join(get_args(Mode))}.")
    given = list(directions)
    _check_alike(given)
    if len(given) == 1:
        return (given[0],)
    made: list[dict[int, Tensor]] = [{} for _ in (given if mode == "subspace" else given[:1])]
    cosines: list[dict[str, float]] = [{} for _ in made]
    for layer in given[0].layers:
        every = torch.stack([one.at(layer) for one in given]).double()  # (K, D)
        vectors = _apart(every, layer) if mode == "subspace" else _averaged(every, layer, mode)[None]
        for number, vector in enumerate(vectors):
            made[number][layer] = vector.float()
            like = every[number] if mode == "subspace" else every.mean(0)
            cosines[number][str(layer)] = float(torch.cosine_similarity(vector, like, dim=0))
    return tuple(_described(given, number, vectors, mode, cosines[number]) for number, vectors in enumerate(made))


def _described(
    given: Sequence[Directions], number: int, vectors: dict[int, Tensor], mode: Mode, cosines: dict[str, float]
) -> Directions:
    known = next((one for one in given if one.fingerprint), given[0])
    own = dict(given[number].facts) if mode == "subspace" else {"of": [dict(one.facts) for one in given]}
    facts = {**own, "fusion": mode, "fused": len(given), **({"cosine": cosines} if mode == "subspace" else {})}
    return replace(given[0], vectors=vectors, fingerprint=known.fingerprint, model=known.model, facts=facts)


def _check_alike(given: Sequence[Directions]) -> None:
    if not given:
        raise VectorError("Fusion of no directions: nothing to fuse. Give at least one.")
    for name in ("layers", "width", "component"):
        found = [getattr(one, name) for one in given]
        if len(set(found)) > 1:
            raise VectorError(f"Fusion: {name} are {', '.join(map(str, found))}. Give directions of the same {name}.")
    models = {one.fingerprint: one.model or "(unnamed)" for one in given if one.fingerprint}
    if len(models) > 1:
        named = ", ".join(f"{model} ({fingerprint})" for fingerprint, model in models.items())
        raise VectorError(f"Fusion: directions of the models {named}. Extract all from one model.")


def _averaged(every: Tensor, layer: int, mode: Mode) -> Tensor:
    """Return one (D,) for `every` (K, D), refusing those that cancel."""
    norms = every.norm(dim=1)
    unit = every / norms[:, None]
    cosines = unit @ unit.T + 2 * torch.eye(len(every)).to(every)  # (K, K), the diagonal out of the way
    lowest = int(cosines.argmin())
    coherence = float(every.sum(0).norm() / norms.sum())
    if float(cosines.min()) < OPPOSING or coherence < COHERENCE:
        first, second = sorted(divmod(lowest, len(every)))
        raise VectorError(
            f"Fusion at layer {layer}: opposing directions, the cosine of number {first + 1} and {second + 1} is "
            f"{float(cosines.min()):.2f} (bound {OPPOSING}) and their sum is {coherence:.2f} of their norms (bound "
            f"{COHERENCE}), so a mean would stand for none. Turn one around if its sign is wrong, or use 'subspace'."
        )
    mean = every.mean(0)
    return mean / mean.norm() * norms.mean() if mode == "norm_aligned" else mean


def _apart(every: Tensor, layer: int) -> Tensor:
    """Return (K, D): orthogonal rows nearest to those of `every`, with their norms."""
    norms = every.norm(dim=1, keepdim=True)
    left, values, right = torch.linalg.svd(every / norms, full_matrices=False)  # (K, K), (K,), (K, D)
    if len(every) > every.shape[1] or float(values[-1]) < INDEPENDENCE:
        raise VectorError(
            f"Fusion at layer {layer}: {len(every)} directions that cannot be kept apart, the smallest singular value "
            f"of their unit vectors is {float(values[-1]):.3f} (bound {INDEPENDENCE}). Leave one out, or use 'mean'."
        )
    apart: Tensor = (left @ right) * norms
    return apart
