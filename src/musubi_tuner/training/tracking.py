"""Scalars to TensorBoard and Weights & Biases, through Accelerate's trackers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.training import TrackingConfig, TrainNetworkConfig

from .state import Progress
from .trainer import StepReport

_SECRET = ("token", "api_key", "password")


def tracker_names(config: TrackingConfig) -> list[str]:
    """Which trackers a run logs to; a logging folder alone means TensorBoard."""
    if config.log_with == "all":
        return ["tensorboard", "wandb"]
    if config.log_with is not None:
        return [config.log_with]
    return ["tensorboard"] if config.logging_dir is not None else []


def log_folder(config: TrackingConfig) -> Path | None:
    """``<logging_dir>/<log_prefix><time>``"""
    if config.logging_dir is None:
        return None
    return config.logging_dir / (config.log_prefix + time.strftime("%Y%m%d%H%M%S"))


def start_trackers(accelerator: Accelerator, config: TrainNetworkConfig) -> None:
    """Open the trackers with the run's settings (no secrets, no nested values).

    Raises:
        UserError: the tracker's package is missing.
    """
    if not accelerator.log_with:
        return
    try:
        accelerator.init_trackers(config.tracking.log_tracker_name, config=_plain_settings(config))
    except ImportError as error:
        raise UserError(f"--log_with: {error}; install it, e.g. pip install wandb tensorboard") from error


def _plain_settings(config: TrainNetworkConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for group in asdict(config).values():
        for key, value in group.items():
            if value is None or any(word in key for word in _SECRET):
                continue
            flat[key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def log_scalars(accelerator: Accelerator, values: Mapping[str, float], step: int) -> None:
    if accelerator.trackers:
        accelerator.log(dict(values), step=step)


class ScalarLog:
    """Listens to the loop and logs each step's numbers at its step."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def on_start(self, progress: Progress) -> None:
        pass

    def on_step(self, report: StepReport, progress: Progress) -> None:
        values = {
            "loss/current": report.loss,
            "loss/average": report.average_loss,
            **{f"loss/{name}": value for name, value in report.losses.items()},
            **{f"lr/{label}": lr for label, lr in report.lrs.items()},
            **report.scalars,
            "grad_norm": report.grad_norm,
            "step_seconds": report.seconds,
            "tokens_per_second": report.num_tokens / report.seconds,
        }
        log_scalars(self._accelerator, values, report.step)

    def on_epoch_end(self, epoch: int, progress: Progress) -> None:
        log_scalars(self._accelerator, {"loss/epoch": _mean(progress.epoch_losses)}, progress.global_step)

    def on_end(self, progress: Progress) -> None:
        pass


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
