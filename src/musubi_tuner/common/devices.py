"""Devices by the name that ``--device`` gives them."""

from __future__ import annotations

import sys

import torch

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
