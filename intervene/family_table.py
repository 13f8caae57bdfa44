"""Where each model family keeps its components: data, not classes.

A `Family` is a set of dotted module paths. `FAMILIES` maps `config.model_type` to one, or to a function of the
configuration where the layout depends on it. A family refuses the configuration values it does not handle, so that
an unforeseen variant is an error and never a wrong tensor. Read against transformers 5.23; `check_family` verifies
an entry on any model. `intervene.resolve` turns a family and a site into a module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from intervene.errors import UnsupportedModel, asked_found_do

QKVLayout = Literal["stacked", "per_head", "grouped"]


@dataclass(frozen=True)
class Refusal:
    """A configuration key that must have one of the `allowed` values; otherwise the model is refused."""

    key: str
    allowed: tuple[Any, ...]
    why: str
    do: str


@dataclass(frozen=True)
class Family:
    """Dotted paths of one family's components.

    `backbones` are relative to the Hugging Face model and tried in order: the first that leads to a module holding
    `layers` is the backbone, which must be the module that every forward pass really calls. `layers`, `final_norm`
    and `embedding` are relative to the backbone, everything below them to one block. None means that the family has
    no such module, and that the components which need it are refused.

    `qkv_layout` names the order of the fused projection's columns, with H query heads, G key/value heads, width d:
        stacked   [q of all heads | k of all heads | v of all heads], G may differ from H
        per_head  (H, 3, d): q, k and v of head 0, then of head 1, ...
        grouped   (G, H/G + 2, d): the query heads of group 0, its key, its value, then group 1, ...
    """

    backbones: tuple[str, ...] = ("model", "")
    layers: str = "layers"
    final_norm: str | None = "norm"
    embedding: str = "embed_tokens"

    attention: str | None = "self_attn"
    q_proj: str | None = "self_attn.q_proj"
    k_proj: str | None = "self_attn.k_proj"
    v_proj: str | None = "self_attn.v_proj"
    qkv_proj: str | None = None  # the three in one module; q_proj, k_proj and v_proj are then ignored
    qkv_layout: QKVLayout = "stacked"
    o_proj: str | None = "self_attn.o_proj"
    attention_output: str | None = None  # None: `attention`. Set where that module's output holds the residual too
    attention_write: str | None = None  # None: as attention_output. A post-norm or dropout module

    mlp: str | None = "mlp"
    act: str | None = "mlp.act_fn"
    gate_proj: str | None = "mlp.gate_proj"
    up_proj: str | None = "mlp.up_proj"
    gate_up_proj: str | None = None  # [gate | up] in one module; gate_proj and up_proj are then ignored
    down_proj: str | None = "mlp.down_proj"
    mlp_input: str | None = None  # None: `mlp`. The module whose input is mlp_input
    mlp_output: str | None = None  # None: `mlp`
    mlp_write: str | None = None  # None: as mlp_output

    router: str | None = None
    experts: str | None = None

    heads: str = "num_attention_heads"  # configuration keys
    kv_heads: str | int | None = "num_key_value_heads"  # a number where no key says it; None: as many as heads
    write_scale: str | None = None  # key of the factor by which sub-layer outputs enter the residual stream
    overwritten: frozenset[str] = frozenset()  # components whose tensor the model later changes in place
    refuses: tuple[Refusal, ...] = field(default=())

    def require(self, config: object, model_type: str) -> None:
        """Raise UnsupportedModel if `config` has a value this family does not handle."""
        for refusal in self.refuses:
            value = getattr(config, refusal.key, refusal.allowed[0])
            if value not in refusal.allowed:
                raise UnsupportedModel(
                    asked_found_do(f"{model_type} with {refusal.key}={value!r}", refusal.why, refusal.do)
                )


FamilyOrFunction = Family | Callable[[Any], Family]

_PATHS_STILL_WORK = "Use a 'path:<module>.input' or 'path:<module>.output' site, which needs no family."

_LLAMA = Family()

_POST_NORMS = replace(_LLAMA, attention_write="post_attention_layernorm", mlp_write="post_feedforward_layernorm")

_GPT2 = Family(
    backbones=("transformer", ""),
    layers="h",
    final_norm="ln_f",
    embedding="wte",
    attention="attn",
    qkv_proj="attn.c_attn",
    qkv_layout="stacked",
    o_proj="attn.c_proj",
    act="mlp.act",
    gate_proj=None,
    up_proj="mlp.c_fc",
    down_proj="mlp.c_proj",
    kv_heads=None,
    refuses=(
        Refusal(
            "add_cross_attention",
            (False, None),
            "cross-attention adds a third write to the residual stream, which has no name here.",
            _PATHS_STILL_WORK,
        ),
    ),
)

_GPT_NEO = replace(
    _GPT2,
    qkv_proj=None,
    q_proj="attn.attention.q_proj",
    k_proj="attn.attention.k_proj",
    v_proj="attn.attention.v_proj",
    o_proj="attn.attention.out_proj",
    refuses=(),
)

_GPT_NEOX = Family(
    backbones=("gpt_neox", ""),
    final_norm="final_layer_norm",
    embedding="embed_in",
    attention="attention",
    qkv_proj="attention.query_key_value",
    qkv_layout="per_head",
    o_proj="attention.dense",
    attention_write="post_attention_dropout",
    act="mlp.act",
    gate_proj=None,
    up_proj="mlp.dense_h_to_4h",
    down_proj="mlp.dense_4h_to_h",
    mlp_write="post_mlp_dropout",
    kv_heads=None,
)

_PHI = replace(
    _LLAMA,
    final_norm="final_layernorm",
    o_proj="self_attn.dense",
    act="mlp.activation_fn",
    gate_proj=None,
    up_proj="mlp.fc1",
    down_proj="mlp.fc2",
)

_PHI3 = replace(
    _LLAMA,
    qkv_proj="self_attn.qkv_proj",
    qkv_layout="stacked",
    attention_write="resid_attn_dropout",
    act="mlp.activation_fn",
    gate_up_proj="mlp.gate_up_proj",
    mlp_write="resid_mlp_dropout",
)

_OPT = Family(
    # OPTForCausalLM calls model.decoder, OPTModel calls decoder: neither calls what encloses it.
    backbones=("model.decoder", "decoder", ""),
    final_norm="final_layer_norm",
    o_proj="self_attn.out_proj",
    mlp=None,  # fc1, activation_fn and fc2 belong to the block itself, and see (B*S, D)
    act="activation_fn",
    gate_proj=None,
    up_proj="fc1",
    down_proj="fc2",
    mlp_input="fc1",
    mlp_output="fc2",
    kv_heads=None,
    refuses=(
        Refusal(
            "do_layer_norm_before",
            (True,),
            "with norms after the sum, block_input + attention_write + mlp_write is not block_output.",
            f"Use an OPT other than opt-350m. {_PATHS_STILL_WORK}",
        ),
    ),
)

_MOE = replace(_LLAMA, act=None, gate_proj=None, up_proj=None, down_proj=None, router="mlp.gate", experts="mlp.experts")


def _mixtral(config: Any) -> Family:
    """Return mixtral's family: with jitter its training forward multiplies the feed-forward input in place."""
    jitter = getattr(config, "router_jitter_noise", 0.0)
    return replace(_MOE, overwritten=frozenset({"mlp_input"})) if jitter else _MOE


def _bloom(config: Any) -> Family:
    """Return bloom's family: its sub-layers add the residual inside, so the projections stand for their outputs."""
    exact = Refusal(
        "slow_but_exact",
        (False, None),
        "with pretraining_tp > 1 the output projections are applied in slices, without calling their modules.",
        "Set model.config.slow_but_exact = False before building the model.",
    )
    return Family(
        backbones=("transformer", ""),
        layers="h",
        final_norm="ln_f",
        embedding="word_embeddings",
        attention="self_attention",
        qkv_proj="self_attention.query_key_value",
        qkv_layout="per_head",
        o_proj="self_attention.dense",
        attention_output="self_attention.dense",
        act="mlp.gelu_impl",
        gate_proj=None,
        up_proj="mlp.dense_h_to_4h",
        down_proj="mlp.dense_4h_to_h",
        mlp_output="mlp.dense_4h_to_h",
        kv_heads=None,
        refuses=(
            Refusal(
                "apply_residual_connection_post_layernorm",
                (False,),
                "the residual stream then restarts from a norm's output, and the writes do not sum to block_output.",
                _PATHS_STILL_WORK,
            ),
            *((exact,) if getattr(config, "pretraining_tp", 1) > 1 else ()),
        ),
    )


def _falcon(config: Any) -> Family:
    """Return falcon's family: three layouts of the fused projection, parallel or sequential sub-layers."""
    layout: QKVLayout
    kv_heads: str | int | None
    if config.new_decoder_architecture:
        layout, kv_heads = "grouped", "num_kv_heads"
    elif config.multi_query:
        layout, kv_heads = "stacked", 1
    else:
        layout, kv_heads = "per_head", None
    parallel = config.new_decoder_architecture or config.parallel_attn
    return Family(
        backbones=("transformer", ""),
        layers="h",
        final_norm="ln_f",
        embedding="word_embeddings",
        attention="self_attention",
        qkv_proj="self_attention.query_key_value",
        qkv_layout=layout,
        o_proj="self_attention.dense",
        act="mlp.act",
        gate_proj=None,
        up_proj="mlp.dense_h_to_4h",
        down_proj="mlp.dense_4h_to_h",
        kv_heads=kv_heads,
        # The block runs `mlp_output += attention_output`: a reader that keeps the tensor would see the sum.
        overwritten=frozenset({"mlp_output", "mlp_write"}) if parallel else frozenset(),
    )


_BARE = Family(  # a stack of blocks and nothing that has a name inside them: the networks of intervene.networks
    backbones=("",),
    final_norm=None,
    embedding="",
    attention=None,
    q_proj=None,
    k_proj=None,
    v_proj=None,
    o_proj=None,
    mlp=None,
    act=None,
    gate_proj=None,
    up_proj=None,
    down_proj=None,
    kv_heads=None,
)

FAMILIES: dict[str, FamilyOrFunction] = {
    "bloom": _bloom,
    "falcon": _falcon,
    "gemma": _LLAMA,
    "gemma2": _POST_NORMS,
    "gemma3_text": _POST_NORMS,
    "gpt2": _GPT2,
    "gpt_neo": _GPT_NEO,
    "gpt_neox": _GPT_NEOX,
    "gpt_oss": replace(_MOE, router="mlp.router"),
    "gru": _BARE,
    "granite": replace(_LLAMA, write_scale="residual_multiplier"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mlp": _BARE,
    "mixtral": _mixtral,
    "olmo": _LLAMA,
    "olmo2": _POST_NORMS,
    "opt": _OPT,
    "phi": _PHI,
    "phi3": _PHI3,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
}


def register_family(model_type: str, family: FamilyOrFunction) -> None:
    """Make `family` the one for models whose `config.model_type` is `model_type`, replacing any earlier one.

    `family` is a Family, or a function that returns one for a configuration. Verify it with
    `intervene.check.check_family` before trusting a number obtained through it.
    """
    FAMILIES[model_type] = family
