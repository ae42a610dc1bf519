"""The training loop."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from musubi_tuner.common.devices import bind_thread
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.log import warn_once
from musubi_tuner.common.progress import progress as progress_bar
from musubi_tuner.common.progress import restart_clock
from musubi_tuner.common.seeding import derive_seed, seed_dropout
from musubi_tuner.dataset.batch import Batch, SampleKey
from musubi_tuner.dataset.loader import BatchLoader
from musubi_tuner.diffusion.losses import AUDIO_TERMS, LossTerm, total
from musubi_tuner.models.ltx2.transformer import LTX2Transformer

from .audio_watch import AudioWatch
from .culprits import Culprits
from .distributed import average_gradients
from .fused_backward import FusedBackward
from .gradients import NORM, clip_gradients
from .lr_plan import LrPlan
from .optimizers import is_schedule_free, learning_rates
from .pace import Lookahead, PeakMemory
from .reports import Listener, StepReport
from .state import Progress
from .step import TaskSettings, TrainingView, prepare_view, view_losses
from .tally import StepTally
from .weights import WeightAction

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 20
_LOSSES = ("loss", "video", *AUDIO_TERMS)  # what a step reports; a batch may lack some


@dataclass(frozen=True)
class LoopSettings:
    """Length and pace of a run; steps are optimizer steps."""

    total_steps: int
    accumulation: int
    max_grad_norm: float
    lr_plan: LrPlan
    rank: int = 0
    world_size: int = 1


@dataclass
class Trainer:
    """Runs optimizer steps over a loader from where ``progress`` stands."""

    transformer: LTX2Transformer
    parameters: Sequence[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    loader: BatchLoader
    task: TaskSettings
    loop: LoopSettings
    progress: Progress
    listeners: Sequence[Listener] = ()
    scaler: torch.amp.GradScaler | None = None
    audio_watch: AudioWatch = AudioWatch()
    weight_actions: Sequence[WeightAction] = ()  # in this order after each step of the optimizer
    norm_groups: Mapping[str, Sequence[torch.nn.Parameter]] = field(default_factory=dict)  # to log the norms of
    fused: FusedBackward | None = None  # steps the optimizer within the backward pass; takes no scaler
    _skipped_in_a_row: int = field(init=False, default=0)
    _first_step: int = field(init=False, default=1)
    _culprits: Culprits = field(init=False)
    _peak: PeakMemory = field(init=False)

    def __post_init__(self) -> None:
        self._peak = PeakMemory(self.task.device)
        self._culprits = Culprits(self.transformer)

    def run(self) -> None:
        """Train to the end.

        Raises:
            UserError: the loss stays non-finite.
        """
        state = self.progress
        self._fit_position_to_data()
        if state.global_step >= self.loop.total_steps:
            logger.warning(
                "nothing is left to train: the state is at step %d and the run ends at step %d; to go on raise "
                "--max_train_steps or --max_train_epochs",
                state.global_step,
                self.loop.total_steps,
            )
        if is_schedule_free(self.optimizer):
            self.optimizer.train()
        for listener in self.listeners:
            listener.on_start(state)
        with progress_bar(total=self.loop.total_steps, initial=state.global_step, desc="steps", unit="step") as bar:
            self._first_step = state.global_step + 1
            while state.global_step < self.loop.total_steps:
                self._run_epoch(bar)
        for listener in self.listeners:
            listener.on_end(state)

    def _fit_position_to_data(self) -> None:
        """Let a state that was saved with other data, maybe in the middle of a longer epoch, go on."""
        state = self.progress
        num_batches = self.loader.batches_per_epoch(self.loop.world_size)
        if state.batches_per_epoch not in (0, num_batches):
            logger.warning(
                "the datasets give %d batches an epoch, %d when the state was saved: training goes on, but not as an "
                "unbroken run would have",
                num_batches,
                state.batches_per_epoch,
            )
        state.batches_per_epoch = num_batches
        if state.batch_in_epoch >= num_batches:
            state.epoch, state.batch_in_epoch, state.epoch_loss_index = state.epoch + 1, 0, 0

    def _run_epoch(self, bar: progress_bar) -> None:
        state = self.progress
        epoch = state.epoch
        start = state.batch_in_epoch
        reader = self.loader.epoch(epoch, start=start, rank=self.loop.rank, world_size=self.loop.world_size)
        bind = partial(bind_thread, self.task.device)
        with Lookahead(self._views(reader, epoch), initializer=bind) as views:
            self._run_views(views, epoch, bar)
        if state.epoch > epoch:
            for listener in self.listeners:
                listener.on_epoch_end(epoch, state)

    def _run_views(self, views: Lookahead[TrainingView], epoch: int, bar: progress_bar) -> None:
        """Steps over the views of what is left of an epoch."""
        state = self.progress
        num_batches = state.batches_per_epoch
        while state.epoch == epoch and state.global_step < self.loop.total_steps:
            report = self._optimizer_step(views, epoch)
            state.batch_in_epoch = min(state.batch_in_epoch + self.loop.accumulation, num_batches)
            bar.set_postfix(report.postfix(), refresh=False)
            bar.update(1)
            if report.step == self._first_step:
                restart_clock(bar)
            # The epoch's last step counts as the start of the next epoch, so that a state saved there does not
            # ask a resumed run for an epoch of no batches.
            if state.batch_in_epoch >= num_batches:
                state.epoch, state.batch_in_epoch, state.epoch_loss_index = epoch + 1, 0, 0
            for listener in self.listeners:
                listener.on_step(report, state)

    def _views(self, reader: Generator[Batch, None, None], epoch: int) -> Generator[TrainingView, None, None]:
        # Closed, as after an error the traceback would keep the reader and its threads.
        with closing(reader) as batches:
            for batch in batches:
                yield self._view(batch, epoch)

    def _view(self, batch: Batch, epoch: int) -> TrainingView:
        return prepare_view(batch, self.task, epoch=epoch, num_blocks=len(self.transformer.transformer_blocks))

    def _optimizer_step(self, views: Lookahead[TrainingView], epoch: int) -> StepReport:
        started = time.perf_counter()
        state = self.progress
        self.loop.lr_plan.apply(self.optimizer, state.global_step)
        norm_names = [NORM, *(f"{NORM}/{name}" for name in self.norm_groups)]
        tally = StepTally([*_LOSSES, *norm_names], self.task.device)
        keys: list[SampleKey] = []
        # Where the processes cannot share an epoch evenly, a process may get an empty last window. It takes part in
        # the step all the same: the others wait for it.
        for index, view in enumerate(itertools.islice(views, self.loop.accumulation)):
            keys += view.keys
            loss, terms = self._backward(view, index, prepare_next=views.prepare)
            tally.add_batch(loss, terms, view.sigma, view.num_tokens)
        for name, value in self._clipped_gradients().items():
            tally.add(name, value)
        totals = tally.over_processes()
        losses, norms = totals.means(_LOSSES), totals.means(norm_names)
        norm, loss = norms.pop(NORM), losses.pop("loss")
        scalars = dict(self.audio_watch.observe(losses, totals.counts, state))
        scalars |= {f"loss/{name}": value for name, value in totals.loss_by_range.items()} | norms
        finite = math.isfinite(norm) and math.isfinite(loss)
        if not finite:
            self._culprits.name(self.loader.plan.training_set, keys, loss_is_finite=math.isfinite(loss))
        stepped = self._apply(finite)
        state.global_step += 1
        for action in self.weight_actions if stepped else ():
            scalars |= action(state.global_step)
        seconds = time.perf_counter() - started
        return StepReport(
            step=state.global_step,
            epoch=epoch,
            loss=loss,
            losses=losses,
            grad_norm=norm,
            lrs=learning_rates(self.optimizer),
            seconds=seconds,
            num_tokens=totals.num_tokens,
            average_loss=self._record(loss),
            wait_share=min(views.waited() / seconds, 1.0),
            peak_memory=self._peak.bytes(),
            stepped=stepped,
            scalars=scalars,
        )

    def _backward(
        self, view: TrainingView, index: int, *, prepare_next: Callable[[], None]
    ) -> tuple[Tensor, Mapping[str, LossTerm]]:
        """Add a micro-batch's gradients; returns its loss and the terms of it."""
        # Dropout draws from the global generator. Seeded by the micro-batch's place in the step, it draws the same in
        # a resumed run, and however many processes share the step.
        place = index * self.loop.world_size + self.loop.rank
        seed_dropout(derive_seed(self.task.seed, "step", self.progress.global_step, place), self.task.device)
        terms = self.audio_watch.weigh(view_losses(self.transformer, view, self.task), self.progress)
        loss = total(terms)
        if loss.requires_grad:
            loss.register_hook(lambda _: prepare_next())  # the backward pass leaves Python to another thread
        if loss.requires_grad and self.fused:
            self.fused.backward(loss)
        elif loss.requires_grad:
            scaled_loss = loss / self.loop.accumulation
            (self.scaler.scale(scaled_loss) if self.scaler else scaled_loss).backward()
        else:
            warn_once(
                logger, "untouched", "a batch of %s trains nothing: no adapted module has a part in it", "+".join(terms)
            )
        return loss, terms

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self.parameters)

    def _clipped_gradients(self) -> dict[str, Tensor]:
        """Clip; returns the norms before, of all gradients and of each group that has any."""
        if self.fused:
            return self.fused.norms()
        # Averaged before they are unscaled: an overflow on one process is one on all, and the scalers stay equal.
        average_gradients(self.parameters)
        if self.scaler and self._has_gradients():
            self.scaler.unscale_(self.optimizer)
        return clip_gradients(self.parameters, self.norm_groups, self.loop.max_grad_norm)

    def _apply(self, finite: bool) -> bool:
        """Step the optimizer, or drop the step when a loss or gradient is not finite."""
        how_far = self.fused.steps_before_fault if self.fused else ""
        moved = self.fused.end_step() if self.fused else self._step_weights(finite)
        if finite:
            self._skipped_in_a_row = 0
            return moved
        self.progress.skipped_steps += 1
        self._skipped_in_a_row += 1
        number = self.progress.global_step + 1
        logger.warning("step %d dropped: the loss or a gradient is not finite%s", number, how_far)
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row had a non-finite loss or gradient (last: step "
                f"{self.progress.global_step + 1}); lower --learning_rate, or train with --mixed_precision bf16"
            )
        return False

    def _step_weights(self, finite: bool) -> bool:
        """Whether there were gradients to step with; they are freed."""
        has_gradients = self._has_gradients()
        if has_gradients and finite:
            if self.scaler:
                self.scaler.step(self.optimizer)
            else:
                self.optimizer.step()
        if has_gradients and self.scaler:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return has_gradients

    def _record(self, loss: float) -> float:
        """Mean over the latest loss of each in-epoch step; non-finite losses are left out."""
        state = self.progress
        if math.isfinite(loss):
            if state.epoch_loss_index < len(state.epoch_losses):
                state.epoch_losses[state.epoch_loss_index] = loss
            else:
                state.epoch_losses.append(loss)
        state.epoch_loss_index += 1
        return state.epoch_loss
