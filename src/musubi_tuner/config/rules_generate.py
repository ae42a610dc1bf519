"""Rules across the flags of ``ltx2_generate_video.py``, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .rules_common import dtypes, folder, missing, samples
from .rules_memory import blocks, compilation, quantization
from .sampling import GenerateVideoConfig


def _files(config: GenerateVideoConfig) -> Iterable[str]:
    if config.checkpoint.ltx2_checkpoint is None:
        yield "--ltx2_checkpoint is required"
    yield from missing(
        {
            "ltx2_checkpoint": config.checkpoint.ltx2_checkpoint,
            "vae": config.generate.vae,
            "sample_prompts": config.generate.sample_prompts,
            "sample_prompts_cache": config.generate.sample_prompts_cache,
            "gemma_root": config.gemma.gemma_root,
            "gemma_safetensors": config.gemma.gemma_safetensors,
        }
    )
    for path in config.lora.lora_weight:
        yield from missing({"lora_weight": path})
    yield from folder("output_dir", config.generate.output_dir)


def _prompts(config: GenerateVideoConfig) -> Iterable[str]:
    generate, gemma = config.generate, config.gemma
    if (generate.prompt is None) == (generate.sample_prompts is None):
        yield "give either --prompt or --sample_prompts"
    if generate.use_precached_sample_prompts:
        if generate.sample_prompts is None:
            yield "--use_precached_sample_prompts needs --sample_prompts"
        if generate.sample_prompts_cache is None:
            yield "--use_precached_sample_prompts needs --sample_prompts_cache"
    elif gemma.gemma_root is None and gemma.gemma_safetensors is None:
        yield "encoding prompts needs --gemma_root or --gemma_safetensors (or --use_precached_sample_prompts)"
    if config.conditioning.use_precached_sample_latents and config.conditioning.sample_latents_cache is None:
        yield "--use_precached_sample_latents needs --sample_latents_cache"
    if gemma.gemma_load_in_8bit and gemma.gemma_load_in_4bit:
        yield "--gemma_load_in_8bit and --gemma_load_in_4bit exclude each other"


def _combinations(config: GenerateVideoConfig) -> Iterable[str]:
    lora, mode = config.lora, config.checkpoint.ltx2_mode
    count, given = len(lora.lora_weight), len(lora.lora_multiplier)
    if given and not count:
        yield "--lora_multiplier needs --lora_weight"
    elif given not in (0, 1, count):
        yield f"--lora_multiplier: {given} values for {count} files; give one each, one or none"
    yield from dtypes({"vae_dtype": config.generate.vae_dtype})
    yield from samples(config.decode, mode)
    yield from blocks(config.memory)
    yield from quantization(config.quantization)
    yield from compilation(config.compilation)
    if not 0 <= config.guidance.guidance_rescale <= 1:
        yield f"--guidance_rescale: expected 0 to 1, got {config.guidance.guidance_rescale}"


def generate_rules(parsed: Any) -> list[str]:
    """Every violation."""
    return [v for rule in (_files, _prompts, _combinations) for v in rule(parsed.config)]
