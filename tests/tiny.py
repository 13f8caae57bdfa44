"""Tiny random models of every family, built from configurations: nothing is downloaded.

`TINY` maps a name to a function that builds that model; the name is a `model_type`, with a suffix where one family
has several layouts. Two or three layers, D = 32, vocabulary 96, 4 query heads, grouped key/value heads and a head
width that is not D / H wherever the family allows it. All parameters, norms and biases included, are redrawn at a size
that makes every component matter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 96
PAD = 0
_FIRST_WORD = 3  # 0, 1, 2 are pad, begin and end

_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GPT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_WIDE_HEADS = {"head_dim": 12}  # not 32 / 4
_NEOX = {
    **_GPT,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}

# name -> (model_type, configuration)
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 64}),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": 4,
            "intermediate_size": 48,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 4,
            "max_position_embeddings": 64,
        },
    ),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox_sequential": ("gpt_neox", {**_NEOX, "use_parallel_residual": False}),
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", {**_LLAMA, **_WIDE_HEADS, "sliding_window": 5}),
    "mixtral": ("mixtral", {**_LLAMA, **_MOE}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", {**_LLAMA, **_WIDE_HEADS}),
    "gemma": ("gemma", {**_LLAMA, **_WIDE_HEADS, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", {**_LLAMA, **_WIDE_HEADS, "sliding_window": 5, "query_pre_attn_scalar": 12}),
    "gemma3_text": (
        "gemma3_text",
        {
            **_LLAMA,
            **_WIDE_HEADS,
            "sliding_window": 5,
            "query_pre_attn_scalar": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi": ("phi", {**_LLAMA, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}}),
    "phi3": ("phi3", {**_LLAMA, "sliding_window": 5}),
    "olmo2": ("olmo2", _LLAMA),
    "opt": (
        "opt",
        {**_GPT, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "dropout": 0.1},
    ),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "falcon": ("falcon", {**_GPT, "ffn_hidden_size": 48, "multi_query": True, "parallel_attn": True}),
    "falcon_new_decoder": ("falcon", {**_GPT, "num_kv_heads": 2, "new_decoder_architecture": True, "bias": True}),
    "falcon_sequential": (
        "falcon",
        {**_GPT, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "smollm3": ("smollm3", {**_LLAMA, "no_rope_layers": [1, 0, 1]}),
    "gpt_oss": ("gpt_oss", {**_LLAMA, **_WIDE_HEADS, **_MOE, "sliding_window": 5, "rope_parameters": _ROPE}),
    "granite": (
        "granite",
        {**_LLAMA, "residual_multiplier": 0.22, "embedding_multiplier": 6.0, "attention_multiplier": 0.3},
    ),
}


def tiny_model(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a tiny random causal language model, float32 and in eval mode.

    `name` is a key of `TINY`; `overrides` are configuration values. The same seed gives the same weights.
    """
    model_type, values = CONFIGURATIONS[name]
    config = AutoConfig.for_model(model_type, **{**_COMMON, **values, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(0.15 * noise)
            else:  # norms and biases: keep what they were, but make no two columns alike
                parameter.add_(0.1 * noise)
    return model.eval()


TINY: dict[str, Callable[..., PreTrainedModel]] = {name: partial(tiny_model, name) for name in CONFIGURATIONS}


def tiny_batch(
    model: PreTrainedModel, padding: str | None = None, seed: int = 0, lengths: tuple[int, ...] = (7, 4)
) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, (B, S), of random tokens.

    `padding` "left" or "right" gives rows of those lengths; None gives rows that are all as long as the longest.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    shape = (len(lengths), longest)
    ids = torch.randint(_FIRST_WORD, model.config.vocab_size, shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.long)
    if padding is not None:
        steps = torch.arange(longest)
        for row, length in enumerate(lengths):
            mask[row] = (steps >= longest - length) if padding == "left" else (steps < length)
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
