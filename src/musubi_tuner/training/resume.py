"""Continuing from a state folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.hub import hub_folder
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.networks.adapter_network import AdapterNetwork
from musubi_tuner.networks.attached import START_BUFFERS

from .hub import download_state
from .optimizers import optimizer_class
from .state import (
    Progress,
    check_network,
    check_optimizer,
    find_latest_state,
    load_average,
    read_progress,
    restore_network,
    restore_optimizer,
)
from .weights import WeightAverage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """A state folder that has been read but not yet applied."""

    folder: Path
    progress: Progress
    settings: dict[str, Any]
    optimizer: dict[str, Any]

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise UserError where the state was made with settings that differ where they must not."""
        different = [f"{k} {self.settings.get(k)} (now {v})" for k, v in settings.items() if self.settings.get(k) != v]
        if different:
            raise UserError(
                f"{self.folder}: was saved with {'; '.join(different)}; resume with the same values, or start a new "
                "run from the LoRA with --network_weights"
            )

    def check_parts(self, network: AdapterNetwork, optimizer: torch.optim.Optimizer, names: list[str]) -> None:
        """Raise UserError where the state is of another network or optimizer, made before the base is loaded."""
        check_network(self.folder, network, later=START_BUFFERS)
        check_optimizer(self.folder, self.optimizer, optimizer, names)

    def restore(
        self,
        network: AdapterNetwork,
        optimizer: torch.optim.Optimizer,
        names: list[str],
        average: WeightAverage | None = None,
    ) -> None:
        """Put weights, optimizer and running average back.

        Raises:
            UserError: a file cannot be read, or is of another network or optimizer.
        """
        restore_network(self.folder, network)
        restore_optimizer(self.folder, self.optimizer, optimizer, names)
        self._restore_average(network, average)
        logger.info("resumed from %s at step %d", self.folder, self.progress.global_step)

    def _restore_average(self, network: AdapterNetwork, average: WeightAverage | None) -> None:
        saved = load_average(self.folder)
        if average is not None:
            if saved is None:
                logger.info("%s holds no running average: --ema_decay starts at its weights", self.folder)
            average.load_state_dict(saved or dict(network.named_parameters()))
        elif saved is not None:
            logger.warning("%s holds a running average, which ends here: --ema_decay is not given", self.folder)


def find_resumed(config: TrainNetworkConfig) -> Resumed | None:
    folder = config.save.resume
    if folder is not None and config.hub.resume_from_huggingface:
        folder = download_state(hub_folder(str(folder)), config.hub.huggingface_token)
    if folder is None and config.save.autoresume:
        folder = find_latest_state(config.save.output_dir, config.save.output_name)
        if folder is None:
            logger.info("--autoresume: no state in %s, starting from scratch", config.save.output_dir)
    if folder is None:
        return None
    progress, settings, optimizer = read_progress(folder)
    return Resumed(folder, progress, settings, optimizer)


def _base_weights(config: TrainNetworkConfig) -> list[Any] | None:
    """Names and strengths of what was merged into the base model, ``None`` (as in earlier states) for nothing."""
    network = config.network
    return (
        [[p.name for p in network.base_weights], list(network.base_weights_multiplier)]
        if network.base_weights
        else None
    )


def resume_settings(config: TrainNetworkConfig, num_processes: int, *, own_base: bool) -> dict[str, Any]:
    """What must not change between saving and resuming.

    ``own_base``: the checkpoint is NF4 and was quantised less the factors that the LoRA started at.
    """
    optimizer = optimizer_class(config.optimizer.optimizer_type)
    return {
        "ltx2_checkpoint": config.checkpoint.ltx2_checkpoint.name,
        "ltx2_mode": config.checkpoint.ltx2_mode,
        "optimizer_type": f"{optimizer.__module__}.{optimizer.__qualname__}",  # however the flag spells it
        "gradient_accumulation_steps": config.optimizer.gradient_accumulation_steps,
        "network_module": config.network.network_module,
        "processes": num_processes,
        "base_weights": _base_weights(config),
        **_corrections(config),
        "loftq_own_base": own_base or None,  # as in states of before there were any
    }


def _corrections(config: TrainNetworkConfig) -> dict[str, Any]:
    """What makes other NF4 weights of the same checkpoint, for the LoRA to have been trained on."""
    calibration = config.calibration
    corrected = calibration.loftq_init or calibration.awq_calibration
    awq = [calibration.awq_alpha, calibration.awq_num_batches] if calibration.awq_calibration else None
    return {
        "loftq_iters": calibration.loftq_iters if calibration.loftq_init else None,
        "awq_calibration": awq,
        "nf4_block_size": config.quantization.nf4_block_size if corrected else None,
    }
