"""What a run asks of the frozen transformer, before anything is put on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from musubi_tuner.config.model import Mode
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.load import Edits
from musubi_tuner.models.ltx2.quantize import Quantization


@dataclass(frozen=True)
class Base:
    """Where the weights are, and how they are held.

    Attributes:
        streams: which modules are built.
        quantization: of the weights of the blocks; ``None``: dense.
        edits: what changes weights while they are loaded.
    """

    checkpoint: Checkpoint
    streams: Mode
    dtype: torch.dtype
    device: torch.device
    quantization: Quantization | None = None
    edits: Edits | None = None
