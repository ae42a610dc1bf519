"""From the flags of the two caching scripts to a run over a dataset configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from musubi_tuner.common.dtypes import parse_dtype
from musubi_tuner.common.errors import UserError
from musubi_tuner.config.caching import CacheLatentsConfig, CacheTextConfig, DatasetRunConfig
from musubi_tuner.config.model import GemmaConfig
from musubi_tuner.dataset.clips import AudioSource
from musubi_tuner.dataset.items import Mode
from musubi_tuner.dataset.schema import DatasetConfig, check_mode, load_dataset_config
from musubi_tuner.models.checkpoint import Checkpoint

from .latent_outputs import LatentRecipe, VirtualGeometry
from .latents import RunOptions, cache_latents
from .text import Encoder, TextRecipe, cache_sample_prompts, cache_text, gemma_fingerprint

if TYPE_CHECKING:
    from musubi_tuner.models.video_vae import VideoVAE

logger = logging.getLogger(__name__)

SAMPLE_PROMPTS_NAME = "ltx2_sample_prompts_cache.pt"
_PRECISION = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run_cache_latents(config: CacheLatentsConfig) -> int:
    """``ltx2_cache_latents.py``: the exit status.

    Raises:
        UserError: the request cannot be carried out; nothing has been encoded then.
    """
    assert config.dataset.dataset_config is not None
    assert config.checkpoint.ltx2_checkpoint is not None
    # Imported here: each script is spared the other's libraries.
    from musubi_tuner.models.audio_vae import load_audio_vae
    from musubi_tuner.models.video_vae import load_video_vae

    datasets = load_dataset_config(config.dataset.dataset_config)
    mode = check_mode(datasets, config.checkpoint.ltx2_mode)
    device = _device(config.dataset.device)
    checkpoint = Checkpoint.open(config.checkpoint.ltx2_checkpoint)
    vae_checkpoint = Checkpoint.open(config.encoding.vae) if config.encoding.vae else checkpoint
    if mode != "audio":
        vae_checkpoint.require("video_vae_encoder", "caching video latents")
    if mode != "video":
        checkpoint.require("audio_vae", "caching audio latents")

    recipe = _latent_recipe(config, mode, checkpoint, vae_checkpoint)
    video_vae = audio_vae = None
    if mode != "audio":
        video_vae = load_video_vae(vae_checkpoint, dtype=recipe.video_dtype, device=device, decoder=False)
        _set_memory_options(video_vae, config)
    if mode != "video":
        audio_vae = load_audio_vae(checkpoint, dtype=recipe.audio_dtype, device=device)
    with _resumable():
        summary = cache_latents(
            datasets, recipe, video_vae=video_vae, audio_vae=audio_vae, options=_options(config.dataset)
        )
    return summary.finish(allow_failed=config.dataset.allow_failed)


def _latent_recipe(
    config: CacheLatentsConfig, mode: Mode, checkpoint: Checkpoint, vae_checkpoint: Checkpoint
) -> LatentRecipe:
    audio = config.audio
    if mode == "audio" and audio.audio_only_target_resolution and audio.audio_only_sequence_resolution:
        logger.warning("--audio_only_target_resolution acts only with --audio_only_sequence_resolution 0")
    audio_dtype = parse_dtype(audio.ltx2_audio_dtype)
    placeholder = parse_dtype(audio.audio_video_latent_dtype) if audio.audio_video_latent_dtype else audio_dtype
    return LatentRecipe(
        mode=mode,
        video_vae_id=vae_checkpoint.encoder_id("video_vae") if mode != "audio" else None,
        audio_vae_id=checkpoint.encoder_id("audio_vae") if mode != "video" else None,
        video_dtype=placeholder if mode == "audio" else parse_dtype(config.encoding.vae_dtype),
        audio_dtype=audio_dtype,
        audio_source=AudioSource(audio.ltx2_audio_source, audio.ltx2_audio_dir, audio.ltx2_audio_ext),
        virtual=VirtualGeometry(
            audio.audio_only_target_fps, audio.audio_only_sequence_resolution, audio.audio_only_target_resolution
        ),
        placeholder_channels=audio.audio_video_latent_channels or _video_channels(checkpoint),
    )


def _video_channels(checkpoint: Checkpoint) -> int:
    """Channels of the video latents that the checkpoint's transformer reads."""
    key = checkpoint.component_keys("transformer").get("patchify_proj.weight")
    return checkpoint.tensors[key].shape[1] if key else 128


def _set_memory_options(vae: VideoVAE, config: CacheLatentsConfig) -> None:
    encoding = config.encoding
    vae.set_chunk_size(encoding.vae_chunk_size)
    vae.enable_encode_tiling(
        spatial_tile=encoding.vae_spatial_tile_size or 0,
        spatial_overlap=encoding.vae_spatial_tile_overlap,
        temporal_tile=encoding.vae_temporal_tile_size or 0,
        temporal_overlap=encoding.vae_temporal_tile_overlap,
    )


def run_cache_text(config: CacheTextConfig) -> int:
    """``ltx2_cache_text_encoder_outputs.py``: the exit status.

    Raises:
        UserError: the request cannot be carried out; nothing has been encoded then.
    """
    assert config.dataset.dataset_config is not None
    assert config.checkpoint.ltx2_checkpoint is not None
    datasets = load_dataset_config(config.dataset.dataset_config)
    mode = check_mode(datasets, config.checkpoint.ltx2_mode)
    device = _device(config.dataset.device)
    checkpoint = Checkpoint.open(config.text.ltx2_text_encoder_checkpoint or config.checkpoint.ltx2_checkpoint)
    checkpoint.require("connectors", "caching text")
    dtype = _PRECISION[config.text.mixed_precision]
    recipe = TextRecipe(
        mode, checkpoint.encoder_id("text"), _gemma_id(config.gemma), dtype, config.text.legacy_text_keys
    )

    @cache
    def encoder() -> Encoder:
        return _load_text_encoder(config, checkpoint, dtype, device)

    with _resumable():
        summary = cache_text(datasets, recipe, encoder, options=_options(config.dataset))
    if config.text.precache_sample_prompts:
        assert config.text.sample_prompts is not None
        path = config.text.sample_prompts_cache or sample_prompts_path(datasets)
        cache_sample_prompts(path, config.text.sample_prompts, recipe, encoder())
    return summary.finish(allow_failed=config.dataset.allow_failed)


def sample_prompts_path(datasets: DatasetConfig) -> Path:
    """Where the encoded prompts of previews go by default."""
    return datasets.datasets[0].cache_directory / SAMPLE_PROMPTS_NAME


def _load_text_encoder(
    config: CacheTextConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> Encoder:
    from musubi_tuner.models.text_encoder import load_text_encoder

    gemma = config.gemma
    compute = gemma.gemma_bnb_4bit_compute_dtype
    return load_text_encoder(
        checkpoint,
        gemma_root=gemma.gemma_root,
        gemma_safetensors=gemma.gemma_safetensors,
        load_in_8bit=gemma.gemma_load_in_8bit,
        load_in_4bit=gemma.gemma_load_in_4bit,
        quant_type=gemma.gemma_bnb_4bit_quant_type,
        double_quant=not gemma.gemma_bnb_4bit_disable_double_quant,
        compute_dtype=None if compute == "auto" else parse_dtype(compute),
        dtype=dtype,
        device=device,
    )


def _gemma_id(gemma: GemmaConfig) -> str:
    path = gemma.gemma_safetensors or gemma.gemma_root
    assert path is not None
    quantization = "8bit" if gemma.gemma_load_in_8bit else "none"
    if gemma.gemma_load_in_4bit:
        quantization = f"4bit {gemma.gemma_bnb_4bit_quant_type} {not gemma.gemma_bnb_4bit_disable_double_quant}"
    return gemma_fingerprint(path, quantization)


def _options(config: DatasetRunConfig) -> RunOptions:
    return RunOptions(config.batch_size, config.num_workers, config.skip_existing, config.keep_cache)


@contextmanager
def _resumable() -> Iterator[None]:
    """Say how an interrupted run goes on."""
    try:
        yield
    except KeyboardInterrupt:
        logger.warning("interrupted; every file written so far is complete, --skip_existing continues from here")
        raise


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use cuda, cuda:1 or cpu") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA device is available to PyTorch; use --device cpu")
    return device
