"""Hand-written forward passes of GPT-2 and Llama: plain matrix products that only read a model's weights.

They share no code with the engine or with transformers, so a number that both give is right. Every named tensor on
the way is shown to a callback, which may return another tensor in its place:

    logits = llama_logits(model, ids, at=replacing("mlp_output", 1, lambda h: h * 0))

Shapes: B batch, S tokens, D width, H query heads, G key/value heads, d width of a head, F feed-forward width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

# (component, layer or None, tensor) -> the tensor that the forward pass goes on with
Callback = Callable[[str, "int | None", Tensor], Tensor]


def untouched(_component: str, _layer: int | None, tensor: Tensor) -> Tensor:
    """Return the tensor as it is: the forward pass without any edit."""
    return tensor


def replacing(component: str, layer: int | None, change: Callable[[Tensor], Tensor]) -> Callback:
    """Return a callback that applies `change` at one component of one layer and nothing elsewhere."""

    def at(name: str, index: int | None, tensor: Tensor) -> Tensor:
        return change(tensor) if (name, index) == (component, layer) else tensor

    return at


class Recorder:
    """A callback that changes nothing and keeps every tensor: `record.seen["mlp_output", 1]`."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int | None], Tensor] = {}

    def __call__(self, component: str, layer: int | None, tensor: Tensor) -> Tensor:
        """Keep the tensor and hand it on."""
        self.seen[component, layer] = tensor.detach().clone()
        return tensor


def blocked_pairs(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return (B, 1, S, S), true where a query may not look at a key: later tokens and padding."""
    tokens = ids.shape[1]
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)[None, None]  # (1, 1, S, S)
    return later if mask is None else later | ~mask.bool()[:, None, None, :]  # (B, 1, S, S)


def split_heads(flat: Tensor, heads: int) -> Tensor:
    """Return (B, S, H, d) from (B, S, H*d)."""
    return flat.reshape(*flat.shape[:2], heads, -1)


def shown_projection(flat: Tensor, name: str, heads: int, layer: int, at: Callback) -> Tensor:
    """Return (B, S, H, d) after `name` was shown as a whole (B, S, H*d) and head by head."""
    whole = at(name, layer, flat)
    return at(f"head_{name}", layer, split_heads(whole, heads))


def attend(query: Tensor, key: Tensor, value: Tensor, blocked: Tensor, layer: int, at: Callback) -> Tensor:
    """Return all heads' outputs, concatenated (B, S, H*d), from (B, S, H, d) each."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(blocked, torch.finfo(scores.dtype).min).softmax(-1)  # (B, H, S, S)
    mixed = torch.einsum("bhqk,bkhd->bqhd", weights, value)  # (B, S, H, d)
    mixed = at("head_attention_value_output", layer, mixed)
    return at("attention_value_output", layer, mixed.reshape(*mixed.shape[:2], -1))


def layer_norm(h: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Return (h - mean) / sqrt(variance + eps) * weight + bias over the last axis."""
    centred = h - h.mean(-1, keepdim=True)
    variance = centred.pow(2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias


def gelu_new(h: Tensor) -> Tensor:
    """Return the tanh approximation of GELU that GPT-2 was trained with."""
    return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


@torch.no_grad()
def gpt2_logits(
    model: nn.Module,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    at: Callback = untouched,
) -> Tensor:
    """Return the logits (B, S, V) of a GPT2LMHeadModel for token ids (B, S)."""
    body, heads = model.transformer, model.config.n_head
    positions = torch.arange(ids.shape[1])[None] if positions is None else positions
    blocked = blocked_pairs(ids, mask)
    h = at("embedding_output", None, body.wte.weight[ids] + body.wpe.weight[positions])  # (B, S, D)
    for layer, block in enumerate(body.h):
        h = at("block_input", layer, h)
        x = at("attention_input", layer, layer_norm(h, block.ln_1))
        fused = x @ block.attn.c_attn.weight + block.attn.c_attn.bias  # (B, S, 3D)
        names = ("query_output", "key_output", "value_output")
        query, key, value = (
            shown_projection(part, name, heads, layer, at)
            for part, name in zip(fused.split(fused.shape[-1] // 3, dim=-1), names, strict=True)
        )
        mixed = attend(query, key, value, blocked, layer, at)
        out = at("attention_output", layer, mixed @ block.attn.c_proj.weight + block.attn.c_proj.bias)
        h = h + at("attention_write", layer, out)
        x = at("mlp_input", layer, layer_norm(h, block.ln_2))
        inner = at("mlp_activation", layer, gelu_new(x @ block.mlp.c_fc.weight + block.mlp.c_fc.bias))
        inner = at("mlp_neurons", layer, inner)  # (B, S, F)
        out = at("mlp_output", layer, inner @ block.mlp.c_proj.weight + block.mlp.c_proj.bias)
        h = at("block_output", layer, h + at("mlp_write", layer, out))
    return at("final_norm_output", None, layer_norm(h, body.ln_f)) @ model.lm_head.weight.T


def rms_norm(h: Tensor, norm: nn.Module) -> Tensor:
    """Return h / sqrt(mean(h^2) + eps) * weight over the last axis."""
    return h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight


def linear(h: Tensor, layer: nn.Linear) -> Tensor:
    """Return h W^T (+ b)."""
    out = h @ layer.weight.T
    return out if layer.bias is None else out + layer.bias


def rotate(h: Tensor, positions: Tensor, base: float) -> Tensor:
    """Return (B, S, H, d) with rotary positions: dimension i turns together with dimension i + d/2."""
    half = h.shape[-1] // 2
    speeds = base ** (-torch.arange(half, dtype=torch.float32) / half)  # (d/2,)
    angles = positions[:, :, None, None].float() * speeds  # (B, S, 1, d/2)
    first, second = h[..., :half], h[..., half:]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


@torch.no_grad()
def llama_logits(
    model: nn.Module,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    at: Callback = untouched,
) -> Tensor:
    """Return the logits (B, S, V) of a LlamaForCausalLM (also Mistral and Qwen2 without a window) for ids (B, S).

    Grouped key/value heads are repeated in place (head g serves queries g*H/G ... (g+1)*H/G - 1), and H*d may differ
    from D.
    """
    body, config = model.model, model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    base = config.rope_parameters["rope_theta"]
    positions = torch.arange(ids.shape[1])[None].expand_as(ids) if positions is None else positions
    blocked = blocked_pairs(ids, mask)
    h = at("embedding_output", None, body.embed_tokens.weight[ids])  # (B, S, D)
    for layer, block in enumerate(body.layers):
        h = at("block_input", layer, h)
        x = at("attention_input", layer, rms_norm(h, block.input_layernorm))
        attention = block.self_attn
        query = shown_projection(linear(x, attention.q_proj), "query_output", heads, layer, at)  # (B, S, H, d)
        key = shown_projection(linear(x, attention.k_proj), "key_output", groups, layer, at)  # (B, S, G, d)
        value = shown_projection(linear(x, attention.v_proj), "value_output", groups, layer, at)
        query, key = rotate(query, positions, base), rotate(key, positions, base)
        key, value = (t.repeat_interleave(heads // groups, dim=2) for t in (key, value))  # (B, S, H, d)
        mixed = attend(query, key, value, blocked, layer, at)
        out = at("attention_output", layer, linear(mixed, attention.o_proj))
        h = h + at("attention_write", layer, out)
        x = at("mlp_input", layer, rms_norm(h, block.post_attention_layernorm))
        gate = linear(x, block.mlp.gate_proj)
        active = at("mlp_activation", layer, gate * torch.sigmoid(gate))  # SiLU, (B, S, F)
        inner = at("mlp_neurons", layer, active * linear(x, block.mlp.up_proj))
        out = at("mlp_output", layer, linear(inner, block.mlp.down_proj))
        h = at("block_output", layer, h + at("mlp_write", layer, out))
    return at("final_norm_output", None, rms_norm(h, body.norm)) @ model.lm_head.weight.T
