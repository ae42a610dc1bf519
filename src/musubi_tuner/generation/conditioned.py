"""Clean tokens within and beside the tokens that are denoised.

The tokens of a first frame stay what they are: their noise level is 0 throughout, whatever the sample's. Reference
tokens stand in front of the others at level 0 and only lend context: their predictions are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.common.av import AV
from musubi_tuner.common.errors import UserError
from musubi_tuner.conditioning.intrinsic import first_frame_keep
from musubi_tuner.conditioning.reference import reference_audio_coords, reference_video_coords
from musubi_tuner.config.model import Mode
from musubi_tuner.dataset.buckets import reference_scale
from musubi_tuner.diffusion.tokens import audio_coords, patchify_audio, patchify_video, video_coords

from .conditions import SampleLatents
from .prompts import SamplePrompt


@dataclass(frozen=True)
class Conditioned:
    """How one modality of one sample is conditioned.

    Attributes:
        coords: positions of all tokens, references first: [1, A, M + N, 2].
        fixed: [N] bool, the tokens that stay as in ``clean``; ``None`` = all are generated.
        clean: [1, N, C].
        reference: [1, M, C].
        fixed_level: whether the transformer is told that fixed tokens are clean (else: as noisy as the sample).
    """

    coords: Tensor
    fixed: Tensor | None = None
    clean: Tensor | None = None
    reference: Tensor | None = None
    fixed_level: bool = True

    @property
    def num_references(self) -> int:
        return 0 if self.reference is None else self.reference.shape[1]

    def lock(self, tokens: Tensor) -> Tensor:
        """Generated tokens [1, N, C] with the fixed ones put back."""
        return tokens if self.fixed is None else torch.where(self.fixed[:, None], self.clean, tokens)

    def with_references(self, tokens: Tensor) -> Tensor:
        """[1, N, C] to [1, M + N, C]."""
        return tokens if self.reference is None else torch.cat([self.reference, tokens], dim=1)

    def levels(self, sigma: float) -> Tensor:
        """Noise level of each token [1, M + N], or [1, 1] where all share one; fp32."""
        told = self.fixed is not None and self.fixed_level
        if not told and self.reference is None:
            return torch.full((1, 1), sigma, device=self.coords.device)
        levels = torch.full((1, self.coords.shape[2]), sigma, device=self.coords.device)
        levels[:, : self.num_references] = 0.0
        if told:
            levels[:, self.num_references :].masked_fill_(self.fixed, 0.0)
        return levels


def condition(
    prompt: SamplePrompt,
    latents: SampleLatents,
    mode: Mode,
    device: torch.device | str,
    *,
    fixed_level: bool = True,
    negative_positions: bool = False,
) -> AV[Conditioned]:
    """How each modality of a sample is conditioned; ``latents`` of an absent modality are not looked at.

    Args:
        fixed_level: see :class:`Conditioned`.
        negative_positions: an audio reference lies before time 0, one step apart from the sample.

    Raises:
        UserError: latents that do not fit the sample's size.
    """
    video = None if mode == "audio" else _video(prompt, latents, device, fixed_level)
    audio = None if mode == "video" else _audio(prompt, latents, device, negative_positions)
    return AV(video=video, audio=audio)


def _video(prompt: SamplePrompt, latents: SampleLatents, device: torch.device | str, fixed_level: bool) -> Conditioned:
    grid = prompt.latent_grid
    fps = torch.tensor([prompt.frame_rate], device=device)
    coords = video_coords(grid, fps)
    fixed = clean = reference = None
    if latents.image is not None:
        if tuple(latents.image.shape[2:]) != (1, *grid[1:]) or grid[0] < 2:
            raise UserError(f"a first frame of latent size {list(latents.image.shape[2:])} for samples of {list(grid)}")
        fixed = first_frame_keep(grid).bool().to(device)
        clean = patchify_video(latents.image.to(device, torch.float32).expand(-1, -1, grid[0], -1, -1))
    if latents.reference is not None:
        frames, height, width = latents.reference.shape[2:]
        if reference_scale(grid, (frames, height, width)) is None:
            raise UserError(
                f"a video reference of {32 * width}x{32 * height} pixels for samples of {prompt.width}x"
                f"{prompt.height}: the sample must be a whole number of times as large"
            )
        reference = patchify_video(latents.reference.to(device, torch.float32))
        coords = torch.cat([reference_video_coords((frames, height, width), grid, fps), coords], dim=2)
    return Conditioned(coords, fixed, clean, reference, fixed_level)


def _audio(
    prompt: SamplePrompt, latents: SampleLatents, device: torch.device | str, negative_positions: bool
) -> Conditioned:
    coords = audio_coords(prompt.audio_steps, 1, device)
    if latents.reference_audio is None:
        return Conditioned(coords)
    reference = patchify_audio(latents.reference_audio.to(device, torch.float32))
    steps = reference.shape[1]
    own = reference_audio_coords(steps, torch.tensor([steps], device=device), negative=negative_positions)
    return Conditioned(torch.cat([own, coords], dim=2), reference=reference)
