"""Text embeddings to normalised latents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from musubi_tuner.common.av import AV, Modality
from musubi_tuner.common.progress import progress
from musubi_tuner.config.model import Mode
from musubi_tuner.dataset.batch import TextEmbeds
from musubi_tuner.diffusion.guidance import Guidance, Pass, guided, perturbations
from musubi_tuner.diffusion.samplers import SAMPLERS, sigma_steps, to_clean
from musubi_tuner.diffusion.schedules import ltx2_sigmas
from musubi_tuner.diffusion.tokens import (
    audio_coords,
    patchify_audio,
    patchify_video,
    unpatchify_audio,
    unpatchify_video,
    video_coords,
)
from musubi_tuner.models.ltx2.inputs import CrossTimestep, ModalityInput
from musubi_tuner.models.ltx2.transformer import LTX2Transformer

from .prompt_cache import EncodedPrompt
from .prompts import SamplePrompt

_AUDIO_CHANNELS = 8

# Block whose self-attention skip guidance leaves out, by release (arXiv 2411.18664 for the idea).
_STG_BLOCK_2_0 = 29
_STG_BLOCK = 28


@torch.no_grad()
def generate_latents(
    transformer: LTX2Transformer,
    encoded: EncodedPrompt,
    prompt: SamplePrompt,
    *,
    mode: Mode,
    device: torch.device | str,
    dtype: torch.dtype,
    sampler: str = "euler",
    cross_timestep: CrossTimestep = "hybrid",
    description: str = "sampling",
) -> AV[Tensor]:
    """Render one prompt to normalised latents, fp32: video [1, 128, F, H, W] and audio [1, 8, T, 16].

    The passes of guidance run as one batch. ``dtype`` is what the transformer computes in; the sample itself stays
    in fp32. Noise is drawn on the CPU, so every device starts from the same.

    Raises:
        UserError: the prompt's guidance does not fit the transformer.
    """
    noise = initial_noise(prompt, mode, channels=_channels(transformer))
    tokens = AV(
        video=None if noise.video is None else patchify_video(noise.video),
        audio=None if noise.audio is None else patchify_audio(noise.audio),
    ).map(lambda x: x.to(device))
    denoise = GuidedDenoiser(
        transformer,
        encoded,
        guidance=_with_stg_blocks(prompt.guidance, transformer),
        coords=token_coords(prompt, mode, device),
        dtype=dtype,
        cross_timestep=cross_timestep,
    )
    steps = sigma_steps(ltx2_sigmas(prompt.sample_steps))
    tokens = SAMPLERS[sampler](denoise, tokens, progress(steps, desc=description, unit="step"))
    return AV(
        video=None if tokens.video is None else unpatchify_video(tokens.video, prompt.latent_grid),
        audio=None if tokens.audio is None else unpatchify_audio(tokens.audio, _AUDIO_CHANNELS),
    )


class GuidedDenoiser:
    """(tokens, sigma) -> guided prediction of the clean tokens, for a batch of one sample."""

    def __init__(
        self,
        transformer: LTX2Transformer,
        encoded: EncodedPrompt,
        *,
        guidance: Guidance,
        coords: AV[Tensor],
        dtype: torch.dtype,
        cross_timestep: CrossTimestep = "hybrid",
    ) -> None:
        modalities = [name for name, _ in coords.items()]
        device = next(iter(coords.items()))[1].device
        self._transformer = transformer
        self._guidance = guidance
        self._passes = guidance.passes(modalities)
        texts = [_text_of(encoded, name) for name in self._passes]
        self._contexts = AV(video=_joined([t.video for t in texts]), audio=_joined([t.audio for t in texts]))
        self._contexts = self._contexts.map(lambda c: c.to(device, dtype))
        self._context_mask = _joined_masks(texts, device)
        self._coords = coords.map(lambda c: c.expand(len(self._passes), -1, -1, -1))
        self._perturbations = perturbations(
            guidance,
            self._passes,
            num_blocks=len(transformer.transformer_blocks),
            batch=1,
            device=device,
        )
        self._dtype = dtype
        self._cross_timestep = cross_timestep

    def __call__(self, tokens: AV[Tensor], sigma: float) -> AV[Tensor]:
        inputs = tokens.map_named(lambda name, x: self._input(name, x, sigma))
        velocity = self._transformer(inputs, self._perturbations, self._cross_timestep)

        def combined(name: Modality, x: Tensor) -> Tensor:
            clean = to_clean(x, velocity[name], inputs[name].timesteps)  # [passes, N, C]
            by_pass = dict(zip(self._passes, clean.split(1), strict=True))
            return guided(self._guidance, name, by_pass)

        return tokens.map_named(combined)

    def _input(self, name: Modality, tokens: Tensor, sigma: float) -> ModalityInput:
        levels = torch.full((len(self._passes),), sigma, device=tokens.device)
        return ModalityInput(
            tokens=tokens.to(self._dtype).expand(len(self._passes), -1, -1),
            timesteps=levels[:, None],
            sigma=levels,
            coords=self._coords[name],
            context=self._contexts[name],
            context_mask=self._context_mask,
        )


def initial_noise(prompt: SamplePrompt, mode: Mode, *, channels: int = 128) -> AV[Tensor]:
    """Latents of pure noise, fp32 on the CPU, from one generator: the video's first, then the sound's."""
    g = torch.Generator().manual_seed(prompt.seed)
    video = None if mode == "audio" else torch.randn(1, channels, *prompt.latent_grid, generator=g)
    bins = channels // _AUDIO_CHANNELS
    audio = None if mode == "video" else torch.randn(1, _AUDIO_CHANNELS, prompt.audio_steps, bins, generator=g)
    return AV(video=video, audio=audio)


def token_coords(prompt: SamplePrompt, mode: Mode, device: torch.device | str) -> AV[Tensor]:
    """Positions of the tokens of one sample."""
    fps = torch.tensor([prompt.frame_rate], device=device)
    return AV(
        video=None if mode == "audio" else video_coords(prompt.latent_grid, fps),
        audio=None if mode == "video" else audio_coords(prompt.audio_steps, 1, device),
    )


def _channels(transformer: LTX2Transformer) -> int:
    config = transformer.config
    return config.audio_in_channels if transformer.mode == "audio" else config.in_channels


def _with_stg_blocks(guidance: Guidance, transformer: LTX2Transformer) -> Guidance:
    if guidance.stg == 0 or guidance.stg_blocks:
        return guidance
    # Only 2.0 projects the text inside the transformer.
    block = _STG_BLOCK_2_0 if transformer.config.has_caption_projection else _STG_BLOCK
    return replace(guidance, stg_blocks=(min(block, len(transformer.transformer_blocks) - 1),))


def _text_of(encoded: EncodedPrompt, name: Pass) -> TextEmbeds:
    if name != "neg":
        return encoded.positive
    if encoded.negative is None:
        raise ValueError("guidance needs the negative prompt, which was not encoded")
    return encoded.negative


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _joined_masks(texts: Iterable[TextEmbeds], device: torch.device) -> Tensor | None:
    """[passes, L] bool, or None when everything is read, which the fast attention kernels need."""
    texts = list(texts)
    if all(t.mask is None or bool(t.mask.all()) for t in texts):
        return None
    some = next(t.mask for t in texts if t.mask is not None)
    masks = [torch.ones_like(some) if t.mask is None else t.mask for t in texts]
    return torch.cat(masks).to(device)
