import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import clicks, onsets, pitch, tone, write_sound, write_video

from musubi_tuner.dataset.audio import (
    AudioTrack,
    NoAudio,
    cut_clip,
    down_mix_matrix,
    fit_length,
    probe_audio,
    resample,
    time_stretch,
    to_stereo,
)
from musubi_tuner.dataset.media import MediaError


def _whole(path, **options) -> tuple[np.ndarray, int]:
    with AudioTrack(path, **options) as track:
        samples = track.read_all()
        assert isinstance(samples, np.ndarray)
        return samples, track.rate


# --- channels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "gain"), [("5.1", 2.41421356), ("7.1", 3.12132034)])
def test_surround_is_mixed_down_without_lfe_and_without_overflow(layout, gain) -> None:
    matrix = down_mix_matrix(layout) * gain
    r = 0.70710678
    left = [1, 0, r, 0, r, 0] + ([r, 0] if layout == "7.1" else [])
    right = [0, 1, r, 0, 0, r] + ([0, r] if layout == "7.1" else [])
    np.testing.assert_allclose(matrix, [left, right], atol=1e-4)
    loud = np.ones((len(left), 10), np.float32)
    assert np.abs(to_stereo(loud, layout)).max() <= 1 + 1e-6


def test_mono_is_doubled_and_stereo_left_alone() -> None:
    mono = tone(0.01, channels=1)
    np.testing.assert_array_equal(to_stereo(mono, "mono"), np.concatenate([mono, mono]))
    stereo = tone(0.01)
    assert to_stereo(stereo, "stereo") is stereo


def test_channels_without_positions_are_averaged() -> None:
    sound = np.arange(27, dtype=np.float32).reshape(9, 3)
    np.testing.assert_allclose(to_stereo(sound, "9 channels"), np.repeat(sound.mean(0)[None], 2, 0), rtol=1e-6)


@pytest.mark.parametrize(
    ("layout", "channels", "codec", "suffix"),
    [
        ("mono", 1, "pcm_s16le", "wav"),
        ("stereo", 2, "flac", "flac"),
        ("stereo", 2, "pcm_u8", "wav"),
        ("5.1", 6, "pcm_s16le", "wav"),
        ("7.1", 8, "pcm_s24le", "mov"),
        ("mono", 1, "aac", "m4a"),
        ("5.1", 6, "aac", "m4a"),
        ("stereo", 2, "libopus", "ogg"),
        ("stereo", 2, "libmp3lame", "mp3"),
    ],
)
def test_any_codec_and_channel_count_becomes_stereo(tmp_path, layout, channels, codec, suffix) -> None:
    path = write_sound(tmp_path / f"a.{suffix}", tone(0.5, channels=channels), layout=layout, codec=codec)
    samples, rate = _whole(path)
    assert samples.dtype == np.float32
    assert samples.shape[0] == 2
    assert samples.shape[1] / rate == pytest.approx(0.5, abs=0.06)  # coders pad to whole frames
    assert pitch(samples, rate) == pytest.approx(440, abs=2)
    info = probe_audio(path)
    assert (info.rate, info.channels) == (rate, channels)
    assert info.duration == pytest.approx(0.5, abs=0.08)


# --- the clock ----------------------------------------------------------------------------------------------


def test_sound_is_placed_on_the_clock_of_the_video(tmp_path) -> None:
    sound = clicks(1.0, [0.2, 0.6])
    path = write_video(tmp_path / "a.mkv", 50, sound=sound, sound_start=0.3)
    with AudioTrack(path, origin=0.0) as track:
        samples = track.read(0.0, 2.0)
        assert onsets(samples, track.rate) == pytest.approx([0.5, 0.9], abs=2e-3)
        assert not samples[:, : round(0.29 * track.rate)].any()
    with AudioTrack(path, origin=0.1) as track:
        assert onsets(track.read(0.0, 2.0), track.rate) == pytest.approx([0.4, 0.8], abs=2e-3)
    samples, rate = _whole(path)  # its own clock
    assert onsets(samples, rate) == pytest.approx([0.2, 0.6], abs=2e-3)


def test_reading_in_parts_equals_reading_whole(tmp_path) -> None:
    path = write_sound(tmp_path / "a.wav", np.random.default_rng(0).normal(size=(2, 48_000)).astype(np.float32) * 0.1)
    whole, _ = _whole(path)
    with AudioTrack(path) as track:
        parts = []
        for i in range(10):
            parts.append(track.read(i / 10, (i + 1) / 10))
            track.forget((i + 1) / 10)
            assert len(track._blocks) <= 2
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_pauses_between_packets_stay_silent_and_keep_time(tmp_path) -> None:
    import av

    sound = clicks(1.0, [0.1, 0.7])
    path = write_video(tmp_path / "whole.mkv", 25, sound=sound)
    with av.open(str(path)) as source, av.open(str(tmp_path / "gap.mkv"), "w") as out:
        copies = {s.index: out.add_stream_from_template(s) for s in (source.streams.video[0], source.streams.audio[0])}
        for packet in source.demux():
            is_sound = packet.stream.type == "audio"
            if packet.dts is None or (is_sound and 0.3 < float(packet.pts * packet.time_base) < 0.5):
                continue
            packet.stream = copies[packet.stream_index]
            out.mux(packet)
    with AudioTrack(tmp_path / "gap.mkv", origin=0.0) as track:
        samples = track.read_all()
        assert onsets(samples, track.rate) == pytest.approx([0.1, 0.7], abs=2e-3)
        assert 0.15 < track.gaps < 0.25


def test_no_sound_is_no_failure_but_damage_is(tmp_path) -> None:
    silent = write_video(tmp_path / "silent.mp4", 5)
    with AudioTrack(silent) as track:
        assert isinstance(track.read(0, 1), NoAudio)
        assert isinstance(track.read_all(), NoAudio)
    assert probe_audio(silent) == NoAudio("no audio stream")
    with AudioTrack(write_sound(tmp_path / "short.wav", tone(0.5))) as track:
        assert isinstance(track.read(0.7, 0.9), NoAudio)
    (tmp_path / "text.wav").write_text("hello", encoding="utf-8")
    with pytest.raises(MediaError, match=r"text\.wav"):
        AudioTrack(tmp_path / "text.wav")


# --- rate and length ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 96_000])
def test_resampling_keeps_pitch_length_level_and_place(rate) -> None:
    out = resample(tone(1.0, rate=rate), rate, 16_000)
    assert out.shape == (2, 16_000)
    assert pitch(out, 16_000) == pytest.approx(440, abs=0.2)
    assert np.abs(out[:, 200:-200] - tone(1.0, rate=16_000)[:, 200:-200]).max() < 0.01


def test_clips_at_48_khz_give_the_exact_number_of_samples() -> None:
    assert resample(np.zeros((2, 254_976), np.float32), 48_000, 16_000).shape == (2, 84_992)


@pytest.mark.parametrize("rate", [44_100, 48_000])
@pytest.mark.parametrize("factor", [0.55, 0.8, 0.96, 1.04, 1.25, 1.9])
def test_stretching_keeps_pitch_and_level_and_gives_the_length(rate, factor) -> None:
    sound = tone(2.0, rate=rate)
    length = round(sound.shape[1] * factor)
    out = time_stretch(sound, rate, length)
    assert out.shape == (2, length)
    assert pitch(out, rate) == pytest.approx(440, rel=2e-3)
    middle = out[:, length // 5 : -length // 5]
    assert np.sqrt((middle**2).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize("rate", [44_100, 48_000])
@pytest.mark.parametrize("factor", [0.96, 1.0417])
def test_stretching_keeps_events_in_place(rate, factor) -> None:
    at = [0.4 + 0.37 * i for i in range(10)]
    out = time_stretch(clicks(5.0, at, rate=rate), rate, round(5.0 * rate * factor))
    found = onsets(out, rate)
    error = np.array(found) - np.array(at) * factor
    assert len(found) == len(at)
    assert abs(error.mean()) < 4e-3
    assert np.abs(error).max() < 12e-3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.integers(0, 50))
def test_lengths_are_cut_or_filled_at_the_end(have, want) -> None:
    out = fit_length(np.ones((2, have), np.float32), want)
    assert out.shape == (2, want)
    assert out.sum() == 2 * min(have, want)


# --- cutting ------------------------------------------------------------------------------------------------


def test_a_cut_of_equal_duration_is_exact(tmp_path) -> None:
    path = write_sound(tmp_path / "a.wav", clicks(4.0, [1.5, 2.0]))
    with AudioTrack(path) as track:
        out = cut_clip(track, 1.0, 2.96, 49 / 25)
    assert out.shape == (2, 31_360)
    assert onsets(out, 16_000) == pytest.approx([0.5, 1.0], abs=1e-3)


def test_a_small_difference_is_filled_with_what_follows_not_silence(tmp_path) -> None:
    with AudioTrack(write_sound(tmp_path / "a.wav", tone(3.0))) as track:
        out = cut_clip(track, 0.0, 1.99, 2.0)
    assert out.shape == (2, 32_000)
    assert np.abs(out[:, -160:-20]).max() > 0.4


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_retimed_sound_is_stretched_at_its_pitch(tmp_path, rate) -> None:
    """48 frames of 24 fps that play at 25 fps."""
    with AudioTrack(write_sound(tmp_path / "a.wav", tone(3.0, rate=rate), rate=rate)) as track:
        out = cut_clip(track, 0.0, 49 / 24, 49 / 25)
    assert out.shape == (2, 31_360)
    assert pitch(out, 16_000) == pytest.approx(440, abs=1.5)


def test_an_impossible_stretch_names_the_remedy(tmp_path) -> None:
    path = write_sound(tmp_path / "a.wav", tone(5.0))
    with AudioTrack(path) as track, pytest.raises(MediaError, match="source_fps"):
        cut_clip(track, 0.0, 4.5, 2.0)


def test_a_cut_past_the_end_is_silent_there(tmp_path) -> None:
    with AudioTrack(write_sound(tmp_path / "a.wav", tone(1.0))) as track:
        out = cut_clip(track, 0.5, 1.5, 1.0)
        assert isinstance(out, np.ndarray)
        assert not out[:, 8200:].any()


def test_held_sound_does_not_keep_decoder_frames_alive(tmp_path) -> None:
    path = write_sound(tmp_path / "a.m4a", tone(0.5), codec="aac")
    with AudioTrack(path) as track:
        track.read(0.0, 0.5)
        assert all(block.base is None for _, block in track._blocks)
