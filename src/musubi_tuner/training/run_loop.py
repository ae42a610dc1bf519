"""The fourth step of a run: the loop with all that listens to it."""

from __future__ import annotations

from dataclasses import dataclass

from .hub import make_uploader
from .memory_outlook import told_with
from .metadata import RunFacts
from .optimization import fused_backward_pass, weight_actions
from .outlook import by_stream
from .previews import Previewer
from .reports import Listener
from .run_checks import CheckedRun
from .run_parts import PreviewParts, RunData, RunModel
from .saving import Saver
from .setup import audio_watch
from .tracking import CudaMemoryLog, ScalarLog, Tracking, start_trackers
from .trainer import Trainer
from .validation import Validator


@dataclass(frozen=True)
class Listeners:
    """What listens to the loop; the saver and the previewer are on the first process only."""

    logs: list[Listener]
    saver: Saver | None
    previewer: Previewer | None
    validator: Validator | None

    def in_order(self) -> list[Listener]:
        """The validator comes after those of the first process alone, for which the others wait in it."""
        others = (self.saver, self.previewer, self.validator)
        return [*self.logs, *(listener for listener in others if listener is not None)]


def make_listeners(
    checked: CheckedRun, data: RunData, model: RunModel, previews: PreviewParts, facts: RunFacts
) -> Listeners:
    accelerator = checked.compute.accelerator
    tracking = Tracking(accelerator)
    return Listeners(
        logs=_logs(checked, tracking),
        saver=_saver(checked, model, facts) if accelerator.is_main_process else None,
        previewer=_previewer(checked, model, previews, tracking),
        validator=_validator(checked, data, model, tracking),
    )


def run_loop(checked: CheckedRun, data: RunData, model: RunModel, listeners: Listeners) -> None:
    """Train to the end.

    Raises:
        UserError: memory does not suffice, or what is trained stays non-finite.
    """
    config, accelerator = checked.config, checked.compute.accelerator
    start_trackers(accelerator, config)
    norm_groups = by_stream(model.names, model.parameters)
    trainer = Trainer(
        model.transformer,
        model.parameters,
        model.optimizer,
        data.loader,
        model.task,
        model.loop,
        checked.progress,
        listeners.in_order(),
        model.scaler,
        audio_watch=audio_watch(config),
        weight_actions=weight_actions(config, model.network, model.average),
        norm_groups=norm_groups,
        fused=fused_backward_pass(config.optimizer, model.optimizer, norm_groups),
    )
    with told_with(data.memory):
        trainer.run()
    accelerator.end_training()


def _logs(checked: CheckedRun, tracking: Tracking) -> list[Listener]:
    memory_every = checked.config.tracking.log_cuda_memory_every_n_steps
    logs: list[Listener] = [ScalarLog(tracking)]
    return [*logs, CudaMemoryLog(tracking, checked.compute.device, memory_every)] if memory_every else logs


def _saver(checked: CheckedRun, model: RunModel, facts: RunFacts) -> Saver:
    return Saver(
        checked.config,
        facts,
        model.network,
        model.optimizer,
        model.names,
        checked.settings,
        model.scaler,
        model.average,
        make_uploader(checked.config.hub),
    )


def _previewer(checked: CheckedRun, model: RunModel, previews: PreviewParts, tracking: Tracking) -> Previewer | None:
    if previews.decoders is None:
        return None
    return Previewer(
        checked.config,
        previews.jobs,
        previews.decoders,
        model.transformer,
        model.network,
        model.optimizer,
        checked.compute.device,
        checked.compute.dtype,
        tracking,
    )


def _validator(checked: CheckedRun, data: RunData, model: RunModel, tracking: Tracking) -> Validator | None:
    if data.validation is None:
        return None
    settings = checked.config.validation
    return Validator(
        data.validation,
        model.task,
        model.transformer,
        model.network,
        model.optimizer,
        tracking,
        every_n_steps=settings.validate_every_n_steps,
        every_n_epochs=settings.validate_every_n_epochs,
        rank=model.loop.rank,
        world_size=model.loop.world_size,
    )
