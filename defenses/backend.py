"""`Backend`: how gradients are made, added up over ranks, and turned into a step; `PlainBackend` on one process.

The gradients of a step are the sum, over ranks and micro-batches, of those of the losses given to `backward`: a
backend that averages undoes it. So a method divides by the tokens of the whole step, and its result does not depend on
how many ranks or micro-batches there are.
"""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from defenses.errors import BackendError, CheckpointError, TrainingError
from intervene.errors import asked_found_do


@dataclass(frozen=True)
class Optimiser:
    """AdamW, its clipping, and the precision of passes.

    Attributes:
        weight_decay: of matrices; vectors (norms, biases) have none. clip: the global gradient norm; None: no clipping.
        precision: "bf16": passes under autocast, weights and optimiser in fp32.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    clip: float | None = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"


class Backend(Protocol):
    """What a defense and the loop ask of the machinery below them. Methods marked collective are called by all ranks.

    Attributes:
        model: the Hugging Face or PEFT model inside every wrapper: what `intervene` and `capture` are given, and what
            passes without gradient call.
    """

    model: nn.Module
    device: torch.device
    rank: int
    world: int

    def forward(self, **inputs: Any) -> Any:
        """Return the model's output in a training pass, through whatever wraps it."""
        ...

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context in which passes of `model` compute as training passes do."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; collective. `last` on the last micro-batch of a step."""
        ...

    def step(self, lr: float) -> float:
        """Clip, step, forget the gradients; return the global norm before clipping. Collective.

        Raises:
            TrainingError: that norm is not finite; nothing was changed.
        """
        ...

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by its name in `model`."""
        ...

    def value(self, name: str) -> Tensor:
        """Return a copy of a parameter, whole and in fp32; collective."""
        ...

    def write(self, name: str, value: Tensor) -> None:
        """Set a parameter to the whole `value`, wherever copies of it are kept; collective."""
        ...

    def gradient(self, name: str) -> Tensor | None:
        """Return a copy of a parameter's gradient before the step, whole and in fp32; collective."""
        ...

    def write_gradient(self, name: str, value: Tensor) -> None:
        """Set a parameter's gradient to the whole `value`; collective."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """Return `value` summed over ranks; collective."""
        ...

    def max(self, value: Tensor) -> Tensor:
        """Return the largest `value` of all ranks, by element; collective."""
        ...

    def weights(self) -> dict[str, Tensor] | None:
        """Return the whole state dict of `model` on the CPU of rank 0, None on others; collective."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what this rank needs to go on exactly: parameters, optimiser, random state; tensors are not copied."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up where `state` left off; collective.

        Raises:
            CheckpointError: it is of another backend, rank or number of ranks.
        """
        ...


class Turns:
    """The order of passes that every backend gets right, and a refusal of the others.

    A backward pass needs a training forward since the one before it: under ZeRO-3 the first gradient of forward,
    forward, backward, backward would be dropped without a word. The last of a step comes once.
    """

    def __init__(self) -> None:
        """Begin before the first forward of a step."""
        self.waiting, self.closed = False, False

    def forward(self) -> None:
        """Note a forward pass; one without gradients does not count."""
        self.waiting = self.waiting or torch.is_grad_enabled()

    def backward(self, last: bool) -> None:
        """Note a backward pass.

        Raises:
            BackendError: no forward since the last one, or the step's last one has been.
        """
        if self.closed:
            found = "the last one of this step, called with last=True, has been."
            raise BackendError(asked_found_do("Backward", found, "Give last=True with the last call of a step only."))
        if not self.waiting:
            found = "there was no backend.forward with gradients since the one before: ZeRO-3 would drop a gradient."
            do = "Add the losses up and call backward once, or alternate forward and backward."
            raise BackendError(asked_found_do("Backward", found, do))
        self.waiting, self.closed = False, last

    def step(self) -> None:
        """Note an optimiser step.

        Raises:
            BackendError: no backward was the last one, so gradients have not been added up over ranks.
        """
        if not self.closed:
            found = "no backward of this step was called with last=True, so ranks have not added up their gradients."
            raise BackendError(asked_found_do("Optimiser step", found, "Call backward(loss, last=True) before it."))
        self.waiting, self.closed = False, False


class PlainBackend:
    """One process, one device, the model as it is."""

    def __init__(
        self, model: nn.Module, optimiser: Optimiser | None = None, *, device: torch.device | str = "cpu"
    ) -> None:
        """Move `model` to `device`, in train mode, with an AdamW for what requires gradients.

        Raises:
            BackendError: nothing is trainable, or bf16 on a device without it.
        """
        self.chosen = optimiser or Optimiser()
        self.device, self.rank, self.world = torch.device(device), 0, 1
        require_precision(self.chosen.precision, self.device)
        self.model = model.to(self.device).train()
        self.named = trainable(model)
        self.optimiser = adamw(self.named, self.chosen)

    def forward(self, **inputs: Any) -> Any:
        """Return the model's output."""
        with self.precision():
            return self.model(**inputs)

    def precision(self) -> AbstractContextManager[Any]:
        """Return autocast to bf16, or nothing."""
        if self.chosen.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`."""
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def step(self, lr: float) -> float:
        """Clip, step, forget the gradients; return the norm before clipping."""
        norm = clipped(self.named, self.chosen.clip)
        stepped(self.optimiser, lr, norm)
        return norm

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained."""
        return self.named

    def value(self, name: str) -> Tensor:
        """Return a copy of a parameter."""
        return self.named[name].detach().float().clone()

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Set a parameter."""
        self.named[name].copy_(value)

    def gradient(self, name: str) -> Tensor | None:
        """Return a copy of a gradient."""
        grad = self.named[name].grad
        return None if grad is None else grad.detach().float().clone()

    def write_gradient(self, name: str, value: Tensor) -> None:
        """Set a gradient."""
        self.named[name].grad = value.to(self.named[name])

    def sum(self, value: Tensor) -> Tensor:
        """Return `value`: there is one rank."""
        return value

    def max(self, value: Tensor) -> Tensor:
        """Return `value`: there is one rank."""
        return value

    def weights(self) -> dict[str, Tensor] | None:
        """Return the model's state dict on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """Return parameters, optimiser and random state; tensors are not copied."""
        held = {name: parameter.detach().cpu() for name, parameter in self.named.items()}
        state = {"parameters": held, "optimiser": self.optimiser.state_dict(), "random": random_state()}
        return signed(state, "plain", 0, 1)

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take up where `state` left off."""
        require_own(state, "plain", 0, 1)
        for name, parameter in self.named.items():
            parameter.copy_(state["parameters"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        set_random_state(state["random"])


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of `model` that require gradients, by name.

    Raises:
        BackendError: there are none.
    """
    named = {name: one for name, one in model.named_parameters() if one.requires_grad}
    if not named:
        found = "no parameter requires gradients."
        raise BackendError(asked_found_do("Training", found, "Unfreeze the model, or put LoRA on it."))
    return named


def adamw(named: dict[str, nn.Parameter], chosen: Optimiser) -> torch.optim.AdamW:
    """Return AdamW on `named`; only matrices decay. The learning rate is given with each step."""
    matrices = [one for one in named.values() if one.dim() > 1]
    vectors = [one for one in named.values() if one.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": chosen.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=chosen.betas, eps=chosen.eps)


def clipped(named: dict[str, nn.Parameter], clip: float | None) -> float:
    """Clip gradients to the global norm `clip` (None: only measure); return the norm before."""
    found = [one for one in named.values() if one.grad is not None]
    norm = nn.utils.clip_grad_norm_(found, float("inf") if clip is None else clip)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def stepped(optimiser: torch.optim.Optimizer, lr: float, norm: float) -> None:
    """Make the optimiser's step at `lr` and forget the gradients.

    Raises:
        TrainingError: `norm`, that of the gradients, is not finite; the gradients are forgotten, nothing is changed.
    """
    if not np.isfinite(norm):
        optimiser.zero_grad(set_to_none=True)
        found = f"the gradient norm is {norm}, though the loss is finite."
        raise TrainingError(asked_found_do("Optimiser step", found, "Lower the learning rate, or use fp32."))
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def require_precision(precision: str, device: torch.device) -> None:
    """Refuse bf16 where the hardware has none.

    Raises:
        BackendError: bf16 on such a GPU, or on a CPU, where it is many times slower than fp32 without its own units.
    """
    if precision != "bf16":
        return
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    if not able:
        found = f"this {device.type} has no bf16 units, and would be tens of times slower than in fp32."
        raise BackendError(asked_found_do("precision bf16", found, "Use precision fp32."))


def signed(state: dict[str, Any], kind: str, rank: int, world: int) -> dict[str, Any]:
    """Return `state` with whose it is, for `require_own`."""
    return {**state, "backend": kind, "rank": rank, "world": world}


def require_own(state: dict[str, Any], kind: str, rank: int, world: int) -> None:
    """Refuse a state that another backend, rank or number of ranks has left.

    Raises:
        CheckpointError: it is not this one's.
    """
    own, found = (kind, rank, world), (state["backend"], state["rank"], state["world"])
    if own != found:
        texts = ["rank {1} of {2} of backend {0}".format(*one) for one in (own, found)]
        do = "Resume with the backend and the number of ranks that wrote it."
        raise CheckpointError(asked_found_do(f"State for {texts[0]}", f"it was left by {texts[1]}.", do))


def random_state() -> dict[str, Any]:
    """Return the state of every random generator a training draws from, as plain values and tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put every random generator back where `random_state` found it."""
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
