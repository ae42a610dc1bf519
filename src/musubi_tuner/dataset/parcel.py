"""A batch as one block of bytes, for the way from a worker process to the loop and on to the device.

Each tensor that crosses the border between processes costs a handshake, and each one that is copied to a GPU without
a halt needs page-locked memory. One block is one handshake and one lock, whatever the batch holds.
"""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.tables import format_bytes

from .batch import Batch

FEWER_WORKERS = (
    "Give it more (containers: --shm-size or --ipc=host), or lower --max_data_loader_n_workers; 0 reads without such "
    "processes"
)

_ALIGNMENT = 64  # bytes; any dtype may start there
_SMALL = 2**20  # bytes; a block up to this size goes through the pipe, which is quicker than a handshake


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the block."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Parcel:
    """A packed batch."""

    rest: bytes  # the batch with the positions of its tensors in place of them
    places: tuple[_Place, ...]
    block: Tensor  # [bytes] uint8

    def pin_memory(self, device: str | None = None) -> Parcel:
        """In page-locked memory, which a GPU reads by itself; the ``DataLoader`` calls this."""
        return replace(self, block=self.block.pin_memory())

    def __reduce__(self) -> tuple[Any, ...]:
        if len(self.block) > _SMALL:
            return Parcel, (self.rest, self.places, self.block)
        return _from_bytes, (self.rest, self.places, self.block.numpy().tobytes())

    def unpack(self) -> Batch:
        """The batch; its tensors are views of the block."""
        return _Unpickler(self).load()


def pack(batch: Batch) -> Parcel:
    """Copy the tensors of a batch into one block."""
    rest = io.BytesIO()
    pickler = _Pickler(rest)
    pickler.dump(batch)
    places, end = [], 0
    for tensor in pickler.tensors:
        places.append(_Place(-(-end // _ALIGNMENT) * _ALIGNMENT, tensor.dtype, tuple(tensor.shape)))
        end = places[-1].end
    block = _new_block(end)
    for tensor, place in zip(pickler.tensors, places, strict=True):
        _view(block, place).copy_(tensor)
    return Parcel(rest.getvalue(), tuple(places), block)


def _new_block(size: int) -> Tensor:
    """In a worker's shared memory at once: sending any other block would copy it once more.

    Raises:
        UserError: there is not enough shared memory.
    """
    if size <= _SMALL or get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    try:
        shared = torch.UntypedStorage._new_shared(size)  # as in default_collate
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"no shared memory for a batch of {format_bytes(size)} ({reason}). {FEWER_WORKERS}") from None
    return torch.empty(0, dtype=torch.uint8).set_(shared)


def _from_bytes(rest: bytes, places: tuple[_Place, ...], block: bytes) -> Parcel:
    return Parcel(rest, places, torch.frombuffer(bytearray(block), dtype=torch.uint8))


def _view(block: Tensor, place: _Place) -> Tensor:
    return block[place.start : place.end].view(place.dtype).view(place.shape)


class _Pickler(pickle.Pickler):
    """Sets the tensors aside."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Reads what a worker of this run has written, and nothing else."""

    def __init__(self, parcel: Parcel) -> None:
        super().__init__(io.BytesIO(parcel.rest))
        self._parcel = parcel

    def persistent_load(self, position: int) -> Tensor:
        return _view(self._parcel.block, self._parcel.places[position])
