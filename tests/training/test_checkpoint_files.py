"""File names and rotation."""

from __future__ import annotations

from pathlib import Path

import pytest

from musubi_tuner.common.atomic import tidy
from musubi_tuner.training.checkpoints import (
    SavePoint,
    comfy_path,
    leftovers,
    lora_path,
    outdated,
    remove_state,
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


def test_a_state_whose_removal_is_cut_off_has_no_name_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("n-step00000010-state", "n-2-step00000010-state"):
        (tmp_path / name).mkdir()
    with monkeypatch.context() as cut_off:
        cut_off.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        remove_state(tmp_path, "n", SavePoint("step", 10))
    (left,) = leftovers(tmp_path, "n")
    assert left.name.startswith("n-step00000010-state.partial-")
    tidy([left])
    assert [p.name for p in tmp_path.iterdir()] == ["n-2-step00000010-state"]


def test_leftovers_are_those_of_this_name(tmp_path: Path):
    ours = ["n.v1.partial-0123abcd.safetensors", "n.v1.comfy.partial-0123abcd.safetensors"]
    ours += ["n.v1-000003.partial-0123abcd.json", "n.partial-0123abcd.v1-state", "n.v1-state.partial-0123abcd.old"]
    others = ["n.v1.safetensors", "n.v2.partial-0123abcd.safetensors", "n.partial-0123abcd.safetensors", "n.v1-state"]
    for name in (*ours, *others):
        (tmp_path / name).touch()
    assert {p.name for p in leftovers(tmp_path, "n.v1")} == set(ours)
