"""Memory that is used again: blocks, and the frames of clips in them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

import numpy as np

from .buckets import Size

_MOST_BLOCK_FRAMES = 257  # allocated at once, however long the longest clip may be


class BlockPool:
    """Blocks to be used again once nothing refers to them. For several threads.

    New memory is dear, since the system clears it first: for a frame that takes a third of its conversion.

    Args:
        keep: bytes that the pool holds at most; what is taken beyond is not used again.
    """

    def __init__(self, keep: int = 1 << 30) -> None:
        self._keep = keep
        self._blocks: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """An uninitialised uint8 array that nobody else has."""
        with self._lock:
            # A view of a block refers to the block itself, so the count tells of every clip still in use.
            unused = [count == _UNUSED for count in _references(self._blocks)]
            for index, block in enumerate(self._blocks):
                if unused[index] and block.shape == shape:
                    return block
            new = np.empty(shape, np.uint8)
            if sum(block.nbytes for block in self._blocks) + new.nbytes > self._keep:
                self._blocks = [b for b, free in zip(self._blocks, unused, strict=True) if not free]
            if sum(block.nbytes for block in self._blocks) + new.nbytes <= self._keep:
                self._blocks.append(new)
            return new


def _references(blocks: Sequence[np.ndarray]) -> list[int]:
    return [sys.getrefcount(block) for block in blocks]


# What is counted for a block that only a list holds; it differs between versions of Python.
_UNUSED = _references([np.empty(1, np.uint8)])[0]


class FrameStore:
    """Frames in blocks, so that those of most clips lie together and need no copy."""

    def __init__(self, bucket: Size, capacity: int, pool: BlockPool) -> None:
        """
        Args:
            bucket: (width, height) of the frames.
            capacity: frames of a block; the longest clip is best.
            pool: where blocks come from.
        """
        self._pool = pool
        self._shape = (min(capacity, _MOST_BLOCK_FRAMES), bucket[1], bucket[0], 3)
        self._block = np.empty((0, *self._shape[1:]), np.uint8)
        self._taken = 0

    def take(self) -> np.ndarray:
        """The next frame, uint8 ``[H, W, 3]``, to be filled once."""
        if self._taken == len(self._block):
            self._block, self._taken = self._pool.take(self._shape), 0
        self._taken += 1
        return self._block[self._taken - 1]


def join(frames: Sequence[np.ndarray]) -> np.ndarray:
    """``[F, H, W, 3]`` of taken frames: a view, where they fill half a block or more in its order, else a copy."""
    block = frames[0].base
    if block is not None and 2 * len(frames) >= len(block) and all(frame.base is block for frame in frames):
        step = frames[0].nbytes
        places = [(_address(frame) - _address(block)) // step for frame in frames]
        run = range(places[0], places[0] + len(frames))
        if places == list(run):
            return block[run.start : run.stop]
    return np.stack(frames)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
