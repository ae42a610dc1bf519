"""Flags of files that a run writes, and of resuming."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .flag import flag


def resolution(text: str) -> str:
    """``"768,512"``, ``"768x512"`` or ``"768"`` to ``"768x512"``; one number is a square.

    Raises:
        ValueError: for anything else.
    """
    sizes = text.lower().replace("x", ",").split(",")
    if len(sizes) > 2 or not all(s.strip().isdigit() and int(s) > 0 for s in sizes):
        raise ValueError("expected W,H")
    return f"{int(sizes[0])}x{int(sizes[-1])}"


@dataclass(frozen=True)
class SaveConfig:
    """Saving and resuming."""

    output_dir: Path | None = flag(None, "folder of the LoRA files (required)")
    output_name: str = flag("ltx2_lora", "name of the LoRA files")
    save_every_n_epochs: int | None = flag(None, "save every so many epochs")
    save_every_n_steps: int | None = flag(None, "save every so many optimizer steps")
    save_last_n_epochs: int | None = flag(None, "keep only the files of the last so many epochs")
    save_last_n_steps: int | None = flag(None, "keep only the files of the last so many steps")
    save_last_n_epochs_state: int | None = flag(None, "the same for state folders")
    save_last_n_steps_state: int | None = flag(None, "the same for state folders")
    save_state: bool = flag(False, "also save what --resume needs, at each save")
    save_state_on_train_end: bool = flag(False, "save the state at the end only")
    resume: Path | None = flag(None, "state folder to continue from")
    autoresume: bool = flag(False, "continue from the latest state in --output_dir, if there is one")
    save_precision: Literal["float", "fp32", "fp16", "bf16"] = flag("bf16", "dtype of the LoRA files")
    save_checkpoint_metadata: bool = flag(False, "write a .json with loss, lr, step and epoch beside each LoRA")
    convert_to_comfy: bool = flag(True, "also write *.comfy.safetensors")
    save_original_lora: bool = flag(True, "keep the original format beside the ComfyUI one")
    metadata_title: str | None = flag(None, "title in the LoRA's metadata (not given: --output_name)")
    metadata_author: str | None = flag(None, "author in the LoRA's metadata")
    metadata_description: str | None = flag(None, "description in the LoRA's metadata")
    metadata_license: str | None = flag(None, "licence in the LoRA's metadata")
    metadata_tags: str | None = flag(None, "tags in the LoRA's metadata, comma separated")
    metadata_reso: str | None = flag(None, "resolution in the LoRA's metadata, W,H (1280,720)", convert=resolution)
    metadata_arch: str | None = flag(None, "architecture in the LoRA's metadata (not given: LTX2/lora)")
