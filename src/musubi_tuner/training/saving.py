"""When and what a run saves: LoRA files in both formats, sidecars, state folders, rotation, uploads.

Weights are checked before anything is written, and each LoRA file is read back before it gets its name. So the files
and states that are there are good ones, whatever stops a run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from musubi_tuner.common.atomic import tidy
from musubi_tuner.common.dtypes import parse_dtype
from musubi_tuner.common.errors import UserError
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.networks.adapter_network import AdapterNetwork
from musubi_tuner.networks.verdict import Verdict, first_non_finite

from .checkpoints import (
    SavePoint,
    comfy_path,
    describe,
    ema_path,
    leftovers,
    lora_path,
    outdated,
    remove_lora,
    remove_state,
    sidecar_path,
    state_path,
    write_sidecar,
)
from .hub import Uploader
from .metadata import RunFacts, training_metadata
from .optimizers import evaluation_weights
from .reports import StepReport
from .state import Progress, save_state
from .weights import WeightAverage

logger = logging.getLogger(__name__)

_ASKED_FOR = {"video": ("video",), "audio": ("audio",), "av": ("video", "audio")}


@dataclass
class Saver:
    """Listens to the loop and writes files at the steps and epochs that were asked for."""

    config: TrainNetworkConfig
    facts: RunFacts
    network: AdapterNetwork
    optimizer: torch.optim.Optimizer
    parameter_names: list[str]
    settings: dict[str, Any]
    scaler: torch.amp.GradScaler | None = None
    average: WeightAverage | None = None
    uploader: Uploader | None = None

    def on_start(self, progress: Progress) -> None:
        save = self.config.save
        save.output_dir.mkdir(parents=True, exist_ok=True)
        tidy(leftovers(save.output_dir, save.output_name))
        if self.uploader is not None:
            self.uploader.create_repository()
        self._catch_up(progress)

    def on_step(self, report: StepReport, progress: Progress) -> None:
        progress.last_step = _sidecar_numbers(report)
        if not (math.isfinite(report.loss) and math.isfinite(report.grad_norm)):
            self._require_finite(progress)  # the weights themselves may be the cause
        point = self._step_point(progress)
        if point is not None:
            self._save(point, progress, with_state=self.config.save.save_state)
            self._rotate(point)

    def on_epoch_end(self, epoch: int, progress: Progress) -> None:
        point = self._epoch_point(progress)
        if point is not None:
            self._save(point, progress, with_state=self.config.save.save_state)
            self._rotate(point)

    def on_end(self, progress: Progress) -> None:
        save = self.config.save
        self._save(SavePoint("end"), progress, with_state=save.save_state or save.save_state_on_train_end)
        if self.uploader is not None:
            self.uploader.close()

    def _step_point(self, progress: Progress) -> SavePoint | None:
        """The save that is due at this step."""
        every = self.config.save.save_every_n_steps
        due = every and progress.global_step > 0 and progress.global_step % every == 0
        return SavePoint("step", progress.global_step) if due else None

    def _epoch_point(self, progress: Progress) -> SavePoint | None:
        """The save that is due where an epoch has just ended; the run's last one is the end itself."""
        every = self.config.save.save_every_n_epochs
        due = every and progress.is_between_epochs and progress.epoch % every == 0
        return SavePoint("epoch", progress.epoch) if due and progress.global_step < self.facts.max_train_steps else None

    def _catch_up(self, progress: Progress) -> None:
        """Write what is due where a resumed run goes on, and had not been written when the run before it ended."""
        for point in (self._step_point(progress), self._epoch_point(progress)):
            if point is None:
                continue
            if any(not path.exists() for path in self._paths(point)):
                logger.info("writing the files of %s, which the earlier run did not complete", self._stem(point))
                self._save(point, progress, with_state=self.config.save.save_state)
            self._rotate(point)

    def _paths(self, point: SavePoint) -> list[Path]:
        """All that a save in the course of the run writes."""
        save = self.config.save
        original = lora_path(save.output_dir, save.output_name, point)
        loras = [original, ema_path(original)] if self.average else [original]
        paths = loras if self._keeps_original else []
        if save.convert_to_comfy:
            paths = [*paths, *map(comfy_path, loras)]
        if save.save_checkpoint_metadata:
            paths.append(sidecar_path(original))
        if save.save_state:
            paths.append(state_path(save.output_dir, save.output_name, point))
        return paths

    @property
    def _keeps_original(self) -> bool:
        return self.config.save.save_original_lora or not self.config.save.convert_to_comfy

    def _stem(self, point: SavePoint) -> str:
        return point.stem(self.config.save.output_name)

    def _save(self, point: SavePoint, progress: Progress, *, with_state: bool) -> None:
        self._require_finite(progress)
        written = self._save_lora(point, progress)
        folder = state_path(self.config.save.output_dir, self.config.save.output_name, point)
        if with_state:
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
        if self.uploader is not None:
            states = [folder] if with_state and self.config.hub.save_state_to_huggingface else []
            self.uploader.upload([*written, *states], wait=point.kind == "end")

    def _save_lora(self, point: SavePoint, progress: Progress) -> list[Path]:
        """Write the LoRA, and its running average, in the formats that were asked for, and the sidecar."""
        save = self.config.save
        original = lora_path(save.output_dir, save.output_name, point)
        with evaluation_weights(self.optimizer):
            written = self._write(original, progress)
        if self.average:
            settings = self.config.network
            facts = {"ss_ema_decay": str(settings.ema_decay), "ss_ema_update_every": str(settings.ema_update_every)}
            with self.average.applied():
                written += self._write(ema_path(original), progress, facts)
        if save.save_checkpoint_metadata:
            write_sidecar(sidecar_path(original), _sidecar(progress))
        return written

    def _write(self, original: Path, progress: Progress, facts: Mapping[str, str] | None = None) -> list[Path]:
        """The network's weights in the formats that were asked for, each read back before it gets its name."""
        save, dtype = self.config.save, parse_dtype(self.config.save.save_precision)
        verdict = self.network.verdict()
        _require_usable(verdict, progress)
        metadata = self.network.metadata() | training_metadata(
            self.config, self.facts, step=progress.global_step, epoch=progress.epoch, verdict=verdict
        )
        metadata |= facts or {}
        written = []
        if self._keeps_original:
            written.append(self.network.save_checked(original, verdict, dtype, metadata))
        if save.convert_to_comfy:
            written.append(self.network.save_checked(comfy_path(original), verdict, dtype, metadata, fmt="comfy"))
        logger.info("saved and read back %s: %s", describe(written), verdict)
        for name in verdict.untouched(_ASKED_FOR[self.config.checkpoint.ltx2_mode]):
            logger.warning("%s was asked for and has not changed in %d steps", name, progress.global_step)
        return written

    def _require_finite(self, progress: Progress) -> None:
        """Stop when a weight is NaN or infinite, before that gets into a file."""
        broken = first_non_finite(self.network.named_parameters())
        if broken is not None:
            raise UserError(
                f"step {progress.global_step}: {broken} holds NaN or infinity, so the training stops here. Nothing of "
                f"it was saved: the files and states of earlier steps in {self.config.save.output_dir} are good. "
                "Resume from the latest state with a lower --learning_rate"
            )

    def _rotate(self, point: SavePoint) -> None:
        """Remove what leaves the window of files to keep, once ``point`` is complete."""
        save = self.config.save
        every, keep, keep_state = (
            (save.save_every_n_epochs, save.save_last_n_epochs, save.save_last_n_epochs_state)
            if point.kind == "epoch"
            else (save.save_every_n_steps, save.save_last_n_steps, save.save_last_n_steps_state)
        )
        old = outdated(point, every, keep)
        if old is not None:
            self._remove(old, remove_lora)
        old_state = outdated(point, every, keep if keep_state is None else keep_state)
        if old_state is not None:
            self._remove(old_state, remove_state)

    def _remove(self, point: SavePoint, remove: Callable[[Path, str, SavePoint], None]) -> None:
        action = partial(remove, self.config.save.output_dir, self.config.save.output_name, point)
        if self.uploader is None:
            action()
        else:
            self.uploader.when_sent(f"removing the files of {self._stem(point)}", action)


def _require_usable(verdict: Verdict, progress: Progress) -> None:
    """Stop when finite factors have grown so large that what they add to the model is not finite."""
    exploded = verdict.exploded
    if exploded:
        raise UserError(
            f"step {progress.global_step}: the {' and '.join(exploded)} weights are so large that the change they make "
            "overflows, so the training stops here and this step is not saved. Resume from the latest state with a "
            "lower --learning_rate"
        )


def _sidecar_numbers(report: StepReport) -> dict[str, float]:
    """What the sidecar says of a step, without what it lacks: a modality that no batch had, a non-finite loss."""
    numbers = {
        "loss": report.loss,
        "loss_avg": report.average_loss,
        "lr": next(iter(report.lrs.values())),
        "loss_video": report.losses.get("video"),
        "loss_audio": report.losses.get("audio"),
    }
    return {name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}


def _sidecar(progress: Progress) -> dict[str, Any]:
    return {
        "step": progress.global_step,
        "epoch": progress.epoch,
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **progress.last_step,
    }
