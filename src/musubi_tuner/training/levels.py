"""The four ranges of noise levels by which losses are told apart."""

from __future__ import annotations

LEVEL_RANGES = ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")


def level_range(sigma: float) -> int:
    """Position in :data:`LEVEL_RANGES` of a level in [0, 1]."""
    count = len(LEVEL_RANGES)
    return min(max(int(sigma * count), 0), count - 1)
