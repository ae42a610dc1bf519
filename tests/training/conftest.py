"""What tests of whole runs share."""

from __future__ import annotations

import pytest

TIMINGS = ("step_seconds", "tokens_per_second", "data_wait_share", "peak_memory_gib")


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, float]]:
    """Scalars by step, without the timings."""
    scalars: dict[int, dict[str, float]] = {}

    def record(accelerator, values, step: int) -> None:
        timeless = {k: v for k, v in values.items() if k not in TIMINGS}
        scalars.setdefault(step, {}).update(timeless)

    monkeypatch.setattr("musubi_tuner.training.tracking.log_scalars", record)
    return scalars
