"""What the diffusion transformer reads. No noise, target or loss in it, so generation uses it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

CrossTimestep = Literal["hybrid", "own", "cross"]


@dataclass(frozen=True)
class ModalityInput:
    """One modality at the model's door.

    ``timesteps`` and ``sigma`` are noise levels in [0, 1] (0 = clean) and stay float32; the model multiplies
    by 1000 itself. Token counts of one sample are equal over the batch; padding is masked by
    ``attention_mask`` and by the other modality's ``cross_mask``.
    """

    tokens: Tensor  # [B, N, C] latent tokens
    timesteps: Tensor  # [B, N] or [B, 1] noise level of each token, fp32
    sigma: Tensor  # [B] noise level of the sample, fp32
    coords: Tensor  # [B, A, N, 2] token bounds, fp32; A = 3 (seconds, pixel rows, pixel columns) or 1 (seconds)
    context: Tensor  # [B, L, D_text]
    context_mask: Tensor | None = None  # [B, L] bool/int (1 = attend) or additive float
    attention_mask: Tensor | None = None  # [B, Nq, Nk] or broadcastable ([B,1,N], [1,1,N]), weights in [0, 1]
    cross_mask: Tensor | None = None  # [B, N, N_other] or [B, 1, N_other] in [0, 1]: what this modality's
    #                                   queries may read of the OTHER modality
    reads_text: Tensor | None = None  # [B, N] in [0, 1], multiplies the text cross-attention output per token
    keyframes_mask: Tensor | None = None  # [B, N, 1], 2.5 only
    enabled: bool = True  # False: this stream is not updated, but the other one still attends to it


@dataclass(frozen=True)
class Perturbations:
    """Per block, per sample switches of guidance (STG, modality isolation); 1 keeps, 0 switches off.

    A missing block index keeps everything. Each value is a float tensor [B].
    Skipping self-attention replaces the attention output by its value path; skipping a2v or v2a drops the
    residual of that cross-modal attention.
    """

    video_self: Mapping[int, Tensor] = field(default_factory=dict)
    audio_self: Mapping[int, Tensor] = field(default_factory=dict)
    a2v: Mapping[int, Tensor] = field(default_factory=dict)
    v2a: Mapping[int, Tensor] = field(default_factory=dict)
