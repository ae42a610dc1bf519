"""Batches of an epoch, read ahead by worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from musubi_tuner.common.errors import UserError

from .batch import Batch
from .collate import load_batch
from .frame_store import BlockPool
from .items import TrainingSet
from .parcel import FEWER_WORKERS, Parcel, pack
from .sampling import BatchPlan, BatchSpec

_KEPT_BYTES = 1 << 28  # memory of batches that every worker keeps for the next ones


class BatchLoader:
    """Loads the batches of a plan.

    Order and content do not depend on the number of workers. One epoch is read at a time.

    Args:
        plan: what is in which batch.
        workers: processes that read ahead, at most the CPU count; 0 reads in this process.
        prefetch: batches that each worker keeps ready.
        persistent: keep the workers between epochs.
        pin_memory: give batches in page-locked memory, from which a GPU copies without the loop waiting for it.
    """

    def __init__(
        self,
        plan: BatchPlan,
        *,
        workers: int = 0,
        prefetch: int = 2,
        persistent: bool = False,
        pin_memory: bool = False,
    ) -> None:
        self.plan = plan
        self._order = _Order()
        workers = min(workers, os.cpu_count() or 1, len(plan))
        # The specs travel as "indices", so workers stay the same whatever the epoch. The private generator
        # keeps the DataLoader from drawing its worker seeds from global random state.
        self._loader: DataLoader[Batch | Parcel | _Failure] = DataLoader(
            _Batches(plan.training_set, packed=workers > 0 or pin_memory),
            batch_size=None,
            sampler=self._order,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=persistent and workers > 0,
            pin_memory=pin_memory,
            collate_fn=_identity,
            generator=torch.Generator(),
        )

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

    def epoch(self, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """The batches of ``epoch`` for one process, from its batch ``start`` on; skipped ones are not read.

        The processes are dealt the batches in turn; over all of them every batch comes once.

        Raises:
            UserError: a cache file is missing or damaged.
        """
        self._order.specs = self.plan.for_epoch(epoch)[rank + start * world_size :: world_size]
        for result in self._loader:
            if isinstance(result, _Failure):
                raise UserError(result.message)
            yield result.unpack() if isinstance(result, Parcel) else result


@contextmanager
def lost_workers_told() -> Iterator[None]:
    """Make one message of the death of a worker, which interrupts whatever the block is doing.

    Raises:
        UserError: a worker process ended before its time.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"a process that reads batches ahead is gone ({str(error).strip().rstrip('.')}). If it was killed, the "
            f"system was most likely out of memory; after a bus error, shared memory is too small. {FEWER_WORKERS}"
        ) from None


class _Failure:
    """An error that crosses the process border without a traceback in its message."""

    def __init__(self, message: str) -> None:
        self.message = message


class _Batches(Dataset):
    def __init__(self, training_set: TrainingSet, *, packed: bool) -> None:
        self.training_set = training_set
        self._packed = packed
        self._pool: BlockPool | None = None  # made in the process that reads

    def __getitem__(self, spec: BatchSpec) -> Batch | Parcel | _Failure:
        self._pool = self._pool or BlockPool(_KEPT_BYTES)
        try:
            batch = load_batch(self.training_set, spec, self._pool)
            return pack(batch) if self._packed else batch
        except (UserError, OSError) as error:
            return _Failure(str(error))


class _Order(Sampler[BatchSpec]):
    def __init__(self) -> None:
        self.specs: Sequence[BatchSpec] = ()

    def __iter__(self) -> Iterator[BatchSpec]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def _identity(value: Batch | Parcel | _Failure) -> Batch | Parcel | _Failure:
    return value
