"""Flags of what is seen of a run, and of its processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .flag import flag


@dataclass(frozen=True)
class TrackingConfig:
    """Logging."""

    logging_dir: Path | None = flag(None, "folder of the logs")
    log_with: Literal["tensorboard", "wandb", "all"] | None = flag(None, "tracker (with --logging_dir: tensorboard)")
    log_prefix: str = flag("", "start of the log folder's name")
    log_tracker_name: str = flag("network_train", "TensorBoard: folder below it; wandb: project")
    log_tracker_config: Path | None = flag(None, "TOML file with a table of options for each tracker")
    log_config: bool = flag(False, "log the flags, without tokens and paths")
    wandb_run_name: str | None = flag(None, "name of the run in Weights & Biases")
    wandb_api_key: str | None = flag(None, "key of Weights & Biases (not given: as wandb login left it); never logged")
    log_cuda_memory_every_n_steps: int | None = flag(None, "log the memory of the GPU every so many steps")


@dataclass(frozen=True)
class ValidationConfig:
    """Validation."""

    validate_every_n_steps: int | None = flag(
        None, "loss on the validation datasets every so many optimizer steps, and after the last"
    )
    validate_every_n_epochs: int | None = flag(None, "the same every so many epochs")
    dry_run: bool = flag(
        False, "check everything, pass one batch of each bucket forward and backward, tell the plan, write nothing"
    )


@dataclass(frozen=True)
class ProcessesConfig:
    """Several processes."""

    ddp_timeout: int | None = flag(None, "minutes that processes wait for each other (not given: 120)")
    ddp_gradient_as_bucket_view: bool = flag(False, "no effect: gradients are averaged once a step, without DDP")
    ddp_static_graph: bool = flag(False, "no effect: gradients are averaged once a step, without DDP")
