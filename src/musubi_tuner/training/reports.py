"""What the loop tells of each step, and to whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from musubi_tuner.common.tables import format_bytes

from .state import Progress


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step found, over all processes.

    Losses are means over the micro-batches that had the modality, or over the samples in a range of noise levels.
    """

    step: int  # 1-based
    epoch: int  # 0-based
    loss: float
    losses: dict[str, float]
    grad_norm: float
    lrs: dict[str, float]  # by label of the group
    seconds: float
    num_tokens: int
    average_loss: float
    wait_share: float  # of the time, in which this process waited for data
    peak_memory: int  # bytes, of this process
    stepped: bool  # False: dropped, or no batch reached anything that is trained
    scalars: Mapping[str, float] = field(default_factory=dict)  # further numbers to log, by their full names

    def postfix(self) -> dict[str, str]:
        """What the progress bar shows of it."""
        shown = {"avr_loss": f"{self.average_loss:.4f}"}
        for name, short in (("video", "loss_v"), ("audio", "loss_a")):
            value = self.losses.get(name)
            shown[short] = "n/a" if value is None else f"{value:.4f}"
        for name, short in (("audio_weight_effective", "audio_w"), ("audio_presence_ema", "audio_p")):
            value = self.scalars.get(f"loss/{name}")
            if value is not None:
                shown[short] = f"{value:.3f}"
        shown["tok/s"] = f"{self.num_tokens / self.seconds:.0f}"
        shown["wait"] = f"{self.wait_share:.0%}"
        shown["mem"] = format_bytes(self.peak_memory)
        return shown


class Listener(Protocol):
    """What the loop tells of: saving, previews, logging."""

    def on_start(self, progress: Progress) -> None: ...
    def on_step(self, report: StepReport, progress: Progress) -> None: ...
    def on_epoch_end(self, epoch: int, progress: Progress) -> None: ...
    def on_end(self, progress: Progress) -> None: ...
