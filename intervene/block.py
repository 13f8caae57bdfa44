"""One block: hooks that follow the forward passes inside it, and which pass a firing module belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intervene.errors import AmbiguousForward, UnknownFamily, UnsupportedModel
from intervene.families import Tap, locate, unwrap
from intervene.forward_inputs import arguments, padding_mask
from intervene.hooks import watch_call
from intervene.locate import walk
from intervene.passes import Pass, Target, Tracker

Batch = Mapping[str, Any]
_FROM_WRAPPERS = ("labels", "use_cache", "attention_mask", "logits_to_keep", "input_ids")


class Block:
    """What `capture` and `intervene` share: hooks that follow passes, and the pass a tap belongs to.

    Gradient checkpointing runs layers again during backward, where no pass is under way. A pass is then known by the
    gradient that reaches its output: `begun` are the passes whose output the backward in progress has reached, and
    each of them runs each tap again at most once.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target], prompt: Batch | None) -> None:
        self.model = model
        self.tracker = Tracker(targets, prompt)
        self.hf, self.backbone, self.layers = _parts(model)
        self.outer: dict[str, Any] = {}  # arguments seen by wrappers, labels among them
        self.current: Pass | None = None
        self.awaiting: list[Pass] = []  # passes whose backward may run them again
        self.begun: list[Pass] = []
        self.backward = -1  # autograd's number of the backward in progress
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
        outer = {name: value for name, value in self.outer.items() if name in _FROM_WRAPPERS}
        self.outer.clear()
        self.current = None  # a pass that was interrupted never ended
        if torch._C._current_graph_task_id() != -1:
            raise AmbiguousForward(
                "The model is run again during backward (a checkpoint around the whole of it?), and which pass that "
                "repeats cannot be told. Use the model's own activation checkpointing."
            )
        inner = arguments(self.backbone, args, kwargs)
        named = {**outer, **{name: value for name, value in inner.items() if value is not None}}
        if padding_mask(outer, 0) is not None:  # some models hand their backbone a mask of another form
            named["attention_mask"] = outer["attention_mask"]
        ids, embedded = named.get("input_ids"), inner.get("inputs_embeds")
        if isinstance(ids, Tensor) and isinstance(embedded, Tensor) and ids.shape[:2] != embedded.shape[:2]:
            del named["input_ids"]  # what runs is not what the wrapper was given
        self.awaiting = [past for past in self.awaiting if past not in self.begun]
        self.begun = []
        self.current = self.tracker.begin(named)
        self.passes += 1

    def _end(self, output: Any) -> None:
        finished, self.current = self.current, None
        if finished is None or output is None:  # a pass that was refused or raised
            return
        self.tracker.finish(output)
        if not torch.is_grad_enabled() or not self._checkpointing():
            return
        self.awaiting.append(finished)
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._backward_reaches, finished))  # type: ignore[no-untyped-call]

    def _checkpointing(self) -> bool:
        modules = [self.backbone, *self.layers]
        return any(getattr(m, "gradient_checkpointing", False) and m.training for m in modules)

    def _backward_reaches(self, finished: Pass, grad: Tensor) -> None:
        if not self.open:
            raise AmbiguousForward(
                "backward() after the block has ended: gradient checkpointing runs the layers again, now without the "
                "interventions, and its gradients would be wrong. Call backward() inside the block."
            )
        self.current = None  # a pass that was stopped or interrupted never ended
        number = torch._C._current_graph_task_id()
        if number != self.backward:
            self.backward, self.begun = number, []
        if finished not in self.begun:
            finished.replayed.clear()
            self.begun.append(finished)

    def pass_of_tap(self, number: int) -> tuple[Pass, bool]:
        """Return the pass that firing tap `number` belongs to, and whether checkpointing is running it again."""
        if self.current is not None:
            return self.current, False
        waiting = [past for past in self.begun if number not in past.replayed] or self.awaiting
        if len(waiting) == 1:
            waiting[0].replayed.add(number)
            return waiting[0], True
        if not waiting:
            raise AmbiguousForward(
                f"A hooked module of {type(self.hf).__name__} ran outside the model's own forward pass, so its "
                "tokens cannot be placed. Call the model, not its parts, inside the block."
            )
        raise AmbiguousForward(
            f"Gradient checkpointing: {len(waiting)} forward passes await their backward, and the one being run again "
            "cannot be told. Call backward() after each forward, or use torch.no_grad() where none follows."
        )


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in a module's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, Mapping):
        for item in output.values():
            yield from _tensors(item)


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


def check_axes(model: nn.Module, tap: Tap) -> None:
    """Refuse a module whose first axis is time: its positions would be examples, silently.

    Raises:
        UnsupportedModel: the tap's module, one it lies in, or a child of such a one has `batch_first=False`.
    """
    root, names = unwrap(model), tap.path.split(".")
    around = [("", root), (tap.path, tap.module)]
    for n in range(1, len(names)):
        path = ".".join(names[:n])
        module = walk(root, path)
        around += [] if module is None else [(path, module)]
    for path, module in around:
        for name, part in ((path, module), *module.named_children()):
            if getattr(part, "batch_first", True) is False:
                raise UnsupportedModel(
                    f"Site {tap.site}: {name or 'the model'}, a {type(part).__name__}, has batch_first=False, so "
                    "tensors there are tokens by examples. Make it with batch_first=True."
                )
