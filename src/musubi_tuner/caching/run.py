"""From the flags of the two caching scripts to a run over a dataset configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch

from musubi_tuner.common.devices import choose_device
from musubi_tuner.common.dtypes import parse_dtype
from musubi_tuner.common.errors import ConfigErrors
from musubi_tuner.config.caching import AudioSourceConfig, CacheLatentsConfig, CacheTextConfig, DatasetRunConfig
from musubi_tuner.config.model import GemmaConfig, Mode
from musubi_tuner.dataset.buckets import SPATIAL_STRIDE
from musubi_tuner.dataset.clip_sound import AudioSource
from musubi_tuner.dataset.companions import check_companions
from musubi_tuner.dataset.entries import DatasetConfig
from musubi_tuner.dataset.fingerprint import short_list
from musubi_tuner.dataset.items import EncoderRecord
from musubi_tuner.dataset.manifest import save_dataset_manifest
from musubi_tuner.dataset.schema import check_mode, load_dataset_config
from musubi_tuner.dataset.sources import require_captions, stray_captions
from musubi_tuner.models.checkpoint import Checkpoint

from .latent_outputs import LatentRecipe, VirtualGeometry
from .latents import cache_latents
from .pipeline import RunOptions, Summary, prepare_directories
from .text import Encoder, TextRecipe, cache_sample_prompts, cache_text, gemma_fingerprint, read_sample_prompts

if TYPE_CHECKING:
    from musubi_tuner.models.video_vae import VideoVAE

logger = logging.getLogger(__name__)

_PRECISION = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def read_datasets(
    config: DatasetRunConfig, mode: Mode, *, defaults: Mapping[str, object] | None = None
) -> tuple[DatasetConfig, Mode]:
    """The dataset configuration of a caching run, and the mode that it has.

    Args:
        defaults: of further keys of the configuration, by the command line.

    Raises:
        UserError: something in the configuration is wrong or, if the flags want all captions, one is missing.
    """
    assert config.dataset_config is not None
    datasets = load_dataset_config(
        config.dataset_config, command_line={"caption_field": config.caption_field, **(defaults or {})}
    )
    mode = check_mode(datasets, mode)
    if config.strict or config.strict_captions:
        require_captions(datasets)
    for entry in datasets.entries():
        if strays := stray_captions(entry):
            logger.warning(
                "%s: captions without a file that is used: %s; are they of another extension?",
                entry.label,
                short_list(strays),
            )
    return datasets, mode


def run_cache_latents(config: CacheLatentsConfig) -> int:
    """``ltx2_cache_latents.py``: the exit status.

    Raises:
        UserError: the request cannot be carried out; nothing has been encoded then.
    """
    assert config.checkpoint.ltx2_checkpoint is not None
    # Imported here: each script is spared the other's libraries.
    from musubi_tuner.generation.latent_cache import DEFAULT_NAME
    from musubi_tuner.models.audio_vae import load_audio_vae
    from musubi_tuner.models.video_vae import load_video_vae

    from .sample_latents import cache_sample_latents, read_conditioned_prompts

    datasets, mode = read_datasets(
        config.dataset, config.checkpoint.ltx2_mode, defaults=config.references.dataset_defaults
    )
    if mode == "audio":
        _check_virtual_size(datasets, config.audio)
    check_companions(datasets, mode, strict=config.references.strict_references)
    device = choose_device(config.dataset.device)
    if config.encoding.disable_cudnn_backend:
        torch.backends.cudnn.enabled = False
    checkpoint = Checkpoint.open(config.checkpoint.ltx2_checkpoint)
    vae_checkpoint = Checkpoint.open(config.encoding.vae) if config.encoding.vae else checkpoint
    if mode != "audio":
        vae_checkpoint.require("video_vae_encoder", "caching video latents")
    if mode != "video":
        checkpoint.require("audio_vae", "caching audio latents")

    samples = read_conditioned_prompts(config.samples, mode)
    prepare_directories(datasets)
    recipe = _latent_recipe(config, mode, checkpoint, vae_checkpoint)
    video_vae = audio_vae = None
    if mode != "audio":
        video_vae = load_video_vae(vae_checkpoint, dtype=recipe.video_dtype, device=device, decoder=False)
        set_memory_options(video_vae, config)
    if mode != "video":
        audio_vae = load_audio_vae(checkpoint, dtype=recipe.audio_dtype, device=device)
    if samples:  # first: what is wrong with them shows at once, not after the dataset
        path = config.samples.sample_latents_cache or datasets.datasets[0].cache_directory / DEFAULT_NAME
        prompt_file = config.samples.sample_prompts
        cache_sample_latents(
            path,
            samples,
            prompt_file,
            recipe,
            video_vae=video_vae,
            audio_vae=audio_vae,
            reference_downscale=datasets.reference_downscale or 1,
        )
    with _resumable():
        summary = cache_latents(
            datasets, recipe, video_vae=video_vae, audio_vae=audio_vae, options=_options(config.dataset)
        )
    return _finish(config.dataset, datasets, summary, text_is_cached=False)


def _check_virtual_size(datasets: DatasetConfig, audio: AudioSourceConfig) -> None:
    """The virtual video of a sound has the dataset's resolution where no flag gives its side."""
    if audio.audio_only_sequence_resolution or audio.audio_only_target_resolution:
        return
    small = [entry for entry in datasets.entries() if min(entry.resolution) < SPATIAL_STRIDE]
    if small:
        raise ConfigErrors(
            [
                f"{entry.label}.resolution: expected at least {SPATIAL_STRIDE} per side with "
                f"--audio_only_sequence_resolution 0, got {list(entry.resolution)}"
                for entry in small
            ],
            f"{datasets.path}: invalid dataset configuration",
        )


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
        video_vae=_encoder("video_vae", vae_checkpoint, checkpoint) if mode != "audio" else None,
        audio_vae=_encoder("audio_vae", checkpoint, checkpoint) if mode != "video" else None,
        video_dtype=placeholder if mode == "audio" else parse_dtype(config.encoding.vae_dtype),
        audio_dtype=audio_dtype,
        audio_source=AudioSource(audio.ltx2_audio_source, audio.ltx2_audio_dir, audio.ltx2_audio_ext),
        virtual=VirtualGeometry(
            audio.audio_only_target_fps, audio.audio_only_sequence_resolution, audio.audio_only_target_resolution
        ),
        placeholder_channels=audio.audio_video_latent_channels or _video_channels(checkpoint),
        reference_audio_seconds=config.references.reference_audio_max_seconds,
    )


def _encoder(
    kind: Literal["video_vae", "audio_vae", "text"], source: Checkpoint, checkpoint: Checkpoint
) -> EncoderRecord:
    """The encoder read from ``source``, instead of the one in ``checkpoint`` where that has another."""
    used, own = source.encoder_id(kind), checkpoint.encoder_id(kind)
    assert used is not None  # Checkpoint.require comes first
    return EncoderRecord(used, own if own != used else None)


def _video_channels(checkpoint: Checkpoint) -> int:
    """Channels of the video latents that the checkpoint's transformer reads."""
    key = checkpoint.component_keys("transformer").get("patchify_proj.weight")
    return checkpoint.tensors[key].shape[1] if key else 128


def set_memory_options(vae: VideoVAE, config: CacheLatentsConfig) -> None:
    """Chunks and tiles of the encoder, from the flags."""
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
    assert config.checkpoint.ltx2_checkpoint is not None
    # Imported here: each script is spared the other's libraries.
    from musubi_tuner.generation.prompt_cache import DEFAULT_NAME
    from musubi_tuner.generation.text_encoding import load_encoder, prompt_length

    datasets, mode = read_datasets(config.dataset, config.checkpoint.ltx2_mode)
    device = choose_device(config.dataset.device)
    text = config.text
    checkpoint = Checkpoint.open(config.checkpoint.ltx2_checkpoint)
    source = Checkpoint.open(text.ltx2_text_encoder_checkpoint) if text.ltx2_text_encoder_checkpoint else checkpoint
    source.require("connectors", "caching text")
    prompts = read_sample_prompts(text.sample_prompts) if text.precache_sample_prompts else []
    prepare_directories(datasets)
    dtype = _PRECISION[text.mixed_precision]
    recipe = TextRecipe(
        mode,
        _encoder("text", source, checkpoint),
        _gemma_id(config.gemma),
        dtype,
        text.legacy_text_keys,
        max_length=prompt_length(),
    )

    @cache
    def encoder() -> Encoder:
        return load_encoder(source, config.gemma, dtype=dtype, device=device)

    with _resumable():
        summary = cache_text(datasets, recipe, encoder, options=_options(config.dataset))
    if prompts and not summary.stopped:
        path = text.sample_prompts_cache or datasets.datasets[0].cache_directory / DEFAULT_NAME
        cache_sample_prompts(path, prompts, recipe, encoder())
    return _finish(config.dataset, datasets, summary, text_is_cached=True)


def _gemma_id(gemma: GemmaConfig) -> str:
    path = gemma.gemma_safetensors or gemma.gemma_root
    assert path is not None
    quantization = "8bit" if gemma.gemma_load_in_8bit else "none"
    if gemma.gemma_load_in_4bit:
        quantization = f"4bit {gemma.gemma_bnb_4bit_quant_type} {not gemma.gemma_bnb_4bit_disable_double_quant}"
    return gemma_fingerprint(path, quantization)


def _options(config: DatasetRunConfig) -> RunOptions:
    return RunOptions(
        config.batch_size, config.num_workers, config.skip_existing, config.keep_cache, strict=config.strict
    )


def _finish(config: DatasetRunConfig, datasets: DatasetConfig, summary: Summary, *, text_is_cached: bool) -> int:
    """Report the run and save the manifest that was asked for; the exit status."""
    status = summary.finish(allow_failed=config.allow_failed)
    if config.save_dataset_manifest is not None:
        path = config.save_dataset_manifest
        save_dataset_manifest(path, datasets, text_is_cached=text_is_cached, failures=len(summary.failures))
    return status


@contextmanager
def _resumable() -> Iterator[None]:
    """Say how an interrupted run goes on."""
    try:
        yield
    except KeyboardInterrupt:
        logger.warning("interrupted; every file written so far is complete, --skip_existing continues from here")
        raise
