"""Rules for training with references."""

from __future__ import annotations

from collections.abc import Iterable

from .model import Mode
from .references import resolve_strategy
from .training import TrainNetworkConfig

_MODES: dict[str, tuple[Mode, ...]] = {"v2v": ("video",), "audio_ref_only_ic": ("av", "audio")}


def references(run: TrainNetworkConfig) -> Iterable[str]:
    """Values out of range, and a strategy that the mode does not have."""
    config, mode, preset = run.references, run.checkpoint.ltx2_mode, run.network.lora_target_preset
    if config.reference_downscale < 1:
        yield f"--reference_downscale: expected at least 1, got {config.reference_downscale}"
    if config.reference_frames < 1 or config.reference_frames % 8 != 1:
        yield f"--reference_frames: expected 8k + 1 (1, 9, 17, ...), got {config.reference_frames}"
    if config.audio_ref_identity_guidance_scale < 0:
        scale = config.audio_ref_identity_guidance_scale
        yield f"--audio_ref_identity_guidance_scale: expected 0 or more, got {scale:g}"
    strategy = resolve_strategy(config.ic_lora_strategy, preset)
    if mode not in _MODES.get(strategy, (mode,)):
        auto = config.ic_lora_strategy == "auto"
        source = f", which --lora_target_preset {preset} stands for," if auto else ""
        remedy = "; --ic_lora_strategy none trains these layers without references" if auto else ""
        wanted = " or ".join(_MODES[strategy])
        yield f"--ic_lora_strategy {strategy}{source} needs --ltx2_mode {wanted}, got {mode}{remedy}"
