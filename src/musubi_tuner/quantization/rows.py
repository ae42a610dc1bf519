"""Work on a big weight a few rows at a time, so that temporaries stay small."""

from __future__ import annotations

from collections.abc import Iterator

_ELEMENTS = 2**22  # 16 MiB in fp32


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover ``rows`` rows of ``columns`` elements, each of a few million elements."""
    step = max(1, _ELEMENTS // max(columns, 1))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))
