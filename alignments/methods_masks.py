"""Methods that learn which features of a fixed basis to swap: neurons, heads, principal components, SAE latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from alignments.method import Method, Setup, numbered
from alignments.schedules import linear
from intervene import PCA, SAE, BudgetSwap, Featurizer, GatedSwap, HardConcreteSwap, Identity, Intervention, Plan, Site
from intervene import Subspace as Directions
from intervene.columns import n_heads
from intervene.errors import InterveneError, asked_found_do
from intervene.families import locate
from intervene.gates import Gated

HEAD_SITES = ("attention_value_output", "head_attention_value_output")
FIRST_TEMPERATURE, LAST_TEMPERATURE = 1.0, 0.01
DECISIVE = 0.1  # a gate within this of 0 or 1 is decided


def masked(setup: Setup, featurizer: Featurizer, count: int, name: str, groups: Tensor | None = None) -> Plan:
    """Return the swap of learned features of a fixed basis, with gates g of each variable's own:

        z = F(h),   z' = (1 - g) z + g F(s),   h' = F^-1(z'),   loss = CE + sparsity * mean(g)

    Option "gate": "sigmoid", g = sigmoid(m / T) with T linear from 1 to 0.01 over the first half of the fit, then
    constant; "hard_concrete", sampled gates that are often exactly 0 or 1, with the probability of a gate that is not
    0 as penalty; "top_k", exactly "budget" gates, no penalty, T as for the first. Gates start at 1/2 and are scored
    hard. `groups` (K,) makes features share a gate.

    Source: binary masks as in De Cao et al. 2022 and Davies et al. 2023 (arXiv 2307.03637), hard concrete gates of
        Louizos et al. 2018 (arXiv 1712.01312). We differ: the L1 penalty is a mean over features, so that one weight
        means the same at any width; MIB (arXiv 2504.13151), for one, fits without any.
    """
    kind, budget = setup.option("gate"), setup.option("budget")
    if kind == "top_k" and budget is None:
        do = "Give the number of open gates: budget: 4."
        raise InterveneError(asked_found_do(f"Method {name} with option gate top_k", "no budget was given.", do))

    def edit(number: int) -> Gated:
        if kind == "top_k":
            return BudgetSwap(count, budget, temperature=FIRST_TEMPERATURE, groups=groups)
        if kind == "hard_concrete":
            return HardConcreteSwap(count, seed=setup.seed * setup.variables + number, groups=groups)
        return GatedSwap(count, temperature=FIRST_TEMPERATURE, groups=groups)

    return tuple(
        Intervention(setup.site, edit(number), setup.positions, featurizer) for number in range(setup.variables)
    )


def neurons(setup: Setup) -> Plan:
    """Return masks on the site's own coordinates, F(h) = h: is the variable in some of the neurons?"""
    return masked(setup, Identity(), setup.width, "mask_neurons")


def heads(setup: Setup) -> Plan:
    """Return masks on the heads' outputs before the output projection, one gate per head: which heads hold it?

    Raises:
        InterveneError: the site is not all heads' (or chosen heads') outputs, or the pairs know no model.
    """
    site = setup.site
    if site.component not in HEAD_SITES or (site.component == HEAD_SITES[0] and site.units is not None):
        do = f"Use {site_like(site, HEAD_SITES[0])}, or other masks there."
        raise InterveneError(asked_found_do("Method mask_heads", f"{site} is not made of heads.", do))
    model = getattr(setup.pairs("mask_heads"), "model", None)
    if model is None:
        raise InterveneError("Method mask_heads: the pairs do not know their model. Use LanguagePairs.")
    count = n_heads(locate(model), kv=False) if site.units is None else len(site.units)
    assert setup.width % count == 0, "each head is equally wide"
    groups = torch.arange(setup.width) // (setup.width // count)
    return masked(setup, Identity(), setup.width, "mask_heads", groups)


def site_like(site: Site, component: str) -> str:
    """Return the text of a component in the layer of `site`."""
    return component if site.layer is None else f"L{site.layer}.{component}"


def train_activations(setup: Setup, method: str) -> Tensor:
    """Return (N * P, D): the activations of bases, then of sources, each token for itself."""
    base, source = setup.pairs(method).activations(setup.site, setup.positions)
    return torch.cat([base, source]).flatten(0, 1)


def principal(setup: Setup) -> Plan:
    """Return masks on principal components of the training pairs' activations, F(h) = (h - mean)Q.

    Option "components" keeps the first ones; else min(N - 1, D) of N activations. They are those of the raw
    covariance. (MIB standardises each neuron for the fit and then applies the directions to raw activations.)
    """
    acts = train_activations(setup, "mask_pca")
    most = min(len(acts) - 1, setup.width)
    wanted = setup.option("components")
    lens = PCA.fit(acts, most if wanted is None else min(wanted, most))
    return masked(setup, lens, lens.features(setup.width), "mask_pca")


def singular(setup: Setup) -> Plan:
    """Return masks on right singular vectors of the training pairs' activations, not centred: F(h) = hQ.

    Option "components" keeps the first ones; else min(N, D). The first is close to the mean activation's direction.
    """
    acts = train_activations(setup, "mask_svd").double()
    wanted = setup.option("components")
    rows = torch.linalg.svd(acts, full_matrices=False).Vh[:wanted]  # (K, D)
    lens = Directions.from_frame(rows.mT.float())
    return masked(setup, lens, lens.rank, "mask_svd")


def latents(setup: Setup) -> Plan:
    """Return masks on the latents of a given sparse autoencoder, option "sae"; what it does not rebuild stays."""
    path = setup.option("sae")
    if path is None:
        do = "Name its file: sae: path/to/sae.safetensors."
        raise InterveneError(asked_found_do("Method mask_sae", "no sparse autoencoder was given.", do))
    lens = load_sae(Path(path), centred=setup.option("sae_centred"))
    if lens.width != setup.width:
        raise InterveneError(
            f"Method mask_sae: {path} is for width {lens.width}, {setup.site} is {setup.width} wide. Use its own SAE."
        )
    return masked(setup, lens, lens.features(setup.width), "mask_sae")


def load_sae(path: Path, *, centred: bool = False) -> SAE:
    """Return the sparse autoencoder in a safetensors file of W_enc (D, K), W_dec (K, D), b_enc (K,), b_dec (D,).

    The names are those of Gemma Scope and SAELens; with a `threshold` (K,) it is a jumprelu, else a relu. `centred`:
    the decoder's bias is subtracted before encoding.

    Raises:
        InterveneError: there is no such file, it cannot be read, or it lacks W_enc or W_dec.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InterveneError(f"Sparse autoencoder {path}: there is no such file. Give the path of a .safetensors file.")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InterveneError(f"Sparse autoencoder {path}: {error}. Give a .safetensors file.") from None
    if not {"W_enc", "W_dec"} <= set(found):
        names = ", ".join(sorted(found)) or "nothing"
        raise InterveneError(f"Sparse autoencoder {path}: it holds {names}. Name its tensors W_enc, W_dec, b_enc ...")
    threshold = found.get("threshold")
    return SAE(
        found["W_enc"],
        found["W_dec"],
        encoder_bias=found.get("b_enc"),
        decoder_bias=found.get("b_dec"),
        threshold=threshold,
        activation="relu" if threshold is None else "jumprelu",
        centred=centred,
    )


def _gates(plan: Plan) -> Iterator[GatedSwap | HardConcreteSwap | BudgetSwap]:
    for item in plan:
        if isinstance(item.edit, GatedSwap | HardConcreteSwap | BudgetSwap):
            yield item.edit


def mask_facts(plan: Plan) -> dict[str, float]:
    """Return for each mask: mask_size, the features swapped when scored hard; mask_gates, the open gates, fewer than
    the features where they share gates; decisive, the share of soft gates below 0.1 or above 0.9 at the end (of
    hard concrete ones, without noise and at temperature 1, which few logits push that far in a short fit).
    """
    edits = list(_gates(plan))
    sizes, counts, decisive = [], [], []
    for edit in edits:
        with torch.no_grad():
            soft, hard = edit.soft(), edit.hard()
        sizes.append(float(edit.size()))
        groups = torch.arange(edit.count) if edit.groups is None else edit.groups
        counts.append(float(len(torch.unique(groups.to(hard.device)[hard]))))
        decisive.append(float(((soft < DECISIVE) | (soft > 1 - DECISIVE)).float().mean()))
    told = {"mask_size": sizes, "mask_gates": counts, "decisive": decisive}
    return {key: value for name, values in told.items() for key, value in numbered(name, values).items()}


def _penalty(plan: Plan, setup: Setup) -> Tensor:
    counted = [edit.penalty() for edit in _gates(plan) if not isinstance(edit, BudgetSwap)]
    return float(setup.option("sparsity")) * torch.stack(counted).mean() if counted else torch.zeros(())


def _anneal(plan: Plan, progress: float) -> None:
    for edit in _gates(plan):
        if not isinstance(edit, HardConcreteSwap):  # its samples are hard by themselves
            edit.temperature = linear(2 * progress, FIRST_TEMPERATURE, LAST_TEMPERATURE)


def _method(name: str, text: str, make: Callable[[Setup], Plan], *, sites: str = "any", needs: str = "") -> Method:
    return Method(
        name, text, make, ranked=False, penalty=_penalty, anneal=_anneal, facts=mask_facts, sites=sites, needs=needs
    )


NEURONS = _method("mask_neurons", "mask on neurons", neurons)
HEADS = _method("mask_heads", "mask on heads", heads, sites=HEAD_SITES[0])
MASK_PCA = _method("mask_pca", "mask on principal components", principal)
MASK_SVD = _method("mask_svd", "mask on singular vectors", singular)
MASK_SAE = _method("mask_sae", "mask on SAE latents", latents, needs="option sae")
