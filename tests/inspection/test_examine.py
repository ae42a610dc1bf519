"""What is said about single files: use of frames, unused seconds, remarks."""

from pathlib import Path

import numpy as np
import pytest
from media_files import index_frame, read_index, tone, write_sound, write_video

from musubi_tuner.dataset.clip_sound import AudioSource
from musubi_tuner.dataset.clips import iter_clips
from musubi_tuner.dataset.entries import DatasetEntry
from musubi_tuner.dataset.sources import SourceItem
from musubi_tuner.inspection.duplicates import find_duplicates
from musubi_tuner.inspection.examine import CLIPS_SHOWN, ItemReport, examine
from musubi_tuner.inspection.findings import picture_findings, size_findings, sound_findings
from musubi_tuner.inspection.timing import read_timing


def _entry(folder: Path, **values: object) -> DatasetEntry:
    options: dict = {"kind": "video", "resolution": (128, 64), "target_frames": (17,)} | values
    return DatasetEntry("datasets[0]", source=folder, cache_directory=folder / "cache", **options)


def _item(path: Path, caption: str = "a clip", kind: str = "video") -> SourceItem:
    return SourceItem(path, path.stem, caption, kind)  # type: ignore[arg-type]


def _examined(path: Path, mode: str = "video", **values: object) -> ItemReport:
    item = _item(path, kind=str(values.get("kind", "video")))
    return examine(item, _entry(path.parent, **values), mode=mode, audio_source=AudioSource())  # type: ignore[arg-type]


def _kinds(report: ItemReport) -> set[str]:
    return {finding.kind for finding in report.all_findings}


@pytest.mark.parametrize(
    ("fps", "options"),
    [
        (25, {}),
        (60, {}),
        (15, {}),
        (24, {}),
        (30, {"source_fps": 50.0}),
        (50, {"target_fps": 10.0, "frame_extraction": "chunk"}),
    ],
)
def test_the_frames_it_names_are_the_frames_of_the_clips(tmp_path: Path, fps: float, options: dict) -> None:
    path = write_video(tmp_path / "a.mp4", 100, fps=fps)
    entry = _entry(tmp_path, **options)
    timing = read_timing(path, entry, fps)
    clips = list(iter_clips(_item(path), entry, with_audio=False))
    assert clips
    for clip in clips:
        shown = [read_index(frame) for frame in clip.pixels]
        use = timing.use(clip.window)
        assert (use.first, use.last, use.used) == (shown[0], shown[-1], len(set(shown)))
        assert use.dropped == shown[-1] - shown[0] + 1 - len(set(shown))


def test_variable_frame_rate_is_named_and_its_frames_are_those_of_the_clips(tmp_path: Path) -> None:
    times = [i / 25 if i < 10 else 10 / 25 + (i - 10) / 5 for i in range(40)]
    path = write_video(tmp_path / "v.mkv", 40, times=times)
    report = _examined(path, source_fps=None, target_fps=25.0)
    (clip,) = iter_clips(_item(path), _entry(tmp_path), with_audio=False)
    assert report.clips[0].use.last == read_index(clip.pixels[-1])
    assert _kinds(report) & {"variable frame rate", "resampled"}


@pytest.mark.parametrize(
    ("options", "unused"),
    [
        ({}, [(0.68, 2.0, "head takes one clip")]),
        ({"frame_extraction": "chunk"}, [(1.36, 2.0, "less than a clip of 17 frames")]),
        (
            {"frame_extraction": "slide", "frame_stride": 20},
            [(0.68, 0.8, "frame_stride 20"), (1.48, 2.0, "frame_stride")],
        ),
        ({"frame_extraction": "uniform", "frame_sample": 2}, [(0.68, 1.32, "frame_sample 2")]),
        ({"frame_extraction": "full", "max_frames": 49}, [(1.96, 2.0, "max_frames 49")]),
    ],
)
def test_unused_seconds_have_a_reason(tmp_path: Path, options: dict, unused: list) -> None:
    report = _examined(write_video(tmp_path / "a.mp4", 50), **options)
    assert len(report.unused) == len(unused)
    for part, (start, end, reason) in zip(report.unused, unused, strict=True):
        assert (part.start, part.end) == (pytest.approx(start), pytest.approx(end))
        assert reason in part.reason


def test_tokens_and_sound_of_a_clip(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mov", 50, sound=tone(2.0))
    (clip,) = _examined(path, "av").clips
    assert (clip.video_tokens, clip.audio_tokens) == (3 * 2 * 4, 18)
    assert clip.level == pytest.approx(-9.0, abs=0.3)
    assert len(clip.preview.wave) == 160
    assert max(clip.preview.wave) == pytest.approx(71, abs=2)  # the root of one half
    silent_mode = _examined(path, "video")
    assert silent_mode.clips[0].audio_tokens == 0
    assert "sound not used" in _kinds(silent_mode)


def test_black_static_and_silent_clips(tmp_path: Path) -> None:
    black = [np.zeros((64, 128, 3), np.uint8)] * 20
    path = write_video(tmp_path / "black.mov", black, sound=np.zeros((2, 48_000), np.float32))
    assert {"black", "silent"} <= _kinds(_examined(path, "av"))
    assert _kinds(_examined(write_video(tmp_path / "static.mp4", [index_frame(5)] * 20), "av")) == {
        "static",
        "no sound",
    }
    assert _kinds(_examined(write_video(tmp_path / "fine.mov", 20, sound=tone(0.8)), "av")) <= {"black frames"}


def test_short_and_damaged_files(tmp_path: Path) -> None:
    short = _examined(write_video(tmp_path / "short.mp4", 20), target_frames=(9, 33))
    assert [clip.frames for clip in short.clips] == [9]
    assert any("shorter than 33 frames" in finding.text for finding in short.findings)
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    bad = _examined(tmp_path / "bad.mp4")
    assert bad.plan is None
    (finding,) = bad.findings
    assert finding.severity == "error"
    assert str(tmp_path) not in finding.text


def test_pictures_of_many_clips_are_few(tmp_path: Path) -> None:
    report = _examined(write_video(tmp_path / "a.mp4", 40), frame_extraction="slide", target_frames=(9,))
    assert len(report.clips) == 32
    assert sum(clip.preview is not None for clip in report.clips) == CLIPS_SHOWN


def test_sound_alone(tmp_path: Path) -> None:
    report = _examined(write_sound(tmp_path / "a.wav", tone(1.5)), "audio", kind="audio")
    assert report.duration == pytest.approx(1.5)
    assert (report.clips[0].video_tokens, report.clips[0].audio_tokens) == (0, 38)
    assert report.has_sound


def test_measures() -> None:
    moving = np.stack([index_frame(i) for i in range(200, 210)])
    assert not list(picture_findings(moving))
    assert [f.kind for f in picture_findings(np.full((1, 64, 64, 3), 99, np.uint8))] == ["one colour"]
    assert [f.kind for f in sound_findings(np.full((2, 1000), 5e-3, np.float32))] == ["quiet"]
    assert [f.kind for f in sound_findings(np.ones((2, 1000), np.float32))] == ["clipped"]
    assert not list(size_findings((1920, 1080), (960, 544)))
    assert [f.text for f in size_findings((64, 64), (128, 64))] == [
        "enlarged 2.0 times from 64x64",
        "50% of the picture is cut off to fit the bucket",
    ]


def test_duplicates_over_datasets(tmp_path: Path) -> None:
    for name, content in {"a": b"12345", "b": b"12345", "c": b"54321", "d": b""}.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
    a, b, c, d = (
        _item(tmp_path / f"{n}.mp4", caption) for n, caption in zip("abcd", ("x", "y", "x ", ""), strict=True)
    )
    found = find_duplicates({"train": [a, b, c, d], "valid": [b]})
    texts = {(label, path.stem): [f.text for f in findings] for (label, path), findings in found.items()}
    assert texts == {
        ("train", "a"): ["same content as b.mp4, b.mp4 in valid", "same caption as c.mp4"],
        ("train", "b"): ["also in valid; same content as a.mp4"],
        ("valid", "b"): ["also in train; same content as a.mp4 in train"],
        ("train", "c"): ["same caption as a.mp4"],
    }
