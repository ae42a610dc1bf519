"""Flags of the two caching scripts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .flag import flag
from .model import CheckpointConfig, GemmaConfig

CAPTION_FIELD_HELP = "key of the captions in JSONL lists, where the configuration has no caption_field; else: caption"


@dataclass(frozen=True)
class DatasetRunConfig:
    """Dataset."""

    dataset_config: Path | None = flag(None, "dataset configuration, TOML or JSON (required)")
    batch_size: int | None = flag(None, "items encoded at once; not given: the dataset's batch_size")
    num_workers: int | None = flag(None, "workers that decode ahead of the encoder; not given: CPU count - 1")
    skip_existing: bool = flag(False, "keep caches that this checkpoint, mode and settings made")
    keep_cache: bool = flag(False, "keep cache files that the dataset no longer produces")
    strict_captions: bool = flag(False, "a caption that is missing or unreadable is an error before any work")
    strict: bool = flag(False, "stop at the first item that fails; implies --strict_captions")
    allow_failed: bool = flag(False, "exit with 0 even when some items failed or lack a caption")
    caption_field: str | None = flag(None, CAPTION_FIELD_HELP, metavar="NAME")
    device: str | None = flag(None, "device of the encoder; not given: cuda if present, else cpu")
    save_dataset_manifest: Path | None = flag(
        None, "when done, list the caches in this file (.json), from which training needs neither sources nor TOML"
    )


@dataclass(frozen=True)
class LatentEncodingConfig:
    """Latent encoding."""

    vae: Path | None = flag(None, "video VAE from another file than --ltx2_checkpoint")
    vae_dtype: str = flag("bfloat16", "dtype of the video VAE", metavar="DTYPE")
    vae_chunk_size: int | None = flag(None, "encode in temporal chunks of this many frames (exact, saves memory)")
    vae_spatial_tile_size: int | None = flag(
        None, "encode in spatial tiles of this many pixels (>= 64, multiple of 32)"
    )
    vae_spatial_tile_overlap: int = flag(64, "overlap of spatial tiles, pixels (multiple of 32)")
    vae_temporal_tile_size: int | None = flag(
        None, "encode in temporal tiles of this many frames (>= 16, multiple of 8)"
    )
    vae_temporal_tile_overlap: int = flag(24, "overlap of temporal tiles, frames (multiple of 8)")
    disable_cudnn_backend: bool = flag(False, "convolutions without cuDNN")


@dataclass(frozen=True)
class AudioSourceConfig:
    """Audio."""

    ltx2_audio_source: Literal["video", "audio_files"] = flag("video", "sound of the video file, or separate files")
    ltx2_audio_dir: Path | None = flag(None, "folder of the separate files; not given: the video's folder")
    ltx2_audio_ext: str = flag(".wav", "extension of the separate files")
    ltx2_audio_dtype: str = flag("float16", "dtype of the audio VAE", metavar="DTYPE")
    audio_only_target_fps: float = flag(25.0, "mode audio: frame rate of the virtual video geometry")
    audio_only_target_resolution: int | None = flag(
        None, "mode audio: side of the virtual video, with --audio_only_sequence_resolution 0"
    )
    audio_only_sequence_resolution: int = flag(
        64, "mode audio: fixed side of the virtual video, pixels; 0 = the dataset's resolution"
    )
    audio_video_latent_channels: int | None = flag(
        None, "mode audio: channels of the placeholder latent; not given: what the checkpoint reads"
    )
    audio_video_latent_dtype: str | None = flag(
        None, "mode audio: dtype of the placeholder latent; not given: --ltx2_audio_dtype", metavar="DTYPE"
    )


@dataclass(frozen=True)
class ReferenceSizeConfig:
    """References."""

    reference_frames: int | None = flag(
        None, "frames of a reference, 8k + 1, where the dataset does not say; not given: 1"
    )
    reference_downscale: int | None = flag(
        None, "the target's size divided by the reference's, where the dataset does not say; not given: 1"
    )
    reference_audio_max_seconds: float | None = flag(
        None, "use only the beginning of a reference sound; not given: the whole"
    )

    @property
    def dataset_defaults(self) -> dict[str, object]:
        """Values of the keys that a dataset configuration may leave out."""
        return {"reference_frames": self.reference_frames, "reference_downscale": self.reference_downscale}


@dataclass(frozen=True)
class ReferenceConfig(ReferenceSizeConfig):
    """References and masks."""

    strict_references: bool = flag(False, "stop before encoding if a reference or mask is missing")


@dataclass(frozen=True)
class WithoutEncodingConfig:
    """Without encoding (no checkpoint needed)."""

    debug_mode: Literal["image", "video", "console"] | None = flag(
        None,
        "list the prepared clips and write them to 'debug' beside the configuration, as pictures or videos with sound",
    )
    dry_run: bool = flag(
        False, "tell the number of files and clips, the size of their caches and the time; write nothing"
    )
    encode_rate: float | None = flag(
        None,
        "dry run: megapixels (width x height x frames) a second of the video VAE; not given: timed on a clip, with a "
        "checkpoint",
    )

    @property
    def requested(self) -> bool:
        return self.dry_run or self.debug_mode is not None


@dataclass(frozen=True)
class SampleLatentsConfig:
    """Conditioning of samples."""

    precache_sample_latents: bool = flag(
        False, "also encode what the prompts of --sample_prompts are conditioned on (--i, --v, --ra)"
    )
    sample_prompts: Path | None = flag(None, "prompt file (.txt, .toml, .json)")
    sample_latents_cache: Path | None = flag(None, "where their latents go; not given: the first cache_directory")
    width: int = flag(768, "width of prompts that give none, pixels; as in training")
    height: int = flag(512, "height of prompts that give none, pixels; as in training")
    sample_num_frames: int = flag(45, "frames of prompts that give none; as in training")


@dataclass(frozen=True)
class CacheLatentsConfig:
    """``ltx2_cache_latents.py``"""

    checkpoint: CheckpointConfig = CheckpointConfig()
    dataset: DatasetRunConfig = DatasetRunConfig()
    encoding: LatentEncodingConfig = LatentEncodingConfig()
    audio: AudioSourceConfig = AudioSourceConfig()
    references: ReferenceConfig = ReferenceConfig()
    samples: SampleLatentsConfig = SampleLatentsConfig()
    without: WithoutEncodingConfig = WithoutEncodingConfig()


@dataclass(frozen=True)
class TextEncodingConfig:
    """Text encoding."""

    ltx2_text_encoder_checkpoint: Path | None = flag(None, "connectors from another file than --ltx2_checkpoint")
    mixed_precision: Literal["no", "fp16", "bf16"] = flag(
        "no", "compute dtype of Gemma and the connectors, and of the cache"
    )
    legacy_text_keys: bool = flag(True, "also write the keys text_* that older trainers read (doubles the file)")
    precache_sample_prompts: bool = flag(False, "also encode the prompts of --sample_prompts")
    sample_prompts: Path | None = flag(None, "prompt file (.txt, .toml, .json)")
    sample_prompts_cache: Path | None = flag(None, "where the encoded prompts go; not given: the first cache_directory")


@dataclass(frozen=True)
class PreservationPromptsConfig:
    """Prompts of preservation (not available yet)."""

    precache_preservation_prompts: bool = flag(False, "also encode the prompts of preservation (not available yet)")
    blank_preservation: bool = flag(False, "the empty prompt (not available yet)")
    dop: bool = flag(False, "the prompt of --dop_class_prompt (not available yet)")
    dop_class_prompt: str = flag("", "class of things whose look is kept (not available yet)")
    preservation_prompts_cache: Path | None = flag(None, "where these prompts go (not available yet)")


@dataclass(frozen=True)
class CacheTextConfig:
    """``ltx2_cache_text_encoder_outputs.py``"""

    checkpoint: CheckpointConfig = CheckpointConfig()
    gemma: GemmaConfig = GemmaConfig()
    dataset: DatasetRunConfig = DatasetRunConfig()
    text: TextEncodingConfig = TextEncodingConfig()
    preservation: PreservationPromptsConfig = PreservationPromptsConfig()
