"""One progress bar with rate and ETA, silent on every process but the first."""

from __future__ import annotations

import os
from collections.abc import Iterable
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
) -> tqdm:
    """A tqdm bar with the project's settings; use it as an iterator or call ``update``."""
    return tqdm(
        iterable,
        total=total,
        desc=desc,
        unit=unit,
        unit_scale=unit_scale,
        unit_divisor=1024 if unit == "B" else 1000,
        initial=initial,
        dynamic_ncols=True,
        smoothing=0.05,
        disable=int(os.environ.get("RANK", "0")) != 0,
    )
