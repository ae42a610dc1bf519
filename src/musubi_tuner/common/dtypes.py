"""Dtypes by the names that flags, file names and users use."""

from __future__ import annotations

import torch

from .errors import UserError

_ALIASES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def parse_dtype(name: str) -> torch.dtype:
    """``bf16``, ``bfloat16``, ``fp16``, ``float16``, ``fp32``, ``float32`` or ``float`` to a torch dtype.

    Raises:
        UserError: for any other name.
    """
    try:
        return _ALIASES[name.lower()]
    except KeyError:
        raise UserError(f"unknown dtype {name!r}; known: {', '.join(_ALIASES)}") from None


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` to ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")
