import logging
import pickle
from fractions import Fraction

import numpy as np
import pytest
from media_files import clicks, onsets, pitch, read_index, tone, write_sound, write_video
from PIL import Image

from musubi_tuner.dataset.audio import AudioTrack
from musubi_tuner.dataset.clip_sound import AudioSource
from musubi_tuner.dataset.clips import iter_clips, prepare_clips
from musubi_tuner.dataset.entries import DatasetEntry
from musubi_tuner.dataset.frames import ClipWindow
from musubi_tuner.dataset.media import MediaError
from musubi_tuner.dataset.plan import plan_item
from musubi_tuner.dataset.sources import SourceItem


def _entry(folder, kind="video", **options) -> DatasetEntry:
    return DatasetEntry("datasets[0]", kind, folder, folder, **{"resolution": (64, 32), **options})


def _item(path, kind="video") -> SourceItem:
    return SourceItem(path, path.stem, "a caption", kind)


def _indices(clip) -> list[int]:
    return [read_index(pixels) for pixels in clip.pixels]


def _one(path, entry, **options):
    (clip,) = prepare_clips(_item(path), entry, **{"with_audio": True, **options})
    return clip


# --- pictures -----------------------------------------------------------------------------------------------


def test_a_clip_and_its_plan(tmp_path) -> None:
    path = write_video(tmp_path / "my clip.mp4", 30, sound=tone(1.2), sound_codec="aac")
    entry = _entry(tmp_path, target_frames=(1, 17, 25, 33))
    clips = prepare_clips(_item(path), entry, with_audio=True)
    plan = plan_item(_item(path), entry)
    assert [clip.base_name for clip in clips] == [f"my clip_00000-{n:03d}" for n in (1, 17, 25)]
    assert tuple(clip.window for clip in clips) == plan.windows
    assert plan.too_short == (33,)
    assert (plan.bucket, plan.size, plan.fps, plan.frames) == ((64, 32), (128, 64), 25.0, 30)
    assert (plan.duration, plan.has_audio, plan.resampled) == (1.2, True, False)
    for clip in clips:
        frames = clip.window.count
        assert clip.pixels.shape == (frames, 32, 64, 3)
        assert _indices(clip) == list(range(frames))
        assert clip.waveform.shape == (2, frames * 640)
        assert (clip.fps, clip.audio_status, clip.original_size) == (25.0, "present", (128, 64))
    assert pickle.loads(pickle.dumps(clips[0])).base_name == clips[0].base_name


@pytest.mark.parametrize(
    ("fps", "indices"),
    [
        (15, [0, 0, 1, 1, 2, 3, 3, 4, 4]),
        (Fraction(24000, 1001), list(range(9))),
        (24, list(range(9))),
        (25, list(range(9))),
        (26, list(range(9))),
        (Fraction(30000, 1001), [0, 1, 2, 3, 4, 5, 7, 8, 9]),
        (30, [0, 1, 2, 3, 4, 6, 7, 8, 9]),
        (50, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        (Fraction(60000, 1001), [0, 2, 4, 7, 9, 11, 14, 16, 19]),
        (60, [0, 2, 4, 7, 9, 12, 14, 16, 19]),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_at_the_target_rate(tmp_path, fps, indices, suffix, caplog) -> None:
    path = write_video(tmp_path / f"a.{suffix}", 40, fps=fps)
    with caplog.at_level(logging.INFO):
        clip = _one(path, _entry(tmp_path, target_frames=(9,)), with_audio=False)
    rounding = int(suffix == "mkv" and isinstance(fps, Fraction))  # Matroska's times are milliseconds
    assert np.abs(np.subtract(_indices(clip), indices)).max() <= rounding
    assert f"Auto-detected source FPS: {float(fps):.2f} for a.{suffix}" in caplog.text
    resampled = indices != list(range(9))
    assert (f"Resampling a.{suffix}: {float(fps):.2f} FPS -> 25.00 FPS" in caplog.text) == resampled
    assert ("repeats frames" in caplog.text) == (fps == 15)


def test_source_fps_overrides_the_container(tmp_path, caplog) -> None:
    path = write_video(tmp_path / "a.mp4", 40, fps=25)
    with caplog.at_level(logging.INFO):
        clip = _one(path, _entry(tmp_path, target_frames=(9,), source_fps=50.0), with_audio=False)
    assert _indices(clip) == list(range(0, 18, 2))
    assert "Auto-detected" not in caplog.text


def test_another_target_rate(tmp_path) -> None:
    path = write_video(tmp_path / "a.mp4", 40, fps=60)
    clip = _one(path, _entry(tmp_path, target_frames=(9,), target_fps=60.0), with_audio=False)
    assert _indices(clip) == list(range(9))
    assert clip.fps == 60.0


def test_variable_rate_near_the_target_is_resampled_by_time(tmp_path) -> None:
    gaps = [0.02, 0.06] * 10 + [0.2] + [0.02] * 20
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    path = write_video(tmp_path / "a.mkv", len(times), times=times)
    clip = _one(path, _entry(tmp_path, target_frames=(25,)), with_audio=False)
    for output, index in enumerate(_indices(clip)):
        assert times[index] <= output / 25 + 1e-3
        assert times[index + 1] > output / 25 - 1e-3
    assert any("variable frame rate" in note for note in clip.notes)


@pytest.mark.parametrize("mode", ["chunk", "slide", "uniform", "full"])
def test_every_extraction_mode_gives_its_plan(tmp_path, mode) -> None:
    path = write_video(tmp_path / "a.mp4", 64, fps=30, sound=tone(64 / 30))
    entry = _entry(
        tmp_path, target_frames=(9, 17), frame_extraction=mode, frame_stride=7, frame_sample=3, max_frames=40
    )
    clips = prepare_clips(_item(path), entry, with_audio=True)
    assert tuple(clip.window for clip in clips) == plan_item(_item(path), entry).windows
    full = _one(path, _entry(tmp_path, target_frames=(49,)))
    for clip in clips:
        start, end = clip.window.start, clip.window.end
        assert _indices(clip) == _indices(full)[start:end] if end <= 49 else True
        assert clip.waveform.shape[1] == clip.window.count * 640


def test_only_the_frames_a_head_clip_needs_are_decoded(tmp_path) -> None:
    """The damage behind the clip is not met."""
    path = write_video(
        tmp_path / "a.mkv",
        [np.random.default_rng(i).integers(0, 255, (64, 128, 3), np.uint8) for i in range(100)],
    )
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    assert _one(path, _entry(tmp_path, target_frames=(25,)), with_audio=False).pixels.shape[0] == 25
    with pytest.raises(MediaError, match=r"a\.mkv"):
        list(iter_clips(_item(path), _entry(tmp_path, target_frames=(25,), frame_extraction="chunk"), with_audio=False))


def test_a_short_video_gives_nothing(tmp_path) -> None:
    path = write_video(tmp_path / "a.mp4", 8)
    entry = _entry(tmp_path, target_frames=(9, 17))
    assert prepare_clips(_item(path), entry, with_audio=False) == []
    assert plan_item(_item(path), entry).too_short == (9, 17)


def test_a_rotated_phone_video_gets_a_portrait_bucket(tmp_path) -> None:
    path = write_video(tmp_path / "a.mp4", 3, size=(160, 96), rotation=-90)
    entry = _entry(tmp_path, resolution=(160, 96), enable_bucket=True)
    clip = _one(path, entry, with_audio=False)
    assert clip.original_size == (96, 160)
    assert clip.bucket == plan_item(_item(path), entry).bucket == (96, 160)
    assert clip.pixels.shape == (1, 160, 96, 3)


def test_too_small_for_a_bucket_without_enlarging(tmp_path) -> None:
    path = write_video(tmp_path / "a.mp4", 3, size=(128, 16))
    entry = _entry(tmp_path, resolution=(256, 256), enable_bucket=True, bucket_no_upscale=True)
    with pytest.raises(MediaError, match="bucket_no_upscale"):
        prepare_clips(_item(path), entry, with_audio=False)


def test_an_image_is_a_clip_of_one_frame(tmp_path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(np.full((96, 192, 3), 50, np.uint8)).save(path)
    entry = _entry(tmp_path, "image")
    (clip,) = prepare_clips(_item(path, "image"), entry, with_audio=True)
    assert (clip.base_name, clip.window, clip.fps) == ("photo", ClipWindow(0, 1), 25.0)
    assert clip.pixels.shape == (1, 32, 64, 3)
    assert (clip.original_size, clip.waveform, clip.audio_status) == ((192, 96), None, "not requested")
    assert plan_item(_item(path, "image"), entry).bucket == (64, 32)


# --- sound --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fps", "given"), [(25, None), (30, None), (60, None), (15, None), (24, None), (24, 24.0)])
def test_sound_meets_its_frames(tmp_path, fps, given) -> None:
    """A click when frame 24 appears is heard at the output frame that shows it."""
    path = write_video(tmp_path / "a.mkv", 120, fps=fps, sound=clicks(120 / fps, [24 / fps]))
    clip = _one(path, _entry(tmp_path, target_frames=(49,), source_fps=given))
    shown = _indices(clip).index(24) / 25
    (heard,) = onsets(clip.waveform, 16_000)
    assert heard == pytest.approx(shown, abs=0.012 if fps == 24 else 0.04)
    assert heard <= shown + 0.012
    assert clip.waveform.shape == (2, 31_360)


def test_every_chunk_has_its_own_part_of_the_sound(tmp_path) -> None:
    path = write_video(tmp_path / "a.mkv", 60, sound=clicks(2.4, [(i * 17 + 4) / 25 for i in range(3)]))
    clips = prepare_clips(_item(path), _entry(tmp_path, target_frames=(17,), frame_extraction="chunk"), with_audio=True)
    assert [clip.window.start for clip in clips] == [0, 17, 34]
    for clip in clips:
        assert onsets(clip.waveform, 16_000) == pytest.approx([4 / 25], abs=2e-3)


def test_head_clips_are_not_squeezed(tmp_path) -> None:
    path = write_video(tmp_path / "a.mkv", 100, fps=30, sound=tone(100 / 30))
    assert pitch(_one(path, _entry(tmp_path, target_frames=(25,))).waveform, 16_000) == pytest.approx(440, abs=1)


def test_retimed_clips_keep_their_pitch(tmp_path) -> None:
    path = write_video(tmp_path / "a.mkv", 60, fps=24, sound=tone(2.5))
    clip = _one(path, _entry(tmp_path, target_frames=(49,)))
    assert pitch(clip.waveform, 16_000) == pytest.approx(440, abs=1.5)


def test_video_without_sound(tmp_path) -> None:
    path = write_video(tmp_path / "a.mp4", 9)
    clip = _one(path, _entry(tmp_path, target_frames=(9,)))
    assert (clip.waveform, clip.audio_status, clip.notes) == (None, "absent", ("no audio stream",))
    assert _one(path, _entry(tmp_path, target_frames=(9,)), with_audio=False).audio_status == "not requested"


def test_sound_that_is_over_before_the_clip_begins(tmp_path) -> None:
    path = write_video(tmp_path / "a.mkv", 36, sound=tone(0.6))
    entry = _entry(tmp_path, target_frames=(17,), frame_extraction="chunk")
    first, second = prepare_clips(_item(path), entry, with_audio=True)
    assert (first.audio_status, second.audio_status) == ("present", "absent")
    assert "no sound between" in second.notes[0]


def test_sound_from_files_of_the_source_stem(tmp_path) -> None:
    path = write_video(tmp_path / "a.mp4", 30, sound=tone(1.2, hertz=300), sound_codec="aac")
    (tmp_path / "voices").mkdir()
    write_sound(tmp_path / "voices" / "a.flac", tone(1.2, hertz=700), codec="flac")
    source = AudioSource("audio_files", tmp_path / "voices", "flac")
    entry = _entry(tmp_path, target_frames=(25,))
    clip = _one(path, entry, audio_source=source)
    assert pitch(clip.waveform, 16_000) == pytest.approx(700, abs=2)
    assert plan_item(_item(path), entry, source).has_audio
    beside = AudioSource("audio_files")
    assert not plan_item(_item(path), entry, beside).has_audio
    missing = _one(path, entry, audio_source=beside)
    assert missing.audio_status == "absent"
    assert "a.wav" in missing.notes[0]


@pytest.mark.parametrize(("layout", "channels"), [("mono", 1), ("5.1", 6)])
def test_mono_and_surround_clips(tmp_path, layout, channels) -> None:
    path = write_video(tmp_path / "a.mp4", 30, sound=tone(1.2, channels=channels), layout=layout, sound_codec="aac")
    clip = _one(path, _entry(tmp_path, target_frames=(25,)))
    assert clip.waveform.shape == (2, 16_000)
    assert np.abs(clip.waveform).max() <= 1
    assert pitch(clip.waveform, 16_000) == pytest.approx(440, abs=1)


def test_an_audio_item(tmp_path) -> None:
    path = write_sound(tmp_path / "a.wav", tone(2.3, rate=44_100), rate=44_100)
    entry = _entry(tmp_path, "audio")
    (clip,) = prepare_clips(_item(path, "audio"), entry, with_audio=False)
    assert (clip.base_name, clip.pixels, clip.window, clip.bucket) == ("a", None, None, (64, 32))
    assert clip.waveform.shape == (2, 36_800)
    assert clip.duration == pytest.approx(2.3)
    assert plan_item(_item(path, "audio"), entry).duration == pytest.approx(2.3)


def test_an_audio_item_without_sound_is_an_error(tmp_path) -> None:
    path = write_video(tmp_path / "a.mp4", 5)
    for call in (plan_item, lambda *a: prepare_clips(*a, with_audio=True)):
        with pytest.raises(MediaError, match="no audio stream"):
            call(_item(path, "audio"), _entry(tmp_path, "audio"))


@pytest.mark.parametrize("mode", ["chunk", "slide"])
def test_long_videos_are_held_in_part(tmp_path, monkeypatch, mode) -> None:
    path = write_video(tmp_path / "a.mkv", 250, sound=tone(10.0))
    held: list[float] = []

    def forget(track, before):
        original(track, before)
        held.append(sum(block.shape[1] for _, block in track._blocks) / track.rate)

    original = AudioTrack.forget
    monkeypatch.setattr(AudioTrack, "forget", forget)
    entry = _entry(tmp_path, target_frames=(9, 25), frame_extraction=mode, frame_stride=6)
    for clip in iter_clips(_item(path), entry, with_audio=True):
        assert clip.waveform.shape[1] == clip.window.count * 640
    assert len(held) > 20
    assert max(held) < 1.2  # seconds; the longest clip has 1.0


def test_sound_too_short_for_the_spectrogram_is_no_sound(tmp_path) -> None:
    item = _item(write_video(tmp_path / "a.mkv", 60, fps=60, sound=tone(1)))
    (clip,) = prepare_clips(item, _entry(tmp_path, target_frames=(1,), target_fps=60.0), with_audio=True)
    assert (clip.waveform, clip.audio_status) == (None, "absent")
    assert clip.notes == ("17 ms of sound, at least 32 ms are needed",)
    alone = _item(write_sound(tmp_path / "b.wav", tone(0.02)), "audio")
    with pytest.raises(MediaError, match="b.wav: 20 ms of sound, at least 32 ms are needed"):
        prepare_clips(alone, _entry(tmp_path, "audio"), with_audio=True)


def test_a_sound_file_that_was_cut_off_is_named(tmp_path, caplog) -> None:
    path = write_sound(tmp_path / "a.flac", tone(4), codec="flac")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        prepare_clips(_item(path, "audio"), _entry(tmp_path, "audio"), with_audio=True)
    assert "a.flac: ends at" in caplog.text
    assert "may be truncated" in caplog.text
