"""What to say about a model of no known family: its first block, and a `register_family` line to start from."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from intervene.errors import close_names

_MAX_LINES = 40
# Family field -> endings of module names that usually mean it, best first.
_ENDINGS: dict[str, tuple[str, ...]] = {
    "attention": ("self_attn", "self_attention", "attention", "attn"),
    "q_proj": ("q_proj", "query", "wq", "q"),
    "k_proj": ("k_proj", "key", "wk", "k"),
    "v_proj": ("v_proj", "value", "wv", "v"),
    "qkv_proj": ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv"),
    "o_proj": ("o_proj", "out_proj", "attn.c_proj", "attention.dense", "attn.dense", "wo", "Wo"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
    "act": ("act_fn", "activation_fn", "act"),
    "gate_proj": ("gate_proj", "w1"),
    "up_proj": ("up_proj", "fc1", "c_fc", "dense_h_to_4h", "fc_in", "w3"),
    "down_proj": ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h", "fc_out", "w2"),
}
_NORM_ENDINGS = ("final_norm", "final_layernorm", "final_layer_norm", "ln_f", "norm", "norm_f")


def describe_unknown(hf: nn.Module, model_type: str | None, known: Iterable[str]) -> str:
    """Return the text of UnknownFamily: what was asked, what the model holds, and the line that would register it."""
    asked = f"Model of class {type(hf).__name__}"
    if model_type is None:
        return (
            f"{asked}: it has no config.model_type, so its components have no names here. "
            "Use 'path:<module>.input' or 'path:<module>.output' sites, which need no family."
        )
    text = f"{asked}: no family is registered for model_type {model_type!r}. {close_names(model_type, known)}"
    found = first_repeated_block(hf)
    if found is None:
        return f"{text} No list of repeated blocks was found. Use 'path:' sites, which need no family."
    path, blocks = found
    return (
        f"{text}\nThe blocks are probably {path} ({len(blocks)} of them). The first is\n{tree(blocks[0])}\n"
        "Check each guess, paste, then run intervene.check.check_family(model, inputs); or use 'path:' sites:\n"
        f"{registration_line(hf, model_type, path, blocks[0])}"
    )


def first_repeated_block(hf: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Return the path and list of the blocks: the outermost ModuleList of one class with most parameters."""
    lists = [
        (name, module)
        for name, module in hf.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(child) for child in module}) == 1
    ]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    return max(outer, key=lambda pair: sum(p.numel() for p in pair[1].parameters()), default=None)


def tree(block: nn.Module) -> str:
    """Return the names and classes of a block's modules, one a line, indented by depth."""
    lines = [
        f"    {'  ' * name.count('.')}{name.rsplit('.')[-1]}: {type(module).__name__}"
        for name, module in block.named_modules()
        if name
    ]
    more = len(lines) - _MAX_LINES
    return "\n".join([*lines[:_MAX_LINES], f"    ... and {more} more"] if more > 0 else lines)


def _ending(names: Iterable[str], endings: tuple[str, ...]) -> str | None:
    """Return the shortest of `names` that is, or ends with a dot and, the first of `endings` that any name has."""
    for ending in endings:
        hits = [name for name in names if name == ending or name.endswith(f".{ending}")]
        if hits:
            return min(hits, key=len)
    return None


def registration_line(hf: nn.Module, model_type: str, path: str, block: nn.Module) -> str:
    """Return a `register_family(...)` line with the best guess for every field."""
    backbone, _, layers = path.rpartition(".")
    inside = [name for name, _ in block.named_modules() if name]
    owner = hf.get_submodule(backbone)
    fields: dict[str, object] = {
        "backbones": (backbone, "") if backbone else ("",),
        "layers": layers,
        "final_norm": _ending([name for name, _ in owner.named_children()], _NORM_ENDINGS),
        "embedding": next((n for n, m in owner.named_modules() if isinstance(m, nn.Embedding)), "?"),
    }
    fields |= {name: _ending(inside, endings) for name, endings in _ENDINGS.items()}
    if fields["q_proj"] is not None:
        del fields["qkv_proj"]
    body = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    return f"register_family({model_type!r}, Family({body}))"
