"""A pretend accelerator: counts the moments at which a host would have to wait for its device, on any machine.

Tensors of the pretend device hold ordinary CPU tensors, but report a device of their own. So torch's own rules say
what is where, and each read of a device value by the host (`.item()`, `.tolist()`, `if tensor:`, boolean indexing,
`nonzero`) and each upload from the host (`torch.tensor(list, device=...)`, `.to(device)`, a CPU index) is seen and
counted, exactly and without a GPU. Where CUDA would refuse to mix host and device tensors, this refuses too. (On CUDA
a blocking upload from ordinary memory synchronises as a read does: `torch.cuda.set_sync_debug_mode` reports both.)

Registering the device cannot be undone: use a process of its own.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"

# operations whose result's shape or value the host must know before it can go on
READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "_linalg_check_errors",
}
# operations that CUDA lets take host tensors beside device ones
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"_to_copy", "copy_", "copy"}


class _Module(_DummyBackendModule):  # type: ignore[misc]
    """What torch asks of a device's Python module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register() -> torch.device:
    """Make the pretend device known to torch, for the rest of this process, and return it."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    return torch.device(NAME, 0)


class Remote(Tensor):
    """A tensor of the pretend device: `inner` is the CPU tensor that computes."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Remote:
        made: Remote = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Remote({self.inner!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch refuses it for subclasses; on CUDA it copies to the host

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class HostCounter(TorchDispatchMode):
    """Counts reads of the pretend device by the host, and uploads to it, inside its `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Reads and uploads so far."""
        return self.reads.total() + self.uploads.total()

    def __enter__(self) -> HostCounter:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device=...) makes its upload where we see it
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        remote = [tensor for tensor in tensors if isinstance(tensor, Remote)]
        host = [tensor for tensor in tensors if not isinstance(tensor, Remote) and tensor.dim()]
        self._note(name, args, kwargs, remote, host)
        return _compute(func, args, kwargs)

    def _note(self, name: str, args: Any, kwargs: Any, remote: list[Remote], host: list[Tensor]) -> None:
        if name in COPIES:
            self._note_copy(name, args, kwargs, bool(remote))
        elif remote and (name in READS or (name in INDEXING and _by_mask(args[1]))):
            self.reads[name] += 1
        elif remote and host and name in INDEXING:
            self.uploads[name] += len(host)
        elif remote and host:
            raise RuntimeError(f"{name}: found host tensors {[tuple(t.shape) for t in host]} beside device tensors.")

    def _note_copy(self, name: str, args: Any, kwargs: Any, any_remote: bool) -> None:
        if name == "_to_copy":
            target = kwargs.get("device")
            onto = isinstance(args[0], Remote) if target is None else torch.device(target).type == NAME
            source = isinstance(args[0], Remote)
        else:
            onto, source = isinstance(args[0], Remote), isinstance(args[1], Remote)
        if source and not onto:
            self.reads[name] += 1
        elif onto and not source and any(isinstance(arg, Tensor) for arg in args):
            self.uploads[name] += 1


def _by_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run `func` on the CPU tensors inside, and wrap what it returns if it belongs on the pretend device."""
    kwargs = dict(kwargs)
    on_device = any(isinstance(leaf, Remote) for leaf in pytree.tree_leaves((args, kwargs)))
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == NAME
        kwargs["device"] = torch.device("cpu")
    inner_args, inner_kwargs = pytree.tree_map_only(Remote, lambda leaf: leaf.inner, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    written = _written(func, args, kwargs)
    if written is not None:
        return written
    return pytree.tree_map_only(Tensor, Remote, out) if on_device else out


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the argument that an in-place or `out=` operation wrote and returns, else None."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            if len(func._schema.returns) != 1:
                return None
            return kwargs[argument.name] if argument.name in kwargs else args[index]
    return None


def to_pretend(model: nn.Module) -> nn.Module:
    """Move every parameter and buffer of `model` to the pretend device, tied ones staying tied; return the model."""
    moved: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(Remote(parameter.detach()), requires_grad=False)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = Remote(buffer)
    return model
