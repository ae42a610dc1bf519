"""Flags of ``ltx2_quantize_model.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .flag import flag
from .network import TargetPreset


@dataclass(frozen=True)
class QuantizeFiles:
    """Files."""

    input_model: Path | None = flag(None, "the full-precision checkpoint (required)")
    output_model: Path | None = flag(None, "the quantised checkpoint to write (required)")


@dataclass(frozen=True)
class QuantizeOptions:
    """Quantising."""

    format: Literal["nf4", "int8"] = flag("nf4", "for --nf4_base or for --int8_base")
    nf4_block_size: int = flag(32, "NF4: weights that share a scale; a power of two from 32 to 2048")
    calc_device: Literal["cpu", "cuda"] | None = flag(
        None, "where weights are quantised (not given: cuda if present, else cpu)", values={"gpu": "cuda"}
    )
    loftq_init: bool = flag(False, "write starting values of LoRAs of --network_dim as well, for --loftq_init")
    loftq_iters: int = flag(2, "--loftq_own_base: rounds of quantising and fitting; else one, which fits every rank")
    loftq_own_base: bool = flag(
        False, "quantise for the LoRAs of --loftq_init, which then are all that the file is for"
    )
    network_dim: int = flag(0, "rank of the LoRAs of --loftq_init")
    lora_target_preset: TargetPreset = flag("t2v", "--loftq_own_base: the --lora_target_preset of the training")


@dataclass(frozen=True)
class QuantizeModelConfig:
    """``ltx2_quantize_model.py``"""

    files: QuantizeFiles = QuantizeFiles()
    options: QuantizeOptions = QuantizeOptions()
