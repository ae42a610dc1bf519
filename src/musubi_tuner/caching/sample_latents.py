"""What the prompts of samples are conditioned on, encoded ahead of training and generation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from musubi_tuner.config.caching import SampleLatentsConfig
from musubi_tuner.config.model import Mode
from musubi_tuner.generation.conditions import check_conditions, conditions_of
from musubi_tuner.generation.latent_cache import CacheOwner, write_latent_cache
from musubi_tuner.generation.prompts import SamplePrompt, load_prompts
from musubi_tuner.generation.sample_latents import encode_sample_latents
from musubi_tuner.generation.sample_media import require_media

from .latent_outputs import LatentRecipe
from .latents import AudioEncoder, VideoEncoder

logger = logging.getLogger(__name__)


def read_conditioned_prompts(options: SampleLatentsConfig, mode: Mode) -> list[SamplePrompt]:
    """The prompts of the flags, if any of them is conditioned on a file; nothing is decoded yet.

    Raises:
        UserError: what is wrong in the prompt file, conditions that the mode cannot use, or missing files.
    """
    if not options.precache_sample_latents:
        return []
    assert options.sample_prompts is not None
    # With a guidance scale, lest negative prompts be said to have no effect: the run's own is not known here.
    defaults = SamplePrompt(
        width=options.width, height=options.height, frame_count=options.sample_num_frames, guidance_scale=2.0
    )
    prompts = load_prompts(options.sample_prompts, defaults)
    check_conditions(prompts, mode)
    require_media(prompts, options.sample_prompts)
    if not any(True for prompt in prompts for _ in conditions_of(prompt)):
        logger.warning("%s: no prompt has --i, --v or --ra, so there are no latents to cache", options.sample_prompts)
        return []
    return prompts


def cache_sample_latents(
    path: Path,
    prompts: Sequence[SamplePrompt],
    prompt_file: Path,
    recipe: LatentRecipe,
    *,
    video_vae: VideoEncoder | None,
    audio_vae: AudioEncoder | None,
    reference_downscale: int = 1,
) -> None:
    """Encode what the prompts name into one file, written whole or not at all.

    Raises:
        UserError: a file that cannot be decoded, with its prompt.
    """
    latents = encode_sample_latents(
        prompts, prompt_file, video_vae=video_vae, audio_vae=audio_vae, reference_downscale=reference_downscale
    )
    # Read by runs of the checkpoint that the VAEs stand for.
    ids = [None if vae is None else vae.replaces or vae.id for vae in (recipe.video_vae, recipe.audio_vae)]
    write_latent_cache(path, prompts, prompt_file, latents, owner=CacheOwner(*ids))
    logger.info("encoded what %d sample prompts are conditioned on into %s", len(prompts), path)
