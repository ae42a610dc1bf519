"""``ltx2_generate_video.py``: from flags to files."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from musubi_tuner.assembly.base import Base
from musubi_tuner.assembly.quantization import quantization_settings
from musubi_tuner.assembly.transformer import assemble_transformer, check_memory
from musubi_tuner.common.devices import choose_device
from musubi_tuner.common.dtypes import parse_dtype
from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.config.sampling import GenerateVideoConfig
from musubi_tuner.dataset.fingerprint import RepairCommands
from musubi_tuner.memory.compilation import check_backend as check_compiler
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.quantize import check_quantization
from musubi_tuner.models.ltx2.transformer import LTX2Transformer
from musubi_tuner.networks.adapter_network import absent_modules
from musubi_tuner.networks.file_tools.merge import broadcast_multipliers
from musubi_tuner.networks.files.lora_reader import LoraReader
from musubi_tuner.networks.lora_ltx2 import create_network_from_weights
from musubi_tuner.networks.lycoris.files import LycorisReader, open_adapter
from musubi_tuner.networks.resolve import lycoris_bridge

from .decode import Decoders
from .prompt_cache import EncodedPrompt, load_prompt_cache
from .prompts import SamplePrompt, load_prompts, make_prompt
from .run import Job, decode_tiling, generation_stem, render_prompts, render_settings
from .sample_latents import CacheChoice, VaeSource, cache_choice, obtain_sample_latents
from .text_encoding import load_encoder_and_encode

logger = logging.getLogger(__name__)

Adapter = LoraReader | LycorisReader
_DOWNSCALE_KEYS = ("reference_downscale_factor", "ss_reference_downscale_factor")  # of a LoRA's metadata

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def generate(config: GenerateVideoConfig) -> int:
    """Render every prompt; 1 when one of them failed.

    Raises:
        UserError: what is wrong with the request, before a model is loaded where possible.
    """
    options = config.generate
    device = choose_device(options.device)
    dtype = _DTYPES[options.mixed_precision]
    settings = render_settings(
        config.decode,
        config.conditioning,
        mode=config.checkpoint.ltx2_mode,
        device=device,
        dtype=dtype,
        write_media=options.output_type != "latent",
        write_latents=options.output_type != "video",
    )
    if config.compilation.settings is not None:
        check_compiler(config.compilation.settings)
    prompts = read_prompts(config)
    checkpoint = Checkpoint.open(config.checkpoint.ltx2_checkpoint)
    checkpoint.require("transformer", "generating")
    quantization = quantization_settings(config.quantization, device)
    check_quantization(checkpoint, quantization)
    base = Base(checkpoint, settings.generated, dtype, device, quantization)
    check_memory(config.memory.settings, base)
    video_vae = Checkpoint.open(options.vae) if options.vae else None
    decoders = Decoders(
        checkpoint,
        video_vae=video_vae,
        dtype=parse_dtype(options.vae_dtype),
        device=device,
        tiling=decode_tiling(config.decode),
    )
    if settings.write_media:
        decoders.require(video=settings.has_video, audio=settings.has_audio)
    loras = open_loras(config.lora.lora_weight, checkpoint)
    options.output_dir.mkdir(parents=True, exist_ok=True)

    vaes = VaeSource(
        checkpoint, video_vae, dtype=parse_dtype(options.vae_dtype), device=device, tiling=decode_tiling(config.decode)
    )
    downscale = reference_downscale(loras)
    latents = obtain_sample_latents(
        prompts,
        options.sample_prompts,
        settings.generated,
        vaes=vaes,
        cache=_latent_cache(config, downscale),
        reference_downscale=downscale,
    )
    encoded = _encoded(config, checkpoint, prompts, device=device, dtype=dtype)
    transformer, _ = assemble_transformer(base, compilation=config.compilation.settings, memory=config.memory.settings)
    # Blocks are compiled when they first compute, and so with the layers that LoRAs put in place here.
    apply_loras(transformer, loras, config.lora.lora_multiplier, device)
    results = render_prompts(
        transformer,
        [Job(i, p, e, x) for i, (p, e, x) in enumerate(zip(prompts, encoded, latents, strict=True))],
        decoders,
        settings=settings,
        output_dir=options.output_dir,
        stem=lambda job: generation_stem(options.output_name, index=job.index, seed=job.prompt.seed),
    )
    failed = [r for r in results if r.error is not None]
    logger.info("%d of %d samples written to %s", len(results) - len(failed), len(prompts), options.output_dir)
    return 1 if failed else 0


def read_prompts(config: GenerateVideoConfig) -> list[SamplePrompt]:
    """The prompt of ``--prompt`` or those of ``--sample_prompts``, with the flags as defaults.

    Raises:
        UserError: a bad value.
    """
    options, guidance = config.generate, config.guidance
    seed = options.seed
    if seed is None:
        seed = secrets.randbelow(2**32)
        logger.info("--seed not given: drew %d", seed)
    defaults = SamplePrompt(
        width=options.width,
        height=options.height,
        frame_count=options.sample_num_frames,
        frame_rate=options.frame_rate,
        seed=seed,
        sample_steps=options.sample_steps,
        guidance_scale=options.guidance_scale,
        cfg_scale=options.cfg_scale,
        discrete_flow_shift=options.discrete_flow_shift,
        negative_prompt=options.negative_prompt or "",
        **vars(guidance),
    )
    if options.sample_prompts is not None:
        return load_prompts(options.sample_prompts, defaults)
    problems: list[str] = []
    given = {"prompt": options.prompt, "negative_prompt": options.negative_prompt or ""}
    prompt = make_prompt(given, defaults, "--prompt", problems)
    if problems:
        raise ConfigErrors(problems, "invalid sample") if len(problems) > 1 else UserError(problems[0])
    return [prompt]


def open_loras(paths: Sequence[Path], checkpoint: Checkpoint) -> list[Adapter]:
    """Read the headers of LoRA and LyCORIS files, so that a wrong one is found before a model is loaded.

    Raises:
        UserError: a file is no LoRA of LTX-2, or of another version than the checkpoint.
    """
    loras = [open_adapter(path) for path in paths]
    available = {name.removesuffix(".weight") for name in checkpoint.component_keys("transformer")}
    for lora in loras:
        if isinstance(lora, LycorisReader):
            lycoris_bridge(f"--lora_weight {lora.path}")
        absent_modules(lora.infos, available, str(lora.path))
        version = lora.metadata.get("ss_ltx_version", checkpoint.version)
        if version != checkpoint.version:
            logger.warning("%s was trained on LTX-%s, the checkpoint is %s", lora.path, version, checkpoint.version)
    return loras


def reference_downscale(loras: Sequence[LoraReader]) -> int | None:
    """How many times the size of their video references the LoRAs make samples, if they say so.

    Raises:
        UserError: they say different things, or no number.
    """
    said: dict[int, Path] = {}
    for lora in loras:
        texts = (lora.metadata.get(key) for key in _DOWNSCALE_KEYS)
        text = next((text for text in texts if text is not None), None)
        if text is None:
            continue
        if not text.isdecimal() or int(text) < 1:
            raise UserError(f"{lora.path}: its metadata have {_DOWNSCALE_KEYS[0]} {text!r}, expected a number >= 1")
        said[int(text)] = lora.path
    if len(said) > 1:
        found = ", ".join(f"{value} ({path.name})" for value, path in said.items())
        raise UserError(f"the LoRAs have different sizes of references: {found}; use those of one")
    return next(iter(said), None)


def apply_loras(
    transformer: LTX2Transformer, loras: Sequence[Adapter], multipliers: Sequence[float], device: torch.device
) -> None:
    """Attach LoRAs to the transformer, one on top of the other."""
    for lora, multiplier in zip(loras, broadcast_multipliers(multipliers, len(loras)), strict=True):
        file = lora.read_all()
        if transformer.mode == "audio":  # the sound alone: what the file says of the video has no place here
            file = replace(file, modules={n: m for n, m in file.modules.items() if "audio_" in n})
            if not file.modules:
                raise UserError(f"{lora.path}: adapts nothing of the audio stream, and only sound is generated")
        create = create_network_from_weights
        if isinstance(lora, LycorisReader):
            create = lycoris_bridge(f"--lora_weight {lora.path}").create_network_from_weights
        network = create(multiplier, file, transformer)
        network.apply_to(transformer)
        network.to(device).eval().requires_grad_(False)
        logger.info("%s x %g: %s", lora.path.name, multiplier, network.describe())


def _latent_cache(config: GenerateVideoConfig, downscale: int | None) -> CacheChoice:
    options = config.generate
    commands = RepairCommands(None, config.checkpoint.ltx2_checkpoint, mode=config.checkpoint.ltx2_mode)
    sizes = {name: getattr(options, name) for name in ("width", "height", "sample_num_frames")}
    sizes |= {"reference_downscale": downscale} if (downscale or 1) > 1 else {}
    return cache_choice(config.conditioning, options.sample_prompts, commands, sizes=sizes)


def _encoded(
    config: GenerateVideoConfig,
    checkpoint: Checkpoint,
    prompts: Sequence[SamplePrompt],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> list[EncodedPrompt]:
    mode, options = config.checkpoint.ltx2_mode, config.generate
    if options.use_precached_sample_prompts:
        encoder_id = checkpoint.encoder_id("text")
        return load_prompt_cache(options.sample_prompts_cache, mode, prompts, encoder_id=encoder_id)
    return load_encoder_and_encode(checkpoint, config.gemma, prompts, mode, device=device, dtype=dtype)
