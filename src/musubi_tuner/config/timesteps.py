"""Flags of noise levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .flag import flag

TimestepSampling = Literal[
    "shifted_logit_normal",
    "sigma",
    "uniform",
    "sigmoid",
    "shift",
    "flux_shift",
    "flux2_shift",
    "qwen_shift",
    "logsnr",
    "qinglong_flux",
    "qinglong_qwen",
]


@dataclass(frozen=True)
class TimestepConfig:
    """Timesteps."""

    timestep_sampling: TimestepSampling = flag(
        "shifted_logit_normal", "distribution of noise levels (sigma means shifted_logit_normal)"
    )
    logit_mean: float = flag(0.0, "shifted_logit_normal: added to the shift; logsnr: mean of the log SNR")
    logit_std: float = flag(1.0, "shifted_logit_normal, logsnr: standard deviation of the normal distribution")
    shifted_logit_mode: Literal["legacy", "stretched"] | None = flag(
        None, "variant of the sampler; not given: legacy for 2.0, stretched for 2.3"
    )
    shifted_logit_eps: float = flag(1e-3, "stretched: lowest noise level, values below are reflected")
    shifted_logit_uniform_prob: float = flag(0.1, "stretched: share of uniform draws")
    shifted_logit_shift: float | None = flag(None, "shift; not given: by the number of tokens")
    discrete_flow_shift: float = flag(1.0, "shift: odds of the noise level are multiplied by this")
    sigmoid_scale: float = flag(1.0, "sigmoid and the *_shift samplings: standard deviation of the logits")
    min_timestep: int | None = flag(None, "lowest noise level, 0 to 1000")
    max_timestep: int | None = flag(None, "highest noise level, 0 to 1000")
    preserve_distribution_shape: bool = flag(False, "draw again until a level is in range instead of squeezing")
    num_timestep_buckets: int | None = flag(None, "spread the levels of an epoch evenly over so many quantiles")
    independent_audio_timestep: bool = flag(False, "draw the audio noise level apart from the video's")
    weighting_scheme: Literal["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"] = flag(
        "none", "no effect: LTX-2 is trained with equal weight at every noise level"
    )
    mode_scale: float = flag(1.29, "no effect: belongs to --weighting_scheme mode")
    show_timesteps: Literal["image", "console"] | None = flag(
        None, "show the distribution of noise levels for --height, --width and --sample_num_frames, and exit"
    )
