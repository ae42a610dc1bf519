"""Devices by the name that ``--device`` gives them."""

from __future__ import annotations

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
