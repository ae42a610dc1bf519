import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from media_files import clicks, index_frame, onsets, read_index, write_sound
from PIL import Image

from musubi_tuner.dataset.clips import prepare_clips
from musubi_tuner.dataset.entries import DatasetEntry
from musubi_tuner.dataset.fingerprint import source_stamp
from musubi_tuner.dataset.frames import ClipWindow
from musubi_tuner.dataset.image_sequence import ImageSequence
from musubi_tuner.dataset.media import MediaError
from musubi_tuner.dataset.plan import plan_item
from musubi_tuner.dataset.sources import SourceItem


def _write(folder: Path, count: int, size: tuple[int, int] = (128, 64)) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.fromarray(index_frame(index, size)).save(folder / f"frame_{index:03d}.png")
    return folder


def _entry(folder: Path, **options) -> DatasetEntry:
    defaults = {"resolution": (128, 64), "target_frames": (9,)}
    return DatasetEntry(
        "datasets[0]", "video", folder.parent / "list.jsonl", folder.parent / "cache", **defaults | options
    )


def _item(folder: Path, **options) -> SourceItem:
    return SourceItem(folder, folder.stem, "", "video", **options)


def _clips(folder: Path, entry: DatasetEntry, **item):
    return prepare_clips(_item(folder, **item), entry, with_audio=True)


@pytest.mark.parametrize("target_fps", [8, 25, 23.976, 60])
def test_every_image_is_one_frame_in_order_of_names(tmp_path: Path, target_fps: float, caplog) -> None:
    folder = _write(tmp_path / "Bilder é", 20)
    (folder / "Thumbs.db").touch()
    (folder / "more").mkdir()
    entry = _entry(folder, frame_extraction="chunk", target_fps=target_fps)
    with caplog.at_level(logging.INFO):
        clips = _clips(folder, entry)
    assert [[read_index(frame) for frame in clip.pixels] for clip in clips] == [list(range(9)), list(range(9, 18))]
    assert {(clip.fps, clip.audio_status, clip.original_size) for clip in clips} == {(target_fps, "absent", (128, 64))}
    assert caplog.text == ""
    plan = plan_item(_item(folder), entry)
    assert plan.windows == (ClipWindow(0, 9), ClipWindow(9, 9))
    assert (plan.frames, plan.resampled, plan.has_audio, plan.size) == (20, False, False, (128, 64))


@pytest.mark.parametrize(
    ("mode", "starts"), [("head", [0]), ("uniform", [0, 5, 11]), ("slide", [0, 4, 8]), ("full", [0])]
)
def test_every_extraction(tmp_path: Path, mode: str, starts: list[int]) -> None:
    folder = _write(tmp_path / "images", 20)
    entry = _entry(folder, frame_extraction=mode, frame_stride=4, frame_sample=3)
    clips = _clips(folder, entry)
    assert [clip.window.start for clip in clips] == starts
    for clip in clips:
        assert [read_index(f) for f in clip.pixels] == list(range(clip.window.start, clip.window.end))
    assert len(clips[0].pixels) == (17 if mode == "full" else 9)


def test_a_given_rate_is_resampled(tmp_path: Path) -> None:
    folder = _write(tmp_path / "images", 20)
    (clip,) = _clips(folder, _entry(folder, source_fps=50.0))
    assert [read_index(frame) for frame in clip.pixels] == list(range(0, 18, 2))


def test_sound_from_a_listed_file_keeps_time(tmp_path: Path) -> None:
    folder = _write(tmp_path / "images", 20)
    sound = write_sound(tmp_path / "sound.wav", clicks(1.0, [0.1, 0.5]))
    first, second = _clips(folder, _entry(folder, frame_extraction="chunk"), audio=sound)
    assert onsets(first.waveform, 16_000) == pytest.approx([0.1], abs=0.005)
    assert onsets(second.waveform, 16_000) == pytest.approx([0.5 - 9 / 25], abs=0.005)


def test_unused_images_are_not_decoded(tmp_path: Path) -> None:
    folder = _write(tmp_path / "images", 10)
    (folder / "frame_009.png").write_bytes(b"damaged")
    assert len(_clips(folder, _entry(folder))) == 1


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda f: (f / "frame_003.png").write_bytes(b""), r"frame_003\.png: cannot be decoded \(the file is empty"),
        (lambda f: Image.new("RGB", (64, 64)).save(f / "frame_003.png"), r"frame_003\.png: 64x64, but frame_000\.png"),
        (lambda f: [image.unlink() for image in f.iterdir()], r"images: holds no image"),
    ],
    ids=["damaged", "other size", "empty"],
)
def test_bad_directories(tmp_path: Path, spoil, problem: str) -> None:
    folder = _write(tmp_path / "images", 9)
    spoil(folder)
    with pytest.raises(MediaError, match=problem):
        _clips(folder, _entry(folder))


def test_numbers_without_zeros_are_told(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(11):
        Image.fromarray(index_frame(index)).save(folder / f"f{index}.png")
    (clip,) = _clips(folder, _entry(folder))
    assert [read_index(frame) for frame in clip.pixels[:4]] == [0, 1, 10, 2]
    assert "f10.png comes before f2.png; pad the numbers" in caplog.text


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30, unique=True), st.booleans())
def test_a_warning_means_that_numbers_go_down(tmp_path_factory, numbers: list[int], padded: bool) -> None:
    folder = tmp_path_factory.mktemp("numbers")
    for number in numbers:
        (folder / (f"take 2 {number:07d}.png" if padded else f"take 2 {number}.png")).touch()
    sequence = ImageSequence.__new__(ImageSequence)
    sequence.images = sorted(folder.iterdir())
    taken = [int(image.stem.split()[-1]) for image in sequence.images]
    assert (sequence.misplaced is None) == (taken == sorted(taken))


def test_the_stamp_knows_every_image_and_nothing_else(tmp_path: Path) -> None:
    folder = _write(tmp_path / "images", 3)
    for image in folder.iterdir():
        os.utime(image, ns=(10**18, 10**18))
    before = source_stamp(folder)
    (folder / "notes.txt").write_text("x", encoding="utf-8")
    assert source_stamp(folder) == before
    first = folder / "frame_000.png"
    first.rename(folder / "frame_009.png")
    assert source_stamp(folder) != before
