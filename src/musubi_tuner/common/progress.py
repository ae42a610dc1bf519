"""One progress bar with rate and ETA, silent on every process but the first."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(
    iterable: Iterable[T] | None = None,
    *,
    total: int | None = None,
    desc: str = "",
    unit: str = "it",
    unit_scale: bool = False,
    initial: int = 0,
    leave: bool = True,
) -> tqdm:
    """A tqdm bar with the project's settings; use it as an iterator or call ``update``.

    ``leave=False`` removes it when it is done.
    """
    return tqdm(
        iterable,
        total=total,
        desc=desc,
        unit=unit,
        unit_scale=unit_scale,
        unit_divisor=1024 if unit == "B" else 1000,
        initial=initial,
        leave=leave,
        dynamic_ncols=True,
        smoothing=0.05,
        disable=int(os.environ.get("RANK", "0")) != 0,
    )


def restart_clock(bar: tqdm) -> None:
    """Forget the time of the steps so far, so that a slow first one does not spoil rate and ETA."""
    done = bar.n
    if not bar.disable:
        draw, bar.display = bar.display, lambda *_, **__: True  # it would show a bar at 0
        try:
            bar.reset()
        finally:
            bar.display = draw
        bar.initial = bar.n = bar.last_print_n = done


def bytes_progress(
    tensors: Iterable[tuple[str, T]], sizes: Mapping[str, int], *, desc: str, least: int = 2**28
) -> Iterator[tuple[str, T]]:
    """Pass (key, value) pairs on under a bar in bytes; ``sizes`` are those of the keys in the file.

    Less than ``least`` bytes are read in a moment and get no bar.
    """
    total = sum(sizes.values())
    if total < least:
        yield from tensors
        return
    with progress(total=total, desc=desc, unit="B", unit_scale=True) as bar:
        for key, value in tensors:
            yield key, value
            bar.update(sizes[key])
