"""What a run is told of its flags: those that change nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import fields

from .flag import flag_info
from .training import TrainNetworkConfig


def without_effect(config: TrainNetworkConfig, explicit: Collection[str]) -> Iterable[str]:
    """One line for each given flag that has no effect."""
    for group in (config.compatibility, config.processes, config.data):
        for f in fields(group):
            value, text = getattr(group, f.name), flag_info(f).help
            if text.startswith("no effect") and value not in (f.default, config.checkpoint.ltx2_checkpoint):
                yield f"--{f.name} has {text}"
    if config.preview.sample_audio_subprocess and "sample_audio_subprocess" in explicit:
        yield "--sample_audio_subprocess has no effect: sound is decoded in the training process"
    if config.timestep.weighting_scheme != "none":
        scheme = config.timestep.weighting_scheme
        yield f"--weighting_scheme {scheme} has no effect: LTX-2 is trained with equal weight at every noise level"
    if "mode_scale" in explicit:
        yield "--mode_scale has no effect: it belongs to --weighting_scheme mode"
    memory = config.memory
    if (memory.ffn_chunk_target in (None, "none")) != (memory.ffn_chunk_size == 0):
        yield "--ffn_chunk_target and --ffn_chunk_size act only together: feed-forward layers are computed whole"
