"""When and what a run saves: LoRA files in both formats, sidecars, state folders, rotation."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from musubi_tuner.common.dtypes import parse_dtype
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.networks.lora_ltx2 import LoRANetwork

from .checkpoints import (
    SavePoint,
    comfy_path,
    describe,
    ema_path,
    lora_path,
    outdated,
    remove_lora,
    remove_state,
    sidecar_path,
    state_path,
    write_sidecar,
)
from .metadata import RunFacts, training_metadata
from .optimizers import evaluation_weights
from .state import Progress, save_state
from .trainer import StepReport
from .weights import WeightAverage

logger = logging.getLogger(__name__)


@dataclass
class Saver:
    """Listens to the loop and writes files at the steps and epochs that were asked for."""

    config: TrainNetworkConfig
    facts: RunFacts
    network: LoRANetwork
    optimizer: torch.optim.Optimizer
    parameter_names: list[str]
    settings: dict[str, Any]
    scaler: torch.amp.GradScaler | None = None
    average: WeightAverage | None = None
    _last: StepReport | None = None

    def on_start(self, progress: Progress) -> None:
        self.config.save.output_dir.mkdir(parents=True, exist_ok=True)

    def on_step(self, report: StepReport, progress: Progress) -> None:
        self._last = report
        save = self.config.save
        every = save.save_every_n_steps
        if every and progress.global_step % every == 0:
            self._save(SavePoint("step", progress.global_step), progress, with_state=save.save_state)
            self._rotate(
                SavePoint("step", progress.global_step),
                every,
                save.save_last_n_steps,
                save.save_last_n_steps_state,
            )

    def on_epoch_end(self, epoch: int, progress: Progress) -> None:
        save = self.config.save
        every, number = save.save_every_n_epochs, epoch + 1
        if every and number % every == 0 and progress.global_step < self.facts.max_train_steps:
            point = SavePoint("epoch", number)
            self._save(point, progress, with_state=save.save_state)
            self._rotate(point, every, save.save_last_n_epochs, save.save_last_n_epochs_state)

    def on_end(self, progress: Progress) -> None:
        save = self.config.save
        self._save(SavePoint("end"), progress, with_state=save.save_state or save.save_state_on_train_end)

    def _save(self, point: SavePoint, progress: Progress, *, with_state: bool) -> None:
        self._save_lora(point, progress)
        if with_state:
            folder = state_path(self.config.save.output_dir, self.config.save.output_name, point)
            if self.scaler:
                progress.scaler = self.scaler.state_dict()
            save_state(
                folder,
                progress=progress,
                network=self.network.state_dict(),
                optimizer=self.optimizer,
                parameter_names=self.parameter_names,
                settings=self.settings,
                average=self.average.state_dict() if self.average else None,
            )
            logger.info("saved state %s", folder)

    def _save_lora(self, point: SavePoint, progress: Progress) -> None:
        save = self.config.save
        original = lora_path(save.output_dir, save.output_name, point)
        metadata = self.network.metadata() | training_metadata(
            self.config, self.facts, step=progress.global_step, epoch=progress.epoch
        )
        with evaluation_weights(self.optimizer):
            written = self._write(original, metadata)
        if self.average:
            settings = self.config.network
            facts = {"ss_ema_decay": str(settings.ema_decay), "ss_ema_update_every": str(settings.ema_update_every)}
            with self.average.applied():
                written += self._write(ema_path(original), metadata | facts)
        if save.save_checkpoint_metadata:
            write_sidecar(sidecar_path(original), self._sidecar(progress))
        logger.info("saved %s", describe(written))

    def _write(self, original: Path, metadata: dict[str, str]) -> list[Path]:
        """The network's weights in the formats that were asked for."""
        save, dtype = self.config.save, parse_dtype(self.config.save.save_precision)
        written = []
        if save.save_original_lora or not save.convert_to_comfy:
            written.append(self.network.save_weights(original, dtype, metadata))
        if save.convert_to_comfy:
            written.append(self.network.save_weights(comfy_path(original), dtype, metadata, fmt="comfy"))
        return written

    def _sidecar(self, progress: Progress) -> dict[str, Any]:
        last = self._last
        values: dict[str, Any] = {
            "step": progress.global_step,
            "epoch": progress.epoch,
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        if last is not None:
            values |= {
                "loss": last.loss,
                "loss_avg": last.average_loss,
                "lr": next(iter(last.lrs.values())),
                "loss_video": last.losses.get("video"),
                "loss_audio": last.losses.get("audio"),
            }
        return values

    def _rotate(self, point: SavePoint, every: int, keep: int | None, keep_state: int | None) -> None:
        directory, name = self.config.save.output_dir, self.config.save.output_name
        old = outdated(point, every, keep)
        if old is not None:
            remove_lora(directory, name, old)
        old_state = outdated(point, every, keep if keep_state is None else keep_state)
        if old_state is not None:
            remove_state(directory, name, old_state)
