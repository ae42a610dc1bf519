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
from musubi_tuner.diffusion.tokens import patchify_audio, patchify_video, unpatchify_audio, unpatchify_video
from musubi_tuner.models.ltx2.inputs import CrossTimestep, ModalityInput
from musubi_tuner.models.ltx2.transformer import LTX2Transformer

from .conditioned import Conditioned, condition
from .conditions import UNCONDITIONED, SampleLatents
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
    latents: SampleLatents = UNCONDITIONED,
    fixed_level: bool = True,
    negative_positions: bool = False,
    description: str = "sampling",
) -> AV[Tensor]:
    """Render one prompt to normalised latents, fp32: video [1, 128, F, H, W] and audio [1, 8, T, 16].

    The passes of guidance run as one batch. ``dtype`` is what the transformer computes in; the sample itself stays
    in fp32. Noise is drawn on the CPU, so every device starts from the same. ``latents`` condition the sample, as
    :func:`musubi_tuner.generation.conditioned.condition` says; those of a first frame are in the result bit for bit.

    Raises:
        UserError: the prompt's guidance does not fit the transformer, or the latents not the prompt's size.
    """
    conditioned = condition(
        prompt, latents, mode, device, fixed_level=fixed_level, negative_positions=negative_positions
    )
    noise = initial_noise(prompt, mode, channels=_channels(transformer))
    tokens = AV(
        video=None if noise.video is None else patchify_video(noise.video),
        audio=None if noise.audio is None else patchify_audio(noise.audio),
    ).map(lambda x: x.to(device))
    denoise = GuidedDenoiser(
        transformer,
        encoded,
        guidance=_with_stg_blocks(prompt.guidance, transformer),
        conditioned=conditioned,
        dtype=dtype,
        cross_timestep=cross_timestep,
    )
    steps = sigma_steps(ltx2_sigmas(prompt.sample_steps))
    tokens = SAMPLERS[sampler](denoise, tokens, progress(steps, desc=description, unit="step"))
    tokens = tokens.map_named(lambda name, x: conditioned[name].lock(x))
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
        conditioned: AV[Conditioned],
        dtype: torch.dtype,
        cross_timestep: CrossTimestep = "hybrid",
    ) -> None:
        modalities = [name for name, _ in conditioned.items()]
        device = next(iter(conditioned.items()))[1].coords.device
        self._transformer = transformer
        self._guidance = guidance
        self._passes = guidance.passes(modalities)
        texts = [_text_of(encoded, name) for name in self._passes]
        self._contexts = AV(video=_joined([t.video for t in texts]), audio=_joined([t.audio for t in texts]))
        self._contexts = self._contexts.map(lambda c: c.to(device, dtype))
        self._context_mask = _joined_masks(texts, device)
        self._conditioned = conditioned
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
        # Whatever the sampler did to them, fixed tokens enter and leave a step as they are.
        tokens = tokens.map_named(lambda name, x: self._conditioned[name].lock(x))
        inputs = tokens.map_named(lambda name, x: self._input(name, x, sigma))
        velocity = self._transformer(inputs, self._perturbations, self._cross_timestep)

        def combined(name: Modality, x: Tensor) -> Tensor:
            conditioned = self._conditioned[name]
            first = conditioned.num_references
            levels = inputs[name].timesteps
            levels = levels[:, first:] if levels.shape[1] > 1 else levels
            clean = to_clean(x, velocity[name][:, first:], levels)  # [passes, N, C]
            by_pass = dict(zip(self._passes, clean.split(1), strict=True))
            return conditioned.lock(guided(self._guidance, name, by_pass))

        return tokens.map_named(combined)

    def _input(self, name: Modality, tokens: Tensor, sigma: float) -> ModalityInput:
        passes, conditioned = len(self._passes), self._conditioned[name]
        return ModalityInput(
            tokens=conditioned.with_references(tokens).to(self._dtype).expand(passes, -1, -1),
            timesteps=conditioned.levels(sigma).expand(passes, -1),
            sigma=torch.full((passes,), sigma, device=tokens.device),
            coords=conditioned.coords.expand(passes, -1, -1, -1),
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
