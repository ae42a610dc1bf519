"""Devices by the name that ``--device`` gives them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .errors import UserError


def choose_device(name: str | None) -> torch.device:
    """The device of ``--device``; ``None`` is CUDA where there is one, else the CPU.

    Raises:
        UserError: no such device, or PyTorch cannot use it.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # fails where the device is only a name
    except (RuntimeError, AssertionError, NotImplementedError):
        usable = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(f"--device {name}: PyTorch cannot use it here; it has {', '.join(usable)}") from None
    return device


def host_memory() -> int:
    """Bytes of memory that this machine has."""
    if sys.platform == "win32":
        import psutil

        return psutil.virtual_memory().total
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_host_memory() -> int:
    """Bytes that this process can still take: what the system has, or less where a container has a limit."""
    import psutil

    free = psutil.virtual_memory().available
    room = _room_in_container(Path("/sys/fs/cgroup"))
    return free if room is None else min(free, room)


def _room_in_container(folder: Path) -> int | None:
    """Bytes below the limit of the control group (version 2); ``None`` where there is none."""
    try:
        limit, used = int((folder / "memory.max").read_text()), int((folder / "memory.current").read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or the limit is "max"
        return None
    return max(limit - used + int(counts.get("inactive_file", 0)), 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was what lacked, on the GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "not enough memory" in str(error) or "can't allocate memory" in str(error)


def bind_thread(device: torch.device) -> None:
    """Make ``device`` the current one of a new thread, which else takes memory of the first GPU for itself."""
    if device.type == "cuda" and device.index is not None:  # without an index it means the current one
        torch.cuda.set_device(device)


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor`` on ``device``, without the host waiting for the device.

    A plain copy to a GPU waits until all that was queued before is done. Convert the dtype afterwards: a copy that
    converts goes through ordinary memory of the host, where page-locked memory is of no use.
    """
    return tensor.to(device, non_blocking=True)


def staging(shape: Sequence[int], device: torch.device | str) -> Tensor:
    """An uninitialised fp32 tensor on the CPU to be filled and uploaded: page-locked where ``device`` is a GPU."""
    return torch.empty(tuple(shape), pin_memory=torch.device(device).type == "cuda")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch had allocated on a GPU at a time, else the most that this process had in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
