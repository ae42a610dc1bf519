"""``--awq_calibration``: what the inputs of the quantised layers are like, measured on batches of the training."""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace

import torch

from musubi_tuner.assembly.base import Base
from musubi_tuner.assembly.transformer import assemble_transformer
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import progress
from musubi_tuner.config.memory import CalibrationConfig, MemorySettings
from musubi_tuner.dataset.collate import load_batch
from musubi_tuner.dataset.sampling import BatchPlan, BatchSpec
from musubi_tuner.models.ltx2.transformer import LTX2Transformer
from musubi_tuner.quantization.awq import InputMagnitudes

from .step import TaskSettings, prepare_view

logger = logging.getLogger(__name__)


def calibrated(
    base: Base, settings: CalibrationConfig, memory: MemorySettings, plan: BatchPlan, task: TaskSettings
) -> Base:
    """``base`` with what ``--awq_calibration`` measures, or as it is without the flag.

    The base is loaded in plain NF4 for it and freed again, so that nothing of it needs more memory than training. The
    batches and their noise are the first ones of the training, so a resumed run measures the same.

    Raises:
        UserError: no quantised layer had an input.
    """
    if base.quantization is None or not base.quantization.calibrate:
        return base
    logger.info("AWQ: measuring inputs on %d batches; the transformer is loaded twice", settings.awq_num_batches)
    transformer, _ = assemble_transformer(base, memory=replace(memory, checkpointing=False, offload_inputs=False))
    found = measure(transformer, plan, task, settings.awq_num_batches)
    del transformer
    gc.collect()
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
    if not found:
        raise UserError("--awq_calibration: no quantised layer had an input in the batches; leave it out")
    logger.info("AWQ: %d weights get scaled columns", len(found))
    return replace(base, quantization=replace(base.quantization, magnitudes=found, strength=settings.awq_alpha))


@torch.no_grad()
def measure(transformer: LTX2Transformer, plan: BatchPlan, task: TaskSettings, count: int) -> dict[str, torch.Tensor]:
    """Mean magnitudes [K] of the inputs of quantised layers over ``count`` batches, by the names of the weights."""
    num_blocks, magnitudes = len(transformer.transformer_blocks), InputMagnitudes()
    with magnitudes.watching(transformer), progress(total=count, desc="AWQ", unit="batch") as bar:
        for epoch, spec in itertools.islice(_batches(plan), count):
            view = prepare_view(load_batch(plan.training_set, spec), task, epoch=epoch, num_blocks=num_blocks)
            transformer(view.inputs, view.perturbations)
            bar.update(1)
    return magnitudes.means()


def _batches(plan: BatchPlan) -> Iterator[tuple[int, BatchSpec]]:
    """The batches of training, epoch after epoch, without end."""
    return ((epoch, spec) for epoch in itertools.count() for spec in plan.for_epoch(epoch))
