"""Flags of ``ltx2_merge_lora_to_model.py``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .flag import flag
from .rules_common import missing, output_file


@dataclass(frozen=True)
class MergeModelFiles:
    """Files."""

    ltx2_checkpoint: Path | None = flag(None, "the checkpoint to merge into, in full precision or FP8 (required)")
    lora_weight: tuple[Path, ...] = flag((), "LoRA files of any format (required)")
    lora_multiplier: tuple[float, ...] = flag((), "strength of each file, or one for all; none: 1.0")
    save_merged_model: Path | None = flag(None, "the checkpoint to write (required)", metavar="FILE")


@dataclass(frozen=True)
class MergeModelOptions:
    """Merging."""

    dtype: Literal["auto", "float32", "float16", "bfloat16", "fp8"] = flag(
        "auto", "of the transformer's weights; auto: as they are; fp8: e4m3 with a scale each, as ComfyUI reads it"
    )
    device: str | None = flag(None, "where products are computed (not given: cuda if present, else cpu)")


@dataclass(frozen=True)
class MergeModelConfig:
    """``ltx2_merge_lora_to_model.py``"""

    files: MergeModelFiles = MergeModelFiles()
    options: MergeModelOptions = MergeModelOptions()


def merge_model_rules(parsed: Any) -> Iterable[str]:
    """Every violation."""
    files = parsed.config.files
    needed = {
        "ltx2_checkpoint": files.ltx2_checkpoint,
        "lora_weight": files.lora_weight,
        "save_merged_model": files.save_merged_model,
    }
    yield from (f"--{name} is required" for name, value in needed.items() if not value)
    yield from missing({"ltx2_checkpoint": files.ltx2_checkpoint})
    for path in files.lora_weight:
        yield from missing({"lora_weight": path})
    count = len(files.lora_multiplier)
    if count > 1 and count != len(files.lora_weight):
        yield f"--lora_multiplier: {count} values for {len(files.lora_weight)} files; give one each, one or none"
    if files.lora_multiplier and not any(files.lora_multiplier):
        yield "--lora_multiplier: all are 0; there is nothing to merge"
    if files.save_merged_model is not None:
        inputs = (*files.lora_weight, *([files.ltx2_checkpoint] if files.ltx2_checkpoint else []))
        yield from output_file("save_merged_model", files.save_merged_model, inputs)
