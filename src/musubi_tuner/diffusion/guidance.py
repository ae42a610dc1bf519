"""Combining several predictions of the clean sample.

Classifier-free guidance (arXiv 2207.12598), spatiotemporal skip guidance (STG, arXiv 2411.18664: away from a pass
whose self-attention is skipped in some blocks) and modality guidance (away from a pass in which sound and picture
do not see each other), with an optional rescaling of the result (arXiv 2305.08891).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from musubi_tuner.common.av import AV
from musubi_tuner.common.errors import UserError
from musubi_tuner.models.ltx2.inputs import Perturbations

# The passes of a step: conditional, negative prompt, self-attention skipped, modalities isolated.
Pass = Literal["cond", "neg", "ptb", "iso"]
STGMode = Literal["stg_av", "stg_v"]


@dataclass(frozen=True)
class Guidance:
    """Strengths of guidance; the defaults switch everything off.

    Attributes:
        cfg: classifier-free guidance scale, 1 = off.
        audio_cfg: the same for sound; ``None`` = ``cfg``.
        stg: strength of skip guidance, 0 = off.
        stg_blocks: blocks whose self-attention is skipped.
        stg_mode: skip it in both streams or in the video stream.
        modality: modality guidance scale, 1 = off; needs both modalities.
        rescale: share of the result that is brought back to the standard deviation of the conditional pass.
    """

    cfg: float = 1.0
    audio_cfg: float | None = None
    stg: float = 0.0
    stg_blocks: tuple[int, ...] = ()
    stg_mode: STGMode = "stg_av"
    modality: float = 1.0
    rescale: float = 0.0

    @property
    def scales(self) -> AV[float]:
        """Classifier-free guidance scale of each modality."""
        return AV(video=self.cfg, audio=self.cfg if self.audio_cfg is None else self.audio_cfg)

    def uses_negative(self, modalities: Sequence[str]) -> bool:
        """Whether the negative prompt has an effect on samples of these modalities."""
        return any(self.scales[name] != 1 for name in modalities)

    def passes(self, modalities: Sequence[str]) -> tuple[Pass, ...]:
        """The passes that a step needs, the negative one first."""
        wanted: dict[Pass, bool] = {
            "neg": self.uses_negative(modalities),
            "cond": True,
            "ptb": self.stg != 0,
            "iso": self.modality != 1 and len(modalities) == 2,
        }
        return tuple(name for name, needed in wanted.items() if needed)


def perturbations(
    guidance: Guidance, passes: Sequence[Pass], *, num_blocks: int, batch: int, device: torch.device | str
) -> Perturbations | None:
    """What the transformer skips when the ``passes`` run as one batch of ``len(passes) * batch`` samples.

    Raises:
        UserError: a block of ``stg_blocks`` does not exist.
    """

    def except_in(name: Pass) -> Tensor:
        keep = torch.tensor([float(p != name) for p in passes], device=device)
        return keep.repeat_interleave(batch)

    skipped: dict[int, Tensor] = {}
    if "ptb" in passes:
        if unknown := [b for b in guidance.stg_blocks if not 0 <= b < num_blocks]:
            raise UserError(f"stg_blocks {unknown}: the transformer has blocks 0 to {num_blocks - 1}")
        skipped = dict.fromkeys(guidance.stg_blocks, except_in("ptb"))
    cut = dict.fromkeys(range(num_blocks), except_in("iso")) if "iso" in passes else {}
    if not skipped and not cut:
        return None
    return Perturbations(
        video_self=skipped, audio_self=skipped if guidance.stg_mode == "stg_av" else {}, a2v=cut, v2a=cut
    )


def guided(guidance: Guidance, name: Literal["video", "audio"], clean: Mapping[Pass, Tensor]) -> Tensor:
    """One prediction [B, N, C] of the clean tokens from those of the passes.

    ``c + (cfg - 1)(c - neg) + stg(c - ptb) + (modality - 1)(c - iso)``
    """
    cond = clean["cond"]
    result = cond
    for other, strength in (
        ("neg", guidance.scales[name] - 1),
        ("ptb", guidance.stg),
        ("iso", guidance.modality - 1),
    ):
        if other in clean and strength != 0:
            result = result + strength * (cond - clean[other])
    if guidance.rescale and result is not cond:
        ratio = cond.std(dim=(1, 2), keepdim=True) / result.std(dim=(1, 2), keepdim=True).clamp(min=1e-8)
        result = result * (guidance.rescale * ratio + 1 - guidance.rescale)
    return result
