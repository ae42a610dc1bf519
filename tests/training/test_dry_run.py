"""``--dry_run`` and the outlook that every run begins with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cache_files import one_dataset, write_item

from musubi_tuner.dataset.sampling import BatchPlan
from musubi_tuner.ltx2_train_network import main as train
from musubi_tuner.training import dry_run
from musubi_tuner.training.dry_run import largest_of_buckets
from musubi_tuner.training.outlook import (
    BatchSize,
    Trained,
    batch_size,
    modality_warnings,
    tokens_per_step,
    trained_by_stream,
)


def arguments(assets, output: Path, *extra: str) -> list[str]:
    return [
        *("--dataset_config", str(assets.dataset), "--ltx2_checkpoint", str(assets.checkpoint), "--ltx2_mode", "av"),
        *("--ltx_version", "2.3", "--mixed_precision", "no", "--network_dim", "4", "--network_alpha", "4"),
        *("--learning_rate", "1e-3", "--output_dir", str(output), "--dry_run", *extra),
    ]


def snapshot(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_it_passes_and_writes_nothing(cached_demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assets = cached_demo()
    before = snapshot(assets.checkpoint.parent)
    train(arguments(assets, tmp_path / "out", "--logging_dir", str(tmp_path / "logs"), "--save_state"))
    said = capsys.readouterr().err
    assert "What will be trained" in said
    assert "dry run passed" in said
    assert list(tmp_path.iterdir()) == []
    assert snapshot(assets.checkpoint.parent) == before


def test_out_of_memory_is_told_with_what_helps(cached_demo, tmp_path: Path, capsys, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 PiB")

    monkeypatch.setattr(dry_run, "view_losses", too_large)
    with pytest.raises(SystemExit) as stop:
        train(arguments(cached_demo(), tmp_path / "out"))
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "out of memory; what helps: --gradient_checkpointing; --blocks_to_swap N" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.fixture
def mixed(tmp_path: Path) -> BatchPlan:
    """Three small clips, one of them with sound, and two large ones; batches of two."""
    items = [
        write_item(tmp_path, "a", grid=(2, 1, 2)),
        write_item(tmp_path, "b", grid=(2, 1, 2), audio_steps=5),
        write_item(tmp_path, "c", grid=(2, 1, 2)),
        *(write_item(tmp_path, name, grid=(3, 2, 2), audio_steps=7) for name in "de"),
    ]
    return BatchPlan(one_dataset(items, batch_size=2, separate_audio_buckets=True), seed=0)


def test_one_batch_of_each_bucket_the_largest_first(mixed: BatchPlan):
    specs = largest_of_buckets(mixed)
    assert [batch_size(mixed, spec) for spec in specs] == [BatchSize(24, 14), BatchSize(4, 5), BatchSize(8, 0)]


def test_silence_lasts_as_long_as_the_picture(mixed: BatchPlan):
    """Two latent frames are 9 pixel frames, at 25 fps 9 steps of sound."""
    silent = next(spec for spec in mixed.for_epoch(0) if not mixed.has_sound(spec))
    assert batch_size(mixed, silent, silence=True) == BatchSize(8, 18)


def test_tokens_of_a_step_are_those_of_its_batches():
    sizes = [BatchSize(1, 0), BatchSize(2, 3), BatchSize(10, 0)]
    assert tokens_per_step(sizes, 2) == [6, 10]
    assert tokens_per_step(sizes, 1) == [1, 5, 10]


def test_trained_modules_are_counted_by_stream():
    names = ["x_attn1_to_q.down", "x_attn1_to_q.up", "x_audio_attn1_to_q.down", "x_audio_to_video_attn_to_q.down"]
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4, 5, 6)]
    assert trained_by_stream(names, parameters) == {
        "video": Trained(1, 7),
        "audio": Trained(1, 5),
        "cross": Trained(1, 6),
    }


GOOD = {
    "mode": "av",
    "trained": dict.fromkeys(("video", "audio", "cross"), Trained(1, 1)),
    "learning": ("video", "audio"),
    "weights": {"video": [1.0], "audio": [0.0, 1.0]},
    "has_sound": True,
    "silence": False,
    "audio_lr": 1e-4,
}
AMISS = {
    "no module": ({"trained": {"video": Trained(1, 1)}, "audio_lr": None}, ["no audio module is trained"]),
    "rate of nothing": (
        {"trained": {"video": Trained(1, 1)}, "learning": ("video",)},
        ["--audio_lr 0.0001 has no effect"],
    ),
    "weight 0": ({"weights": {"video": [1.0], "audio": [0.0, 0.0]}}, ["every audio loss weight is 0"]),
    "no sound": ({"has_sound": False}, ["no cached item has sound: of the audio stream its modules learn nothing"]),
    "silence": ({"has_sound": False, "silence": True}, ["trained on silence only"]),
}


@pytest.mark.parametrize(("change", "expected"), AMISS.values(), ids=AMISS)
def test_a_modality_that_gets_nothing_is_told(change: dict, expected: list[str]):
    assert modality_warnings(**GOOD) == []
    found = modality_warnings(**{**GOOD, **change})
    assert len(found) == len(expected)
    assert all(part in text for part, text in zip(expected, found, strict=True))
