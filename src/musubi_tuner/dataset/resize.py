"""The resize of pictures to a bucket: area averaging to shrink, Lanczos to enlarge, and a cut to the centre.

Frames of 8-bit YUV 4:2:0, the usual format of videos, are shrunk plane by plane before they become RGB. An
average and the colour matrix are both linear, so their order matters only to rounding and to colours outside
RGB, which are clipped after the average instead of before; and there are half as many samples to average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from PIL import Image

from .buckets import Size

# Several files are read at once; threads inside one picture would only compete with the other files.
cv2.setNumThreads(1)

_STRIP_ROWS = 64  # converted at a time, so that the intermediate picture stays in the processor's cache
# Weights of red and blue in luma, by AVColorSpace; others are left to the general path.
_LUMA_WEIGHTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114)}
BT709, BT601 = 1, 6
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG


@dataclass(frozen=True)
class Cover:
    """How a picture covers a bucket: scaled to ``scaled``, then cut by the margins."""

    scaled: Size  # (width, height)
    bucket: Size
    enlarged: bool

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom."""
        across, down = (new - kept for new, kept in zip(self.scaled, self.bucket, strict=True))
        return across // 2, down // 2, across - across // 2, down - down // 2


def cover(size: Size, bucket: Size) -> Cover:
    """The smallest scaling of ``size`` (width, height) that covers ``bucket``."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return Cover((int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)), bucket, enlarged=scale > 1)


def resize_to_bucket(pixels: np.ndarray, bucket: Size) -> np.ndarray:
    """Scale uint8 ``[h, w, 3]`` to cover ``bucket`` (width, height) and cut the centre: ``[H, W, 3]``.

    Area averaging to shrink, Lanczos to enlarge.
    """
    size = pixels.shape[1], pixels.shape[0]
    if size == bucket:
        return pixels
    fit = cover(size, bucket)
    if fit.scaled != size:
        if fit.enlarged:
            enlarged = Image.fromarray(pixels).resize(fit.scaled, Image.Resampling.LANCZOS)
            pixels = np.array(enlarged)  # writable, for torch
        else:
            pixels = cv2.resize(pixels, fit.scaled, interpolation=cv2.INTER_AREA)
    left, top, _, _ = fit.margins
    return pixels[top : top + bucket[1], left : left + bucket[0]]


class YuvShrinker:
    """Shrinks 8-bit YUV 4:2:0 frames of one video to their bucket. Not for several threads at once."""

    def __init__(self) -> None:
        self._scaler = VideoReformatter()  # luma and chroma may need one each: it is set up for one size
        self._chroma_scaler = VideoReformatter()
        self._strip = np.empty((0, 0, 3), np.uint8)

    def shrink(self, frame: av.VideoFrame, out: np.ndarray, *, colorspace: int, turns: int = 0) -> bool:
        """Fill ``out``, uint8 ``[H, W, 3]``, with the frame as RGB; ``False`` if it is not of a kind for this.

        Args:
            colorspace: AVColorSpace in which the frame is to be read.
            turns: counter-clockwise quarter turns by which the frame is shown.
        """
        shown = (out.shape[1], out.shape[0])
        size = (frame.width, frame.height)
        fit = cover(size, shown[::-1] if turns % 2 else shown)
        even = size[0] % 2 == 0 and size[1] % 2 == 0
        planar = frame.format.name in ("yuv420p", "yuvj420p")
        if fit.enlarged or fit.scaled == size or not (even and planar and colorspace in _LUMA_WEIGHTS):
            return False
        full = frame.format.name == "yuvj420p" or int(frame.color_range) == _FULL_RANGE
        luma, *chroma = (_samples(plane) for plane in frame.planes)
        planes = [_average(luma, fit.scaled, self._scaler)]
        planes += [_average(plane, fit.scaled, self._chroma_scaler) for plane in chroma]
        # Margins are of the picture as it is shown.
        margins = cover(size[::-1] if turns % 2 else size, shown).margins
        left, top, right, bottom = margins[-turns:] + margins[:-turns] if turns else margins
        width, height = fit.scaled
        planes = [plane[top : height - bottom, left : width - right] for plane in planes]
        stored = np.empty((*planes[0].shape, 3), np.uint8) if turns else out
        self._convert(planes, _matrix(colorspace, full), stored)
        if turns:
            out[...] = np.rot90(stored, turns)
        return True

    def _convert(self, planes: Sequence[np.ndarray], matrix: np.ndarray, out: np.ndarray) -> None:
        """Three planes ``[H, W]`` to RGB ``[H, W, 3]`` by ``matrix`` [3, 4]."""
        height, width = planes[0].shape
        if self._strip.shape[1] != width:
            self._strip = np.empty((_STRIP_ROWS, width, 3), np.uint8)
        for top in range(0, height, _STRIP_ROWS):
            rows = slice(top, min(top + _STRIP_ROWS, height))
            strip = self._strip[: rows.stop - rows.start]
            cv2.merge([plane[rows] for plane in planes], dst=strip)
            cv2.transform(strip, matrix, dst=out[rows])


def _samples(plane: av.video.plane.VideoPlane) -> np.ndarray:
    """A view of a plane's uint8 samples ``[h, w]``."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


def _average(plane: np.ndarray, size: Size, scaler: VideoReformatter) -> np.ndarray:
    """Area averages of uint8 ``[h, w]`` over a grid of ``size`` (width, height), rounded.

    Where the grid is finer than the samples each of them is a square of its value, as in the plain conversion
    of 4:2:0, which repeats its chroma.
    """
    height, width = plane.shape
    finer = size[0] >= width and size[1] >= height
    whole = width % size[0] == 0 and height % size[1] == 0
    if finer or whole:  # where OpenCV is exact and fast; for other ratios it takes five times as long
        return cv2.resize(plane, size, interpolation=cv2.INTER_AREA)
    # Equal ranges: grey would else be stretched to the full one.
    grey = scaler.reformat(
        av.VideoFrame.from_numpy_buffer(plane, format="gray"),
        width=size[0],
        height=size[1],
        interpolation=Interpolation.AREA,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.JPEG,
        threads=1,
    )
    return _samples(grey.planes[0])


@lru_cache(maxsize=8)
def _matrix(colorspace: int, full_range: bool) -> np.ndarray:
    """float64 [3, 4]: bytes (Y, Cb, Cr, 1) to RGB bytes."""
    red, blue = _LUMA_WEIGHTS[colorspace]
    green = 1 - red - blue
    cr, cb = 2 * (1 - red), 2 * (1 - blue)  # of chroma in +-0.5
    to_rgb = np.array([[1, 0, cr], [1, -blue / green * cb, -red / green * cr], [1, cb, 0]])
    if full_range:
        scale, zero = np.array([1.0, 1.0, 1.0]), np.array([0.0, 128, 128])
    else:
        scale, zero = 255 / np.array([219.0, 224, 224]), np.array([16.0, 128, 128])
    to_rgb = to_rgb * scale
    return np.hstack([to_rgb, -(to_rgb @ zero)[:, None]])
