"""The plans that defenses use: inject directions, ablate them, read a gradient; and the tokens they act on.

    columns = scope_columns(batch, Scope.RESPONSE)
    with intervene(backend.model, injection(directions, 5.0, columns=columns), prompt=batch.prompt(columns)):
        loss = ...
        backend.backward(loss)                       # inside the block

Layers are 0-based and the site is the block's output, the residual stream after block l, as everywhere here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from defenses.batch import NO_SAMPLE, Batch
from defenses.errors import VectorError
from intervene import Add, InterveneError, Intervention, Marked, Plan, Positions, Site, Subspace, Zero, fingerprint
from intervene.errors import asked_found_do
from intervene.families import resolve

ABSENT = -1
CANCELLED = 1e-6  # of the sum of strengths: what is left below it is rounding
RANK_TOLERANCE = 1e-4  # of the largest singular value: directions below it are combinations of the others


class Scope(str, Enum):
    """Which tokens a plan acts on. None holds padding, a sample's first token, or template tokens.

    RESPONSE: tokens with a label. RESPONSE_SHIFTED: the tokens that predict them, one column earlier. ALL: every token.

    A sample's first token is left out because attention rests on it with activations hundreds of times the usual ones,
    and steering them derails the model. One kind of template token is in a scope: in RESPONSE_SHIFTED, the last one
    before an answer, which predicts its first word; without it the shifted scope would be the unshifted one.
    """

    RESPONSE = "response"
    RESPONSE_SHIFTED = "response_shifted"
    ALL = "all"


@dataclass(frozen=True, eq=False)
class Directions:
    """One direction (D,) per layer, and where they came from.

    Attributes:
        vectors: 0-based layer -> (D,), kept as fp32 copies on the device they were given on, in order of layers.
        component: of the site, "block_output" being the residual stream after the block.
        fingerprint, model: of the model they were made from; "" where unknown.
        facts: how they were made: pooling, AUC, norms. Anything JSON can hold.

    Raises:
        VectorError: there are none, of several widths, zero, not finite, or at a layer that is no number from 0.
    """

    vectors: Mapping[int, Tensor] = field(repr=False)
    component: str = "block_output"
    fingerprint: str = ""
    model: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.vectors:
            raise VectorError("Directions of no layer: there is nothing to inject. Give at least one layer's vector.")
        for layer, vector in self.vectors.items():
            _check_layer(layer)
            _check_direction(layer, vector)
        widths = {layer: len(vector) for layer, vector in self.vectors.items()}
        if len(set(widths.values())) > 1:
            raise VectorError(f"Directions of several widths: {widths} by layer. Take them from one model.")
        kept = {layer: self.vectors[layer].detach().to(torch.float32, copy=True) for layer in sorted(self.vectors)}
        object.__setattr__(self, "vectors", kept)
        object.__setattr__(self, "facts", dict(self.facts))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a direction, in order."""
        return tuple(self.vectors)

    @property
    def width(self) -> int:
        """D."""
        return len(next(iter(self.vectors.values())))

    @property
    def norms(self) -> dict[int, float]:
        """Layer -> Euclidean norm."""
        return {layer: float(vector.norm()) for layer, vector in self.vectors.items()}

    def site(self, layer: int) -> Site:
        """Return the site of the direction of `layer`."""
        return Site(self.component, layer)

    def at(self, layer: int) -> Tensor:
        """Return the direction (D,) of `layer`; VectorError if there is none."""
        if layer not in self.vectors:
            raise VectorError(
                f"Direction of layer {layer}: there are those of {_listed(self.layers)}. Use one of them."
            )
        return self.vectors[layer]

    def to(self, device: torch.device | str) -> Directions:
        """Return these directions on `device`: that of the model, so that no step copies them there."""
        return replace(self, vectors={layer: vector.to(device) for layer, vector in self.vectors.items()})

    def only(self, layers: Sequence[int]) -> Directions:
        """Return the directions of `layers` alone."""
        return replace(self, vectors={layer: self.at(layer) for layer in layers})

    def unit(self) -> Directions:
        """Return these directions with norm 1 in each layer, so that a strength is a length in the stream."""
        return replace(self, vectors={layer: vector / vector.norm() for layer, vector in self.vectors.items()})

    def check(self, model: nn.Module, *, force: str | None = None) -> Directions:
        """Return these directions if they fit `model`: layers, width, and fingerprint where it is known.

        To be called before training: weights that have learned have another fingerprint.

        Args:
            force: the reason for using directions of another model, whose fingerprint is then not compared.

        Raises:
            VectorError: a layer the model does not have, another width, or another model without a reason.
        """
        for layer, vector in self.vectors.items():
            try:
                width = resolve(model, self.site(layer)).width
            except InterveneError as error:
                raise VectorError(f"Directions at {self.site(layer)} of {self.model or 'a file'}: {error}") from error
            if width != len(vector):
                raise VectorError(
                    f"Direction at {self.site(layer)}: it is {len(vector)} wide, this model is {width} wide there. "
                    "Make it from this model."
                )
        if self.fingerprint and not force and (found := fingerprint(model)) != self.fingerprint:
            raise VectorError(
                f"Directions of model {self.model or '(unnamed)'} ({self.fingerprint}): this one is "
                f"{name_of(model)} ({found}). Extract them anew, or give the reason: force='<reason>'."
            )
        return self


def name_of(model: nn.Module) -> str:
    """Return the name `model` was loaded under, else its class."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)


def scope_columns(batch: Batch, scope: Scope, *, chosen: Tensor | None = None) -> Tensor:
    """Return (B, P) int64 columns of the tokens in `scope`, in order, then -1; on the device of the batch.

    P is the largest number in a row, and at least 1: a batch without such a token gives (B, 1) of -1, for which
    `injection`, `ablation` and `gradient_probe` return an empty plan when told the columns.

    Args:
        chosen: (N,) bool, to act on some samples only, also where a row packs several.
    """
    real = batch.sample != NO_SAMPLE  # (B, S)
    starts = real & (torch.nn.functional.pad(batch.sample, (1, 0), value=NO_SAMPLE)[:, :-1] != batch.sample)
    inner = real & ~starts  # tokens with another of their own sample before them
    content = real & ~batch.template
    if scope is Scope.ALL:
        selected = content
    elif scope is Scope.RESPONSE:
        selected = content & batch.response
    else:
        predicts, predicts_word = (_earlier(inner & batch.response & also) for also in (real, content))
        selected = predicts_word | (predicts & content)
    selected = selected & ~starts
    if chosen is not None:
        of_chosen = chosen.to(batch.sample.device).bool()[batch.sample.clamp_min(0)]
        selected = selected & of_chosen
    return _packed(selected)


def _earlier(selected: Tensor) -> Tensor:
    """Return `selected` (B, S) moved one column to the left."""
    return torch.nn.functional.pad(selected[:, 1:], (0, 1), value=False)


def _packed(selected: Tensor) -> Tensor:
    width = max(int(selected.sum(1).max()), 1)
    order = torch.argsort((~selected).to(torch.int8), dim=1, stable=True)[:, :width]  # the selected first
    return order.masked_fill(~selected.gather(1, order), ABSENT)


def selects(columns: Tensor) -> bool:
    """Return whether `columns` (B, P) name any token."""
    return bool((columns != ABSENT).any())


def injection(
    directions: Directions,
    strength: float | Tensor,
    relative: bool = False,
    *,
    columns: Tensor | None = None,
    positions: Positions | None = None,
) -> Plan:
    """Return h' = h + strength * v at each layer of `directions`, on `Marked("scope")`.

    Args:
        strength: a number, or one per row (B,), which may be 0. Over packed rows choose samples in `scope_columns`.
        relative: add strength * |h| * v / |v| at each token instead: a fraction of the stream's own norm there.
        columns: what `scope_columns` returned. If it names no token the plan is (), since a plan that would touch
            nothing is an error when applied.
        positions: other tokens than the scope, as AllTokens() for steering while generating.

    Source: preventative steering, Chen et al. 2025 (arXiv 2507.21509), who add on every token of the prompt too.
    """
    if columns is not None and not selects(columns):
        return ()
    where = Marked("scope") if positions is None else positions
    return tuple(
        Intervention(directions.site(layer), Add(vector, strength, relative=relative), where)
        for layer, vector in directions.vectors.items()
    )


def joint_injection(
    traits: Sequence[Directions],
    strengths: Sequence[float],
    relative: bool = False,
    *,
    columns: Tensor | None = None,
    positions: Positions | None = None,
) -> Plan:
    """Return the injection of several traits at once, each with its strength; those of 0 are left out.

    `relative` is of the stream before any of them: h' = h + |h| * sum of strength_k * v_k / |v_k| at each site, in one
    edit, whatever their order. Plans of `injection` in a row would each see the norm that those before them made.

    Args:
        columns, positions: as in `injection`.
    """
    if columns is not None and not selects(columns):
        return ()
    given = [(one, strength) for one, strength in zip(traits, strengths, strict=True) if strength]
    if not relative:
        return tuple(item for one, dose in given for item in injection(one, dose, positions=positions))
    doses: dict[Site, list[tuple[Tensor, float]]] = {}
    for one, dose in given:
        for layer, vector in one.vectors.items():
            doses.setdefault(one.site(layer), []).append((vector, dose))
    where = Marked("scope") if positions is None else positions
    summed = {site: _joined(several) for site, several in doses.items()}
    return tuple(
        Intervention(site, Add(vector, strength, relative=True), where)
        for site, (vector, strength) in summed.items()
        if strength
    )


def _joined(doses: Sequence[tuple[Tensor, float]]) -> tuple[Tensor, float]:
    """Return one direction and its relative strength for several; 0 where they cancel, to rounding."""
    if len(doses) == 1:
        return doses[0]
    total = torch.stack([strength * (vector / vector.norm()) for vector, strength in doses]).sum(0)
    length = float(total.norm())
    return total, length if length > CANCELLED * sum(abs(strength) for _, strength in doses) else 0.0


Basis = Directions | Sequence[Directions] | Mapping[int, Tensor] | Tensor


def ablation(
    basis: Basis,
    layers: Sequence[int] | None = None,
    *,
    columns: Tensor | None = None,
    positions: Positions | None = None,
) -> Plan:
    """Return h' = h - Q Q^T h at each of `layers`, on `Marked("scope")`; no gradient flows along Q either.

    Args:
        basis: what is removed: directions; several of them, removed together; layer -> (D, K); or one (D, K) for all
            `layers`. Columns need not be orthonormal: Q spans them.
        layers: None: those of the directions. columns, positions: as in `injection`.

    Raises:
        VectorError: no layers for one basis, or columns that are linearly dependent to 1e-4.

    Source: concept ablation fine-tuning, Casademunt et al. 2025 (arXiv 2507.16795).
    """
    if columns is not None and not selects(columns):
        return ()
    where = Marked("scope") if positions is None else positions
    spans, component = _spans(basis, layers)
    return tuple(
        Intervention(Site(component, layer), Zero(), where, featurizer=Subspace.from_frame(_frame(layer, span)))
        for layer, span in spans.items()
    )


def _spans(basis: Basis, layers: Sequence[int] | None) -> tuple[dict[int, Tensor], str]:
    """Return layer -> (D, K) of what spans the subspace there, and the component."""
    if isinstance(basis, Tensor):
        if not layers:
            raise VectorError("Ablation of one basis: no layers were given. Name them, e.g. layers=[12].")
        return dict.fromkeys(layers, basis), "block_output"
    if isinstance(basis, Mapping):
        every, component = dict(basis), "block_output"
    else:
        given = [basis] if isinstance(basis, Directions) else list(basis)
        if not given or len({one.layers for one in given}) > 1 or len({one.component for one in given}) > 1:
            found = [(one.component, one.layers) for one in given]
            raise VectorError(f"Ablation of several directions: they are at {found}. Give all of them the same layers.")
        component = given[0].component
        every = {layer: torch.stack([one.at(layer) for one in given], 1) for layer in given[0].layers}
    for layer in layers or ():
        if layer not in every:
            raise VectorError(f"Ablation at layer {layer}: there are directions of {_listed(every)}. Use one of them.")
    return {layer: every[layer] for layer in (every if layers is None else layers)}, component


def _frame(layer: int, span: Tensor) -> Tensor:
    """Return an orthonormal (D, K) frame of the columns of `span`."""
    _check_layer(layer)
    wide = span.detach().double()
    if wide.dim() != 2 or not 1 <= wide.shape[1] <= wide.shape[0] or not bool(torch.isfinite(wide).all()):
        raise VectorError(f"Ablation at layer {layer}: a basis of shape {tuple(span.shape)}. Give a finite (D, K).")
    lengths = wide.norm(dim=0)
    values = torch.linalg.svdvals(wide / lengths.clamp_min(1e-30))
    if not float(lengths.min()) > 0 or float(values[-1]) < RANK_TOLERANCE * float(values[0]):
        raise VectorError(
            f"Ablation at layer {layer}: {wide.shape[1]} directions that are linearly dependent (smallest singular "
            f"value {float(values[-1]):.1e}, lengths {[round(x, 6) for x in lengths.tolist()]}). Leave some out."
        )
    frame: Tensor = torch.linalg.qr(wide)[0]
    return frame.float()


def gradient_probe(
    layer: int,
    columns: Tensor,
    width: int,
    device: torch.device | str = "cpu",
    *,
    component: str = "block_output",
) -> tuple[Plan, Tensor]:
    """Return a plan that changes nothing and its leaf (B, P, D) fp32, whose gradient is dL/dh at `columns`.

        plan, leaf = gradient_probe(14, columns, model.config.hidden_size, columns.device)
        with intervene(model, plan, prompt=batch.prompt(columns)):
            loss = ...
            (g,) = torch.autograd.grad(loss, [leaf], materialize_grads=True)      # or loss.backward(); leaf.grad

    Slots of -1 get a gradient of 0. If no column names a token the plan is () and the leaf takes part in nothing: its
    `.grad` stays None, and `materialize_grads=True` above gives zeros.

    Args:
        layer: 0-based. columns: of `scope_columns`. device: where that layer computes.
    """
    zeros = torch.zeros(*columns.shape, width, device=device)
    edit = Add(zeros, trainable=True)
    leaf: Tensor = edit.vector
    if not selects(columns):
        return (), leaf
    return (Intervention(Site(component, layer), edit, Marked("scope")),), leaf


def _check_layer(layer: Any) -> None:
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise VectorError(
            asked_found_do(f"Direction of layer {layer!r}", "layers count blocks from 0.", "Use 0 for the first block.")
        )


def _check_direction(layer: int, vector: Any) -> None:
    if not isinstance(vector, Tensor) or vector.dim() != 1 or not vector.is_floating_point():
        kind = f"{vector.dtype} {tuple(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
        raise VectorError(f"Direction of layer {layer}: found {kind}. Give a tensor of real numbers of shape (D,).")
    wide = vector.detach().float().double()  # as it is kept
    if bad := int((~torch.isfinite(wide)).sum()):
        raise VectorError(
            f"Direction of layer {layer}: {bad} of {len(wide)} entries are NaN or infinite. "
            "Check the activations it was made from."
        )
    length = float(wide.norm())
    if not (length >= torch.finfo(torch.float32).tiny and math.isfinite(length)):
        raise VectorError(
            f"Direction of layer {layer}: its norm is {length:g}, and to inject it would change nothing. "
            "Check that its two sets of examples differ, or leave the layer out."
        )


def _listed(layers: Sequence[int] | Mapping[int, Any]) -> str:
    """Return "layers 0, 1, 2"."""
    return f"layer{'s' if len(layers) != 1 else ''} {', '.join(map(str, sorted(layers)))}"
