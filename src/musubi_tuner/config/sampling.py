"""Flags of previews and generation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .flag import flag
from .memory import BlockMemoryConfig, CompileConfig, QuantizationConfig
from .model import CheckpointConfig, GemmaConfig


@dataclass(frozen=True)
class SampleDecodeConfig:
    """Decoding of samples."""

    sample_tiled_vae: bool = flag(False, "decode the video in spatial tiles")
    sample_vae_tile_size: int = flag(512, "side of a tile, pixels")
    sample_vae_tile_overlap: int = flag(64, "overlap of tiles, pixels")
    sample_vae_temporal_tile_size: int = flag(0, "decode in temporal tiles of this many frames; 0 = off")
    sample_vae_temporal_tile_overlap: int = flag(8, "overlap of temporal tiles, frames")
    sample_merge_audio: bool = flag(False, "write the sound into the .mp4 (a .wav is written in any case)")
    sample_audio_only: bool = flag(False, "render the sound alone, without a video beside it (modes av and audio)")
    sample_disable_audio: bool = flag(False, "do not decode the sound")
    sample_with_offloading: bool = flag(False, "move the transformer to the CPU while the VAEs decode")


@dataclass(frozen=True)
class PreviewConfig:
    """Previews during training."""

    sample_prompts: Path | None = flag(None, "prompt file (.txt, .toml, .json)")
    sample_at_first: bool = flag(False, "render before the first step")
    sample_every_n_steps: int | None = flag(None, "render every so many optimizer steps")
    sample_every_n_epochs: int | None = flag(None, "render every so many epochs")
    height: int = flag(512, "height, pixels (rounded down to a multiple of 32)")
    width: int = flag(768, "width, pixels (rounded down to a multiple of 32)")
    sample_num_frames: int = flag(45, "frames (rounded down to 8k+1)")
    guidance_scale: float = flag(1.0, "default classifier-free guidance scale of a prompt; 1 = off")
    use_precached_sample_prompts: bool = flag(
        False,
        "read the encoded prompts from the cache instead of loading Gemma",
        aliases=["precache_sample_prompts"],
    )
    sample_prompts_cache: Path | None = flag(None, "the encoded prompts; not given: in the first cache_directory")
    sample_disable_flash_attn: bool = flag(False, "PyTorch attention in samples, whatever training uses")
    sample_audio_subprocess: bool = flag(
        True, "no effect: sound is decoded in the training process, and a failure there does not end the run"
    )
    sample_include_reference: bool = flag(False, "show the reference beside the sample (not available yet)")
    sample_two_stage: bool = flag(False, "render at half size, then enlarge and refine (not available yet)")
    spatial_upsampler_path: Path | None = flag(None, "the latent upsampler of --sample_two_stage (not available yet)")
    distilled_lora_path: Path | None = flag(None, "LoRA of its second stage (not available yet)")
    sample_stage2_steps: int = flag(3, "steps of its second stage (not available yet)")


@dataclass(frozen=True)
class SampleConditioningConfig:
    """Conditioning of samples (--i, --v and --ra in prompt files)."""

    use_precached_sample_latents: bool | None = flag(
        None, "read what prompts are conditioned on from the cache; not given: where the cache exists"
    )
    sample_latents_cache: Path | None = flag(
        None, "the cached latents; training, not given: in the first cache_directory"
    )
    sample_i2v_token_timestep_mask: bool = flag(
        True, "tell the transformer that the tokens of a given first frame are clean"
    )
    audio_ref_use_negative_positions: bool = flag(
        False, "place audio references before time 0: in training, and in samples of LoRAs that were trained so"
    )


@dataclass(frozen=True)
class GenerateConfig:
    """Generation."""

    prompt: str | None = flag(None, "text of the one sample to render")
    negative_prompt: str | None = flag(None, "what to steer away from; acts only with a guidance scale other than 1")
    sample_prompts: Path | None = flag(
        None, "prompt file (.txt, .toml, .json) instead of --prompt", aliases=["from_file"]
    )
    output_dir: Path = flag(Path("output"), "folder of the results")
    output_name: str = flag("ltx2_gen", "start of the file names")
    output_type: Literal["video", "latent", "both"] = flag("video", "decoded samples, latents (.safetensors) or both")
    height: int = flag(512, "height, pixels (rounded down to a multiple of 32)")
    width: int = flag(768, "width, pixels (rounded down to a multiple of 32)")
    sample_num_frames: int = flag(45, "frames (rounded down to 8k+1)", aliases=["frame_count"])
    frame_rate: float = flag(25.0, "frames per second")
    sample_steps: int = flag(20, "denoising steps")
    guidance_scale: float = flag(1.0, "classifier-free guidance scale; 1 = off")
    cfg_scale: float | None = flag(None, "the same, wins over --guidance_scale")
    discrete_flow_shift: float | None = flag(None, "no effect: the schedule of LTX-2 is fixed")
    seed: int | None = flag(None, "seed of the noise; not given: random, and logged")
    device: str | None = flag(None, "device; not given: cuda if present, else cpu")
    mixed_precision: Literal["no", "fp16", "bf16"] = flag("bf16", "compute dtype of the transformer")
    vae: Path | None = flag(None, "video VAE from another file than --ltx2_checkpoint")
    vae_dtype: str = flag("bfloat16", "dtype of the VAEs", metavar="DTYPE")
    use_precached_sample_prompts: bool = flag(
        False,
        "read the encoded prompts from the cache instead of loading Gemma",
        aliases=["precache_sample_prompts"],
    )
    sample_prompts_cache: Path | None = flag(None, "the encoded prompts")


@dataclass(frozen=True)
class GuidanceConfig:
    """Further guidance (all off by default; keys of the same names in prompt files)."""

    audio_cfg_scale: float | None = flag(None, "guidance scale of the sound; not given: that of the video")
    stg_scale: float = flag(0.0, "skip guidance: away from a pass that skips self-attention in --stg_blocks")
    stg_blocks: tuple[int, ...] = flag((), "blocks of skip guidance; not given: 29 for 2.0, 28 for 2.3")
    stg_mode: Literal["stg_av", "stg_v"] = flag("stg_av", "skip self-attention in both streams, or in the video's")
    modality_scale: float = flag(1.0, "away from a pass in which picture and sound do not see each other; 1 = off")
    guidance_rescale: float = flag(0.0, "share of guidance's gain in contrast to take back, 0 to 1")


@dataclass(frozen=True)
class GenerateLoraConfig:
    """LoRA."""

    lora_weight: tuple[Path, ...] = flag((), "LoRA files to apply")
    lora_multiplier: tuple[float, ...] = flag((), "their strengths: none (all 1), one for all, or one each")


@dataclass(frozen=True)
class GenerateVideoConfig:
    """``ltx2_generate_video.py``"""

    checkpoint: CheckpointConfig = CheckpointConfig()
    gemma: GemmaConfig = GemmaConfig()
    generate: GenerateConfig = GenerateConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    lora: GenerateLoraConfig = GenerateLoraConfig()
    memory: BlockMemoryConfig = BlockMemoryConfig()
    conditioning: SampleConditioningConfig = SampleConditioningConfig()
    decode: SampleDecodeConfig = SampleDecodeConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    compilation: CompileConfig = CompileConfig()
