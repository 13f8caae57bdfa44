"""Directions from files, and into them: our own safetensors, persona vectors (.pt), llama.cpp control vectors (.gguf).

    directions = read_vectors("evil_response_avg_diff.pt", model=model, layers=[20], one_based=True)
    write_vectors("evil.safetensors", directions)

Files count layers in three ways; here a layer is always a block, from 0, and its direction belongs to the block's
output. No file is ever unpickled in a way that runs code.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from defenses.errors import VectorError
from defenses.plans import Directions
from intervene import StoreError, load_vector
from intervene.files import as_json, beside, own_copy, parsed_json, read_tensors, sync
from intervene.vectors import LAYER_CONVENTION

SCHEMA = 1
CVECTOR_GENERATOR = 1  # direction.1 was measured at the first block
_TORCH = (".pt", ".pth", ".bin")
_HIDDEN_STATES = "Index k of such a file is hidden_states[k], the output of block k - 1"


def read_vectors(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    layers: Sequence[int] | None = None,
    one_based: bool = False,
    gguf_first: int = CVECTOR_GENERATOR,
    force: str | None = None,
) -> Directions:
    """Return the directions in `path`, by 0-based block, checked against `model` if it is given.

    Formats:
        .safetensors: of `write_vectors`, or a single vector of `intervene.save_vector`.
        .pt, .pth, .bin: persona vectors, a tensor (N+1, D) or a dict {k: (D,)} by index into `hidden_states`: k is the
            output of block k - 1, and 0 the embeddings, which are no block's output. The last index, N, is left out
            too: transformers applies the final norm before it. A tensor (D,) is of the one layer that is named.
        .gguf: tensors `direction.N` of a control vector. See `gguf_first`.

    Args:
        model: its layers and width are compared, and its fingerprint where the file knows one.
        layers: which blocks; None: all that the file has.
        one_based: `layers` count from 1, as the flags of the persona-vector code do; they are converted here, once.
        gguf_first: which N is the first block. 1 as llama.cpp's cvector-generator names what it measures; 0 for files
            of repeng. Both are in use: llama.cpp itself adds direction.N to block N counted from 0.
        force: the reason for using directions of another model, or of the last index of a .pt file.

    Raises:
        VectorError: no such file, damaged, of an unknown kind, holding code; a layer that it or the model lacks;
            another width or model; and whatever `Directions` refuses.

    Source: persona vectors, Chen et al. 2025 (arXiv 2507.21509); llama.cpp, tools/cvector-generator (mean.hpp, pca.hpp:
        "direction." il + 1) and llama_adapter_cvec::apply; repeng (Vogel 2024), ControlVector.export_gguf.
    """
    path = Path(path)
    if not path.is_file():
        raise VectorError(f"Vectors {path}: there is no such file. Give one of .safetensors, .pt or .gguf.")
    wanted = None if layers is None else _zero_based(path, layers, one_based)
    if path.suffix == ".safetensors":
        found = _read_safetensors(path)
    elif path.suffix in _TORCH:
        found = _read_torch(path, wanted, model, force)
    elif path.suffix == ".gguf":
        found = _read_gguf(path, gguf_first)
    else:
        raise VectorError(
            f"Vectors {path}: {path.suffix or 'no suffix'} is no kind known. Use .safetensors, .pt, .gguf."
        )
    if wanted is not None:
        found = _only(path, found, wanted)
    if force:
        found = replace(found, facts={**found.facts, "force": force})
    return found if model is None else found.check(model, force=force)


def write_vectors(path: str | Path, directions: Directions, *, overwrite: bool = False) -> Path:
    """Write `directions` with all that is known of them to one safetensors file, whole or not at all; return its path.

    Its metadata holds the convention of layers, component, model, fingerprint, norms and facts.

    Raises:
        VectorError: `path` is no .safetensors or exists already, or the facts are not plain.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise VectorError(f"Write vectors to {path}: they are kept as safetensors. Name it {path.stem}.safetensors.")
    if path.exists() and not overwrite:
        raise VectorError(f"Write vectors to {path}: it exists. Choose another name, or pass overwrite=True.")
    about = {
        "convention": LAYER_CONVENTION,
        "component": directions.component,
        "model": directions.model,
        "fingerprint": directions.fingerprint,
        "norms": {str(layer): norm for layer, norm in directions.norms.items()},
        "facts": directions.facts,
    }
    try:
        metadata = {"schema": str(SCHEMA), "directions": as_json(about, path)}
    except StoreError as error:
        raise VectorError(str(error)) from error
    with beside(path) as draft:
        tensors = {f"layer.{layer}": own_copy(vector) for layer, vector in directions.vectors.items()}
        save_file(tensors, draft, metadata=metadata)
        sync(draft)
        os.replace(draft, path)
        sync(path.parent)
    return path


def _zero_based(path: Path, layers: Sequence[int], one_based: bool) -> list[int]:
    if not layers:
        raise VectorError(f"Vectors {path}: no layer was asked for. Name some, or leave layers out for all.")
    chosen = [layer - 1 for layer in layers] if one_based else list(layers)
    for asked, layer in zip(layers, chosen, strict=True):
        if layer < 0:
            counted = "1: index 0 of hidden_states is the embeddings, no block's output" if one_based else "0"
            raise VectorError(f"Vectors {path}: layer {asked}, but layers count from {counted}. Use a higher one.")
    return chosen


def _only(path: Path, found: Directions, wanted: Sequence[int]) -> Directions:
    if missing := [layer for layer in wanted if layer not in found.vectors]:
        raise VectorError(
            f"Vectors {path}: layer {missing[0]} (0-based) is not in it, it has {_spelled(found.layers)}. "
            "Use one of these, or extract it."
        )
    return found.only(wanted)


def _spelled(layers: Sequence[int]) -> str:
    whole = len(layers) > 2 and tuple(layers) == tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if whole else ", ".join(map(str, layers))


# --- our own ----------------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> Directions:
    try:
        tensors = read_tensors(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if "provenance" in metadata:
            return _of_steering_vector(path)
        if "directions" not in metadata:
            raise VectorError(
                f"Vectors {path}: its metadata does not say what they are, it holds {sorted(tensors)[:4]}. "
                "Wrap the tensors yourself: Directions({layer: vector}), and write_vectors."
            )
        if not metadata.get("schema", "").isdigit() or int(metadata["schema"]) > SCHEMA:
            raise VectorError(
                f"Vectors {path}: schema {metadata.get('schema')!r}, this version reads up to {SCHEMA}. Upgrade."
            )
        about = parsed_json(metadata["directions"], str(path))
    except StoreError as error:
        raise VectorError(f"Vectors {error}") from error
    if not isinstance(about, dict) or about.get("convention") != LAYER_CONVENTION:
        raise VectorError(f"Vectors {path}: layers are not counted as {LAYER_CONVENTION!r}. Write the file anew.")
    numbers = {name: name.removeprefix("layer.") for name in tensors}
    if bad := [name for name, number in numbers.items() if not number.isdigit()]:
        raise VectorError(f"Vectors {path}: unknown tensor {bad[0]!r}. Write the file anew instead of editing it.")
    return Directions(
        {int(number): tensors[name] for name, number in numbers.items()},
        component=about.get("component", "block_output"),
        fingerprint=about.get("fingerprint", ""),
        model=about.get("model", ""),
        facts=about.get("facts", {}),
    )


def _of_steering_vector(path: Path) -> Directions:
    one = load_vector(path)
    if one.site.layer is None or one.site.units is not None:
        raise VectorError(f"Vectors {path}: made at {one.site}, which is no block. Extract it at a block's output.")
    facts = {"format": "steering vector", "method": one.method, "pooling": one.pooling, "stream_norm": one.stream_norm}
    return Directions({one.site.layer: one.vector}, one.site.component, one.fingerprint, one.model, facts)


# --- persona vectors --------------------------------------------------------------------------------------------------


def _read_torch(path: Path, wanted: Sequence[int] | None, model: nn.Module | None, force: str | None) -> Directions:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise VectorError(
            f"Vectors {path}: damaged, or it holds more than tensors, which could run code and is not loaded "
            f"({first}). Save it again as a tensor or a dict of tensors."
        ) from error
    facts = {"format": "persona vector", "convention": _HIDDEN_STATES}
    if isinstance(content, Tensor) and content.dim() == 1:
        if wanted is None or len(wanted) != 1:
            raise VectorError(f"Vectors {path}: one vector that names no layer. Say which: layers=[l], one layer.")
        return Directions({wanted[0]: content}, facts=facts)
    rows, last = _by_index(path, content, model)
    if last is not None and last in rows and not force:
        if wanted is not None and last - 1 in wanted:
            raise VectorError(
                f"Vectors {path}: layer {last - 1} (0-based), but index {last} was measured behind the final norm, not "
                "at the block's output. Use a lower layer, or give the reason: force='<reason>'."
            )
        del rows[last]
    chosen = {index - 1: vector for index, vector in rows.items() if wanted is None or index - 1 in wanted}
    if wanted is not None and (missing := [layer for layer in wanted if layer not in chosen]):
        have = _spelled([index - 1 for index in sorted(rows)])
        raise VectorError(
            f"Vectors {path}: layer {missing[0]} (0-based) is not in it, it has {have}. Use one of these."
        )
    return Directions(chosen, facts=facts)


def _by_index(path: Path, content: Any, model: nn.Module | None) -> tuple[dict[int, Tensor], int | None]:
    """Return index -> vector without that of the embeddings, and N, the index behind the final norm, if known."""
    blocks = None if model is None else int(model.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr, operator]
    if isinstance(content, Tensor) and content.dim() == 2:
        if blocks is not None and len(content) != blocks + 1:
            raise VectorError(
                f"Vectors {path}: {len(content)} rows, but this model has {blocks} blocks and so {blocks + 1} hidden "
                f"states. {_HIDDEN_STATES}: give a file with all of them, or a dict."
            )
        return dict(enumerate(content[1:], 1)), len(content) - 1
    if not isinstance(content, Mapping) or not all(
        type(key) is int and isinstance(value, Tensor) for key, value in content.items()
    ):
        kind = f"a tensor {tuple(content.shape)}" if isinstance(content, Tensor) else f"a {type(content).__name__}"
        raise VectorError(f"Vectors {path}: found {kind}. Persona vectors are a tensor (N+1, D) or a dict {{k: (D,)}}.")
    if low := [key for key in content if key < 1]:
        raise VectorError(
            f"Vectors {path}: index {low[0]}. {_HIDDEN_STATES}, and 0 are the embeddings. If its numbers count blocks "
            "from 0, make Directions of it yourself."
        )
    return dict(content), blocks


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def _read_gguf(path: Path, first: int) -> Directions:
    import gguf  # with it transformers reads the embedded model too; not needed for other files

    if first not in (0, 1):
        raise VectorError(f"Vectors {path}: gguf_first={first}. The first block is direction.1 or direction.0.")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise VectorError(f"Vectors {path}: damaged, or no GGUF ({error}). Make or fetch it again.") from error
    kind = _field(reader, "general.architecture")
    if kind != "controlvector":
        raise VectorError(f"Vectors {path}: a GGUF of {kind or 'no architecture'}, not a control vector. Give another.")
    vectors: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        prefix, _, number = tensor.name.partition(".")
        if prefix != "direction" or not number.isdigit() or int(number) < first:
            raise VectorError(
                f"Vectors {path}: tensor {tensor.name!r}. With gguf_first={first} it is no block's; a control vector "
                f"has direction.{first} and on."
            )
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        vectors[int(number) - first] = torch.from_numpy(values.astype("float32").copy()).flatten()
    facts = {
        "format": "control vector",
        "convention": f"direction.{first} is the first block's",
        "model_hint": _field(reader, "controlvector.model_hint"),
    }
    return Directions(vectors, facts=facts)


def _field(reader: Any, name: str) -> str:
    field = reader.get_field(name)
    return "" if field is None else str(field.contents())
