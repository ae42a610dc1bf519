"""Flags of ``ltx2_extract_lora.py``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .flag import flag
from .rules_common import missing, output_file


@dataclass(frozen=True)
class ExtractFiles:
    """Files."""

    base_model: Path | None = flag(None, "the original checkpoint, in full precision or FP8 (required)")
    tuned_model: Path | None = flag(None, "the changed checkpoint (required)")
    save_extracted_lora: Path | None = flag(None, "the LoRA file to write (required)", metavar="FILE")


@dataclass(frozen=True)
class ExtractOptions:
    """Extracting."""

    network_dim: int = flag(64, "rank of each module; the most where the next two ask for less")
    energy: float = flag(1.0, "as few directions as hold this share of a change's squared norm, above 0 to 1")
    singular_ratio: float = flag(0.0, "drop directions weaker than this share of the strongest, 0 to 1")
    save_precision: Literal["fp32", "fp16", "bf16"] = flag("bf16", "dtype of the LoRA")
    convert_to_comfy: bool = flag(True, "also write *.comfy.safetensors")
    exact_svd: bool = flag(False, "decompose each weight as a whole: the same for changes of low rank, and slow")
    device: str | None = flag(None, "where decompositions are computed (not given: cuda if present, else cpu)")


@dataclass(frozen=True)
class ExtractConfig:
    """``ltx2_extract_lora.py``"""

    files: ExtractFiles = ExtractFiles()
    options: ExtractOptions = ExtractOptions()


def extract_rules(parsed: Any) -> Iterable[str]:
    """Every violation."""
    files, options = parsed.config.files, parsed.config.options
    inputs = {"base_model": files.base_model, "tuned_model": files.tuned_model}
    needed = {**inputs, "save_extracted_lora": files.save_extracted_lora}
    yield from (f"--{name} is required" for name, value in needed.items() if value is None)
    yield from missing(inputs)
    if files.save_extracted_lora is not None:
        yield from output_file("save_extracted_lora", files.save_extracted_lora, [p for p in inputs.values() if p])
    if options.network_dim < 1:
        yield f"--network_dim {options.network_dim}: expected at least 1"
    if not 0 < options.energy <= 1:
        yield f"--energy {options.energy}: expected above 0 to 1"
    if not 0 <= options.singular_ratio < 1:
        yield f"--singular_ratio {options.singular_ratio}: expected 0 to below 1"
