"""The loss on the validation datasets: a number that only the trained weights can change."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.common.progress import progress as progress_bar
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.dataset.collate import load_batch
from musubi_tuner.dataset.entries import DatasetConfig
from musubi_tuner.dataset.items import TrainingSet
from musubi_tuner.dataset.sampling import BatchPlan, BatchSpec
from musubi_tuner.diffusion.losses import AUDIO_TERMS, total
from musubi_tuner.models.ltx2.transformer import LTX2Transformer

from .distributed import sum_over_processes
from .levels import LEVEL_RANGES, level_range
from .optimizers import evaluation_weights
from .reports import StepReport
from .state import Progress
from .step import TaskSettings, prepare_view, view_losses
from .tracking import Tracking

logger = logging.getLogger(__name__)

# Its noise is that of no epoch of training, also where both have the same clips.
_EPOCH = -1
_TERMS = ("video", *AUDIO_TERMS)
# Midpoints of eight equal parts of the distribution, in an order whose every start is spread widely: few items already
# see low and high levels.
_QUANTILES = tuple((k + 0.5) / 8 for k in (0, 4, 2, 6, 1, 5, 3, 7))


@dataclass(frozen=True)
class ItemLoss:
    """Losses of one validation item."""

    loss: float  # weighted sum of the terms
    terms: Mapping[str, float]  # unweighted, without those that the item lacks
    level: int  # position in LEVEL_RANGES


def quantile_of(index: int) -> float:
    """Which quantile of the noise levels the item at this place gets."""
    return _QUANTILES[index % len(_QUANTILES)]


def validation_plan(training_set: TrainingSet, seed: int) -> list[BatchSpec]:
    """One item a batch, in the order of the files, so that no option of batching changes the result."""
    single = tuple(replace(dataset, batch_size=1) for dataset in training_set.datasets)
    return BatchPlan(replace(training_set, datasets=single), seed, shuffle=False).for_epoch(0)


def item_loss(
    transformer: LTX2Transformer, training_set: TrainingSet, task: TaskSettings, spec: BatchSpec, index: int
) -> ItemLoss:
    """The loss of the item of ``spec``, which is number ``index`` of the plan."""
    batch = load_batch(training_set, spec)
    quantiles = torch.tensor([quantile_of(index)], dtype=torch.float64)
    num_blocks = len(transformer.transformer_blocks)
    view = prepare_view(batch, task, epoch=_EPOCH, num_blocks=num_blocks, quantiles=quantiles)
    terms = view_losses(transformer, view, task)
    # A mask may leave nothing of a modality to learn.
    found = {name: term for name, term in terms.items() if term.valid is None or bool(term.valid.any())}
    means = {name: float(term.mean()) for name, term in found.items()}
    return ItemLoss(float(total(terms)), means, level_range(view.sigma.item()))


@dataclass
class Validator:
    """Listens to the loop and logs the validation loss at the steps and epochs that were asked for, and at the end.

    All processes take part: they are dealt the items, and each ends up with the numbers of all.

    Attributes:
        task: of the training; what is random in it beyond the noise is left out.
        last: the latest result, by the names that are logged.
    """

    training_set: TrainingSet
    task: TaskSettings
    transformer: LTX2Transformer
    network: nn.Module
    optimizer: torch.optim.Optimizer  # some have other weights to look at than to train with
    tracking: Tracking
    every_n_steps: int | None
    every_n_epochs: int | None
    rank: int = 0
    world_size: int = 1
    last: dict[str, float] = field(init=False, default_factory=dict)
    _last_step: int = field(init=False, default=0)  # measured last; before step 1 there is nothing to measure

    def __post_init__(self) -> None:
        self.task = replace(self.task, level_pool=None, first_frame_p=0.0, caption_dropout_rate=0.0)
        self._plan = validation_plan(self.training_set, self.task.seed)

    def on_start(self, progress: Progress) -> None:
        # The state that a run goes on from may be the last thing that the run before it did, with the measuring that
        # was due at its step still ahead. Measured again, the loss is the same.
        if self._is_due_at_step(progress) or self._is_due_at_epoch(progress):
            self._validate(progress)

    def on_step(self, report: StepReport, progress: Progress) -> None:
        if self._is_due_at_step(progress):
            self._validate(progress)

    def on_epoch_end(self, epoch: int, progress: Progress) -> None:
        if self._is_due_at_epoch(progress):
            self._validate(progress)

    def on_end(self, progress: Progress) -> None:
        self._validate(progress)

    def _is_due_at_step(self, progress: Progress) -> bool:
        return bool(self.every_n_steps) and progress.global_step % self.every_n_steps == 0

    def _is_due_at_epoch(self, progress: Progress) -> bool:
        """Whether an epoch after which to measure has just ended."""
        return bool(self.every_n_epochs) and progress.is_between_epochs and progress.epoch % self.every_n_epochs == 0

    def _validate(self, progress: Progress) -> None:
        if progress.global_step == self._last_step:
            return
        self._last_step = progress.global_step
        self.last = summarise(self.measure())
        self.tracking.log(self.last, progress.global_step)
        shown = ", ".join(f"{name.removeprefix('val_')} {value:.4f}" for name, value in self.last.items())
        logger.info("validation after step %d: %s", progress.global_step, shown)

    def measure(self) -> list[ItemLoss]:
        """The losses of all items, in the order of the plan."""
        table = torch.zeros(len(self._plan), 2 + 2 * len(_TERMS), dtype=torch.float32)
        own = range(self.rank, len(self._plan), self.world_size)
        with (
            evaluation_weights(self.optimizer),
            _evaluating(self.transformer, self.network, self.task.device),
            progress_bar(total=len(own), desc="validation", unit="item", leave=False) as bar,
        ):
            for index in own:
                spec = self._plan[index]
                loss = item_loss(self.transformer, self.training_set, self.task, spec, index)
                table[index] = _row(loss)
                bar.update(1)
        # Each row is one process's and 0 on the others, so the sum is exact, and the same however many there are.
        rows = sum_over_processes(table, self.task.device).tolist()
        return [_item(row) for row in rows]


def summarise(items: list[ItemLoss]) -> dict[str, float]:
    """Means over all items, over those that have a term, and over those in each range of noise levels."""
    values = {"val_loss": _mean([item.loss for item in items])}
    for name in _TERMS:
        found = [item.terms[name] for item in items if name in item.terms]
        if found:
            values[f"val_loss_{name}"] = _mean(found)
    for index, name in enumerate(LEVEL_RANGES):
        found = [item.loss for item in items if item.level == index]
        if found:
            values[f"val_loss_sigma_{name}"] = _mean(found)
    return values


def wants_validation(config: TrainNetworkConfig, datasets: DatasetConfig) -> bool:
    """Whether to validate; says so where flags and datasets do not go together."""
    settings = config.validation
    asked = bool(settings.validate_every_n_steps or settings.validate_every_n_epochs)
    if asked and not datasets.validation:
        logger.warning(
            "--validate_every_n_* has no effect: %s has no [[validation_datasets]]; add one with a cache_directory "
            "of its own and cache it",
            datasets.path,
        )
    if datasets.validation and not asked:
        logger.info("the validation datasets are not used; --validate_every_n_steps or --validate_every_n_epochs does")
    return asked and bool(datasets.validation)


def _mean(values: list[float]) -> float:
    # fsum has no order: the result is the same however the items were dealt.
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def _row(item: ItemLoss) -> Tensor:
    present = [float(name in item.terms) for name in _TERMS]
    return torch.tensor([item.loss, item.level, *(item.terms.get(name, 0.0) for name in _TERMS), *present])


def _item(row: list[float]) -> ItemLoss:
    loss, level, *rest = row
    pairs: Iterator[Any] = zip(_TERMS, rest[: len(_TERMS)], rest[len(_TERMS) :], strict=True)
    return ItemLoss(loss, {name: value for name, value, present in pairs if present}, int(level))


@contextmanager
def _evaluating(transformer: nn.Module, network: nn.Module, device: torch.device) -> Iterator[None]:
    """Without dropout and gradients; modes and global random state come back as they were."""
    modes = transformer.training, network.training
    transformer.eval()
    network.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        transformer.train(modes[0])
        network.train(modes[1])
