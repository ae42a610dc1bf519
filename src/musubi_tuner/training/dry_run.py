"""``--dry_run``: one batch of each bucket through the model, forward and backward, and nothing else."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from musubi_tuner.common.devices import is_out_of_memory, peak_memory
from musubi_tuner.common.tables import format_bytes, format_table
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.dataset.buckets import pixel_frames, pixel_size
from musubi_tuner.dataset.collate import load_batch
from musubi_tuner.dataset.sampling import BatchPlan, BatchSpec, bucket_key
from musubi_tuner.diffusion.losses import total
from musubi_tuner.models.ltx2.transformer import LTX2Transformer

from .memory_outlook import MemoryOutlook
from .outlook import batch_size
from .step import TaskSettings, prepare_view, view_losses

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """What became of one batch."""

    loss: float | None  # None: out of memory
    seconds: float = 0.0
    peak_memory: int = 0


def run_dry_run(
    config: TrainNetworkConfig,
    transformer: LTX2Transformer,
    parameters: Sequence[torch.nn.Parameter],
    plan: BatchPlan,
    task: TaskSettings,
    memory: MemoryOutlook,
) -> int:
    """Try the largest batch of each bucket, the largest of all first; 1 when one did not fit into memory."""
    specs = largest_of_buckets(plan, silence=task.silence_weight is not None)
    trials = []
    with _freed_at_once(parameters) if config.optimizer.fused_backward_pass else nullcontext():
        for number, spec in enumerate(specs, start=1):
            logger.info("dry run: batch %d of %d, %s", number, len(specs), describe(plan, spec))
            trials.append(try_batch(transformer, parameters, plan, spec, task))
    rows = [_row(plan, spec, trial, task) for spec, trial in zip(specs, trials, strict=True)]
    headers = ["batch", "tokens", "seconds", "peak memory", "loss"]
    logger.info(format_table(headers, rows, title="Dry run: forward and backward of the largest batch of each bucket"))
    _warn_of_losses(plan, specs, trials)
    if any(trial.loss is None for trial in trials):
        logger.error("out of memory; what helps: %s", "; ".join(advice(config, plan)))
        logger.error("by the estimate, %s", memory.after_a_failure())
        return 1
    logger.info("dry run passed: nothing was trained or written")
    return 0


@contextmanager
def _freed_at_once(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Gradients go as they come, as where each weight is stepped within the backward pass."""

    def free(parameter: torch.nn.Parameter) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(free) for p in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def largest_of_buckets(plan: BatchPlan, *, silence: bool = False) -> list[BatchSpec]:
    """One batch of the first epoch for each bucket, with and without sound; most tokens first."""
    chosen: dict[Hashable, tuple[int, BatchSpec]] = {}
    for spec in plan.for_epoch(0):
        dataset = plan.training_set.datasets[spec.dataset]
        key = spec.dataset, bucket_key(dataset, dataset.items[spec.samples[0][0]]), plan.has_sound(spec)
        tokens = batch_size(plan, spec, silence=silence).total
        if key not in chosen or tokens > chosen[key][0]:
            chosen[key] = tokens, spec
    return [spec for _, spec in sorted(chosen.values(), key=lambda pair: -pair[0])]


def try_batch(
    transformer: LTX2Transformer,
    parameters: Sequence[torch.nn.Parameter],
    plan: BatchPlan,
    spec: BatchSpec,
    task: TaskSettings,
) -> Trial:
    """Forward and backward of one batch; its gradients are thrown away."""
    if task.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(task.device)
    started = time.perf_counter()
    try:
        loss = _forward_and_backward(transformer, plan, spec, task)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Trial(None)
    finally:
        for parameter in parameters:
            parameter.grad = None
        if task.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    return Trial(loss, time.perf_counter() - started, peak_memory(task.device))


def _forward_and_backward(transformer: LTX2Transformer, plan: BatchPlan, spec: BatchSpec, task: TaskSettings) -> float:
    batch = load_batch(plan.training_set, spec)
    view = prepare_view(batch, task, epoch=0, num_blocks=len(transformer.transformer_blocks))
    loss = total(view_losses(transformer, view, task))
    if loss.requires_grad:  # else nothing that is trained takes part in it
        loss.backward()
    return float(loss.detach())


def advice(config: TrainNetworkConfig, plan: BatchPlan) -> list[str]:
    """What takes less memory, the cheapest first."""
    found = []
    memory = config.memory
    if not memory.settings.checkpointing:
        found.append("--gradient_checkpointing")
    if memory.blocks_to_swap == 0:
        found.append("--blocks_to_swap N --use_pinned_memory_for_block_swap")
    if not memory.gradient_checkpointing_cpu_offload:
        found.append("--gradient_checkpointing_cpu_offload")
    if any(dataset.batch_size > 1 for dataset in plan.training_set.datasets):
        found.append("batch_size = 1, with --gradient_accumulation_steps for the same steps")
    found.append("fewer target_frames or a lower resolution (cache again)")
    if config.checkpoint.ltx2_mode == "av":
        found.append("--ltx2_mode video, if the sound is not needed")
    return found


def describe(plan: BatchPlan, spec: BatchSpec) -> str:
    """``dataset 0: 1 x 192x128, 17 frames, sound``"""
    item = plan.training_set.datasets[spec.dataset].items[spec.samples[0][0]]
    sound = ", sound" if plan.has_sound(spec) else ""
    if plan.training_set.mode == "audio":
        return f"dataset {spec.dataset}: {len(spec.samples)} x sound of {item.audio_steps} steps"
    width, height = pixel_size(item.grid)
    return f"dataset {spec.dataset}: {len(spec.samples)} x {width}x{height}, {pixel_frames(item.grid)} frames{sound}"


def _row(plan: BatchPlan, spec: BatchSpec, trial: Trial, task: TaskSettings) -> list[object]:
    row = [describe(plan, spec), batch_size(plan, spec, silence=task.silence_weight is not None).total]
    if trial.loss is None:
        return [*row, "-", "out of memory", "-"]
    return [*row, f"{trial.seconds:.1f}", format_bytes(trial.peak_memory), f"{trial.loss:.4f}"]


def _warn_of_losses(plan: BatchPlan, specs: Sequence[BatchSpec], trials: Sequence[Trial]) -> None:
    for spec, trial in zip(specs, trials, strict=True):
        if trial.loss is not None and not math.isfinite(trial.loss):
            logger.warning("%s: the loss is %s; training drops such steps", describe(plan, spec), trial.loss)
