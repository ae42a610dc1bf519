"""Memory for the frames of clips."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .buckets import Size

_MOST_BLOCK_FRAMES = 257  # allocated at once, however long the longest clip may be


class FrameStore:
    """Frames in blocks, so that those of most clips lie together and need no copy.

    New memory is dear: a frame that is allocated on its own and then copied into its clip costs more time for
    that than for its conversion.
    """

    def __init__(self, bucket: Size, capacity: int) -> None:
        """
        Args:
            bucket: (width, height) of the frames.
            capacity: frames of a block; the longest clip is best.
        """
        self._shape = (min(capacity, _MOST_BLOCK_FRAMES), bucket[1], bucket[0], 3)
        self._block = np.empty((0, *self._shape[1:]), np.uint8)
        self._taken = 0

    def take(self) -> np.ndarray:
        """The next frame, uint8 ``[H, W, 3]``, to be filled once."""
        if self._taken == len(self._block):
            self._block, self._taken = np.empty(self._shape, np.uint8), 0
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
