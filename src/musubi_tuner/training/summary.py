"""What a run tells when it is done."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.common.tables import format_table

from .state import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSummary:
    """Numbers of a finished run."""

    first_step: int  # 0, or where it was resumed
    progress: Progress
    seconds: float
    validation: Mapping[str, float]
    files: tuple[Path, ...]
    peak_memory: str  # beside what was estimated

    def log(self) -> None:
        logger.info(format_table(["result", "value"], self.rows(), title="Done"))

    def rows(self) -> list[list[object]]:
        """Name and value of each line."""
        state = self.progress
        done = state.global_step - self.first_step
        resumed = f" ({done} since step {self.first_step})" if self.first_step else ""
        rows: list[list[object]] = [["steps", f"{state.global_step}{resumed}"], ["time", duration(self.seconds)]]
        if done:
            rows.append(["seconds a step", f"{self.seconds / done:.2f}"])
        if state.epoch_losses:
            rows.append(["average loss", f"{state.epoch_loss:.4f}"])
        rows += [[name.replace("_", " "), f"{value:.4f}"] for name, value in self.validation.items()]
        rows.append(["peak memory", self.peak_memory])
        rows.append(["dropped steps", state.skipped_steps])
        rows += [["file" if i == 0 else "", str(path)] for i, path in enumerate(self.files)]
        return rows


def written_files(folder: Path, name: str, since: float) -> tuple[Path, ...]:
    """LoRA files of a run and its state folders, which were written after the time ``since``, oldest first."""
    found: Iterable[Path] = (*folder.glob(f"{name}*.safetensors"), *folder.glob(f"{name}*-state"))
    # Some file systems keep times of two seconds.
    times = {path: path.stat().st_mtime for path in found}
    return tuple(sorted((path for path, time in times.items() if time >= since - 2), key=lambda p: (times[p], p.name)))


def duration(seconds: float) -> str:
    """``3725`` to ``"1:02:05"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
