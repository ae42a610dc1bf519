from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import index_frame, read_index, tone, write_sound, write_video
from PIL import Image

from musubi_tuner.dataset.media import (
    MediaError,
    frame_times,
    image_size,
    open_video,
    probe_video,
    read_image,
)
from musubi_tuner.dataset.resize import resize_to_bucket


def _read(path) -> list[tuple[float, np.ndarray]]:
    with open_video(path) as video:
        return [(time, video.to_rgb(frame)) for time, frame in video.frames()]


# --- video --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
def test_frames_in_order_with_their_times(tmp_path, suffix) -> None:
    path = write_video(tmp_path / f"ein Test é.{suffix}", 30, fps=30, options={"preset": "medium", "bf": "3"})
    frames = _read(path)
    assert [read_index(pixels) for _, pixels in frames] == list(range(30))
    assert [time for time, _ in frames] == pytest.approx([i / 30 for i in range(30)], abs=1e-3)
    assert frame_times(path) == pytest.approx([time for time, _ in frames])
    assert frame_times(path, 5) == pytest.approx([time for time, _ in frames[:5]])
    info = probe_video(path)
    assert (info.size, info.fps, info.duration, info.has_audio) == (
        (128, 64),
        30.0,
        pytest.approx(1.0),
        False,
    )


def test_variable_frame_times(tmp_path) -> None:
    times = [0.0, 0.04, 0.1, 0.5, 0.52, 0.9]
    path = write_video(tmp_path / "v.mkv", 6, times=times)
    assert [time for time, _ in _read(path)] == pytest.approx(times, abs=1e-3)
    assert frame_times(path) == pytest.approx(times, abs=1e-3)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_video_is_turned_as_it_is_shown(tmp_path, rotation) -> None:
    stored = np.zeros((64, 128, 3), np.uint8)
    stored[:32, :64] = 255  # the top left quarter
    path = write_video(tmp_path / "r.mp4", [stored] * 3, rotation=rotation)
    shown = _read(path)[0][1]
    assert np.abs(shown.astype(int) - np.rot90(stored, rotation // 90)).mean() < 4
    assert probe_video(path).size == (shown.shape[1], shown.shape[0])


@pytest.mark.parametrize(("height", "weights"), [(480, (0.299, 0.114)), (720, (0.2126, 0.0722))])
def test_untagged_video_is_bt709_from_720_lines(tmp_path, height, weights) -> None:
    """The YUV triple of saturated red, written without a tag, reads back as red by the matrix of its size."""
    red, blue = weights
    luma, cb, cr = 16 + 219 * red, 128 - 112 * red / (1 - blue), 128 + 112
    planes = [np.full((height, 64), luma), np.full((height // 2, 32), cb), np.full((height // 2, 32), cr)]
    yuv = np.concatenate([p.astype(np.uint8).reshape(-1, 64) for p in planes])
    path = tmp_path / "c.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"crf": "1", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, height, "yuv420p"
        for _ in range(2):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(yuv, format="yuv420p")))
        out.mux(stream.encode())
    pixels = _read(path)[0][1]
    assert np.abs(pixels.reshape(-1, 3).mean(axis=0) - (255, 0, 0)).max() < 6


def test_damaged_files_are_named(tmp_path) -> None:
    good = write_video(
        tmp_path / "good.mkv",
        [np.random.default_rng(i).integers(0, 255, (64, 128, 3), np.uint8) for i in range(50)],
    )
    data = good.read_bytes()
    broken = {
        "empty.mp4": (b"", "empty"),
        "text.mp4": (b"hello " * 100, "cannot be decoded"),
        "short.mkv": (data[: len(data) // 2], "truncated"),
    }
    for name, (content, reason) in broken.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(MediaError, match=reason) as caught:
            _read(path)
        assert str(path) in str(caught.value)


def test_a_cut_mp4_is_damaged_only_where_it_is_read(tmp_path) -> None:
    noise = [np.random.default_rng(i).integers(0, 255, (64, 128, 3), np.uint8) for i in range(50)]
    with av.open(str(tmp_path / "fast.mp4"), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        for image in noise:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    data = (tmp_path / "fast.mp4").read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: len(data) // 2])
    assert probe_video(path).size == (128, 64)
    with pytest.raises(MediaError, match=r"cut\.mp4"):
        _read(path)
    with av.open(str(tmp_path / "fast.mp4")) as container:
        index = container.streams.video[0].index_entries
        last = index[len(index) - 1].pos
    path.write_bytes(data[:last])  # 49 whole frames: the duration alone would not tell
    with pytest.raises(MediaError, match=rf"ends at byte {len(data)} of a file of {last}, so .* truncated"):
        _read(path)
    path.write_bytes(data + b"trailing")
    assert len(_read(path)) == 50


def test_sound_without_a_picture_is_no_video(tmp_path) -> None:
    with pytest.raises(MediaError, match="no video stream"):
        probe_video(write_sound(tmp_path / "a.mp4", tone(0.2), codec="aac"))


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(MediaError, match=r"gone\.mp4"):
        probe_video(tmp_path / "gone.mp4")


# --- images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation) -> None:
    stored = np.zeros((40, 64, 3), np.uint8)
    stored[:20, :32, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(stored).save(path, exif=exif)
    shown = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, -1)[:, ::-1][::-1, ::-1],
        8: np.rot90(stored),
    }[orientation]
    pixels = read_image(path)
    np.testing.assert_array_equal(pixels, shown)
    assert image_size(path) == (pixels.shape[1], pixels.shape[0])


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_transparency_is_dropped_not_blended(tmp_path, suffix) -> None:
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, 10
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(rgba).save(path, lossless=True)
    np.testing.assert_array_equal(read_image(path), rgba[..., :3])


def test_grey_images_of_8_and_16_bits(tmp_path) -> None:
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(grey * 256).save(tmp_path / "16.png")
    for name in ("8.png", "16.png"):
        np.testing.assert_array_equal(read_image(tmp_path / name), np.repeat(grey[..., None], 3, 2).astype(np.uint8))


def test_damaged_images_are_named(tmp_path) -> None:
    good = tmp_path / "good.jpg"
    Image.fromarray(index_frame(77)).save(good)
    for name, content in (("cut.jpg", good.read_bytes()[:400]), ("text.png", b"text"), ("empty.webp", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError, match=name):
            read_image(tmp_path / name)


# --- resize -------------------------------------------------------------------------------------------------

multiples = st.integers(1, 4).map(lambda n: n * 32)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), multiples, multiples)
def test_a_resized_frame_fills_its_bucket(width, height, bucket_width, bucket_height) -> None:
    out = resize_to_bucket(np.full((height, width, 3), 90, np.uint8), (bucket_width, bucket_height))
    assert out.shape == (bucket_height, bucket_width, 3)
    assert out.dtype == np.uint8
    assert (out == 90).all()


def test_a_frame_of_the_right_size_is_left_alone() -> None:
    pixels = index_frame(5)
    assert resize_to_bucket(pixels, (128, 64)) is pixels


def test_shrinking_averages_areas_and_cuts_the_centre() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (128, 512, 3), np.uint8)
    expected = cv2.resize(pixels, (256, 64), interpolation=cv2.INTER_AREA)[:, 64:192]
    np.testing.assert_array_equal(resize_to_bucket(pixels, (128, 64)), expected)
    means = pixels.reshape(64, 2, 256, 2, 3).mean(axis=(1, 3))[:, 64:192]
    assert np.abs(expected - means).max() <= 0.5


def test_enlarging_is_lanczos() -> None:
    pixels = index_frame(0b1011001, (64, 32))
    expected = np.asarray(Image.fromarray(pixels).resize((128, 64), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(resize_to_bucket(pixels, (128, 64)), expected)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_video_that_holds_its_last_frame_is_not_truncated(tmp_path, suffix) -> None:
    path = tmp_path / f"held{suffix}"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"preset": "ultrafast", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        packets = []
        for index in range(10):
            frame = av.VideoFrame.from_ndarray(index_frame(index), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            packets += stream.encode(frame)
        packets += stream.encode()
        for index, packet in enumerate(packets):
            seconds = Fraction(1, 25) if index < 9 else 3  # a screen recording in which nothing changes any more
            packet.duration = int(seconds / packet.time_base)
            out.mux(packet)
    with open_video(path) as video:
        assert video.info.duration > 3
        assert len(list(video.frames())) == 10


def test_a_video_that_begins_after_its_sound_is_not_truncated(tmp_path) -> None:
    # Matroska counts the duration from its own zero.
    times = [2.0 + i / 25 for i in range(20)]
    path = write_video(tmp_path / "late.mkv", 20, times=times, sound=tone(2.8))
    with open_video(path) as video:
        assert len(list(video.frames())) == 20
        assert video.info.duration > 2.5
