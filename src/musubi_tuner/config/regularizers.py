"""Flags of what keeps a LoRA close to, or away from, the base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .flag import flag


@dataclass(frozen=True)
class PreservationConfig:
    """Preservation (not available yet)."""

    blank_preservation: bool = flag(False, "keep the predictions without a caption (not available yet)")
    blank_preservation_args: tuple[str, ...] = flag((), "its options, key=value: multiplier (1.0)")
    dop: bool = flag(False, "keep the predictions for a class of things (not available yet)")
    dop_args: tuple[str, ...] = flag((), "its options, key=value: class, multiplier (1.0)")
    prior_divergence: bool = flag(False, "move the predictions away from the base model's (not available yet)")
    prior_divergence_args: tuple[str, ...] = flag((), "its options, key=value: multiplier (0.1)")
    audio_dop: bool = flag(False, "mode av: keep the sound of clips that have none (not available yet)")
    audio_dop_args: tuple[str, ...] = flag((), "its options, key=value: multiplier (1.0)")
    use_precached_preservation: bool = flag(
        False, "read the encoded prompts of preservation from the cache (not available yet)"
    )
    preservation_prompts_cache: Path | None = flag(None, "these encoded prompts (not available yet)")


@dataclass(frozen=True)
class AlignmentConfig:
    """Alignment of features (not available yet)."""

    crepa: bool = flag(False, "align the features of neighbouring frames (not available yet)")
    crepa_args: tuple[str, ...] = flag((), "its options, key=value")
    self_flow: bool = flag(False, "align the features of two blocks at two noise levels (not available yet)")
    self_flow_args: tuple[str, ...] = flag((), "its options, key=value")
