"""Flags of ``ltx2_merge_lora.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .flag import flag


@dataclass(frozen=True)
class MergeFiles:
    """Files."""

    lora_weight: tuple[Path, ...] = flag((), "LoRA files to merge, in order (any format); required")
    lora_multiplier: tuple[float, ...] = flag((), "strength of each file, or one for all; none: 1.0")
    save_merged_lora: Path | None = flag(None, "the merged .safetensors file; required", metavar="FILE")


@dataclass(frozen=True)
class MergeOptions:
    """Merging."""

    merge_method: Literal["concat", "orthogonal"] = flag(
        "concat", "concat: exact sum, ranks add up; orthogonal: remove overlap between exactly two files"
    )
    orthogonal_k_fraction: float = flag(
        0.5, "orthogonal: share of each LoRA's directions that is removed from the other, 0 to 1"
    )
    orthogonal_rank_mode: Literal["sum", "max", "min"] = flag(
        "sum", "orthogonal: rank of the result from the two ranks"
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = flag(
        "auto", "dtype of the result; auto: the widest of the inputs"
    )
    emit_alpha: bool = flag(False, "write <module>.alpha also in formats that do without (lora_A/lora_B)")


@dataclass(frozen=True)
class MergeConfig:
    """Everything ``ltx2_merge_lora.py`` reads."""

    files: MergeFiles = field(default_factory=MergeFiles)
    options: MergeOptions = field(default_factory=MergeOptions)
