"""Flags of ``ltx2_convert_lora.py``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .flag import flag
from .rules_common import missing, output_file

# What stands before ``.safetensors`` in the name that a format gets where none is given.
SUFFIXES = {"native": "", "musubi": ".musubi", "comfy": ".comfy", "diffusers": ".diffusers"}


@dataclass(frozen=True)
class ConvertFiles:
    """Files."""

    lora_weight: Path | None = flag(None, "the LoRA file to convert, of any format (required)")
    save_converted_lora: Path | None = flag(
        None, "the file to write (not given: NAME.comfy.safetensors and the like beside the input)", metavar="FILE"
    )
    ltx2_checkpoint: Path | None = flag(
        None, "the checkpoint that the LoRA was trained on; needed only to convert DoRA to or from comfy"
    )


@dataclass(frozen=True)
class ConvertOptions:
    """Converting."""

    format: Literal["native", "musubi", "comfy", "diffusers"] | None = flag(
        None,
        "to write (required): native (lora_unet_...), musubi (lora_unet_model_...), comfy or diffusers (PEFT)",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = flag(
        "auto", "dtype of the result; auto: as it is, so that nothing is lost"
    )
    keep_alpha: bool = flag(
        False, "comfy, diffusers: write <module>.alpha instead of folding it into B; ComfyUI reads it, others may not"
    )
    split_modalities: bool = flag(
        False, "write two files, NAME.video and NAME.audio: modules that act on the picture, and those on the sound"
    )


@dataclass(frozen=True)
class ConvertConfig:
    """``ltx2_convert_lora.py``"""

    files: ConvertFiles = ConvertFiles()
    options: ConvertOptions = ConvertOptions()


def target_path(config: ConvertConfig) -> Path:
    """The file to write, which ``--split_modalities`` makes two of."""
    given, source = config.files.save_converted_lora, config.files.lora_weight
    if given is not None:
        return given
    stem = source.stem
    for suffix in filter(None, SUFFIXES.values()):
        stem = stem.removesuffix(suffix)
    return source.with_name(f"{stem}{SUFFIXES[config.options.format]}.safetensors")


def part_path(path: Path, modality: str) -> Path:
    """``x.safetensors`` to ``x.video.safetensors``."""
    return path.with_name(f"{path.stem}.{modality}{path.suffix}")


def convert_rules(parsed: Any) -> Iterable[str]:
    """Every violation."""
    files, options = parsed.config.files, parsed.config.options
    if files.lora_weight is None:
        yield "--lora_weight is required"
    if options.format is None:
        yield "--format is required: native, musubi, comfy or diffusers"
    yield from missing({"lora_weight": files.lora_weight, "ltx2_checkpoint": files.ltx2_checkpoint})
    if files.lora_weight is None or options.format is None:
        return
    yield from output_file("save_converted_lora", target_path(parsed.config), (files.lora_weight,))
