"""`check_family(model, inputs)`: run a model and verify what its family says about it.

Use it on a model whose family you registered yourself, or after an upgrade of transformers. It lives above `run`,
because it runs forward passes; the family table itself must not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from intervene.edits import Zero
from intervene.errors import InterveneError, asked_found_do
from intervene.families import Located, components_of, locate, resolve
from intervene.interventions import Intervention
from intervene.run import capture, intervene
from intervene.sites import LAYERLESS, Site

_PARTS = ("block_input", "attention_write", "mlp_write", "block_output")
_DO = "Correct the paths of its Family, then check again."


@torch.no_grad()
def check_family(model: nn.Module, inputs: Mapping[str, Tensor], *, tolerance: float = 1e-5) -> None:
    """Verify, for every layer, that the family's components are what their names say.

    block_input + attention_write + mlp_write is block_output, to `tolerance` of its largest value; every component has
    the width it claims; and setting any component to zero changes the logits.

    Args:
        inputs: a tokenised batch, as for `model(**inputs)`. Two short prompts are enough.
        tolerance: meant for float32. In bfloat16 a block's own sums round to about 1e-2.

    Raises:
        InterveneError: naming the first site that fails. And all that `locate` and `capture` raise.
    """
    place = locate(model)
    sites = [site for name in components_of(place.family) for site in _sites(place, name)]
    with capture(model, sites) as acts:
        clean = model(**inputs).logits
    values = {site: acts[site] for site in sites}
    _check_residual(place, values, tolerance)
    for site in sites:
        _check_site(model, place, site, values[site], clean, inputs)


def _sites(place: Located, component: str) -> list[Site]:
    if component in LAYERLESS:
        return [Site(component)]
    return [Site(component, layer) for layer in range(place.n_layers)]


def _failed(site: object, place: Located, found: str) -> InterveneError:
    return InterveneError(asked_found_do(f"Check of {site} in family {place.model_type!r}", found, _DO))


def _check_residual(place: Located, values: Mapping[Site, Tensor], tolerance: float) -> None:
    for layer in range(place.n_layers):
        x, attention, mlp, y = (values[Site(part, layer)].float() for part in _PARTS)
        error, size = (x + attention + mlp - y).abs().max().item(), y.abs().max().item()
        if not error <= tolerance * max(size, 1.0):
            raise _failed(
                f"layer {layer}",
                place,
                f"block_input + attention_write + mlp_write differs from block_output by {error:.1e} (of {size:.1e}).",
            )


def _check_site(
    model: nn.Module, place: Located, site: Site, value: Tensor, clean: Tensor, inputs: Mapping[str, Tensor]
) -> None:
    claimed = resolve(model, site).width
    if value.shape[-1] != claimed:
        raise _failed(site, place, f"it is {value.shape[-1]} wide, and the family says {claimed}.")
    if not value.any():
        raise _failed(site, place, "it is zero everywhere, so changing it shows nothing.")
    with intervene(model, [Intervention(site, Zero())]):
        zeroed = model(**inputs).logits
    if torch.equal(zeroed, clean):
        raise _failed(site, place, "setting it to zero leaves every logit as it was.")
