"""How fast a run is and what holds it up."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

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
