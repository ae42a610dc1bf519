"""Flags of other musubi-tuner scripts that LTX-2 has no use for: accepted, so that shared commands still work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .flag import flag


@dataclass(frozen=True)
class CompatibilityConfig:
    """Accepted, without effect."""

    dit: Path | None = flag(None, "no effect: the transformer is in --ltx2_checkpoint")
    vae: Path | None = flag(None, "no effect: the VAEs are in --ltx2_checkpoint")
    split_attn: bool = flag(False, "no effect: see --split_attn_target")
    img_in_txt_in_offloading: bool = flag(False, "no effect: LTX-2 has no such layers")
    disable_numpy_memmap: bool = flag(False, "no effect: weights are read without numpy")
