"""Whether a run in mode av sees enough sound (``--audio_supervision_mode``)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from musubi_tuner.common.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SupervisionSettings:
    """When too few training batches have sound of their own."""

    mode: Literal["warn", "error"]
    warmup: int = 50  # batches before the first check
    interval: int = 50  # batches between checks
    min_ratio: float = 0.9


@dataclass(frozen=True)
class SupervisionCounts:
    """Training batches so far, over all processes."""

    expected: int = 0
    supervised: int = 0  # with sound of their own; silence put in its place does not count


def supervise(
    counts: SupervisionCounts, settings: SupervisionSettings, *, batches: int, with_sound: int
) -> SupervisionCounts:
    """Count the batches of a step, and check when their number has passed a multiple of the interval.

    Raises:
        UserError: mode error, and too few had sound.
    """
    counts_now = SupervisionCounts(counts.expected + batches, counts.supervised + with_sound)
    expected, supervised = counts_now.expected, counts_now.supervised
    is_due = expected // settings.interval > counts.expected // settings.interval
    if is_due and expected >= settings.warmup and supervised < settings.min_ratio * expected:
        message = (
            f"{supervised} of {expected} training batches had sound ({supervised / expected:.0%}), expected at least "
            f"{settings.min_ratio:.0%}: look for failed sound in the summary of ltx2_cache_latents.py, raise "
            "num_repeats of the datasets with sound, or lower --audio_supervision_min_ratio"
        )
        if settings.mode == "error":
            raise UserError(message)
        logger.warning("%s", message)
    return counts_now
