"""Shrinking plane by plane against float averages of exactly converted pictures."""

import av
import cv2
import numpy as np
import pytest
from media_files import index_frame, write_video

from musubi_tuner.dataset.frame_store import BlockPool, FrameStore, join
from musubi_tuner.dataset.media import open_video
from musubi_tuner.dataset.resize import YuvShrinker, resize_to_bucket

LIMITED, FULL = 1, 2
WEIGHTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114)}  # red and blue by AVColorSpace
# From 192x108: odd sizes with a cut, whole ratios, chroma that is shrunk too.
BUCKETS = [(160, 96), (96, 54), (64, 32), (191, 64), (128, 96)]


def _area_weights(samples: int, cells: int) -> np.ndarray:
    """[cells, samples]: the part of each cell that each sample covers."""
    edges = np.arange(cells + 1)[:, None] * samples / cells
    left = np.arange(samples)[None]
    overlap = np.minimum(edges[1:], left + 1) - np.maximum(edges[:-1], left)
    return overlap.clip(0) * cells / samples


def _cut_average(picture: np.ndarray, bucket: tuple[int, int]) -> np.ndarray:
    height, width = picture.shape[:2]
    scale = max(bucket[0] / width, bucket[1] / height)
    new = int(width * scale + 0.5), int(height * scale + 0.5)
    rows, columns = _area_weights(height, new[1]), _area_weights(width, new[0])
    means = np.einsum("ah,bw,hwc->abc", rows, columns, picture, optimize=True)
    left, top = (new[0] - bucket[0]) // 2, (new[1] - bucket[1]) // 2
    return means[top : top + bucket[1], left : left + bucket[0]]


def _exact_rgb(yuv: np.ndarray, colorspace: int, color_range: int) -> np.ndarray:
    """Unclipped float [h, w, 3] of 4:2:0 planes as PyAV lays them out, chroma repeated."""
    height = yuv.shape[0] * 2 // 3
    luma = yuv[:height].astype(float)
    cb, cr = (
        plane.reshape(height // 2, -1).repeat(2, 0).repeat(2, 1) - 128.0
        for plane in np.split(yuv[height:].reshape(-1), 2)
    )
    if color_range == LIMITED:
        luma, cb, cr = (luma - 16) * 255 / 219, cb * 255 / 224, cr * 255 / 224
    red, blue = WEIGHTS[colorspace]
    r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
    return np.stack([r, (luma - red * r - blue * b) / (1 - red - blue), b], axis=-1)


def _frame(yuv: np.ndarray, colorspace: int, color_range: int) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(yuv, format="yuv420p")
    frame.colorspace, frame.color_range = colorspace, color_range
    return frame


def _noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (162, 192), np.uint8)


def _shrunk(frame: av.VideoFrame, bucket: tuple[int, int], colorspace: int, turns: int = 0) -> np.ndarray:
    out = np.zeros((bucket[1], bucket[0], 3), np.uint8)
    assert YuvShrinker().shrink(frame, out, colorspace=colorspace, turns=turns)
    return out


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("colorspace", WEIGHTS)
@pytest.mark.parametrize("color_range", [LIMITED, FULL])
def test_noise_is_the_average_within_rounding(bucket, colorspace, color_range) -> None:
    """Half a level for each plane, weighted by the matrix (up to 2.1), and for the result; luma a little more."""
    yuv = _noise()
    expected = _cut_average(_exact_rgb(yuv, colorspace, color_range), bucket).clip(0, 255)
    error = np.abs(_shrunk(_frame(yuv, colorspace, color_range), bucket, colorspace) - expected)
    assert error.mean() < 0.6
    assert error.max() < 4


@pytest.mark.parametrize("bucket", BUCKETS)
def test_saturated_edges_are_averaged_as_rgb(bucket) -> None:
    """Halved chroma makes colours outside RGB at edges, which are clipped after the average; little else differs."""
    colours = np.array([(235, 20, 20), (20, 235, 20), (20, 20, 235), (235, 235, 20), (128, 128, 128), (20, 20, 20)])
    picture = colours[np.random.default_rng(1).integers(0, 6, (18, 32))].repeat(6, 0).repeat(6, 1).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
    rgb = _exact_rgb(frame.to_ndarray(), 1, LIMITED).clip(0, 255)
    error = np.abs(_shrunk(frame, bucket, 1) - _cut_average(rgb, bucket))
    assert error.mean() < 0.6
    assert error.max() < 8


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("bucket", [(64, 32), (32, 64), (96, 96)])
def test_a_turned_frame_is_cut_as_it_is_shown(turns, bucket) -> None:
    yuv = _noise(2)
    shown = np.rot90(_exact_rgb(yuv, 1, LIMITED), turns)
    error = np.abs(_shrunk(_frame(yuv, 1, LIMITED), bucket, 1, turns) - _cut_average(shown, bucket).clip(0, 255))
    assert error.max() < 4


def test_grey_stays_grey_and_keeps_its_level() -> None:
    for level in (16, 100, 235):
        yuv = np.full((162, 192), level, np.uint8)
        yuv[108:] = 128
        assert set(_shrunk(_frame(yuv, 1, LIMITED), (128, 64), 1).reshape(-1)) == {round((level - 16) * 255 / 219)}


@pytest.mark.parametrize("size", [(192, 108), (191, 107), (96, 54)])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "yuv422p", "yuv420p10le", "rgb24", "gray", "nv12"])
def test_fitted_frames_are_the_plain_conversion_resized(tmp_path, size, pixel_format) -> None:
    """Exactly, wherever the frame is not shrunk or not 4:2:0 of even size; else up to rounding, which the plain
    conversion does downwards."""
    soft = cv2.resize(np.random.default_rng(3).integers(30, 220, (9, 16, 3), np.uint8), size)
    frame = av.VideoFrame.from_ndarray(soft, format="rgb24").reformat(format=pixel_format)
    path = write_video(tmp_path / "a.mp4", [index_frame(0)] * 2)
    with open_video(path) as video:
        for bucket in ((96, 32), (96, 54), (160, 96), (192, 108), (256, 160)):
            out = np.zeros((bucket[1], bucket[0], 3), np.uint8)
            video.fit(frame, out)
            plain = resize_to_bucket(video.to_rgb(frame), bucket)
            even_420 = pixel_format == "yuv420p" and size[0] % 2 == 0
            shrunk = max(bucket[0] / size[0], bucket[1] / size[1]) < 1
            error = np.abs(out.astype(int) - plain)
            assert error.max() <= (4 if even_420 and shrunk else 0)
            assert error.mean() < 1.6


@pytest.mark.parametrize("color_range", [LIMITED, FULL])
@pytest.mark.parametrize("colorspace", [1, 5, 6])
def test_tags_are_read_as_in_the_plain_conversion(tmp_path, colorspace, color_range) -> None:
    """Flat colours, so that nothing but the matrix and the range matters."""
    path = write_video(tmp_path / "a.mp4", [index_frame(0)] * 2)
    with open_video(path) as video:
        for luma, cb, cr in ((120, 90, 170), (180, 140, 100), (60, 150, 140)):
            yuv = np.full((162, 192), luma, np.uint8)
            yuv[108:135], yuv[135:] = cb, cr
            frame = _frame(yuv, colorspace, color_range)
            out = np.zeros((64, 96, 3), np.uint8)
            video.fit(frame, out)
            assert np.abs(out.astype(int) - video.to_rgb(frame)[:1, :1]).max() <= 2


def test_decoder_threads_change_nothing(tmp_path) -> None:
    path = write_video(tmp_path / "a.mp4", 12, size=(320, 192))
    results = []
    for threads in (1, 3):
        with open_video(path, threads=threads) as video:
            out = np.zeros((12, 96, 224, 3), np.uint8)
            for target, (_, frame) in zip(out, video.frames(), strict=True):
                video.fit(frame, target)
            results.append(out)
    np.testing.assert_array_equal(*results)


# --- memory -------------------------------------------------------------------------------------------------


def _taken(store: FrameStore, count: int) -> list[np.ndarray]:
    frames = [store.take() for _ in range(count)]
    for value, frame in enumerate(frames):
        frame[:] = value
    return frames


def _values(clip: np.ndarray) -> list[int]:
    assert clip.shape[1:] == (4, 8, 3)
    return clip[:, 0, 0, 0].tolist()


def test_a_whole_block_of_frames_is_not_copied() -> None:
    frames = _taken(FrameStore((8, 4), 9, BlockPool()), 18)
    for first in (0, 9):
        clip = join(frames[first : first + 9])
        assert _values(clip) == list(range(first, first + 9))
        assert np.shares_memory(clip, frames[first])


@pytest.mark.parametrize("order", [range(5, 14), [0, 0, 1, 2, 3, 4, 5, 6, 7], [8, 7, 6, 5, 4], [2], range(0, 9, 2)])
def test_other_frames_are_copied_in_their_order(order) -> None:
    frames = _taken(FrameStore((8, 4), 9, BlockPool()), 18)
    clip = join([frames[i] for i in order])
    assert _values(clip) == list(order)
    assert not any(np.shares_memory(clip, frame) for frame in frames)


def test_memory_is_used_again_only_when_no_part_of_a_clip_is_left() -> None:
    pool = BlockPool()
    clip = join(_taken(FrameStore((8, 4), 9, pool), 9))
    part = clip[3:5]  # outlives its clip
    del clip
    other = join(_taken(FrameStore((8, 4), 9, pool), 9))
    other[:] = 77
    assert _values(part) == [3, 4]
    assert not np.shares_memory(pool.take((5, 4, 8, 3)), part)
    place = part.__array_interface__["data"][0] - 3 * part[0].nbytes
    del part
    again = pool.take((9, 4, 8, 3))
    assert again.__array_interface__["data"][0] == place
    assert not np.shares_memory(again, other)
    assert not np.shares_memory(pool.take((9, 4, 8, 3)), again)
