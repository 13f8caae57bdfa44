"""Blocks of the commonest shape in few passes over memory: one autograd node each, forwards and backwards by hand.

A frozen Llama-shaped block (RMS norm, rotary attention with separate projections, gated SiLU) of a Hugging Face model
takes some two hundred small operations per training step, most of them reading and writing what the last one wrote. At
few rows their dispatch, at many rows that traffic, costs more than the matrix products. Here a block is some forty,
and no gradient of a weight is ever thought of. The mask, the cache and the rotary tables are the model's own.

Nothing is assumed about a family: `fusable` looks at a block's own parts, and `suffix` compares the result with the
model's own full pass, logits and gradient, before it uses any of this (`Prefix.fused`). Blocks that a hook watches,
that have adapters, or that something may train, run as they always do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from intervene.fused_attention import Attended, attended, attended_back
from intervene.hooks import replaced
from intervene.model_state import all_hooks, idle
from intervene.precision import multiplies_fast

_BLOCK = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
# With so few rows, weights wider than this are read faster as W x^T, whose result lies by columns: 25 % on one core.
_FEW, _NARROW = 64, 1024
_SMALL = 2**21  # numbers in a weight of which a turned copy is kept, where that is faster


@dataclass(frozen=True)
class Parts:
    """What a fusable block consists of, without the block itself, whose key in a weak table this is."""

    attention: Any
    norms: tuple[Any, Any]
    linears: dict[str, Any]
    modules: tuple[nn.Module, ...]  # all below the block
    rounded: dict[str, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)
    copies: dict[tuple[str, int, torch.dtype], tuple[Tensor, int, Tensor]] = field(default_factory=dict)

    def free(self, block: nn.Module) -> bool:
        """Return whether nothing watches, replaces or trains anything here, and all is fp32 on the CPU."""
        learning = torch.is_grad_enabled()
        if all_hooks() or torch.is_autocast_enabled("cpu"):
            return False
        for module in (block, *self.modules):
            if watched(module) or "forward" in module.__dict__ or module.training:
                return False
            for one in module._parameters.values():
                if one is not None and (not _known(one) or (learning and one.requires_grad)):
                    return False
        return bool(self.attention.config._attn_implementation == "sdpa")

    def weights(self, fast: bool) -> Weights:
        """Return what the products need: the model's own weights, or joined ones in bf16, made once for their values.

        With `fast` the norms' weights are in them.
        """
        one, norms = self.linears, self.norms
        scales = norms[0].weight, norms[1].weight
        if not fast:
            q, k, v, o, gate, up, down = (one[name].weight for name in (*_ATTENTION, *_MLP))
            return Weights(q, (k, v), o, (gate, up), down, scales)
        kv, gate_up = self._joined(0, "k_proj", "v_proj"), self._joined(1, "gate_proj", "up_proj")
        q, o, down = self._joined(0, "q_proj"), self._joined(None, "o_proj"), self._joined(None, "down_proj")
        return Weights(q, (kv,), o, (gate_up,), down, (None, None))

    def turned(self, name: str, weights: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...]:
        """Return copies (in, out) of small wide weights, with which few rows go backwards a sixth faster; else none."""
        if not all(_by_columns(rows, one) and one.numel() <= _SMALL for one in weights):
            return ()
        made = []
        for number, one in enumerate(weights):
            key = name, number, one.dtype  # fast and exact passes may take turns
            held = self.copies.get(key)
            if held is None or held[0] is not one or held[1] != one._version:
                held = self.copies[key] = one, one._version, one.detach().t().contiguous()
            made.append(held[2])
        return tuple(made)

    def _joined(self, norm: int | None, *names: str) -> Tensor:
        """Return the named weights below one another in bf16, times the weight of the norm before them."""
        sources = [self.linears[name].weight for name in names]
        if norm is not None:
            sources.append(self.norms[norm].weight)
        versions = tuple(part for one in sources for part in (id(one), one._version))
        held = self.rounded.get(names[0])
        if held is None or held[0] != versions:
            joined = torch.cat([one.detach() for one in sources[: len(names)]])
            scaled = joined if norm is None else joined * sources[-1].detach()
            held = self.rounded[names[0]] = versions, scaled.bfloat16()
        return held[1]


@dataclass(frozen=True)
class Weights:
    """Weights (out, in) of a block's products; `scales` those of its norms, None where the products hold them."""

    q: Tensor
    kv: tuple[Tensor, ...]
    o: Tensor
    gate_up: tuple[Tensor, ...]
    down: Tensor
    scales: tuple[Tensor | None, Tensor | None]


def _known(parameter: Tensor) -> bool:
    return parameter.dtype == torch.float32 and parameter.device.type == "cpu" and not parameter.is_inference()


_Tree = tuple[tuple[nn.Module | None, ...], ...]  # the children of a block, and of each module below it
_KNOWN: WeakKeyDictionary[nn.Module, tuple[_Tree, Parts | None]] = WeakKeyDictionary()


def fusable(block: nn.Module) -> Parts | None:
    """Return the parts of `block` if it has the shape that is computed here and nothing watches or trains it."""
    tree = tuple(tuple(module._modules.values()) for module in block.modules())
    if block not in _KNOWN or _KNOWN[block][0] != tree:
        _KNOWN[block] = tree, _parts(block)
    parts = _KNOWN[block][1]
    return parts if parts is not None and parts.free(block) else None


def forget_copies(model: nn.Module) -> None:
    """Drop the copies of weights that blocks of `model` hold: a write through `.data` leaves no other trace."""
    for block in model.modules():
        parts = _KNOWN[block][1] if block in _KNOWN else None
        if parts is not None:
            parts.copies.clear()
            parts.rounded.clear()


def _parts(block: nn.Module) -> Parts | None:
    children = dict(block.named_children())
    if set(children) != _BLOCK:
        return None
    attention, mlp = children["self_attn"], children["mlp"]
    linears: dict[str, Any] = {name: getattr(attention, name, None) for name in _ATTENTION}
    linears |= {name: getattr(mlp, name, None) for name in _MLP}
    norms = (children["input_layernorm"], children["post_attention_layernorm"])
    act = getattr(mlp, "act_fn", None)
    known = {*linears.values(), *norms, attention, mlp, block, act}
    plain = all(type(one) is nn.Linear for one in linears.values()) and set(block.modules()) <= known
    rms = all(eps_of(norm) is not None for norm in norms)
    told = all(hasattr(attention, name) for name in ("head_dim", "scaling", "layer_idx", "config"))
    if not plain or not rms or not told or type(act).__name__ not in {"SiLU", "SiLUActivation"}:
        return None
    return Parts(attention, norms, linears, tuple(module for module in block.modules() if module is not block))


def watched(module: nn.Module) -> bool:
    """Return whether a hook of any kind is on `module`."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return bool(module._forward_hooks) and not all(map(idle, module._forward_hooks.values()))


def eps_of(norm: nn.Module) -> float | None:
    """Return what an RMS norm adds under its root; None: it is no such norm."""
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = getattr(norm, "weight", None)
    plain = isinstance(weight, Tensor) and weight.ndim == 1 and getattr(norm, "bias", None) is None
    return found if isinstance(found, float) and plain else None


@contextmanager
def fused(blocks: Sequence[nn.Module], *, last: nn.Module | None = None) -> Iterator[list[int]]:
    """Compute the fusable ones among `blocks` as one node each until the block ends; yields which they are.

    `last` is the model's last block, if only the last column of what it gives is wanted: its other columns are computed
    as far as that one reads them, and come out as they went in.
    """
    found = [(number, block, fusable(block)) for number, block in enumerate(blocks)]
    with replaced([(block, _Forward(block, parts, block is last)) for _, block, parts in found if parts]):
        yield [number for number, _, parts in found if parts]


class _Forward:
    """Stands in for a block's forward, with its signature."""

    def __init__(self, block: nn.Module, parts: Parts, last: bool) -> None:
        self.own = type(block).forward.__get__(block)
        self.parts, self.last = parts, last

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **more: Any,
    ) -> Any:
        if position_embeddings is None:  # rotary tables are made elsewhere, so this is no block of the kind
            return self.own(
                hidden_states, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, use_cache=use_cache, **more,
            )  # fmt: skip
        mask = additive(attention_mask, hidden_states)
        call = _Call(self.parts, mask, past_key_values, position_embeddings, self.last)
        return _Block.apply(hidden_states, call)  # type: ignore[no-untyped-call]


def additive(mask: Tensor | None, h: Tensor) -> Tensor | None:
    """Return a mask of True and False as one of 0 and the least number: padding that sees nothing stays finite."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=h.dtype).masked_fill_(~mask, torch.finfo(h.dtype).min)


@dataclass(frozen=True)
class _Call:
    """What one call of a block was given besides the stream."""

    parts: Parts
    mask: Tensor | None
    cache: Any
    tables: tuple[Tensor, Tensor]
    last: bool

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        """Return attention of q (B, Q, H, d) on the cache and on k and v (B, S, G, d)."""
        module: Any = self.parts.attention
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.cache is not None:
            held = self.cache.layers[module.layer_idx]
            if getattr(held, "room", None) is not None:
                for whole, part in zip(held.room, (k, v), strict=True):
                    whole[:, :, -part.shape[2] :] = part
                k, v = held.room
            elif held.keys is not None:
                k, v = torch.cat([held.keys, k], 2), torch.cat([held.values, v], 2)
        mask = None if self.mask is None else self.mask[:, :, -1:] if self.last else self.mask
        return attended(q, k, v, mask, module.scaling)

    def attend_back(self, grad: Tensor, kept: Attended, new: int) -> tuple[Tensor, ...]:
        """Return the gradients to q, k and v, (B, ., heads, d), the latter two of the `new` columns."""
        return tuple(part.transpose(1, 2) for part in attended_back(grad, kept, self.parts.attention.scaling, new))


class _Block(torch.autograd.Function):
    """One block, (B, S, D) -> (B, S, D), with its gradient to the stream. The file says what is left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call) -> Tensor:
        parts, fast, wanted = call.parts, multiplies_fast(x), ctx.needs_input_grad[0]
        B, S, D = x.shape
        d = parts.attention.head_dim
        columns = slice(S - 1, S) if call.last else slice(0, S)

        held, one, tables = parts.weights(fast), parts.linears, _tables(call.tables, d)
        normed, scale = _normed(x.reshape(-1, D), parts.norms[0], held.scales[0], fast)
        chosen = normed.view(B, S, D)[:, columns].reshape(-1, D) if call.last else normed
        (q,) = _products(chosen, (held.q,), [one["q_proj"]])
        k, v = _products(normed, held.kv, [one["k_proj"], one["v_proj"]])
        q = _rotated(q.float().view(B, -1, one["q_proj"].out_features // d, d), tables, columns)
        k = _rotated(k.float().view(B, S, -1, d), tables, slice(0, S))
        kept = call.attend(q, k, v.float().view(B, S, -1, d))
        taken = kept.out.transpose(1, 2).reshape(len(chosen), -1)
        (added,) = _products(_cast(taken, fast), (held.o,), [one["o_proj"]])
        middle = x[:, columns].reshape(-1, D) + added.float()
        normed, second = _normed(middle, parts.norms[1], held.scales[1], fast)
        gate, up = _products(normed, held.gate_up, [one["gate_proj"], one["up_proj"]])
        shut = nn.functional.silu(gate)
        (added,) = _products(shut * up, (held.down,), [one["down_proj"]])
        made = (middle + added.float()).view(B, -1, D)
        if wanted:
            ctx.save_for_backward(x)
            ctx.call, ctx.fast, ctx.columns, ctx.tables, ctx.weights = call, fast, columns, tables, held
            ctx.attention, ctx.kept = kept, (scale, middle, second, gate, up, shut)
        return torch.cat([x[:, : S - 1], made], 1) if call.last and S > 1 else made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        parts, fast, columns = ctx.call.parts, ctx.fast, ctx.columns
        scale, middle, second, gate, up, shut = ctx.kept
        B, S, D = x.shape

        held = ctx.weights
        above = grad[:, columns].reshape(-1, D)
        turned = parts.turned("down", (held.down,), len(above))
        inner = torch.mm(turned[0], _cast(above, fast).t()).t() if turned else _back([above], (held.down,), fast)
        if up.stride(0) == 1 != inner.stride(0):  # few rows: as gate and up lie
            inner = inner.t().contiguous().t()
        turned = parts.turned("gate_up", held.gate_up, len(above))
        to_normed = _through_gate(inner, gate, up, shut, held.gate_up, turned).float()
        above = above + _norm_back(to_normed, middle, second, held.scales[1])
        heads = ctx.attention.out.shape
        to_attended = _back([above], (held.o,), fast).float().view(B, heads[2], heads[1], heads[3]).transpose(1, 2)
        to_q, to_k, to_v = ctx.call.attend_back(to_attended, ctx.attention, S)
        to_k, to_v = _rotated(to_k, ctx.tables, slice(0, S), -1).reshape(B * S, -1), to_v.reshape(B * S, -1)
        to_q = _rotated(to_q, ctx.tables, columns, -1).flatten(0, 1).flatten(1)
        to_normed = _back([to_k, to_v], held.kv, fast).float()
        to_normed.view(B, S, D)[:, columns] += _back([to_q], (held.q,), fast).view(B, -1, D)
        below = _norm_back(to_normed, x.reshape(-1, D), scale, held.scales[0]).view(B, S, D)
        below[:, columns] += above.view(B, -1, D)
        if ctx.call.last and S > 1:
            below[:, : S - 1] += grad[:, : S - 1]
        return below, None


def _cast(h: Tensor, fast: bool) -> Tensor:
    return h.bfloat16() if fast else h


def _products(h: Tensor, weights: tuple[Tensor, ...], linears: Sequence[Any]) -> list[Tensor]:
    """Return h W^T + b, (M, out), of each linear layer, whose weights may be joined; few rows may lie by columns."""
    if len(weights) < len(linears):
        made = list(torch.split(_product(h, weights[0]), [one.out_features for one in linears], 1))
    else:
        made = [_product(h, weight) for weight in weights]
    return [
        part if one.bias is None else part + one.bias.to(part.dtype) for part, one in zip(made, linears, strict=True)
    ]


def _through_gate(
    inner: Tensor, gate: Tensor, up: Tensor, shut: Tensor, weights: tuple[Tensor, ...], turned: tuple[Tensor, ...]
) -> Tensor:
    """Return the gradient (M, D) below a gated product from `inner` (M, F), that to its value; `inner` is used up."""
    if len(weights) > 1:
        to_gate, to_up = torch.ops.aten.silu_backward(inner * up, gate), inner.mul_(shut)
        if turned:
            return torch.mm(turned[0], to_gate.t()).addmm_(turned[1], to_up.t()).t()
        return torch.mm(to_gate, weights[0]).addmm_(to_up, weights[1])
    both = torch.empty(len(inner), len(weights[0]), dtype=inner.dtype)
    first, second = torch.split(both, inner.shape[1], 1)
    torch.ops.aten.silu_backward.grad_input(inner * up, gate, grad_input=first)
    torch.mul(inner, shut, out=second)
    return torch.mm(turned[0], both.t()).t() if turned else torch.mm(both, weights[0])


def _product(h: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(weight, h.t()).t() if _by_columns(len(h), weight) else torch.mm(h, weight.t())


def _back(grads: Sequence[Tensor], weights: tuple[Tensor, ...], fast: bool) -> Tensor:
    """Return the sum of grad W, (M, in), in the weights' precision; the weights may be joined."""
    if len(weights) < len(grads):
        joined = torch.empty(len(grads[0]), len(weights[0]), dtype=weights[0].dtype)
        for part, grad in zip(torch.split(joined, [one.shape[1] for one in grads], 1), grads, strict=True):
            part.copy_(grad)
        return torch.mm(joined, weights[0])
    made = torch.mm(_cast(grads[0], fast), weights[0])
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        made.addmm_(_cast(grad, fast), weight)
    return made


def _by_columns(rows: int, weight: Tensor) -> bool:
    return rows <= _FEW and max(weight.shape) > _NARROW


def _normed(h: Tensor, norm: Any, weight: Tensor | None, fast: bool) -> tuple[Tensor, Tensor]:
    """Return h (M, D) over its root mean square, times the norm's weight if given, and each row's factor (M, 1)."""
    squares = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_()
    scale = squares.div_(h.shape[-1]).add_(eps_of(norm) or 0.0).rsqrt_()
    made = h * scale
    return _cast(made if weight is None else made.mul_(weight), fast), scale


def _norm_back(grad: Tensor, h: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
    """Return the gradient to h (M, D) of `_normed`; `grad` is overwritten."""
    grad = grad if weight is None else grad.mul_(weight)
    along = (grad * h).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-h.shape[-1])
    return grad.mul_(scale).addcmul_(h, along)


def _tables(tables: tuple[Tensor, Tensor], d: int) -> tuple[Tensor, Tensor]:
    """Return cosines (B, S, 1, d) and sines (B, S, 1, d/2); the model's hold each of them twice."""
    return tables[0][..., None, :], tables[1][..., None, : d // 2]


def _rotated(h: Tensor, tables: tuple[Tensor, Tensor], columns: slice, direction: int = 1) -> Tensor:
    """Return h (B, S, H, d) with pairs (i, i + d/2) turned by each column's angles; direction -1: turned back."""
    cos, sin = (part[:, columns] for part in tables)
    half = h.shape[-1] // 2
    made = h * cos
    made[..., :half].addcmul_(h[..., half:], sin, value=-direction)
    made[..., half:].addcmul_(h[..., :half], sin, value=direction)
    return made
