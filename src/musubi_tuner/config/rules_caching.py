"""Rules across the flags of the two caching scripts, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable

from .caching import CacheLatentsConfig, CacheTextConfig, DatasetRunConfig, LatentEncodingConfig, ReferenceSizeConfig
from .rules_common import dtypes, missing, tiles
from .unavailable import unavailable

_SHORTEST_REFERENCE = 0.1  # seconds of sound


def required(config: CacheLatentsConfig | CacheTextConfig) -> Iterable[str]:
    """Files that both scripts cannot do without, and whether they exist."""
    needed = {
        "dataset_config": config.dataset.dataset_config,
        "ltx2_checkpoint": config.checkpoint.ltx2_checkpoint,
    }
    without_checkpoint = isinstance(config, CacheLatentsConfig) and config.without.requested
    for name, path in needed.items():
        if path is None and not (name == "ltx2_checkpoint" and without_checkpoint):
            yield f"--{name} is required"
    yield from missing(needed)
    yield from unavailable(config)
    yield from _dataset_run(config.dataset)
    yield from _manifest(config.dataset)


def latents(config: CacheLatentsConfig) -> Iterable[str]:
    """Options of the latent caching script."""
    encoding, audio = config.encoding, config.audio
    yield from missing({"vae": encoding.vae, "ltx2_audio_dir": audio.ltx2_audio_dir})
    yield from dtypes(
        {
            "vae_dtype": encoding.vae_dtype,
            "ltx2_audio_dtype": audio.ltx2_audio_dtype,
            "audio_video_latent_dtype": audio.audio_video_latent_dtype,
        }
    )
    yield from _tiles(encoding)
    if audio.ltx2_audio_source == "video" and audio.ltx2_audio_dir is not None:
        yield "--ltx2_audio_dir needs --ltx2_audio_source audio_files"
    if audio.audio_only_target_fps <= 0:
        yield f"--audio_only_target_fps {audio.audio_only_target_fps:g}: expected a number > 0"
    if audio.audio_only_sequence_resolution != 0 and audio.audio_only_sequence_resolution < 32:
        yield f"--audio_only_sequence_resolution {audio.audio_only_sequence_resolution}: expected 0 or at least 32"
    if audio.audio_only_target_resolution is not None and audio.audio_only_target_resolution < 32:
        yield f"--audio_only_target_resolution {audio.audio_only_target_resolution}: expected at least 32"
    if audio.audio_video_latent_channels is not None and audio.audio_video_latent_channels < 1:
        yield f"--audio_video_latent_channels {audio.audio_video_latent_channels}: expected at least 1"


def references(config: CacheLatentsConfig) -> Iterable[str]:
    """Options of references."""
    return reference_sizes(config.references)


def reference_sizes(given: ReferenceSizeConfig) -> Iterable[str]:
    """How references are cached, by the rules of the dataset's keys."""
    frames = given.reference_frames
    if frames is not None and (frames < 1 or frames % 8 != 1):
        yield f"--reference_frames {frames}: expected a number of frames of the form 8k + 1 (1, 9, 17, ...)"
    if given.reference_downscale is not None and given.reference_downscale < 1:
        yield f"--reference_downscale {given.reference_downscale}: expected at least 1"
    seconds = given.reference_audio_max_seconds
    if seconds is not None and seconds < _SHORTEST_REFERENCE:
        yield f"--reference_audio_max_seconds {seconds:g}: expected at least {_SHORTEST_REFERENCE:g}"


def sample_latents(config: CacheLatentsConfig) -> Iterable[str]:
    """Options for what samples are conditioned on."""
    samples = config.samples
    if samples.precache_sample_latents and samples.sample_prompts is None:
        yield "--precache_sample_latents needs --sample_prompts"
    if samples.sample_prompts is not None and not samples.precache_sample_latents:
        yield "--sample_prompts needs --precache_sample_latents"
    if samples.precache_sample_latents and config.without.requested:
        yield "--precache_sample_latents encodes, --dry_run and --debug_mode do not; leave one out"
    yield from missing({"sample_prompts": samples.sample_prompts})


def without_encoding(config: CacheLatentsConfig) -> Iterable[str]:
    """Options that look at the clips instead of caching them."""
    without = config.without
    if without.dry_run and without.debug_mode is not None:
        yield "--dry_run and --debug_mode exclude each other; give one"
    if without.requested and config.dataset.save_dataset_manifest is not None:
        yield "--save_dataset_manifest lists what a run has cached; --dry_run and --debug_mode cache nothing"
    if without.encode_rate is not None and not without.dry_run:
        yield "--encode_rate needs --dry_run"
    if without.encode_rate is not None and without.encode_rate <= 0:
        yield f"--encode_rate {without.encode_rate:g}: expected a number > 0"


def _tiles(encoding: LatentEncodingConfig) -> Iterable[str]:
    if encoding.vae_chunk_size is not None and encoding.vae_chunk_size < 1:
        yield f"--vae_chunk_size {encoding.vae_chunk_size}: expected at least 1"
    kinds = (
        ("spatial", encoding.vae_spatial_tile_size, encoding.vae_spatial_tile_overlap, 64, 32),
        ("temporal", encoding.vae_temporal_tile_size, encoding.vae_temporal_tile_overlap, 16, 8),
    )
    for kind, size, overlap, least, step in kinds:
        if size is not None:
            yield from tiles(f"vae_{kind}_tile", size, overlap, least=least, step=step)


def text(config: CacheTextConfig) -> Iterable[str]:
    """Options of the text caching script."""
    gemma, prompts = config.gemma, config.text
    if gemma.gemma_root is None and gemma.gemma_safetensors is None:
        yield "give --gemma_root (a folder) or --gemma_safetensors (a file)"
    quantized = [name for name in ("gemma_load_in_8bit", "gemma_load_in_4bit") if getattr(gemma, name)]
    if len(quantized) > 1:
        yield "--gemma_load_in_8bit and --gemma_load_in_4bit exclude each other; give one"
    if quantized and gemma.gemma_safetensors is not None:
        yield f"--{quantized[0]} works with --gemma_root only; a single file is loaded as it is stored"
    if prompts.precache_sample_prompts and prompts.sample_prompts is None:
        yield "--precache_sample_prompts needs --sample_prompts"
    yield from missing(
        {
            "gemma_root": gemma.gemma_root,
            "gemma_safetensors": gemma.gemma_safetensors,
            "ltx2_text_encoder_checkpoint": prompts.ltx2_text_encoder_checkpoint,
            "sample_prompts": prompts.sample_prompts,
        }
    )


def _manifest(dataset: DatasetRunConfig) -> Iterable[str]:
    manifest, config = dataset.save_dataset_manifest, dataset.dataset_config
    if manifest is None:
        return
    if manifest.is_dir():
        yield f"--save_dataset_manifest {manifest}: is a folder, expected a file"
    if config is not None and manifest.resolve() == config.resolve():
        yield f"--save_dataset_manifest {manifest}: would replace the dataset configuration; choose another name"


def _dataset_run(dataset: DatasetRunConfig) -> Iterable[str]:
    if dataset.strict and dataset.allow_failed:
        yield "--strict and --allow_failed exclude each other; give one"
    if dataset.caption_field is not None and not dataset.caption_field.strip():
        yield "--caption_field: expected the name of a key"
    for name in ("batch_size", "num_workers"):
        value = getattr(dataset, name)
        if value is not None and value < 1:
            yield f"--{name} {value}: expected at least 1"
