"""The weight of the audio loss, adapted to how rare sound is or to how large its loss is.

The weight of a step follows from the steps before it, so that all processes and all batches of a step have the same and
nothing waits for a loss to be read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from .losses import AUDIO_TERMS, LossTerm

_SMALLEST_LOSS = 1e-12


@dataclass(frozen=True)
class BalanceSettings:
    """How the weight ``w`` of an audio term becomes its effective weight; 0 stays 0.

    ``inv_freq``: ``w / P`` with the running share ``P`` of batches that have sound, rate ``beta``, floor ``eps``.
    ``ema_mag``: ``w * target_ratio * V / A`` with the running means ``V`` and ``A`` of the unweighted losses.
    Both within [minimum, maximum]. Silence put in for missing sound counts neither in ``P`` nor in ``A``.
    """

    mode: Literal["inv_freq", "ema_mag"]
    beta: float = 0.01
    eps: float = 0.05
    minimum: float = 0.05
    maximum: float = 4.0
    ema_init: float = 1.0
    target_ratio: float = 0.33
    ema_decay: float = 0.99


@dataclass(frozen=True)
class BalanceState:
    """The running means."""

    presence: float  # share of batches with sound
    video_loss: float
    audio_loss: float

    @staticmethod
    def start(settings: BalanceSettings) -> BalanceState:
        return BalanceState(min(settings.ema_init, 1.0), settings.ema_init, settings.ema_init)


def effective_weight(weight: float, settings: BalanceSettings, state: BalanceState) -> float:
    """What an audio term of weight ``weight`` counts."""
    if weight == 0:
        return 0.0
    if settings.mode == "inv_freq":
        balanced = weight / max(state.presence, settings.eps)
    else:
        balanced = weight * settings.target_ratio * state.video_loss / state.audio_loss
    return min(max(balanced, settings.minimum), settings.maximum)


def balanced(terms: Mapping[str, LossTerm], settings: BalanceSettings, state: BalanceState) -> dict[str, LossTerm]:
    """The terms with the audio ones at their effective weight."""
    return {
        name: replace(term, weight=effective_weight(term.weight, settings, state)) if name in AUDIO_TERMS else term
        for name, term in terms.items()
    }


def observed(
    state: BalanceState, settings: BalanceSettings, *, presence: float, losses: Mapping[str, float]
) -> BalanceState:
    """The running means after a step.

    Args:
        presence: share of the step's batches, over all processes, that had sound.
        losses: the step's mean unweighted losses by modality; one that is absent or not finite leaves its running
            mean as it is.
    """

    def followed(mean: float, loss: float | None) -> float:
        if loss is None or not math.isfinite(loss):
            return mean
        return settings.ema_decay * mean + (1 - settings.ema_decay) * max(loss, _SMALLEST_LOSS)

    return BalanceState(
        presence=(1 - settings.beta) * state.presence + settings.beta * presence,
        video_loss=followed(state.video_loss, losses.get("video")),
        audio_loss=followed(state.audio_loss, losses.get("audio")),
    )
