"""`ZeroBackend`: DeepSpeed's ZeRO stages 0 to 3, driven directly.

DeepSpeed averages gradients over the ranks, and a backend here sums them. Nothing of its own is touched for that:
AdamW makes the same step of gradients that are W times smaller if its eps is, and so is clipping, so both are given
divided by W; what goes out (norm, gradients) is multiplied, what comes in is divided.

Stages: 0 replicas; 1 optimiser state cut over the ranks; 2 gradients too; 3 parameters too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from defenses.backend import (
    Optimiser,
    Turns,
    adamw,
    clipped,
    random_state,
    require_own,
    require_precision,
    set_random_state,
    signed,
    stepped,
    trainable,
)
from defenses.errors import BackendError, TrainingError
from defenses.ranks import reduced, spread
from intervene.errors import asked_found_do

_SHARED_MEMORY_OP = "deepspeed_shm_comm"
# stage -> where its optimiser keeps this rank's fp32 parameters, as flat tensors
_MASTERS = {
    1: "single_partition_of_fp32_groups",
    2: "single_partition_of_fp32_groups",
    3: "fp32_partitioned_groups_flat",
}


class ZeroBackend:
    """A DeepSpeed engine around the model. On the CPU nothing is compiled, and no compiler has to be there."""

    def __init__(
        self,
        model: nn.Module,
        optimiser: Optimiser | None = None,
        *,
        stage: int,
        device: torch.device | str = "cpu",
        offload: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Move `model` to `device`, give it the weights of rank 0, and hand it to an engine; collective.

        In bf16 the model computes in bf16 throughout, and the fp32 parameters are those of the optimiser (stages 2, 3).

        Args:
            offload: keep optimiser state in the memory of the CPU (stages 1-3).
            settings: of DeepSpeed's "zero_optimization", over those chosen here.

        Raises:
            BackendError: deepspeed is missing, or of a version this was not made for; bf16 on a device without it or
                in stages 0 and 1; reentrant checkpointing; nothing is trainable.
        """
        self.chosen, self.stage = optimiser or Optimiser(), stage
        self.device, self.rank, self.world = torch.device(device), dist.get_rank(), dist.get_world_size()
        _require_usable(model, stage, self.chosen)
        require_precision(self.chosen.precision, self.device)
        deepspeed = loaded(self.device)
        os.environ.setdefault("LOCAL_RANK", str(self.device.index or 0))  # it asks for this of whoever started us
        self.model = model.to(self.device).train()
        spread(self.model)
        self.named = trainable(self.model)
        scaled = replace(self.chosen, eps=self.chosen.eps / self.world)
        self.shapes = {name: one.shape for name, one in self.named.items()}
        kept = self._exact()
        config = engine_settings(stage, self.chosen, self.world, offload=offload, settings=settings or {})
        self.engine: Any = deepspeed.initialize(model=model, optimizer=adamw(self.named, scaled), config=config)[0]
        self.turns = Turns()
        for name, value in kept.items():
            self.write(name, value)

    def _exact(self) -> dict[str, Tensor]:
        """Return what is trained as it was given: in bf16 DeepSpeed rounds it, and makes its fp32 weights of that."""
        if self.chosen.precision != "bf16":
            return {}
        wide = {name: one for name, one in self.named.items() if one.dtype != torch.bfloat16}
        return {name: one.detach().cpu().clone() for name, one in wide.items()}

    def forward(self, **inputs: Any) -> Any:
        """Return the model's output, through the engine."""
        self.turns.forward()
        return self.engine(**inputs)

    def precision(self) -> AbstractContextManager[Any]:
        """Return nothing: the engine has put the model itself into bf16."""
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`."""
        self.turns.backward(last)
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def step(self, lr: float) -> float:
        """Clip, step, forget the gradients; return the norm before clipping."""
        self.turns.step()
        if self.stage == 0:
            return self._plain_step(lr)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm()) * self.world
        if self.engine.optimizer.overflow or norm < 0:  # DeepSpeed left this step out and forgot the gradients
            found = "the gradient norm is not finite, though the loss is."
            raise TrainingError(asked_found_do("Optimiser step", found, "Lower the learning rate, or use fp32."))
        return norm

    def _plain_step(self, lr: float) -> float:
        """Step without the engine's, which clips but does not say what the norm was, and steps on NaN."""
        clip = self.chosen.clip
        norm = clipped(self.named, None if clip is None else clip / self.world) * self.world
        stepped(self.engine.optimizer, lr, norm)
        return norm

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained; in stage 3 these are empty between passes."""
        return self.named

    @torch.no_grad()
    def value(self, name: str) -> Tensor:
        """Return a copy of a parameter, from the fp32 ones of the optimiser."""
        if self.stage == 0:
            return self.named[name].detach().float().clone()
        from deepspeed.utils import safe_get_full_fp32_param

        return _found(safe_get_full_fp32_param(self.named[name])).float().clone()

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Set a parameter: the optimiser's copy, else the next step undoes it, and the working one, else it waits."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param

        one, whole = self.named[name], value.detach().to(self.device, torch.float32)
        if self.stage > 0:
            safe_set_full_fp32_param(one, whole)
        if self.stage < 3:
            one.data.copy_(whole)
            return
        with GatheredParameters([one], modifier_rank=0):
            if self.rank == 0:
                one.data.copy_(whole)

    @torch.no_grad()
    def gradient(self, name: str) -> Tensor | None:
        """Return a copy of a gradient; None before the last backward pass of a step."""
        from deepspeed.utils import safe_get_full_grad

        one = self.named[name]
        if not self.turns.closed:
            return None
        grad = one.grad if self.stage == 0 else safe_get_full_grad(one)
        return None if grad is None else grad.detach().float().reshape(self.shapes[name]) * self.world

    @torch.no_grad()
    def write_gradient(self, name: str, value: Tensor) -> None:
        """Set a gradient; every rank is given the same `value`."""
        from deepspeed.utils import safe_set_full_grad

        one, shared = self.named[name], value.detach().to(self.device, torch.float32) / self.world
        if self.stage == 0:
            one.grad = shared.to(one)
        else:
            safe_set_full_grad(one, shared)

    def sum(self, value: Tensor) -> Tensor:
        """Return `value` summed over ranks."""
        return reduced(value, dist.ReduceOp.SUM, self.device)

    def max(self, value: Tensor) -> Tensor:
        """Return the largest `value` of all ranks."""
        return reduced(value, dist.ReduceOp.MAX, self.device)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor] | None:
        """Return the model's state dict on the CPU of rank 0, trained parameters in fp32; gathered one at a time."""
        trained = {id(one): name for name, one in self.named.items()}
        held = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            whole = self.value(trained[id(value)]) if id(value) in trained else self._working(value)
            if self.rank == 0:
                held[name] = whole.cpu()
        return held if self.rank == 0 else None

    def _working(self, value: Tensor) -> Tensor:
        """Return a copy of a parameter as it computes, or of a buffer."""
        from deepspeed.runtime.zero import GatheredParameters

        cut = isinstance(value, nn.Parameter) and self.stage == 3
        with GatheredParameters([value]) if cut else nullcontext():
            return value.detach().clone()

    def state(self) -> dict[str, Any]:
        """Return this rank's share of fp32 parameters and optimiser state, and its random state."""
        if self.stage == 0:
            held = {name: one.detach().cpu() for name, one in self.named.items()}
            state = {"parameters": held, "optimiser": self.engine.optimizer.state_dict()}
        else:
            base = self.engine.optimizer.optimizer
            state = {"parameters": self._masters(), "optimiser": [dict(base.state[one]) for one in self._masters()]}
        return signed({**state, "random": random_state()}, f"zero{self.stage}", self.rank, self.world)

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take up where `state` left off."""
        require_own(state, f"zero{self.stage}", self.rank, self.world)
        if self.stage == 0:
            for name, one in self.named.items():
                one.copy_(state["parameters"][name])
            self.engine.optimizer.load_state_dict(state["optimiser"])
        else:
            self._load_shares(state)
        set_random_state(state["random"])

    def _load_shares(self, state: dict[str, Any]) -> None:
        base = self.engine.optimizer.optimizer
        for master, value, moments in zip(self._masters(), state["parameters"], state["optimiser"], strict=True):
            master.data.copy_(value)
            held = base.state[master]
            for name, moment in moments.items():
                if isinstance(held.get(name), Tensor):  # DeepSpeed keeps views of these
                    held[name].copy_(moment)
                else:
                    held[name] = moment.to(master.device) if moment.dim() else moment.clone()
        for name in self.named:  # from the fp32 shares into the weights that compute
            self.write(name, self.value(name))

    def _masters(self) -> list[Tensor]:
        return list(getattr(self.engine.optimizer, _MASTERS[self.stage]))


def engine_settings(
    stage: int, chosen: Optimiser, world: int, *, offload: bool, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the engine's configuration. Nothing is left to a default that would change training without a word."""
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # not read: batches are cut by the loop
        "gradient_accumulation_steps": 1,  # the boundary is set by hand, and a loss is not divided by it
        "gradient_clipping": 0.0 if chosen.clip is None or stage == 0 else chosen.clip / world,  # absent: 1.0
        "bf16": {"enabled": chosen.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_force_ds_cpu_optimizer": False,  # else it is compiled
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "zero_optimization": {**zero, **settings},
    }


def loaded(device: torch.device) -> Any:
    """Return deepspeed, told not to compile anything for `device`.

    Raises:
        BackendError: it is missing, or its table of compiled parts is not where it was in 0.19.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise BackendError("ZeRO needs: pip install deepspeed") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # Built with g++ whenever ranks meet on a CPU, for inference only; a killed build leaves a lock on which every
        # later start waits without a word.
        compiled = getattr(deepspeed.ops, "__compatible_ops__", None)
        if not isinstance(compiled, dict) or _SHARED_MEMORY_OP not in compiled:
            found = f"deepspeed {deepspeed.__version__} has another table of compiled parts."
            raise BackendError(asked_found_do("ZeRO on the CPU", found, "pip install 'deepspeed>=0.19.8,<0.20'"))
        compiled[_SHARED_MEMORY_OP] = False
    return deepspeed


def _require_usable(model: nn.Module, stage: int, chosen: Optimiser) -> None:
    if stage < 2 and chosen.precision == "bf16":
        found = "DeepSpeed keeps the fp32 weights of stages 0 and 1 in other optimisers, of which nothing is shown."
        raise BackendError(asked_found_do(f"ZeRO {stage} in bf16", found, "Use zero2, ddp, or precision fp32."))
    for name, module in model.named_modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
            found = f"{name or 'the model'} checkpoints with use_reentrant=True: two passes before a backward fail."
            do = "Call model.activation_checkpointing_enable({'use_reentrant': False})."
            raise BackendError(asked_found_do(f"ZeRO {stage}", found, do))


def _found(value: Tensor | None) -> Tensor:
    assert value is not None, "DeepSpeed has no fp32 copy of a parameter that it was given to train"
    return value
