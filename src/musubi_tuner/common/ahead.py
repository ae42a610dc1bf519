"""Work that threads do ahead of the one who takes its results.

Threads suit what reads files, copies and calls PyTorch: all of these let other threads run meanwhile. Unlike
processes they start in no time, share memory, and exist alike on every platform.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    threads: int,
    ahead: int,
    initializer: Callable[[], None] | None = None,
) -> Generator[R, None, None]:
    """``map(function, items)``, in order, that has up to ``ahead`` results made or in the making.

    What the function raises is raised where its result would have come. Closing it ends the threads.

    Args:
        threads: 0 works when it is asked for a result.
        initializer: runs first in each thread.
    """
    if threads == 0:
        yield from map(function, items)
        return
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead", initializer=initializer)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
