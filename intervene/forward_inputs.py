"""What a forward pass was called with: its arguments by name, its tokens, its padding, and how much is cached.

Everything here reads; nothing is kept. `passes` decides from it where a pass lies in its sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intervene.errors import BadPosition

Named = Mapping[str, Any]


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Named) -> dict[str, Any]:
    """Return the arguments of a call of `module.forward` by name."""
    if not args:
        return dict(kwargs)
    try:
        signature = inspect.signature(module.forward)
        bound = signature.bind_partial(*args, **kwargs)
    except (TypeError, ValueError):  # a call the module itself will refuse, or a signature Python cannot see
        return {**kwargs, "inputs_embeds": args[0]}
    named = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            extra = named.pop(parameter.name, ())
            named.update({} if not extra else {"inputs_embeds": extra[0]})
    return named


def token_inputs(named: Named) -> dict[str, Any]:
    """Return `named` with its token axis under a name that positions know.

    A module that is no language model is called with some first tensor: integers (B, S) are ids, (B, S, D) are
    embeddings, and (B, D) is taken as one token per example.
    """
    if isinstance(named.get("input_ids"), Tensor) or isinstance(named.get("inputs_embeds"), Tensor):
        return dict(named)
    first = next((value for value in named.values() if isinstance(value, Tensor)), None)
    if first is None:
        raise BadPosition(f"Forward pass: no tensor among its arguments {sorted(named)}. Pass the batch as tensors.")
    if not first.is_floating_point() and first.dim() == 2:
        return {**named, "input_ids": first}
    return {**named, "inputs_embeds": first[:, None] if first.dim() < 3 else first}


def tokens_of(named: Named) -> Tensor:
    """Return the ids (B, S) or embeddings (B, S, D) that a pass runs on."""
    ids: Any = named.get("input_ids")
    tokens: Tensor = ids if isinstance(ids, Tensor) else named["inputs_embeds"]
    return tokens


def past_length(named: Named) -> int:
    """Return how many columns are in the key/value cache that a pass was given."""
    cache = named.get("past_key_values")
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2]) if cache and cache[0] is not None else 0


def padding_mask(named: Named, stop: int) -> Tensor | None:
    """Return the (B, S) attention mask of a pass that ends at column `stop`; None if it has none of that form.

    Raises:
        BadPosition: it is shorter than the columns seen so far.
    """
    mask = named.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    if mask.shape[1] < stop:
        raise BadPosition(
            f"Attention mask of shape {tuple(mask.shape)}: cache and new tokens together have {stop} columns. "
            "Pass a mask that covers the cached ones too."
        )
    return mask


def with_prefix(named: Named, rows: int, length: int, start: int) -> dict[str, Any]:
    """Return the inputs with `start` cached columns put in front, so that columns count from the cache's beginning.

    Their ids are not known and become -1, which `content` refuses to read; they carry no label.
    """
    made = dict(named)
    if start == 0:
        return made
    for name, unknown in (("input_ids", -1), ("labels", -100)):
        value = named.get(name)
        if isinstance(value, Tensor):
            made[name] = torch.cat([value.new_full((rows, start), unknown), value], 1)
    if named.get("attention_mask") is None:
        made["attention_mask"] = torch.ones((rows, start + length), dtype=torch.int64)
    return made


def sign_of_a_part(named: Named) -> str | None:
    """Return why the first pass over a given cache may hold other columns than one whole prompt; None if it need not.

    Two ways of generating show themselves only here. Assisted decoding appends guessed tokens to the prompt and keeps
    a logit for each of them. A prompt in chunks comes with its mask and its position ids cut from longer rows, so
    their strides are longer than they are.
    """
    if named.get("past_key_values") is None:
        return None
    keep = named.get("logits_to_keep")
    if isinstance(keep, int) and keep > 1:
        return f"it keeps the logits of {keep} tokens, as assisted decoding does for tokens it guessed"
    for name in ("input_ids", "attention_mask", "position_ids"):
        value = named.get(name)
        if isinstance(value, Tensor) and value.dim() == 2 and value.stride(0) > value.shape[1] > 0:
            return f"its {name} was cut from rows of {value.stride(0)}, as a prompt given in chunks is"
    return None
