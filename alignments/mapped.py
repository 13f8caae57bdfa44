"""What `space` asks of the operating system: files allocated, mapped and locked, and how much memory is free."""

from __future__ import annotations

import math
import mmap
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

ALIGN = 64  # bytes: every tensor begins where any dtype may
CHUNK = 1 << 20

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape, dtype


def places_of(layout: Layout) -> tuple[dict[str, int], int]:
    """Return name -> first byte, each aligned, and the bytes in all."""
    places, end = {}, 0
    for name, (shape, dtype) in layout.items():
        places[name] = end
        end += -(-math.prod(shape) * dtype.itemsize // ALIGN) * ALIGN
    return places, max(end, ALIGN)


def views(data: mmap.mmap, places: Mapping[str, int], layout: Layout) -> dict[str, Tensor]:
    """Return the tensors of `layout` in mapped bytes, which stay mapped as long as one of them is there."""
    made = {}
    for name, (shape, dtype) in layout.items():
        count = math.prod(shape)
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=places[name]) if count else torch.empty(0)
        made[name] = flat.to(dtype).view(shape)
    return made


def allocate(descriptor: int, size: int) -> None:
    """Make the file `size` bytes long, each one backed by the disk, so that no later write can find it full."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros = bytes(CHUNK)  # macOS and Windows; a hole would end the process where the mapping is written to
    for start in range(0, size, CHUNK):
        os.write(descriptor, zeros[: min(CHUNK, size - start)])


def mapped(descriptor: int, size: int) -> mmap.mmap:
    """Return a file mapped so that a stray write stays in this process, and that it may be larger than memory."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)  # Windows
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0)
    return mmap.mmap(descriptor, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def ends_checked(tensors: Mapping[str, Tensor]) -> int:
    """Return a CRC of the two ends of every tensor: enough for a cut or unwritten file, and read in no time."""
    total = 0
    for _, tensor in sorted(tensors.items()):
        flat = tensor.reshape(-1).view(torch.uint8)
        for part in (flat[:1024], flat[-1024:]):
            total = zlib.crc32(part.numpy().tobytes(), total)
    return total


def lock(descriptor: int) -> bool:
    """Lock a file for as long as it stays open or mapped here; return whether nobody else holds it."""
    try:
        import fcntl  # not on Windows, where what died is left until it is removed by hand
    except ImportError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def locked(path: Path) -> bool:
    """Return whether someone holds the lock of a file; False: there is no such file."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return not lock(file.fileno())


def available(device: torch.device | None = None) -> int:
    """Return the bytes of memory that are free: on a CUDA device, else in this machine or its container."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_of_machine()]
    with suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(limits))


def _of_machine() -> int:
    with suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(OSError, ValueError, AttributeError):  # no such figure; no such function on Windows
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**63 - 1  # nobody knows: then the disk is used only where it is asked for
