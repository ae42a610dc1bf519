"""Names of the files of LoftQ factors beside an NF4 checkpoint."""

from __future__ import annotations

import re
from pathlib import Path


def loftq_path(checkpoint: Path, rank: int) -> Path:
    """``x-nf4.safetensors`` to ``x-nf4.loftq_r32.safetensors``."""
    return checkpoint.with_name(f"{checkpoint.stem}.loftq_r{rank}.safetensors")


def loftq_rank(path: Path, checkpoint: Path) -> int | None:
    """Undo :func:`loftq_path` for a file of the same folder; ``None``: no such name."""
    match = re.fullmatch(re.escape(checkpoint.stem) + r"\.loftq_r(\d+)\.safetensors", path.name)
    return int(match[1]) if match else None
