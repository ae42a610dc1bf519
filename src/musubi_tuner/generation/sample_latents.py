"""The latents that prompts are conditioned on: read from the cache, or encoded here and now."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import progress
from musubi_tuner.config.model import Mode
from musubi_tuner.config.sampling import SampleConditioningConfig
from musubi_tuner.dataset.buckets import SPATIAL_STRIDE, reference_scale
from musubi_tuner.dataset.clip_sound import read_sound
from musubi_tuner.dataset.fingerprint import RepairCommands
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.video_vae import Tiling

from .conditions import UNCONDITIONED, Condition, SampleLatents, check_conditions, conditions_of, named_prompt
from .latent_cache import CacheOwner, load_latent_cache
from .prompts import SamplePrompt
from .sample_media import locate, read_reference, read_still, require_media

logger = logging.getLogger(__name__)


class Encoder(Protocol):
    """What is used of the VAEs: pixels [1, 3, F, H, W] or a waveform [1, 2, S] to latents."""

    @property
    def device(self) -> torch.device: ...
    def encode(self, content: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class VaeSource:
    """Where the VAEs come from and how they run; nothing is loaded before :func:`encode_with` needs it."""

    checkpoint: Checkpoint
    video_vae: Checkpoint | None = None  # another file for the video VAE
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = torch.device("cpu")
    tiling: Tiling = Tiling()

    def owner(self) -> CacheOwner:
        """The checkpoint as caches know it: by its own VAEs, also where another file stands in for one."""
        return CacheOwner(self.checkpoint.encoder_id("video_vae"), self.checkpoint.encoder_id("audio_vae"))


@dataclass(frozen=True)
class CacheChoice:
    """Which file may hold the latents, and whether to use it.

    Attributes:
        path: the file; ``None`` = none is known.
        use: read it (True), encode anyway (False), or read it where it exists (``None``).
        rebuild: the command that makes it.
    """

    path: Path | None
    use: bool | None
    rebuild: str

    @property
    def chosen(self) -> Path | None:
        """The file to read, or ``None``."""
        if self.use is False or self.path is None:
            return None
        return self.path if self.use or self.path.is_file() else None


def cache_choice(
    config: SampleConditioningConfig,
    prompt_file: Path | None,
    commands: RepairCommands,
    *,
    default: Path | None = None,
    sizes: Mapping[str, int],
) -> CacheChoice:
    """The choice that the flags make.

    Args:
        prompt_file, commands, sizes: the prompts, the caching command and the flags of sizes, for messages.
        default: where the file lies when ``--sample_latents_cache`` is not given.
    """
    given = config.sample_latents_cache
    use = config.use_precached_sample_latents
    options = {"--sample_prompts": prompt_file or "<prompts.txt>", **{f"--{name}": v for name, v in sizes.items()}}
    if given is not None:
        options["--sample_latents_cache"] = given
    quoted = " ".join(
        f'{name} "{value}"' if " " in str(value) else f"{name} {value}" for name, value in options.items()
    )
    return CacheChoice(
        given or default,
        True if use is None and given is not None else use,
        f"{commands['latents']} --precache_sample_latents {quoted}",
    )


def obtain_sample_latents(
    prompts: Sequence[SamplePrompt],
    prompt_file: Path | None,
    generated: Mode,
    *,
    vaes: VaeSource,
    cache: CacheChoice,
    reference_downscale: int | None = None,
) -> list[SampleLatents]:
    """The latents of every prompt; the VAEs are loaded only where something has to be encoded.

    Args:
        reference_downscale: how many times the size of their video references samples are, as the LoRA was trained;
            ``None`` = not known: references of the sample's size are encoded, and any of a cache are used.

    Raises:
        UserError: conditions that the mode cannot use, missing or damaged files, a cache made for something else.
    """
    check_conditions(prompts, generated)
    if not any(True for prompt in prompts for _ in conditions_of(prompt)):
        return [UNCONDITIONED] * len(prompts)
    if cache.chosen is not None:
        logger.info("conditioning of samples: read from %s", cache.chosen)
        latents = load_latent_cache(cache.chosen, prompts, prompt_file, rebuild=cache.rebuild, owner=vaes.owner())
        if reference_downscale is not None:
            _check_scale(cache, prompts, latents, reference_downscale)
        return latents
    require_media(prompts, prompt_file)
    return encode_with(vaes, prompts, prompt_file, reference_downscale=reference_downscale or 1)


def _check_scale(
    cache: CacheChoice, prompts: Sequence[SamplePrompt], latents: Sequence[SampleLatents], downscale: int
) -> None:
    for index, (prompt, one) in enumerate(zip(prompts, latents, strict=True)):
        if one.reference is None:
            continue
        frames, height, width = one.reference.shape[2:]
        found = reference_scale(prompt.latent_grid, (frames, height, width))
        if found != downscale:
            raise UserError(
                f"{cache.chosen}: {named_prompt(index, prompt)}: its video reference was encoded for "
                f"reference_downscale {found}, the LoRA has {downscale}; rebuild it: {cache.rebuild}"
            )


def encode_with(
    vaes: VaeSource, prompts: Sequence[SamplePrompt], prompt_file: Path | None, *, reference_downscale: int = 1
) -> list[SampleLatents]:
    """Encode what the prompts name with VAEs that are loaded for it and gone afterwards."""
    wanted = {condition.modality for prompt in prompts for condition, _ in conditions_of(prompt)}
    video_vae, audio_vae = _load(vaes, wanted)
    latents = encode_sample_latents(
        prompts, prompt_file, video_vae=video_vae, audio_vae=audio_vae, reference_downscale=reference_downscale
    )
    del video_vae, audio_vae
    gc.collect()
    if vaes.device.type == "cuda":
        torch.cuda.empty_cache()
    return latents


def _load(vaes: VaeSource, wanted: set[str]) -> tuple[Encoder | None, Encoder | None]:
    # Imported here: with the latents in a cache, only the decoders are needed.
    from musubi_tuner.models.audio_vae import load_audio_vae
    from musubi_tuner.models.video_vae import load_video_vae

    source = vaes.video_vae or vaes.checkpoint
    if "video" in wanted:
        source.require("video_vae_encoder", "encoding what samples are conditioned on")
    if "audio" in wanted:
        vaes.checkpoint.require("audio_vae", "encoding what samples are conditioned on")
    video = audio = None
    if "video" in wanted:
        video = load_video_vae(source, dtype=vaes.dtype, device=vaes.device, decoder=False)
        video.enable_encode_tiling(**vars(vaes.tiling))
    if "audio" in wanted:
        audio = load_audio_vae(vaes.checkpoint, dtype=vaes.dtype, device=vaes.device)
    return video, audio


def encode_sample_latents(
    prompts: Sequence[SamplePrompt],
    prompt_file: Path | None,
    *,
    video_vae: Encoder | None,
    audio_vae: Encoder | None,
    reference_downscale: int = 1,
) -> list[SampleLatents]:
    """Encode the images, references and sounds of the prompts, each at its prompt's size.

    Args:
        prompts: with sizes rounded down.
        prompt_file: relative names are looked for beside it first.
        video_vae, audio_vae: needed where a prompt names pictures or sound.
        reference_downscale: video references have the prompt's size divided by it.

    Raises:
        UserError: a file that cannot be decoded or encoded, with its prompt.
    """
    results = []
    for index, prompt in enumerate(progress(prompts, desc="conditioning", unit="prompt")):
        found = {}
        for condition, text in conditions_of(prompt):
            vae = video_vae if condition.modality == "video" else audio_vae
            assert vae is not None
            try:
                content = _read(condition, locate(text, prompt_file), prompt, reference_downscale)
            except UserError as error:
                raise UserError(f"{named_prompt(index, prompt)}: {condition.option}: {error}") from error
            found[condition.name] = _encoded(vae, content)
            if not bool(found[condition.name].isfinite().all()):
                raise UserError(
                    f"{named_prompt(index, prompt)}: {condition.option} {text}: the VAE gives values that are not "
                    "finite; encode it in float32 (--vae_dtype or --ltx2_audio_dtype)"
                )
        results.append(SampleLatents(**found))
    return results


def _read(condition: Condition, path: Path, prompt: SamplePrompt, downscale: int) -> np.ndarray:
    size = prompt.width, prompt.height
    if condition.name == "image":
        return read_still(path, size)
    if condition.name == "reference":
        step = SPATIAL_STRIDE * downscale
        if any(side % step for side in size):
            raise UserError(
                f"with reference_downscale {downscale} width and height must be multiples of {step}, got "
                f"{size[0]}x{size[1]}"
            )
        smaller = size[0] // downscale, size[1] // downscale
        return read_reference(path, smaller, frames=prompt.frame_count, fps=prompt.frame_rate)
    return read_sound(path, advice="name another file")


def _encoded(vae: Encoder, content: np.ndarray) -> Tensor:
    """Pixels [F, H, W, 3] uint8 or a waveform [2, S] to latents with a batch dimension, fp32 on the CPU."""
    tensor = torch.from_numpy(content)[None].to(vae.device)
    if tensor.dtype == torch.uint8:
        tensor = tensor.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)
    with torch.no_grad():
        return vae.encode(tensor).float().cpu()
