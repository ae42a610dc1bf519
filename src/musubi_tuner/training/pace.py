"""How fast a run is and what holds it up."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from musubi_tuner.common.devices import peak_memory

T = TypeVar("T")


class Waiting(Iterator[T]):
    """An iterator that adds up how long its items were waited for."""

    def __init__(self, source: Iterable[T]) -> None:
        self._source = iter(source)
        self._seconds = 0.0

    def __next__(self) -> T:
        started = time.perf_counter()
        try:
            return next(self._source)
        finally:
            self._seconds += time.perf_counter() - started

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Lookahead(Iterator[T]):
    """An iterator whose next item can be made early.

    Launching a forward and backward pass returns before the device is done; the next batch's noise and copies
    are made in that time, before the results are waited for.
    """

    def __init__(self, source: Iterable[T]) -> None:
        self._source = iter(source)
        self._ready: list[T] = []

    def prepare(self) -> None:
        """Make the next item now, if there is one."""
        if not self._ready:
            self._ready.extend(itertools.islice(self._source, 1))

    def __next__(self) -> T:
        self.prepare()
        if not self._ready:
            raise StopIteration
        return self._ready.pop()


class PeakMemory:
    """The most memory that was taken, looked at once a second: PyTorch collects a hundred numbers for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peak, self._next_look = 0, 0.0

    def bytes(self) -> int:
        now = time.monotonic()
        if now >= self._next_look:
            self._peak, self._next_look = peak_memory(self._device), now + 1.0
        return self._peak
