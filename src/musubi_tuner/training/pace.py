"""What a run waits for, and what memory it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from musubi_tuner.common.devices import peak_memory

T = TypeVar("T")

_END: Any = object()


class Lookahead(Iterator[T]):
    """An iterator whose next item a thread makes while the last one is in use; a context, which ends thread and source.

    The thread starts on it with :meth:`prepare`, at a time that suits the one who uses the items: two threads that
    both run Python hold each other up.

    Args:
        source: advanced by the thread alone.
        initializer: runs first in the thread.
    """

    def __init__(self, source: Generator[T, None, None], *, initializer: Callable[[], None] | None = None) -> None:
        self._source = source
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lookahead", initializer=initializer)
        self._next: Future[T] | None = None
        self._waited = 0.0

    def prepare(self) -> None:
        """Let the thread make the next item now, if it does not already."""
        if self._next is None:
            self._next = self._pool.submit(next, self._source, _END)

    def __next__(self) -> T:
        started = time.perf_counter()
        self.prepare()
        try:
            item = self._next.result()
        finally:
            self._next = None
            self._waited += time.perf_counter() - started
        if item is _END:
            raise StopIteration
        return item

    def waited(self) -> float:
        """Seconds that items were waited for since the last call."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def __enter__(self) -> Lookahead[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._source.close()


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
