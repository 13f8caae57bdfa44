"""One block: hooks that follow the forward passes inside it, and which pass a firing module belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from intervene.errors import AmbiguousForward, UnknownFamily
from intervene.families import locate, unwrap
from intervene.hooks import watch_call
from intervene.passes import Pass, Target, Tracker, arguments

Batch = Mapping[str, Any]


class Block:
    """What `capture` and `intervene` share: hooks that follow passes, and the pass a tap belongs to."""

    def __init__(self, model: nn.Module, targets: Sequence[Target], prompt: Batch | None) -> None:
        self.model = model
        self.tracker = Tracker(targets, prompt)
        self.hf, self.backbone, self.layers = _parts(model)
        self.outer: dict[str, Any] = {}  # arguments seen by wrappers, labels among them
        self.current: Pass | None = None
        self.awaiting: list[Pass] = []  # passes whose backward may run them again
        self.replaying: Pass | None = None
        self.open = True
        self.passes = 0

    def enter(self, stack: ExitStack) -> None:
        """Register the hooks that see a pass begin and end."""
        stack.callback(self._close)
        for module in {id(m): m for m in (self.model, self.hf)}.values():
            if module is not self.backbone:
                watch_call(stack, module, before=lambda a, k, m=module: self._note(m, a, k))  # type: ignore[misc]
        watch_call(stack, self.backbone, before=self._begin, after=self._end)

    def _close(self) -> None:
        self.open = False

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self.model:
            self.outer.clear()
        named = arguments(module, args, kwargs)
        self.outer.update({name: value for name, value in named.items() if value is not None})

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {name: value for name, value in self.outer.items() if name in ("labels", "use_cache", "attention_mask")}
        inner = arguments(self.backbone, args, kwargs)
        named.update({name: value for name, value in inner.items() if value is not None or name not in named})
        self.outer.clear()
        self.awaiting, self.replaying = [past for past in self.awaiting if past is not self.replaying], None
        self.current = self.tracker.begin(named)
        self.passes += 1

    def _end(self, output: Any) -> None:
        finished, self.current = self.current, None
        if finished is None or not torch.is_grad_enabled() or not self._checkpointing():
            return
        self.awaiting.append(finished)
        last = output if isinstance(output, Tensor) else output[0] if output is not None else None
        if isinstance(last, Tensor) and last.requires_grad:
            last.register_hook(self._backward_begins)

    def _checkpointing(self) -> bool:
        modules = [self.backbone, *self.layers]
        return any(getattr(m, "gradient_checkpointing", False) and m.training for m in modules)

    def _backward_begins(self, grad: Tensor) -> Tensor:
        if not self.open:
            raise AmbiguousForward(
                "backward() after the block has ended: gradient checkpointing runs the layers again, now without the "
                "interventions, and its gradients would be wrong. Call backward() inside the block."
            )
        return grad

    def pass_of_tap(self) -> tuple[Pass, bool]:
        """Return the pass a firing tap belongs to, and whether checkpointing is running it again."""
        if self.current is not None:
            return self.current, False
        waiting = [past for past in self.awaiting if past is not self.replaying]
        if len(waiting) == 1:
            self.replaying = waiting[0]
        if self.replaying is not None and len(waiting) < 2:
            return self.replaying, True
        if not waiting:
            raise AmbiguousForward(
                f"A hooked module of {type(self.hf).__name__} ran outside the model's own forward pass, so its "
                "tokens cannot be placed. Call the model, not its parts, inside the block."
            )
        raise AmbiguousForward(
            f"Gradient checkpointing: {len(waiting)} forward passes await their backward, and the one being run again "
            "cannot be told. Call backward() after each forward, or use torch.no_grad() where none follows."
        )




def _parts(model: nn.Module) -> tuple[nn.Module, nn.Module, Sequence[nn.Module]]:
    """Return the model without wrappers, the module that every forward calls, and its blocks.

    Of a module of no registered family ("path:" sites only) it is the module itself that every forward calls.
    """
    try:
        located = locate(model)
    except UnknownFamily:
        inner = unwrap(model)
        return inner, inner, ()
    return located.hf, located.backbone, located.layers
