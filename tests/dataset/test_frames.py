from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from musubi_tuner.dataset.frames import (
    ClipWindow,
    ExtractionRule,
    FrameRate,
    clip_windows,
    cut_clips,
    is_regular,
    needs_resampling,
    output_length,
    resample_indices,
    sample_frames,
    settle_rate,
)


def _times(frames: int, fps: float) -> list[float]:
    return [float(i / Fraction(fps).limit_denominator(1001)) for i in range(frames)]


def _indices(frames: int, fps: float, target: float = 25.0, **options) -> list[int]:
    return resample_indices(_times(frames, fps), FrameRate(fps, target, resample=True, **options))


# --- rate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [23.976, 24000 / 1001, 24, 24.5, 25, 26])
def test_rates_within_one_frame_of_25_are_kept(fps) -> None:
    assert not needs_resampling(fps, 25)


@pytest.mark.parametrize("fps", [15, 23, 26.5, 29.97, 30, 48, 50, 59.94, 60, 120])
def test_other_rates_are_resampled_to_25(fps) -> None:
    assert needs_resampling(fps, 25)


def test_ntsc_rates_are_kept_beside_their_nominal_ones() -> None:
    assert not needs_resampling(60000 / 1001, 60)
    assert not needs_resampling(30000 / 1001, 30)
    assert not needs_resampling(30000 / 1001, 29.97)


@pytest.mark.parametrize(
    ("frames", "fps", "begin", "length"),
    [
        (120, 30, [0, 1, 2, 3, 4, 6, 7, 8], 100),
        (100, 50, [0, 2, 4, 6, 8, 10], 50),
        (120, 60, [0, 2, 4, 7, 9, 12], 50),
        (60, 15, [0, 0, 1, 1, 2, 3, 3, 4], 100),
        (120, 30000 / 1001, [0, 1, 2, 3, 4, 5, 7], 101),
        (48, 24000 / 1001, [0, 0, 1, 2, 3], 51),
    ],
)
def test_output_is_the_last_frame_that_is_not_late(frames, fps, begin, length) -> None:
    indices = _indices(frames, fps)
    assert indices[: len(begin)] == begin
    assert len(indices) == length
    assert output_length(frames, frames / fps, FrameRate(fps, 25, resample=True)) == length


@given(
    st.lists(st.floats(0.001, 0.3), min_size=1, max_size=60),
    st.sampled_from([8.0, 15.0, 24.0, 25.0, 29.97, 30.0, 60.0]),
)
@example([0.25, 0.1808245937216888, 0.1808245937216888, 0.05417547329361334, 0.05417547329361334], 25.0)
def test_resampling_any_frame_times_keeps_real_time(gaps, target) -> None:
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    indices = resample_indices(times, FrameRate(25.0, target, resample=True))
    assert len(indices) == output_length(len(times), times[-1] + 1 / 25, FrameRate(25.0, target, resample=True))
    for output, index in enumerate(indices):
        assert times[index] <= output / target + 2e-6
        assert index + 1 == len(times) or times[index + 1] > output / target


def test_a_given_rate_ignores_the_times_of_the_container() -> None:
    irregular = [0.0, 0.3, 0.31, 0.32, 0.9, 1.0]
    rate = FrameRate(50.0, 25.0, given=True, resample=True)
    assert resample_indices(irregular, rate) == [0, 2, 4]
    samples = list(sample_frames(((t, t) for t in irregular), rate))
    assert [s.time for s in samples] == pytest.approx([0.0, 0.31, 0.9, 1.2])  # sound lies where the frames lie


def test_sound_of_kept_frames_lies_where_the_frames_lie() -> None:
    samples = list(sample_frames(((t, t) for t in _times(4, 24)), FrameRate(24.0, 25.0)))
    assert [s.time for s in samples] == pytest.approx([0, 1 / 24, 2 / 24, 3 / 24, 4 / 24])
    assert [s.index for s in samples] == [0, 1, 2, 3, 4]
    assert samples[-1].frame is None


def test_sound_of_resampled_frames_lies_on_the_output_grid() -> None:
    samples = list(sample_frames(((t, t) for t in _times(121, 30)), FrameRate(30.0, 25.0, resample=True)))
    assert [s.time for s in samples] == pytest.approx([j / 25 for j in range(len(samples))])


def test_only_frames_that_can_be_used_decide_whether_the_rate_varies() -> None:
    times = [i / 25 for i in range(10)] + [5 + i / 10 for i in range(10)]
    rate = FrameRate(25.0, 25.0)
    assert settle_rate(rate, times, limit=9) == rate
    assert settle_rate(rate, times, limit=10) == replace(rate, resample=True, variable=True)
    assert settle_rate(rate, times, limit=None).variable
    for settled in (replace(rate, given=True), replace(rate, resample=True)):
        assert settle_rate(settled, times, limit=None) == settled


def test_an_empty_stream_gives_nothing() -> None:
    assert list(sample_frames([], FrameRate(30.0, 25.0, resample=True))) == []
    assert list(sample_frames([], FrameRate(25.0, 25.0))) == []


def test_regular_times_are_told_from_variable_ones() -> None:
    assert is_regular(_times(100, 24000 / 1001), 24000 / 1001)
    assert is_regular([round(t, 3) for t in _times(100, 29.97)], 30000 / 1001)
    assert not is_regular([0.0, 0.04, 0.08, 0.3, 0.34], 25.0)


# --- extraction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "length", "windows"),
    [
        (ExtractionRule("head", (1, 17, 49)), 40, [(0, 1), (0, 17)]),
        (ExtractionRule("head", (49,)), 48, []),
        (ExtractionRule("chunk", (17, 33)), 70, [(0, 17), (17, 17), (34, 17), (51, 17), (0, 33), (33, 33)]),
        (ExtractionRule("slide", (17,), stride=10), 40, [(0, 17), (10, 17), (20, 17)]),
        (ExtractionRule("uniform", (49,), sample=4), 250, [(0, 49), (67, 49), (134, 49), (201, 49)]),
        (ExtractionRule("uniform", (9,), sample=4), 11, [(0, 9), (1, 9), (2, 9)]),
        (ExtractionRule("full", max_frames=129), 132, [(0, 129)]),
        (ExtractionRule("full", max_frames=129), 33, [(0, 33)]),
        (ExtractionRule("full", max_frames=129), 20, [(0, 17)]),
        (ExtractionRule("full", max_frames=20), 33, [(0, 17)]),
    ],
)
def test_extraction(rule, length, windows) -> None:
    assert clip_windows(rule, length) == [ClipWindow(*w) for w in windows]


rules = st.builds(
    ExtractionRule,
    mode=st.sampled_from(["head", "chunk", "slide", "uniform", "full"]),
    target_frames=st.sets(st.sampled_from([1, 9, 17, 25]), min_size=1).map(lambda s: tuple(sorted(s))),
    stride=st.integers(1, 12),
    sample=st.integers(1, 6),
    max_frames=st.integers(1, 40),
)


@given(rules, st.integers(0, 60))
def test_clips_of_a_stream_are_those_of_the_plan(rule, length) -> None:
    samples = sample_frames(((i / 25, i) for i in range(length)), FrameRate(25.0, 25.0))
    cuts = list(cut_clips(samples, rule, convert=lambda i: i, length=length if rule.mode == "uniform" else None))
    assert sorted((c.window.count, c.window.start) for c in cuts) == [
        (w.count, w.start) for w in clip_windows(rule, length)
    ]
    for cut in cuts:
        assert cut.frames == list(range(cut.window.start, cut.window.end))
        assert (cut.start, cut.end) == pytest.approx((cut.window.start / 25, cut.window.end / 25))


def test_head_reads_one_frame_more_than_it_needs() -> None:
    read = []

    def source():
        for i in range(1000):
            read.append(i)
            yield i / 25, i

    rule = ExtractionRule("head", (9, 17))
    used: list[int] = []
    assert len(list(cut_clips(sample_frames(source(), FrameRate(25.0, 25.0)), rule, convert=used.append))) == 2
    assert read == list(range(18))
    assert len(used) == 17


def test_frames_that_are_dropped_or_repeated_are_not_converted() -> None:
    used: list[int] = []
    rate = FrameRate(60.0, 25.0, resample=True)
    samples = sample_frames(((t, i) for i, t in enumerate(_times(120, 60))), rate)
    list(cut_clips(samples, ExtractionRule("chunk", (9,)), convert=used.append))
    assert used == resample_indices(_times(120, 60), rate)[: len(used)]
    used.clear()
    rate = FrameRate(15.0, 25.0, resample=True)
    samples = sample_frames(((t, i) for i, t in enumerate(_times(30, 15))), rate)
    list(cut_clips(samples, ExtractionRule("head", (25,)), convert=used.append))
    assert used == sorted(set(used))
