"""Flags of losses and of their balance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .flag import flag


@dataclass(frozen=True)
class LossConfig:
    """Loss and conditioning."""

    loss_type: Literal["mse", "mae", "l1", "huber", "smooth_l1"] = flag("mse", "error of each latent value")
    huber_delta: float = flag(1.0, "where huber and smooth_l1 turn linear")
    video_loss_weight: float = flag(1.0, "weight of the video loss")
    audio_loss_weight: float = flag(1.0, "weight of the audio loss")
    caption_dropout_rate: float = flag(0.0, "probability to train a sample without its caption")
    ltx2_first_frame_conditioning_p: float = flag(0.1, "probability to keep a sample's first latent frame clean")


@dataclass(frozen=True)
class AudioLossConfig:
    """Balance and supervision of the audio loss."""

    audio_loss_balance_mode: Literal["none", "inv_freq", "ema_mag"] = flag(
        "none", "adapt the weight of the audio loss: to how rare sound is, or to the size of the losses (mode av)"
    )
    audio_loss_balance_beta: float = flag(0.01, "inv_freq: rate at which the share of batches with sound is followed")
    audio_loss_balance_eps: float = flag(0.05, "inv_freq: lowest share to divide by")
    audio_loss_balance_min: float = flag(0.05, "lowest weight that balancing gives")
    audio_loss_balance_max: float = flag(4.0, "highest weight that balancing gives")
    audio_loss_balance_ema_init: float = flag(1.0, "start of the running means")
    audio_loss_balance_target_ratio: float = flag(0.33, "ema_mag: audio loss to reach, relative to the video loss")
    audio_loss_balance_ema_decay: float = flag(0.99, "ema_mag: decay of the running means of the losses")
    audio_silence_regularizer: bool = flag(False, "mode av: train clips without sound on silence")
    audio_silence_regularizer_weight: float = flag(1.0, "the audio loss of such clips is multiplied by this")
    audio_supervision_mode: Literal["off", "warn", "error"] = flag(
        "off", "mode av: what to do when too few batches have sound"
    )
    audio_supervision_warmup_steps: int = flag(50, "batches before the first check")
    audio_supervision_check_interval: int = flag(50, "batches between checks")
    audio_supervision_min_ratio: float = flag(0.9, "share of batches that must have sound")
