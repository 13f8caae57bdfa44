"""Tiny random models from configurations, one per family that pyvene 0.1.8 knows, and the inputs for them."""

from __future__ import annotations

import copy
from functools import cache

import torch
import transformers
from torch import Tensor, nn

LAYERS, HEADS, GROUPS, WIDTH, VOCABULARY = 3, 4, 2, 32, 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # wide enough that a changed position or head shows in the logits far above rounding
    "initializer_range": 0.2,
}
GROUPED = COMMON | {"num_key_value_heads": GROUPS}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
NEO = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": HEADS}
RANGE = {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}

# name -> (model class, configuration class, configuration)
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2 | RANGE),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        NEO | RANGE | {"attention_types": [[["global"], LAYERS]], "max_position_embeddings": 64},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", COMMON),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "llama_wide_heads": ("LlamaForCausalLM", "LlamaConfig", GROUPED | {"head_dim": 16}),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": None}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED | {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", GROUPED),
}


@cache
def _built(name: str) -> nn.Module:
    model_class, config_class, options = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
        for parameter in model.parameters():  # biases and norms too, so that none of them can be forgotten
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def tiny(name: str) -> nn.Module:
    """Return a fresh copy of the named model: pyvene removes hooks and freezes what it is given."""
    return copy.deepcopy(_built(name))


def token_ids(seed: int = 0, *, batch: int = 2, tokens: int = 7) -> Tensor:
    """Return (B, S) token ids without special tokens."""
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    """Return a standard normal tensor of this shape, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_frame(width: int, rank: int, seed: int = 0) -> Tensor:
    """Return (D, K) with orthonormal columns."""
    return torch.linalg.qr(random_tensor(width, rank, seed=seed))[0]
