"""How a run spreads its batches with sound, and what it says of them at the start."""

from __future__ import annotations

import logging
import math

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.model import Mode
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.dataset.audio_mixing import AudioMixing, AudioProbability, AudioQuota
from musubi_tuner.dataset.sampling import BatchPlan

logger = logging.getLogger(__name__)

_LITTLE_SOUND = 0.3  # share of batches below which the log advises to repeat what has sound


def audio_mixing(config: TrainNetworkConfig, world_size: int) -> AudioMixing | None:
    """How batches with sound are to be spread over an epoch."""
    quota, probability = config.data.min_audio_batches_per_accum, config.data.audio_batch_probability
    if quota:
        return AudioQuota(quota, config.optimizer.gradient_accumulation_steps * world_size)
    return None if probability is None else AudioProbability(probability)


def report_sound(plan: BatchPlan, mode: Mode) -> None:
    """Log how much of an epoch has sound, as far as that is a question, and what limits the mixing.

    Raises:
        UserError: batches with sound are asked for, and there are none.
    """
    found = plan.count_sound(epoch=0)
    flag = _mixing_flag(plan.mixing)
    if flag and not found.audio_batches:
        raise UserError(f"{flag}: none of the {found.batches} batches has sound; {_advice_without_sound(flag, mode)}")
    if mode == "av":
        share = found.audio_batches / found.batches
        logger.info(
            "sound in the first epoch: %d of %d batches (%.0f%%), %d of %d samples (%.0f%%)",
            found.audio_batches,
            found.batches,
            100 * share,
            found.audio_samples,
            found.samples,
            100 * found.audio_samples / found.samples,
        )
        if 0 < share < _LITTLE_SOUND:
            logger.warning(
                "few batches have sound, and the others dilute what is learned of it: raise num_repeats of the "
                "datasets with sound until about a third of the batches have it"
            )
    if flag and found.audio_batches == found.batches:
        logger.warning("%s has no effect: every batch has sound", flag)
    if isinstance(plan.mixing, AudioQuota):
        _report_quota(plan.mixing, found.batches, found.audio_batches)


def _report_quota(quota: AudioQuota, batches: int, audio_batches: int) -> None:
    """Warn where the batches with sound do not last."""
    steps, supplied = math.ceil(batches / quota.window), math.ceil(audio_batches / quota.batches)
    if supplied < steps:
        logger.warning(
            "--min_audio_batches_per_accum %d: the batches with sound last for %d of the %d steps of an epoch; raise "
            "num_repeats of the datasets with sound",
            quota.batches,
            supplied,
            steps,
        )


def _mixing_flag(mixing: AudioMixing | None) -> str | None:
    if mixing is None:
        return None
    if isinstance(mixing, AudioQuota):
        return f"--min_audio_batches_per_accum {mixing.batches}"
    return f"--audio_batch_probability {mixing.probability:g}"


def _advice_without_sound(flag: str, mode: Mode) -> str:
    otherwise = f"or leave {flag.partition(' ')[0]} out"
    if mode == "video":
        return f"mode video reads none: train with --ltx2_mode av, {otherwise}"
    return f"run ltx2_cache_latents.py with --ltx2_mode av --skip_existing if the clips have any, {otherwise}"
