"""File names and rotation."""

from __future__ import annotations

from pathlib import Path

import pytest

from musubi_tuner.training.checkpoints import (
    SavePoint,
    comfy_path,
    lora_path,
    outdated,
    sidecar_path,
    state_path,
)


def test_names(tmp_path: Path):
    assert lora_path(tmp_path, "n", SavePoint("epoch", 3)).name == "n-000003.safetensors"
    assert lora_path(tmp_path, "n", SavePoint("step", 50)).name == "n-step00000050.safetensors"
    assert lora_path(tmp_path, "n.v1", SavePoint("end")).name == "n.v1.safetensors"
    assert state_path(tmp_path, "n", SavePoint("step", 50)).name == "n-step00000050-state"
    assert state_path(tmp_path, "n", SavePoint("end")).name == "n-state"
    assert comfy_path(Path("n.v1.safetensors")).name == "n.v1.comfy.safetensors"
    assert sidecar_path(Path("n.v1.safetensors")).name == "n.v1.json"


@pytest.mark.parametrize(
    ("point", "every", "keep", "gone"),
    [
        (SavePoint("epoch", 5), 1, 2, 3),
        (SavePoint("epoch", 4), 2, 1, 2),
        (SavePoint("epoch", 2), 1, 2, None),
        (SavePoint("step", 50), 10, 30, 10),
        (SavePoint("step", 30), 10, 30, None),
        (SavePoint("step", 50), 10, None, None),
        (SavePoint("end"), 10, 1, None),
    ],
)
def test_rotation(point: SavePoint, every: int, keep: int | None, gone: int | None):
    old = outdated(point, every, keep)
    assert (old.number if old else None) == gone
