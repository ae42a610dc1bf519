"""Flags of training with references (in-context LoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .flag import flag

ReferenceStrategy = Literal["none", "v2v", "audio_ref_only_ic"]


@dataclass(frozen=True)
class ReferenceConfig:
    """References."""

    ic_lora_strategy: Literal["auto", "none", "v2v", "audio_ref_only_ic"] = flag(
        "auto", "which references are trained with; auto: by --lora_target_preset v2v or audio_ref_only_ic, else none"
    )
    reference_downscale: int = flag(1, "targets are so many times the size of their references; as in caching")
    reference_frames: int = flag(1, "frames of a reference, 8k + 1; as in caching")
    audio_ref_mask_cross_attention_to_reference: bool = flag(False, "the video does not attend to reference sounds")
    audio_ref_mask_reference_from_text_attention: bool = flag(False, "reference sounds do not attend to the text")
    audio_ref_identity_guidance_scale: float = flag(
        0.0, "previews: guidance scale of the sound with audio_ref_only_ic; 0 = that of the video"
    )


def resolve_strategy(strategy: str, preset: str) -> ReferenceStrategy:
    """The strategy that ``--ic_lora_strategy`` means with a target preset."""
    if strategy != "auto":
        return strategy  # type: ignore[return-value]
    return preset if preset in ("v2v", "audio_ref_only_ic") else "none"  # type: ignore[return-value]
