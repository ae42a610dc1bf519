import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_encoders import RECIPE, FakeAudioVAE, FakeVideoVAE
from media_files import tone, write_sound, write_video
from PIL import Image

from musubi_tuner.caching.latent_outputs import LatentRecipe
from musubi_tuner.caching.latents import cache_latents
from musubi_tuner.caching.pipeline import RunOptions
from musubi_tuner.common.av import AV
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile
from musubi_tuner.dataset.cache import read_mask_header, write_audio, write_mask
from musubi_tuner.dataset.entries import DatasetConfig, DatasetEntry
from musubi_tuner.dataset.intervals import interval_mask, read_intervals
from musubi_tuner.dataset.masks import pool_cells, pool_frames

PLAIN = RunOptions(workers=1)
SKIP = RunOptions(skip_existing=True, workers=1)
SIZE = (128, 64)


def _entry(tmp_path: Path, **options) -> DatasetEntry:
    defaults = {
        **{"kind": "video", "source": tmp_path / "media", "resolution": SIZE, "target_frames": (17,)},
        "mask_directory": tmp_path / "masks",
    }
    return DatasetEntry("datasets[0]", cache_directory=tmp_path / "cache", **(defaults | options))


def _video(tmp_path: Path, frames: int = 20, **options) -> None:
    for name in ("media", "masks", "audio_masks"):
        (tmp_path / name).mkdir(exist_ok=True)
    write_video(tmp_path / "media" / "a.mp4", frames, **options)
    (tmp_path / "media" / "a.txt").write_text("a", encoding="utf-8")


def _run(entry: DatasetEntry, options: RunOptions = PLAIN, recipe: LatentRecipe = RECIPE):
    config = DatasetConfig((entry,), (), Path("data.toml"))
    return cache_latents(config, recipe, video_vae=FakeVideoVAE(), audio_vae=FakeAudioVAE(), options=options)


def _counts(summary, role: str = "mask") -> tuple[int, int, int]:
    tally = summary.tally("datasets[0]", role)
    return tally.encoded, tally.current, tally.failed


def _mask(entry: DatasetEntry, base: str = "a_00000-017", key: str = "mask") -> torch.Tensor:
    return SafetensorsFile(entry.cache_directory / f"{base}_0128x0064_ltx2_mask.safetensors").read_one(key)


# --- pooling ------------------------------------------------------------------------------------------------


def test_pooling_is_the_mean_over_cells_and_the_maximum_over_causal_groups() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(16, 240, (17, 64, 96, 3), dtype=np.uint8)
    expected = np.zeros((3, 2, 3))
    for f, group in enumerate([range(1), range(1, 9), range(9, 17)]):
        for row in range(2):
            for column in range(3):
                means = []
                for i in group:
                    total = 0.0
                    for y in range(32 * row, 32 * row + 32):
                        for x in range(32 * column, 32 * column + 32):
                            total += float(frames[i, y, x].sum()) / 3 / 255
                    means.append(total / 1024)
                expected[f, row, column] = max(means)
    pooled = pool_frames(np.stack([pool_cells(frame) for frame in frames]))
    np.testing.assert_allclose(pooled, expected, atol=1e-6)
    assert pooled.dtype == np.float32


def test_nearly_black_and_white_are_snapped() -> None:
    levels = np.array([0, 15, 16, 128, 239, 240, 255], dtype=np.uint8)
    cells = [float(pool_cells(np.full((32, 32, 3), level, np.uint8))[0, 0]) for level in levels]
    assert cells == pytest.approx([0, 0, 16 / 255, 128 / 255, 239 / 255, 1, 1])


# --- of pictures --------------------------------------------------------------------------------------------


def test_an_image_holds_for_all_frames(tmp_path: Path) -> None:
    _video(tmp_path)
    picture = np.zeros((64, 128), np.uint8)
    picture[:32, :80] = 255  # two and a half cells of the first row
    Image.fromarray(picture).save(tmp_path / "masks" / "a.png")
    entry = _entry(tmp_path)
    summary = _run(entry)
    assert summary.finish(allow_failed=False) == 0
    assert _counts(summary) == (1, 0, 0)
    assert sorted(p.name for p in entry.cache_directory.iterdir()) == [
        "a_00000-017_0128x0064_ltx2.safetensors",
        "a_00000-017_0128x0064_ltx2_mask.safetensors",
    ]
    frame = torch.tensor([[1, 1, 0.5, 0], [0, 0, 0, 0]])
    assert torch.equal(_mask(entry), frame.expand(3, 2, 4))
    header = read_mask_header(entry.cache_directory / "a_00000-017_0128x0064_ltx2_mask.safetensors")
    assert (header.grid, header.audio_steps, header.metadata["source_name"]) == ((3, 2, 4), None, "a.png")
    assert _counts(_run(entry, SKIP)) == (0, 1, 0)


def _moving(frames: int) -> list[np.ndarray]:
    """White left half in frame 9 alone, right half from frame 12 on."""
    pictures = [np.zeros((64, 128, 3), np.uint8) for _ in range(frames)]
    for index, picture in enumerate(pictures):
        picture[:, :64] = 255 * (index == 9)
        picture[:, 64:] = 255 * (index >= 12)
    return pictures


def test_a_video_follows_the_windows_of_its_clips(tmp_path: Path) -> None:
    _video(tmp_path, frames=27)
    write_video(tmp_path / "masks" / "a.mp4", _moving(27))
    entry = _entry(tmp_path, frame_extraction="chunk", target_frames=(9,))
    assert _counts(_run(entry)) == (3, 0, 0)
    left, right = torch.tensor([1.0, 1, 0, 0]).expand(2, 4), torch.tensor([0.0, 0, 1, 1]).expand(2, 4)
    none = torch.zeros(2, 4)
    assert torch.equal(_mask(entry, "a_00000-009"), torch.stack([none, none]))
    assert torch.equal(_mask(entry, "a_00009-009"), torch.stack([left, right]))  # its groups: 9 | 10-17
    assert torch.equal(_mask(entry, "a_00018-009"), torch.stack([right, right]))


def test_a_video_mask_is_resampled_as_its_clip(tmp_path: Path) -> None:
    _video(tmp_path, frames=20)
    pictures = [np.full((64, 128, 3), 255 * (index >= 18), np.uint8) for index in range(40)]
    write_video(tmp_path / "masks" / "a.mp4", pictures, fps=50)
    entry = _entry(tmp_path)
    _run(entry)
    # At 25 frames a second it begins with frame 9, the first of the third latent frame.
    assert _mask(entry).amax((1, 2)).tolist() == [0, 0, 1]


def test_a_short_video_mask_holds_its_last_frame(tmp_path: Path, caplog) -> None:
    _video(tmp_path)
    pictures = [np.full((64, 128, 3), 255 * (index == 4), np.uint8) for index in range(5)]
    write_video(tmp_path / "masks" / "a.mp4", pictures)
    entry = _entry(tmp_path)
    _run(entry)
    assert _mask(entry).amin((1, 2)).tolist() == [0, 1, 1]
    assert "the mask ends after 5 of 17 frames" in caplog.text


def test_masks_are_cut_as_their_clips(tmp_path: Path) -> None:
    _video(tmp_path, size=(256, 64))
    picture = np.zeros((128, 512), np.uint8)
    picture[:, 128:384] = 255  # what is left of a 4:1 picture in a 2:1 bucket
    Image.fromarray(picture).save(tmp_path / "masks" / "a.png")
    entry = _entry(tmp_path)
    _run(entry)
    assert _mask(entry).min() == 1


def test_a_mask_of_another_shape_fails_alone(tmp_path: Path) -> None:
    _video(tmp_path)
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "masks" / "a.png")
    summary = _run(_entry(tmp_path))
    assert summary.finish(allow_failed=False) == 1
    assert "64x64, but a.mp4 is 128x64; a mask needs the same aspect ratio" in summary.failures[0]


def test_a_mask_of_the_size_of_the_bucket_is_taken_as_it_is(tmp_path: Path) -> None:
    _video(tmp_path, size=(256, 64))
    picture = np.zeros((64, 128), np.uint8)
    picture[:, :32] = 255
    Image.fromarray(picture).save(tmp_path / "masks" / "a.png")
    entry = _entry(tmp_path)
    assert _run(entry).finish(allow_failed=False) == 0
    assert _mask(entry).sum((0, 1)).tolist() == [6, 0, 0, 0]


def test_masks_of_images(tmp_path: Path) -> None:
    for name, level in (("media", 100), ("masks", 255)):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((64, 128), level, np.uint8)).save(tmp_path / name / "a.png")
    (tmp_path / "media" / "a.txt").write_text("a", encoding="utf-8")
    entry = _entry(tmp_path, kind="image")
    assert _run(entry).finish(allow_failed=False) == 0
    assert torch.equal(_mask(entry, "a"), torch.ones(1, 2, 4))


def test_missing_masks_are_listed_and_lost_ones_deleted(tmp_path: Path, caplog) -> None:
    _video(tmp_path)
    entry = _entry(tmp_path)
    with caplog.at_level(logging.ERROR):
        assert _run(entry).finish(allow_failed=False) == 1
    assert "missing: datasets[0]: no mask for a.mp4" in caplog.text
    Image.fromarray(np.zeros((64, 128), np.uint8)).save(tmp_path / "masks" / "a.png")
    _run(entry, SKIP)
    path = entry.cache_directory / "a_00000-017_0128x0064_ltx2_mask.safetensors"
    assert path.exists()
    without = replace(entry, mask_directory=None)
    _run(without, RunOptions(skip_existing=True, keep_cache=True))
    assert path.exists()
    _run(without, SKIP)
    assert not path.exists()


# --- of sound -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.txt", "# kept\n0.5 1.25\n\n2, 3\n"),
        ("m.json", "[[0.5, 1.25], [2, 3]]"),
        ("m.json", '{"intervals": [{"start": 0.5, "end": 1.25}, {"start": 2, "end": 3}]}'),
    ],
)
def test_intervals_are_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_intervals(tmp_path / name) == ((0.5, 1.25), (2.0, 3.0))


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("m.txt", "0 1\n2\n", "m.txt:2: expected a start and an end in seconds, got 2"),
        ("m.txt", "2 1\n", "m.txt:1: expected 0 <= start < end"),
        ("m.txt", "a b\n", "m.txt:1: expected a start and an end"),
        ("m.json", "[[0, 1], [nan, 2]]", "not JSON"),
        ("m.json", "[[0, 1], [-1, 2]]", "interval 1: expected 0 <= start < end"),
        ("m.json", '{"start": 1}', "expected a list of"),
        ("m.json", '[{"start": 1}]', "interval 0: expected a start and an end"),
    ],
)
def test_intervals_that_cannot_be_read(tmp_path: Path, name: str, text: str, problem: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=problem):
        read_intervals(tmp_path / name)


def test_steps_are_masked_by_their_middle() -> None:
    # Bounds of the steps in seconds: [0, .01], [.01, .05], [.05, .09], [.09, .13]
    assert interval_mask([(0.0, 0.03)], 4).tolist() == [1, 0, 0, 0]
    assert interval_mask([(0.0, 0.031)], 4).tolist() == [1, 1, 0, 0]
    assert interval_mask([(0.03, 0.05), (0.1, 9.0)], 4).tolist() == [0, 1, 0, 1]
    assert interval_mask([], 3).tolist() == [0, 0, 0]
    # A clip that begins at 10 s and is played at double speed
    assert interval_mask([(10.05, 10.15)], 4, start=10.0, pace=2.0).tolist() == [0, 1, 1, 0]


def _kept(mask: torch.Tensor) -> tuple[float, float]:
    """Where the steps that are kept begin and end, in seconds."""
    steps = mask.nonzero()
    return 0.04 * steps[0].item(), 0.04 * (steps[-1].item() + 1)


@pytest.mark.parametrize(("fps", "pace"), [(25, 1.0), (24, 25 / 24), (50, 1.0)])
def test_intervals_are_seconds_of_the_source(tmp_path: Path, fps: int, pace: float) -> None:
    _video(tmp_path, frames=4 * fps, fps=fps, sound=tone(4.0))
    (tmp_path / "audio_masks" / "a.txt").write_text("1.6 2.0\n", encoding="utf-8")
    entry = _entry(
        tmp_path,
        mask_directory=None,
        audio_mask_directory=tmp_path / "audio_masks",
        frame_extraction="chunk",
        target_frames=(33,),
    )
    summary = _run(entry)
    assert summary.finish(allow_failed=False) == 0
    begin = 33 / fps if fps == 24 else 33 / 25  # of the second clip, seconds of the source
    mask = _mask(entry, "a_00033-033", "audio_mask")
    first, last = _kept(mask)
    # Material at 24 is played at 25: a second of it lasts 0.96 s.
    assert first == pytest.approx((1.6 - begin) / pace, abs=0.05)
    assert last == pytest.approx((2.0 - begin) / pace, abs=0.05)
    assert _mask(entry, "a_00000-033", "audio_mask").sum() == 0
    assert _counts(_run(entry, SKIP), "audio mask")[0] == 0


def test_both_parts_share_a_file_that_mode_video_keeps(tmp_path: Path) -> None:
    _video(tmp_path, sound=tone(0.8))
    Image.fromarray(np.zeros((64, 128), np.uint8)).save(tmp_path / "masks" / "a.png")
    (tmp_path / "audio_masks" / "a.json").write_text(json.dumps([[0.2, 0.4]]), encoding="utf-8")
    entry = _entry(tmp_path, audio_mask_directory=tmp_path / "audio_masks")
    assert _counts(_run(entry)) == (1, 0, 0)
    path = entry.cache_directory / "a_00000-017_0128x0064_ltx2_mask.safetensors"
    header = read_mask_header(path)
    assert (header.grid, header.audio_steps) == ((3, 2, 4), 18)
    assert header.metadata["source_name"] == "a.png, a.json"
    assert _counts(_run(entry, SKIP, replace(RECIPE, mode="video", audio_vae=None))) == (0, 1, 0)
    (tmp_path / "audio_masks" / "a.json").write_text(json.dumps([[0.2, 0.4], [0.5, 0.6]]), encoding="utf-8")
    assert _counts(_run(entry, SKIP)) == (1, 0, 0)


def test_a_clip_without_sound_needs_no_audio_mask_file(tmp_path: Path) -> None:
    _video(tmp_path)
    (tmp_path / "audio_masks" / "a.txt").write_text("0 1", encoding="utf-8")
    entry = _entry(tmp_path, mask_directory=None, audio_mask_directory=tmp_path / "audio_masks")
    assert _run(entry).finish(allow_failed=False) == 0
    assert [p.name for p in entry.cache_directory.iterdir()] == ["a_00000-017_0128x0064_ltx2.safetensors"]


def test_masks_of_sounds_count_from_their_beginning(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "audio_masks").mkdir()
    write_sound(tmp_path / "media" / "a.wav", tone(2.0))
    (tmp_path / "media" / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "audio_masks" / "a.txt").write_text("0 0.5\n", encoding="utf-8")
    entry = _entry(tmp_path, kind="audio", mask_directory=None, audio_mask_directory=tmp_path / "audio_masks")
    assert _run(entry, recipe=replace(RECIPE, mode="audio", video_vae=None)).finish(allow_failed=False) == 0
    mask = _mask(entry, "a", "audio_mask")
    assert mask.shape == (51,)
    assert _kept(mask) == (0.0, pytest.approx(0.5, abs=0.05))


def test_damaged_mask_caches_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a_0128x0064_ltx2_mask.safetensors"
    with pytest.raises(UserError, match="NaN or infinity"):
        write_mask(path, AV(torch.full((1, 2, 2), float("nan"))), {})
    write_audio(path, torch.zeros(8, 3, 16), {})
    with pytest.raises(UserError, match="has no mask"):
        read_mask_header(path)
