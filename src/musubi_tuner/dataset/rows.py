"""Memory for the tensors of a batch: those that will be stacked are read one behind the other.

Stacking then copies nothing. Copying takes longer than reading, since the system clears new memory first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .frame_store import BlockPool

_Key = tuple[str, tuple[int, ...], torch.dtype]


class Rows:
    """Hands out the memory of one batch.

    Args:
        count: items of the batch.
        pool: where blocks come from, and whereto they return once no tensor of the batch is in use.
    """

    def __init__(self, count: int, pool: BlockPool) -> None:
        self._count = count
        self._pool = pool
        self._unused: dict[_Key, list[Tensor]] = {}

    def take(self, role: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor that lies behind the last one with this role, shape and dtype."""
        key = (role, tuple(shape), dtype)
        if not self._unused.get(key):
            self._unused[key] = self._block(tuple(shape), dtype)
        return self._unused[key].pop()

    def _block(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        nbytes = math.prod(shape) * dtype.itemsize
        block = torch.from_numpy(self._pool.take((self._count * nbytes,)))
        return list(block.view(dtype).view(self._count, *shape).unbind())[::-1]


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.stack``; a view where the tensors lie one behind the other."""
    first = tensors[0]
    if not _is_run(tensors):
        return torch.stack(list(tensors))
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))


def _is_run(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    start, step = first.data_ptr(), first.nbytes
    for index, tensor in enumerate(tensors):
        if tensor.shape != first.shape or tensor.dtype != first.dtype or not tensor.is_contiguous():
            return False
        if tensor.data_ptr() != start + index * step:
            return False
    # What lies between the first and the last of one storage belongs to it.
    return tensors[-1].untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
