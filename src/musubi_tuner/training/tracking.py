"""Numbers, samples and settings to TensorBoard and Weights & Biases, through Accelerate's trackers."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from musubi_tuner.common.errors import UserError, did_you_mean
from musubi_tuner.common.tables import format_bytes
from musubi_tuner.common.text_files import read_toml
from musubi_tuner.config.tracking import TrackingConfig
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.generation.run import Rendered

from .reports import StepReport
from .sample_log import LOG_SAMPLE
from .state import Progress

logger = logging.getLogger(__name__)

_SECRET = ("token", "api_key", "password")
_GIB = 1024**3


# --- choice and start -------------------------------------------------------------------------------------------


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


def check_trackers(config: TrackingConfig) -> None:
    """Raise UserError for a tracker that is not installed or options that cannot be read, before anything is loaded."""
    for name in tracker_names(config):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--log_with {name}: the package is not installed; run: pip install {name}")
    tracker_options(config)


def tracker_options(config: TrackingConfig) -> dict[str, dict[str, Any]]:
    """What each tracker is started with, by its name.

    Raises:
        UserError: the file of ``--log_tracker_config`` is no TOML, or has more than tables of trackers.
    """
    options: dict[str, dict[str, Any]] = {"tensorboard": {}, "wandb": {}}
    if config.log_tracker_config is not None:
        for name, table in read_toml(config.log_tracker_config).items():
            if name not in options or not isinstance(table, dict):
                raise UserError(
                    f"{config.log_tracker_config}: {name!r} is no table of a tracker{did_you_mean(name, options)}; "
                    f"expected {' or '.join(f'[{known}]' for known in options)}"
                )
            options[name] = table
    if config.wandb_run_name is not None:
        options["wandb"]["name"] = config.wandb_run_name
    return options


def start_trackers(accelerator: Accelerator, config: TrainNetworkConfig) -> None:
    """Open the trackers of the run, on the first process."""
    if not accelerator.log_with:
        return
    tracking = config.tracking
    if accelerator.is_main_process and "wandb" in tracker_names(tracking):
        _set_up_wandb(accelerator, tracking)
    accelerator.init_trackers(
        tracking.log_tracker_name,
        config=plain_settings(config) if tracking.log_config else None,
        init_kwargs=tracker_options(tracking),
    )


def _set_up_wandb(accelerator: Accelerator, tracking: TrackingConfig) -> None:
    # By the environment, which leaves no key in a file of the user's home.
    if tracking.wandb_api_key is not None:
        os.environ["WANDB_API_KEY"] = tracking.wandb_api_key
    if accelerator.logging_dir is not None:
        folder = Path(accelerator.logging_dir)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_DIR", str(folder))


def plain_settings(config: TrainNetworkConfig) -> dict[str, bool | int | float | str]:
    """The flags that have a value, without secrets and paths."""
    flat: dict[str, bool | int | float | str] = {}
    for group in asdict(config).values():
        for key, value in group.items():
            parts = value if isinstance(value, tuple) else (value,)
            if value is None or any(word in key for word in _SECRET) or any(isinstance(p, Path) for p in parts):
                continue
            flat[key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


# --- during the run ---------------------------------------------------------------------------------------------


def log_scalars(accelerator: Accelerator, values: Mapping[str, float], step: int) -> None:
    if accelerator.trackers:
        accelerator.log(dict(values), step=step)


@dataclass(frozen=True)
class Tracking:
    """Logs everything of a step at its number: trackers refuse steps that go back."""

    accelerator: Accelerator

    def log(self, values: Mapping[str, float], step: int) -> None:
        log_scalars(self.accelerator, values, step)

    def log_samples(self, results: Sequence[Rendered], step: int) -> None:
        """Pictures, videos and sounds of samples, as ``sample_<index>``; what fails is a warning."""
        for tracker in self.accelerator.trackers:
            for result in results:
                try:
                    LOG_SAMPLE[tracker.name](tracker.tracker, f"sample_{result.job.index}", result.paths, step)
                except Exception as error:
                    logger.warning("sample %d was not sent to %s: %s", result.job.index, tracker.name, error)


@dataclass(frozen=True)
class ScalarLog:
    """Listens to the loop and logs each step's numbers at its step."""

    tracking: Tracking

    def on_start(self, progress: Progress) -> None:
        # The run that saved this state may not have come to it. Logged twice, it is the same.
        if progress.is_between_epochs:
            self._log_epoch(progress)

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
            "data_wait_share": report.wait_share,
            "peak_memory_gib": report.peak_memory / _GIB,
        }
        self.tracking.log(values, report.step)

    def on_epoch_end(self, epoch: int, progress: Progress) -> None:
        self._log_epoch(progress)

    def on_end(self, progress: Progress) -> None:
        pass

    def _log_epoch(self, progress: Progress) -> None:
        self.tracking.log({"loss/epoch": progress.epoch_loss}, progress.global_step)


@dataclass(frozen=True)
class CudaMemoryLog:
    """Listens to the loop and logs the memory of the GPU every so many steps."""

    tracking: Tracking
    device: torch.device
    every_n_steps: int

    def on_start(self, progress: Progress) -> None:
        if self.device.type != "cuda":
            logger.warning("--log_cuda_memory_every_n_steps has no effect: this run computes on the %s", self.device)

    def on_step(self, report: StepReport, progress: Progress) -> None:
        if self.device.type != "cuda" or report.step % self.every_n_steps:
            return
        values = {
            "allocated": torch.cuda.memory_allocated(self.device),
            "reserved": torch.cuda.memory_reserved(self.device),
            "peak_allocated": torch.cuda.max_memory_allocated(self.device),
            "peak_reserved": torch.cuda.max_memory_reserved(self.device),
        }
        self.tracking.log({f"cuda_memory/{name}_gib": value / _GIB for name, value in values.items()}, report.step)
        shown = ", ".join(f"{name.replace('_', ' ')} {format_bytes(value)}" for name, value in values.items())
        logger.info("step %d: GPU memory: %s", report.step, shown)

    def on_epoch_end(self, epoch: int, progress: Progress) -> None:
        pass

    def on_end(self, progress: Progress) -> None:
        pass
