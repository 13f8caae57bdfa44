"""Which tensor: `Site` names a component of a layer, and optionally units (heads, neurons, experts) of it.

A site is written `"L3.mlp_output"`, `"L-1.head_output[2,5]"` or `"embedding_output"`. A name in `ALIASES` becomes
the full one on construction, so two ways of writing one site compare equal. Anything that is no component but a
dotted path (`"path:encoder.layers.2.linear1.output"`) names a module's input or output directly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from intervene.errors import InterveneError, UnknownComponent, close_names

# name -> what it is. Shapes are of one forward pass; D width, H query heads, G key/value heads, F feed-forward width.
COMPONENTS: dict[str, str] = {
    "embedding_output": "residual stream before the first block (B, S, D); no layer",
    "block_input": "residual stream entering the block (B, S, D)",
    "block_output": "residual stream leaving the block (B, S, D)",
    "attention_input": "what the attention module reads, after any pre-norm (B, S, D)",
    "attention_output": "what the attention module returns, before any post-norm (B, S, D)",
    "attention_write": "what attention adds to the residual stream, after any post-norm (B, S, D)",
    "attention_value_output": "all heads' outputs, concatenated: input of the output projection (B, S, H*d)",
    "head_attention_value_output": "one head's output, before the output projection (B, S, d per head)",
    "query_output": "query projection (B, S, H*d)",
    "key_output": "key projection (B, S, G*d)",
    "value_output": "value projection (B, S, G*d)",
    "head_query_output": "one query head (B, S, d per head)",
    "head_key_output": "one key head (B, S, d per head)",
    "head_value_output": "one value head (B, S, d per head)",
    "mlp_input": "what the feed-forward module reads, after any pre-norm (B, S, D)",
    "mlp_activation": "output of the activation function, before any gating product (B, S, F)",
    "mlp_neurons": "what the down projection reads: activation times gate, if gated (B, S, F)",
    "mlp_output": "what the feed-forward module returns, before any post-norm (B, S, D)",
    "mlp_write": "what the feed-forward module adds to the residual stream, after any post-norm (B, S, D)",
    "router_output": "router logits of a mixture of experts (B, S, E)",
    "expert_output": "one expert's weighted contribution to mlp_output (B, S, D per expert)",
    "final_norm_output": "residual stream after the final norm (B, S, D); no layer",
}
ALIASES = {"head_output": "head_attention_value_output"}
LAYERLESS = frozenset({"embedding_output", "final_norm_output"})
HEAD_COMPONENTS = frozenset(name for name in COMPONENTS if name.startswith("head_"))
PATH_PREFIX = "path:"

_TEXT = re.compile(r"^(?:L(?P<layer>-?\d+)\.)?(?P<component>[^\[\]]+?)(?:\[(?P<units>[\d,\s-]*)\])?$")


@dataclass(frozen=True)
class Site:
    """One tensor inside a model: `component` of block `layer` (0-based; negative counts from the end).

    `units` selects heads (head components), experts (`expert_output`) or single columns (every other component);
    None means all. Component names are in `COMPONENTS`; `"path:<dotted module path>.input"` or `".output"` names any
    module, without a layer.

    Raises:
        UnknownComponent: the name is neither a component, an alias nor a path.
        InterveneError: a layer is missing, superfluous, or units are empty, negative or repeated.
    """

    component: str
    layer: int | None = None
    units: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "component", ALIASES.get(self.component, self.component))
        if self.units is not None:
            object.__setattr__(self, "units", tuple(int(unit) for unit in self.units))
        self._check_component()
        self._check_units()

    def _check_component(self) -> None:
        if self.is_path:
            if not self.component.endswith((".input", ".output")):
                raise UnknownComponent(
                    f"Site {self.component!r}: a path must say which side it means. "
                    f"Write {self.component}.output or {self.component}.input."
                )
        elif self.component not in COMPONENTS:
            known = [*COMPONENTS, *ALIASES]
            raise UnknownComponent(
                f"Component {self.component!r}: there is none of that name. {close_names(self.component, known)}"
            )
        if (self.is_path or self.component in LAYERLESS) and self.layer is not None:
            raise InterveneError(f"Site {self}: this component belongs to no layer. Write {self.component!r}.")
        if not self.is_path and self.component not in LAYERLESS and self.layer is None:
            raise InterveneError(
                f"Site {self.component!r}: this component exists once per layer, and no layer was given. "
                f"Write 'L0.{self.component}' for the first block."
            )

    def _check_units(self) -> None:
        if self.units is None:
            return
        if not self.units or len(set(self.units)) != len(self.units) or min(self.units) < 0:
            raise InterveneError(
                f"Site {self}: units must be distinct numbers from 0, found {list(self.units)}. "
                "Leave units out for all of them."
            )

    @property
    def is_path(self) -> bool:
        """Whether this site names a module by its dotted path instead of a component."""
        return self.component.startswith(PATH_PREFIX)

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Return the site that `text` names; a Site is returned as it is."""
        if isinstance(text, Site):
            return text
        if not isinstance(text, str):
            raise InterveneError(f"Site {text!r}: a text or a Site is needed. Write e.g. 'L3.block_output'.")
        match = _TEXT.match(text.strip())
        if match is None:
            raise InterveneError(f"Site {text!r}: not understood. Write e.g. 'L3.mlp_output' or 'L3.head_output[2,5]'.")
        layer, units = match["layer"], match["units"]
        if units is not None and not units.strip():
            raise InterveneError(f"Site {text!r}: empty brackets. Name units, as in [2,5], or leave the brackets out.")
        return cls(
            component=match["component"],
            layer=None if layer is None else int(layer),
            units=None if units is None else tuple(int(unit) for unit in units.split(",")),
        )

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"L{self.layer}."
        units = "" if self.units is None else f"[{','.join(map(str, self.units))}]"
        return f"{layer}{self.component}{units}"
