"""Batches of an epoch, read ahead by threads."""

from __future__ import annotations

import os
from collections.abc import Generator
from functools import partial

import torch

from musubi_tuner.common.ahead import map_ahead
from musubi_tuner.common.devices import bind_thread
from musubi_tuner.common.errors import UserError

from .batch import Batch, pin_memory
from .collate import load_batch
from .frame_store import BlockPool
from .sampling import BatchPlan, BatchSpec

_KEPT_BYTES = 1 << 28  # memory of batches that is kept for the next ones
_AHEAD = 2  # batches that each worker keeps ready


class BatchLoader:
    """Loads the batches of a plan.

    Order and content do not depend on the number of workers. One epoch is read at a time.

    Args:
        plan: what is in which batch.
        workers: threads that read ahead, at most the CPU count; 0 reads when a batch is asked for.
        device: where batches will go: for a GPU they are given in page-locked memory, from which it copies without
            the loop waiting for it.
    """

    def __init__(self, plan: BatchPlan, *, workers: int = 0, device: torch.device | None = None) -> None:
        self.plan = plan
        self.workers = min(workers, os.cpu_count() or 1, len(plan))
        self._device = device or torch.device("cpu")
        self._pool = BlockPool(_KEPT_BYTES)

    def batches_per_epoch(self, world_size: int = 1) -> int:
        """Batches of one epoch for the process that gets most; where they cannot be shared evenly, others get one less.

        Raises:
            UserError: fewer batches than processes.
        """
        if len(self.plan) < world_size:
            raise UserError(
                f"the datasets give {len(self.plan)} batches an epoch, fewer than the {world_size} processes; "
                "raise num_repeats, lower batch_size or use fewer processes"
            )
        return -(-len(self.plan) // world_size)

    def epoch(self, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1) -> Generator[Batch, None, None]:
        """The batches of ``epoch`` for one process, from its batch ``start`` on; skipped ones are not read.

        The processes are dealt the batches in turn; over all of them every batch comes once. Closing it ends the
        threads that read.

        Raises:
            UserError: a cache file is missing or damaged.
        """
        return map_ahead(
            self._load,
            self.plan.for_epoch(epoch)[rank + start * world_size :: world_size],
            threads=self.workers,
            ahead=self.workers * _AHEAD,
            initializer=partial(bind_thread, self._device),
        )

    def _load(self, spec: BatchSpec) -> Batch:
        try:
            batch = load_batch(self.plan.training_set, spec, self._pool)
        except OSError as error:
            raise UserError(str(error)) from None
        return pin_memory(batch) if self._device.type == "cuda" else batch
