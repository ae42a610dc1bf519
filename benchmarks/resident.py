"""What a process keeps in memory while it works: for the benchmarks of loading, quantising and merging."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

T = TypeVar("T")

GB = 10**9


def measured(work: Callable[[], T], *, limit_gb: float | None = None) -> tuple[T, dict[str, float]]:
    """Run ``work``; its result, with the peak of resident bytes above the start and the seconds.

    Whatever is imported and allocated once should have been before.

    Args:
        limit_gb: of memory that may be taken beyond what is there (Linux); ``None`` for no limit.
    """
    process = psutil.Process()
    if limit_gb is not None:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_DATA, (process.memory_info().data + int(limit_gb * GB), -1))
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        result = work()
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    peak = max(peak, process.memory_info().rss)
    return result, {"peak": peak - before, "seconds": seconds}
