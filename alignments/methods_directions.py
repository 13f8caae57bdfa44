"""Methods that swap directions computed from activations, without a fit by gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from alignments.method import Method, Setup, one_variable
from alignments.methods_masks import train_activations
from intervene import PCA, Intervention, Plan, Subspace, Swap
from intervene.errors import InterveneError

NEGLIGIBLE = 1e-6  # share of the largest singular value below which a direction is rounding


@dataclass(frozen=True, eq=False)
class Classes:
    """Activations (M, D) in fp64 with the class of each (M,), from 0 to `count` - 1."""

    activations: Tensor
    labels: Tensor
    count: int

    def means(self) -> Tensor:
        """Return the mean activation of each class, (count, D)."""
        return torch.stack([self.activations[self.labels == one].mean(0) for one in range(self.count)])


def classes_of(setup: Setup, method: str) -> Classes:
    """Return the training activations of bases and sources, each token for itself, with the variable's value as class.

    Values that come only once are left out: nothing can be said of their spread.

    Raises:
        InterveneError: several variables, pairs without values, or fewer than two values that come twice.
    """
    one_variable(setup, method)
    base, source = setup.pairs(method).values
    if not len(base) or not len(source):
        raise InterveneError(f"Method {method}: the pairs do not say the variable's values. Give values=, or use das.")
    values: list[Hashable] = [*base, *source]
    seen = Counter(values)
    known = [value for value, times in seen.items() if times > 1]  # in order of first appearance
    if len(known) < 2:
        found = ", ".join(map(str, list(seen)[:3])) + (" ..." if len(seen) > 3 else "")
        raise InterveneError(
            f"Method {method}: it tells values of the variable apart, and fewer than two of them come at least twice "
            f"({found}). Draw more pairs, or use das."
        )
    numbers = {value: number for number, value in enumerate(known)}
    acts = train_activations(setup, method)
    per = len(acts) // len(values)  # tokens per pair
    labels = torch.tensor([numbers.get(value, -1) for value in values], device=acts.device).repeat_interleave(per)
    return Classes(acts[labels >= 0].double(), labels[labels >= 0], len(known))


def span(vectors: Tensor, most: int) -> Tensor:
    """Return an orthonormal basis (D, K) of what `vectors` (M, D) span, the strongest first, at most `most` of them.

    Each direction's sign is fixed so that its largest entry is positive.

    Raises:
        InterveneError: the vectors are all zero, or not finite.
    """
    if not bool(torch.isfinite(vectors).all()) or not bool(vectors.any()):
        raise InterveneError("Directions: the classes' activations do not differ there. Choose another site.")
    _, strengths, rows = torch.linalg.svd(vectors.double(), full_matrices=False)
    count = min(most, int((strengths > NEGLIGIBLE * strengths[0]).sum()))
    basis = rows[:count].mT
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    return torch.mul(basis, signs).float()


def _swap(setup: Setup, frame: Tensor) -> Plan:
    return (Intervention(setup.site, Swap(), setup.positions, Subspace.from_frame(frame)),)


def principal(setup: Setup) -> Plan:
    """Return the swap of the first `rank` principal components of training bases and sources, each token for itself.

    h' = h + QQ^T(s - h), Q from the covariance of the raw activations. It knows nothing of the variable: what it finds
    is where activations vary most. With several variables it swaps all at once.

    Source: the PCA baseline of RAVEL, Huang et al. 2024 (arXiv 2402.17700). We differ: neurons are not standardised.
    """
    assert setup.rank is not None
    lens = PCA.fit(train_activations(setup, "pca"), setup.rank)
    return (Intervention(setup.site, Swap(), setup.positions, lens),)


def mean_difference(setup: Setup) -> Plan:
    """Return the swap of what the class means of the variable's values span: of two values, mu_1 - mu_0, normalised.

    Of c values the span of mu_j - mean(mu), of up to c - 1 dimensions.

    Source: difference in means as in Marks & Tegmark 2023 (arXiv 2310.06824).
    """
    means = classes_of(setup, "mean_difference").means()
    return _swap(setup, span(means - means.mean(0), len(means) - 1))


def lda(setup: Setup) -> Plan:
    """Return the swap of the span of the linear discriminants of the variable's values, S_w^-1 (mu_j - mean(mu)).

    S_w is the covariance within classes, shrunk towards a multiple of the identity by Ledoit & Wolf's rule, so that it
    has an inverse with fewer activations than neurons.

    Source: Fisher 1936, with scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")`.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis  # a dependency of the commands

    classes = classes_of(setup, "lda")
    fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    fitted.fit(classes.activations.cpu().numpy(), classes.labels.cpu().numpy())
    return _swap(setup, _weights(fitted.coef_, classes))


def probe(setup: Setup) -> Plan:
    """Return the swap of the span of a logistic probe's weights for the variable's value, of up to c - 1 dimensions.

    scikit-learn's L2 probe (C = 1) on standardised activations, its weights mapped back to raw ones. What a probe can
    read need not be what the model uses: compare its score with that of das.
    """
    from sklearn.linear_model import LogisticRegression  # a dependency of the commands

    classes = classes_of(setup, "probe")
    mean, spread = classes.activations.mean(0), classes.activations.std(0).clamp_min(1e-8)
    fitted = LogisticRegression(max_iter=2000)
    fitted.fit(((classes.activations - mean) / spread).cpu().numpy(), classes.labels.cpu().numpy())
    return _swap(setup, _weights(fitted.coef_ / spread.cpu().numpy(), classes))


def _weights(coefficients: object, classes: Classes) -> Tensor:
    """Return the frame of one weight per class, (c, D), or of the one weight of two classes, (1, D)."""
    weights = torch.as_tensor(coefficients, device=classes.activations.device, dtype=torch.float64)
    # a weight that all classes share tells none of them apart
    return span(weights if len(weights) == 1 else weights - weights.mean(0), classes.count - 1)


def direction_facts(plan: Plan) -> dict[str, float]:
    """Return directions: how many dimensions are swapped."""
    lenses = [item.featurizer for item in plan]
    return {"directions": float(sum(lens.rank for lens in lenses if isinstance(lens, Subspace)))}


PRINCIPAL = Method("pca", "PCA", principal, learned=False, seeded=False, train_kinds=None)
MEAN_DIFFERENCE, LDA, PROBE = (
    Method(
        name,
        text,
        make,
        learned=False,
        ranked=False,
        seeded=False,
        facts=direction_facts,
        train_kinds=None,
        needs=needs,
    )
    for name, text, make, needs in (
        ("mean_difference", "difference in means", mean_difference, "values of the variable"),
        ("lda", "linear discriminants", lda, "values of the variable, scikit-learn"),
        ("probe", "logistic probe", probe, "values of the variable, scikit-learn"),
    )
)
