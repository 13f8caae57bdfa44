"""Which weight matrices a method protects or reads, by parameter name: `writing_matrices`, `linear_matrices`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from defenses.backend import Backend
from defenses.errors import DefenseError
from intervene import InterveneError, Site
from intervene.errors import asked_found_do
from intervene.families import Located, locate, resolve

# what writes to the residual stream -> the site of its input: o_proj and down_proj, whatever a family calls them
WRITERS = {"attention": "attention_value_output", "mlp": "mlp_neurons"}


@dataclass(frozen=True)
class Matrix:
    """A trained weight matrix.

    Attributes:
        name: of the parameter, in the backend's words. writes: whether its output is added to the residual stream.
        transposed: whether it is kept as (in, out), as GPT-2 does. layer: 0-based. part: "attention", "mlp" or "".
    """

    name: str
    layer: int
    writes: bool
    transposed: bool = False
    part: str = ""

    def turned(self, value: Tensor) -> Tensor:
        """Return the parameter's `value` as (out, in), or such a matrix as the parameter keeps it."""
        return value.T.contiguous() if self.transposed else value


def writing_matrices(
    backend: Backend, layers: Sequence[int], parts: Sequence[str] = ("attention", "mlp"), *, partial: bool = False
) -> list[Matrix]:
    """Return the output projections of attention and MLP in `layers`.

    Args:
        partial: leave out what the family does not have as a single matrix (the experts of a mixture) or what is not
            trained, instead of refusing.

    Raises:
        DefenseError: a layer the model does not have, a projection that is missing, frozen, or under LoRA.
    """
    found = []
    names = _names(backend)
    for layer in layers:
        for part in parts:
            try:
                module = resolve(backend.model, Site(WRITERS[part], layer)).module
            except InterveneError as error:
                if partial and 0 <= layer < locate(backend.model).n_layers:
                    continue
                raise DefenseError(f"Output projection of {part} in layer {layer}: {error}") from error
            found += _matrix(names, module, f"{part} of layer {layer}", layer, True, part, partial)
    return found


def linear_matrices(backend: Backend, layers: Sequence[int], *, partial: bool = False) -> list[Matrix]:
    """Return every linear layer's matrix in blocks `layers`; norms, embeddings and the head are in no block.

    Raises:
        DefenseError: as `writing_matrices`.
    """
    place = locate(backend.model)
    writers = {id(one) for one in _writers(place, backend.model)}
    found, names = [], _names(backend)
    for layer in layers:
        if not 0 <= layer < place.n_layers:
            found_text = f"this {place.model_type} has layers 0-{place.n_layers - 1}."
            raise DefenseError(asked_found_do(f"Matrices of layer {layer}", found_text, "Use one of those."))
        for path, module in place.layers[layer].named_modules():
            if _is_lora(module) or _is_linear(module):
                writes = id(module) in writers
                found += _matrix(names, module, f"{path} of layer {layer}", layer, writes, "", partial)
    return found


def _writers(place: Located, model: nn.Module) -> Iterable[nn.Module]:
    for layer in range(place.n_layers):
        for component in WRITERS.values():
            try:
                yield resolve(model, Site(component, layer)).module
            except InterveneError:  # experts: fused, and not linear layers either
                continue


def _names(backend: Backend) -> dict[int, str]:
    return {id(parameter): name for name, parameter in backend.parameters().items()}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora_A")


def _matrix(
    names: dict[int, str], module: nn.Module, where: str, layer: int, writes: bool, part: str, partial: bool
) -> list[Matrix]:
    if _is_lora(module):
        found = "it is under LoRA: only two thin factors are trained, and their product has no step of its own."
        raise DefenseError(asked_found_do(f"Weight of {where}", found, "Train all parameters."))
    name = names.get(id(getattr(module, "weight", None)))
    if name is None:
        if partial:
            return []
        do = "Unfreeze it, choose other layers, or say allow_partial=true."
        raise DefenseError(asked_found_do(f"Weight of {where}", "it is not trained.", do))
    return [Matrix(name, layer, writes, type(module).__name__ == "Conv1D", part)]
