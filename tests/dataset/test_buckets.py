import math

import pytest
from hypothesis import given
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

sides = st.integers(64, 2048)
sizes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


@pytest.mark.parametrize(("resolution", "number"), [((960, 544), 24), ((768, 512), 22), ((512, 512), 17)])
def test_number_of_buckets(resolution, number) -> None:
    assert len(bucket_sizes(resolution)) == number


@pytest.mark.parametrize(
    ("resolution", "size", "bucket"),
    [
        ((960, 544), (1920, 1080), (960, 544)),
        ((960, 544), (640, 272), (1088, 480)),
        ((960, 544), (1024, 1024), (704, 736)),
        ((960, 544), (4000, 1000), (1472, 352)),
        ((768, 512), (1920, 1080), (800, 480)),
        ((768, 512), (1000, 1000), (608, 640)),
        ((512, 512), (1920, 1080), (672, 384)),
    ],
)
def test_the_nearest_aspect_ratio_is_chosen(resolution, size, bucket) -> None:
    assert choose_bucket(size, resolution, enable_bucket=True) == bucket


@given(st.tuples(sides, sides))
def test_buckets_are_divisible_and_not_larger_than_the_area(resolution) -> None:
    buckets = bucket_sizes(resolution)
    assert buckets == tuple(sorted(set(buckets)))
    for width, height in buckets:
        assert width % 32 == height % 32 == 0
        assert 0 < width * height <= resolution[0] * resolution[1]
        assert (height, width) in buckets


@given(sizes)
def test_a_bucket_maps_to_itself(size) -> None:
    bucket = choose_bucket(size, (960, 544), enable_bucket=True)
    assert choose_bucket(bucket, (960, 544), enable_bucket=True) == bucket


@given(sizes)
def test_without_buckets_every_size_has_the_resolution(size) -> None:
    assert choose_bucket(size, (960, 544), enable_bucket=False, no_upscale=True) == (960, 544)


@given(sizes)
def test_no_upscale_never_enlarges_a_small_item(size) -> None:
    bucket = choose_bucket(size, (768, 512), enable_bucket=True, no_upscale=True)
    if size[0] * size[1] > 768 * 512:
        assert bucket == choose_bucket(size, (768, 512), enable_bucket=True)
    elif min(size) < 32:
        assert bucket is None
    else:
        assert bucket == (size[0] // 32 * 32, size[1] // 32 * 32)


def test_a_downscaled_reference_is_an_exact_fraction_of_its_target() -> None:
    for width, height in bucket_sizes((960, 544), 64):
        assert width // 2 % 32 == height // 2 % 32 == 0


@given(st.integers(1, 10_000))
def test_frames_round_down_to_8k_plus_1(frames) -> None:
    legal = floor_frames(frames)
    assert is_legal_frame_count(legal)
    assert frames - 8 < legal <= frames
    assert (latent_frames(legal) - 1) * 8 + 1 == legal


def test_latent_grid_of_a_clip() -> None:
    assert latent_grid(49, (768, 512)) == (7, 16, 24)
    assert latent_grid(1, (960, 544)) == (1, 17, 30)
    assert floor_frames(0) == 0


@pytest.mark.parametrize("seconds", [1, 2, 5, 10])
def test_whole_seconds_of_sound_give_25_steps_each_and_one(seconds) -> None:
    assert audio_latent_length(16_000 * seconds) == 25 * seconds + 1


def test_audio_length_of_a_clip() -> None:
    assert audio_latent_length(31_360) == 50  # 49 frames at 25 fps
    mels = {1: 1, 4: 1, 5: 2, 8: 2, 101: 26, 201: 51, 401: 101, 404: 101, 485: 122}
    assert {mel: audio_latent_length((mel - 1) * 160) for mel in mels} == mels


@pytest.mark.parametrize(
    ("length", "padded", "truncated"),
    [(24, 50, 50), (74, 50, 50), (75, 100, 50), (100, 100, 100), (125, 150, 100)],
)
def test_audio_buckets(length, padded, truncated) -> None:
    step = audio_bucket_step(2.0)
    assert step == 50
    assert quantize_audio_length(length, step, "pad") == padded
    assert quantize_audio_length(length, step, "truncate") == truncated


@given(st.integers(1, 5000), st.floats(0.01, 30))
def test_audio_buckets_are_near(length, interval) -> None:
    step = audio_bucket_step(interval)
    assert abs(quantize_audio_length(length, step, "pad") - max(length, step)) <= math.ceil(step / 2)
    truncated = quantize_audio_length(length, step, "truncate")
    assert truncated % step == 0
    assert truncated == step or length - step < truncated <= length
