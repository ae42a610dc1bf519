"""LoRA files and state folders of a run: names, both formats, rotation."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.common.atomic import is_partial, remove_folder, target_of, write_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavePoint:
    """One moment at which files are written; ``number`` is the epoch or the step, ``None`` at the end."""

    kind: str  # "epoch", "step" or "end"
    number: int | None = None

    def stem(self, name: str) -> str:
        if self.kind == "epoch":
            return f"{name}-{self.number:06d}"
        if self.kind == "step":
            return f"{name}-step{self.number:08d}"
        return name


def lora_path(output_dir: Path, name: str, point: SavePoint) -> Path:
    return output_dir / f"{point.stem(name)}.safetensors"


def state_path(output_dir: Path, name: str, point: SavePoint) -> Path:
    return output_dir / f"{point.stem(name)}-state"


def comfy_path(original: Path) -> Path:
    """``x.safetensors`` to ``x.comfy.safetensors``."""
    return original.with_name(f"{original.stem}.comfy.safetensors")


def ema_path(original: Path) -> Path:
    """``x.safetensors`` to ``x-ema.safetensors``, the running average of the weights."""
    return original.with_name(f"{original.stem}-ema.safetensors")


def sidecar_path(original: Path) -> Path:
    return original.with_suffix(".json")


def write_sidecar(path: Path, values: Mapping[str, Any]) -> None:
    """The ``.json`` beside a LoRA."""
    write_text(path, json.dumps(dict(values), indent=2) + "\n")


def outdated(point: SavePoint, every: int, keep: int | None) -> SavePoint | None:
    """The save point that leaves the window of the last ``keep`` epochs or steps when ``point`` is written."""
    if keep is None or point.number is None:
        return None
    if point.kind == "epoch":
        number = point.number - every * keep
    else:
        number = point.number - keep - 1
        number -= number % every
    return SavePoint(point.kind, number) if number > 0 else None


def remove_lora(output_dir: Path, name: str, point: SavePoint) -> None:
    """Remove the LoRA of a save point with its ComfyUI file, its running average and its sidecar."""
    original = lora_path(output_dir, name, point)
    average = ema_path(original)
    _remove(original, comfy_path(original), average, comfy_path(average), sidecar_path(original))


def remove_state(output_dir: Path, name: str, point: SavePoint) -> None:
    folder = state_path(output_dir, name, point)
    if folder.is_dir():
        logger.info("removing old state %s", folder)
        remove_folder(folder)


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            logger.info("removing old checkpoint %s", path)
            path.unlink()


def leftovers(output_dir: Path, name: str) -> list[Path]:
    """What saves of this name that did not come to their end left behind."""
    ours = re.compile(re.escape(name) + r"(-\d{6,}|-step\d{8,})?(-state|(-ema)?(\.comfy)?\.safetensors|\.json)")
    return [p for p in sorted(output_dir.iterdir()) if is_partial(p) and ours.fullmatch(target_of(p).name)]


def describe(paths: Iterable[Path]) -> str:
    return ", ".join(p.name for p in paths)
