"""Flags that name the model files and how they are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .flag import flag

Mode = Literal["video", "av", "audio"]
Version = Literal["2.0", "2.3"]
MODE_SHORT_FORMS = {"v": "video", "va": "av", "a": "audio"}


@dataclass(frozen=True)
class CheckpointConfig:
    """Model."""

    ltx2_checkpoint: Path | None = flag(None, "official LTX-2 single-file checkpoint (required)")
    ltx2_mode: Mode = flag(
        "video",
        "what is cached, trained or generated: video, audio and video, or audio",
        aliases=["ltx_mode"],
        values=MODE_SHORT_FORMS,
    )


@dataclass(frozen=True)
class GemmaConfig:
    """Text encoder."""

    gemma_root: Path | None = flag(None, "Gemma model folder (Hugging Face format)")
    gemma_safetensors: Path | None = flag(
        None, "Gemma in one safetensors file; --gemma_root beside it gives the tokenizer and the configuration only"
    )
    gemma_load_in_8bit: bool = flag(False, "load Gemma in 8 bit (bitsandbytes, CUDA only)")
    gemma_load_in_4bit: bool = flag(False, "load Gemma in 4 bit (bitsandbytes, CUDA only)")
    gemma_bnb_4bit_quant_type: Literal["nf4", "fp4"] = flag("nf4", "4-bit type")
    gemma_bnb_4bit_disable_double_quant: bool = flag(False, "do not quantise the 4-bit scales")
    gemma_bnb_4bit_compute_dtype: Literal["auto", "fp16", "bf16", "fp32"] = flag(
        "auto", "compute dtype of 4-bit layers; auto follows --mixed_precision"
    )


@dataclass(frozen=True)
class VersionConfig:
    """Model version."""

    ltx_version: Version = flag("2.0", "version whose defaults apply; not given: the checkpoint's")
    ltx_version_check_mode: Literal["off", "warn", "error"] = flag(
        "warn", "what to do when --ltx_version and the checkpoint disagree"
    )
    ltx2_audio_only_model: bool = flag(False, "build the transformer without its video part (mode audio only)")


@dataclass(frozen=True)
class PrecisionConfig:
    """Precision."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(
        None,
        "compute dtype of the transformer; not given: accelerate's setting, else bf16 on CUDA and no on a CPU",
    )
    full_fp16: bool = flag(False, "trained weights and their gradients in fp16 (needs --mixed_precision fp16)")
    full_bf16: bool = flag(False, "trained weights and their gradients in bf16 (needs --mixed_precision bf16)")
    vae_dtype: str = flag("bfloat16", "dtype of the VAEs", metavar="DTYPE")
