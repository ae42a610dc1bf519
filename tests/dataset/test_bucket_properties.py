"""Arithmetic of buckets, frames and sound over random sizes, rates and lengths."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musubi_tuner.dataset.buckets import (
    audio_bucket_step,
    audio_latent_length,
    bucket_sizes,
    choose_bucket,
    floor_frames,
    is_legal_frame_count,
    latent_frames,
    latent_grid,
    quantize_audio_length,
)
from musubi_tuner.dataset.frames import (
    ClipWindow,
    ExtractionRule,
    FrameRate,
    can_start_at,
    clip_windows,
    cut_clips,
    output_length,
    resample_indices,
    sample_frames,
)
from musubi_tuner.dataset.resize import resize_to_bucket

fast = settings(max_examples=50, derandomize=True, deadline=None, database=None)

steps = st.sampled_from([32, 64, 96, 128])
sizes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


@st.composite
def resolutions(draw: st.DrawFn, step: int = 32) -> tuple[int, int]:
    """Of any sides, as long as one bucket has room."""
    width, height = draw(st.tuples(st.integers(1, 2048), st.integers(1, 2048)))
    return max(width, step), max(height, step)


# --- buckets ------------------------------------------------------------------------------------------------


@settings(fast, max_examples=200)
@given(st.data(), steps)
def test_sides_are_multiples_of_the_step_and_areas_are_not_larger(data: st.DataObject, step: int) -> None:
    resolution = data.draw(resolutions(step))
    buckets = bucket_sizes(resolution, step)
    assert buckets
    for width, height in buckets:
        assert width > 0 < height
        assert width % step == height % step == 0
        assert width * height <= resolution[0] * resolution[1]
        # As large as its width allows.
        assert (height, width) in buckets
        assert max(width * (height + step), height * (width + step)) > resolution[0] * resolution[1]


@settings(fast, max_examples=200)
@given(st.data(), steps, sizes)
def test_every_item_gets_the_bucket_of_the_nearest_shape(data: st.DataObject, step: int, size) -> None:
    resolution = data.draw(resolutions(step))
    bucket = choose_bucket(size, resolution, enable_bucket=True, step=step)

    def distance(other: tuple[int, int]) -> Fraction:
        return abs(Fraction(*other) - Fraction(*size))

    assert bucket in bucket_sizes(resolution, step)
    nearest = min(map(distance, bucket_sizes(resolution, step)))
    assert float(distance(bucket)) == pytest.approx(float(nearest), abs=1e-12)


@settings(fast, max_examples=200)
@given(st.data(), steps)
def test_a_size_that_is_a_bucket_maps_to_itself(data: st.DataObject, step: int) -> None:
    resolution = data.draw(resolutions(step))
    for no_upscale in (False, True):
        for bucket in bucket_sizes(resolution, step):
            chosen = choose_bucket(bucket, resolution, enable_bucket=True, no_upscale=no_upscale, step=step)
            assert chosen == bucket


@fast
@given(sizes, resolutions())
def test_no_upscale_cuts_less_than_a_step_from_small_items(size, resolution) -> None:
    bucket = choose_bucket(size, resolution, enable_bucket=True, no_upscale=True)
    if size[0] * size[1] > resolution[0] * resolution[1]:
        assert bucket in bucket_sizes(resolution)
    elif bucket is None:
        assert min(size) < 32
    else:
        assert all(0 <= side - cut < 32 and cut % 32 == 0 for side, cut in zip(size, bucket, strict=True))


@settings(fast, max_examples=100)
@given(
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
    st.tuples(st.sampled_from([32, 64, 96, 160]), st.sampled_from([32, 64, 96, 160])),
)
def test_a_resized_item_covers_its_bucket(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    width, height = size
    grey = np.full((height, width, 3), 77, dtype=np.uint8)
    resized = resize_to_bucket(grey, bucket)
    assert resized.shape == (bucket[1], bucket[0], 3)
    assert set(resized.flatten().tolist()) == {77}  # no border


@fast
@given(st.sampled_from([32, 64, 96]), st.integers(2, 5), st.booleans())
def test_the_crop_is_centred(side: int, ratio: int, upright: bool) -> None:
    """The middle of an item of several bucket widths stays, whichever way it lies."""
    pixels = np.zeros((side, side * ratio, 3), dtype=np.uint8)
    left = (side * ratio - side) // 2
    pixels[:, left : left + side] = 255
    pixels = pixels.transpose(1, 0, 2) if upright else pixels
    assert resize_to_bucket(pixels, (side, side)).min() == 255


# --- frames -------------------------------------------------------------------------------------------------


@fast
@given(st.integers(-5, 10_000))
def test_floor_frames_is_the_largest_legal_count(frames: int) -> None:
    legal = floor_frames(frames)
    assert floor_frames(legal) == legal
    if frames < 1:
        assert legal == 0
        return
    assert legal % 8 == 1
    assert legal <= frames < legal + 8
    assert is_legal_frame_count(frames) == (legal == frames)


@fast
@given(st.integers(0, 500), st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_the_latent_grid_undoes_the_strides(k: int, cells: tuple[int, int]) -> None:
    grid = latent_grid(8 * k + 1, (cells[0] * 32, cells[1] * 32))
    assert grid == (k + 1, cells[1], cells[0])
    assert latent_frames(8 * k + 1) == k + 1


rules = st.builds(
    ExtractionRule,
    mode=st.sampled_from(["head", "chunk", "slide", "uniform", "full"]),
    target_frames=st.sets(st.integers(0, 8), min_size=1).map(lambda s: tuple(8 * k + 1 for k in sorted(s))),
    stride=st.integers(1, 40),
    sample=st.integers(1, 12),
    max_frames=st.integers(1, 140),
)
lengths = st.integers(0, 300)


@settings(fast, max_examples=200)
@given(rules, lengths)
def test_clips_lie_inside_the_video_and_have_legal_lengths(rule: ExtractionRule, length: int) -> None:
    windows = clip_windows(rule, length)
    assert len(set(windows)) == len(windows)
    for window in windows:
        assert 0 <= window.start < window.end <= length
        assert is_legal_frame_count(window.count)
        assert can_start_at(rule, window.start, window.count)
        assert rule.mode == "full" or window.count in rule.target_frames
    if rule.mode != "full":
        # A target length is left out only where the video is shorter.
        assert {w.count for w in windows} == {t for t in rule.target_frames if t <= length}


def _starts(rule: ExtractionRule, length: int) -> dict[int, list[int]]:
    windows = clip_windows(rule, length)
    return {t: [w.start for w in windows if w.count == t] for t in rule.target_frames if t <= length}


def _as(mode: str) -> st.SearchStrategy[ExtractionRule]:
    return rules.map(
        lambda r: ExtractionRule(mode, r.target_frames, stride=r.stride, sample=r.sample, max_frames=r.max_frames)
    )


@fast
@given(_as("chunk"), lengths)
def test_chunks_are_adjacent_and_leave_less_than_one(rule: ExtractionRule, length: int) -> None:
    for count, starts in _starts(rule, length).items():
        assert starts == [count * i for i in range(len(starts))]
        assert 0 <= length - count * len(starts) < count


@fast
@given(_as("slide"), lengths)
def test_slides_go_on_by_the_stride_to_the_end(rule: ExtractionRule, length: int) -> None:
    for count, starts in _starts(rule, length).items():
        assert starts == [rule.stride * i for i in range(len(starts))]
        assert starts[-1] + count <= length < starts[-1] + rule.stride + count


@fast
@given(_as("uniform"), lengths)
def test_uniform_clips_reach_from_the_beginning_to_the_end(rule: ExtractionRule, length: int) -> None:
    for count, starts in _starts(rule, length).items():
        room = length - count
        assert starts == sorted(set(starts))
        assert len(starts) == (min(rule.sample, room + 1) if rule.sample <= room + 1 else room + 1)
        assert starts[0] == 0
        if rule.sample > 1:
            assert starts[-1] == room
            ideal = [Fraction(room * i, rule.sample - 1) for i in range(rule.sample)]
            assert all(min(abs(start - x) for x in ideal) <= 1 for start in starts)


@fast
@given(_as("full"), lengths)
def test_full_takes_one_clip_of_at_most_max_frames(rule: ExtractionRule, length: int) -> None:
    windows = clip_windows(rule, length)
    longest = min(length, rule.max_frames)
    assert windows == [ClipWindow(0, n) for n in range(1, longest + 1) if n % 8 == 1][-1:]


# --- rate ---------------------------------------------------------------------------------------------------

fps = st.sampled_from([Fraction(n, d) for n, d in [(12, 1), (15, 1), (24000, 1001), (24, 1), (25, 1), (30000, 1001)]]
    + [Fraction(n) for n in (30, 48, 50, 60, 120)] + [Fraction(60000, 1001)])  # fmt: skip
targets = st.sampled_from([8.0, 16.0, 24.0, 25.0, 29.97, 30.0, 60.0])


@settings(fast, max_examples=150)
@given(fps, targets, st.integers(1, 200), st.booleans())
def test_resampled_frames_keep_real_time(source: Fraction, target: float, frames: int, given_rate: bool) -> None:
    """Each output shows what the source shows then: the error is below one frame of the source."""
    rate = FrameRate(float(source), target, given=given_rate, resample=True)
    indices = resample_indices([float(i / source) for i in range(frames)], rate)
    for output, index in enumerate(indices):
        assert -1e-5 < output / target - index / source < 1 / source + 1e-5
    assert indices == sorted(indices)
    assert set(indices) <= set(range(frames))
    # As many as fit into the time that the source lasts.
    assert len(indices) == output_length(frames, float(frames / source), rate)
    assert abs(len(indices) / target - frames / source) < 1 / target + 1e-5
    if target >= source:
        assert set(indices) == set(range(frames))  # nothing is dropped
    if target <= source:
        assert len(set(indices)) == len(indices)  # nothing is repeated


@fast
@given(fps, targets, st.integers(1, 100))
def test_the_sound_of_a_resampled_clip_lasts_as_long_as_its_frames(source, target: float, frames: int) -> None:
    rate = FrameRate(float(source), target, resample=True)
    samples = list(sample_frames(((float(i / source), i) for i in range(frames)), rate))
    assert [s.time for s in samples] == pytest.approx([j / target for j in range(len(samples))], abs=1e-5)
    for cut in cut_clips(samples, ExtractionRule("chunk", (1, 9)), convert=lambda i: i):
        assert cut.end - cut.start == pytest.approx(cut.window.count / target, abs=1e-5)


@fast
@given(fps, targets, st.integers(0, 100))
def test_kept_frames_are_all_kept(source: Fraction, target: float, frames: int) -> None:
    rate = FrameRate(float(source), target)
    samples = list(sample_frames(((float(i / source), i) for i in range(frames)), rate))
    assert [s.frame for s in samples[:-1]] == list(range(frames))
    assert output_length(frames, float(frames / source), rate) == frames == max(len(samples) - 1, 0)
    assert [s.time for s in samples] == pytest.approx([float(i / source) for i in range(len(samples))])


# --- sound --------------------------------------------------------------------------------------------------


@settings(fast, max_examples=200)
@given(st.integers(1, 5000), st.integers(1, 400))
def test_pad_takes_the_nearest_and_truncate_the_lower_multiple(length: int, step: int) -> None:
    multiples = range(step, length + 2 * step, step)
    padded, truncated = (quantize_audio_length(length, step, strategy) for strategy in ("pad", "truncate"))
    assert truncated == max([m for m in multiples if m <= length], default=step)
    assert padded == min(multiples, key=lambda m: (abs(m - length), -m))  # half way goes up
    assert quantize_audio_length(padded, step, "pad") == padded
    assert quantize_audio_length(truncated, step, "truncate") == truncated


@fast
@given(st.floats(0.001, 60))
def test_the_bucket_step_is_the_interval_in_latent_steps(interval: float) -> None:
    step = audio_bucket_step(interval)
    assert step >= 1
    assert step == 1 or abs(step / 25 - interval) <= 0.5 / 25 + 1e-9


@settings(fast, max_examples=200)
@given(st.integers(1, 5_000_000))
def test_audio_latent_length_is_the_count_of_two_strides(samples: int) -> None:
    """A centred spectrogram has a frame at every multiple of the hop up to the end; four of them, or fewer at the
    end, make a latent step."""
    mel = sum(1 for _ in range(0, samples + 1, 160))
    assert audio_latent_length(samples) == sum(1 for _ in range(0, mel, 4)) == math.ceil((samples // 160 + 1) / 4)
