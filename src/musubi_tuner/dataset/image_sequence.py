"""A directory of images that is read as a video."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from .files import scan_directory
from .media import MediaError, VideoInfo, image_size, media_errors, read_image
from .resize import resize_to_bucket

logger = logging.getLogger(__name__)


class ImageSequence:
    """The images directly in a directory, sorted by name, with the interface of :class:`.media.Video`.

    A frame is the path of its image until it is asked for its pixels, so unused ones are never decoded.
    """

    origin = 0.0

    def __init__(self, path: Path, fps: float) -> None:
        """
        Args:
            fps: at which the images are shown; a directory has no rate of its own.

        Raises:
            MediaError: there is no image, or the first one cannot be read.
        """
        self.path = path
        self.fps = fps
        with media_errors(path):
            self.images = scan_directory(path, "image")
        if not self.images:
            raise MediaError(f"{path}: holds no image; remove it from the dataset")
        self.info = VideoInfo(
            size=image_size(self.images[0]),
            fps=fps,
            duration=len(self.images) / fps,
            frames=len(self.images),
            has_audio=False,
        )

    def times(self, limit: int | None = None) -> list[float]:
        """Seconds of the (first ``limit``) frames since the first."""
        return [index / self.fps for index, _ in enumerate(self.images[:limit])]

    def frames(self) -> Iterator[tuple[float, Path]]:
        """Pairs of seconds since the first frame and the frame."""
        return ((index / self.fps, image) for index, image in enumerate(self.images))

    def to_rgb(self, frame: Path) -> np.ndarray:
        """uint8 ``[H, W, 3]``.

        Raises:
            MediaError: the image is damaged, or of another size than the first.
        """
        pixels = read_image(frame)
        size = pixels.shape[1], pixels.shape[0]
        if size != self.info.size:
            (width, height), first = self.info.size, self.images[0].name
            raise MediaError(f"{frame}: {size[0]}x{size[1]}, but {first} is {width}x{height}; make all equal")
        return pixels

    def fit(self, frame: Path, out: np.ndarray) -> None:
        """Fill ``out``, uint8 ``[H, W, 3]``, with the image, resized to cover it and cut."""
        out[...] = resize_to_bucket(self.to_rgb(frame), (out.shape[1], out.shape[0]))

    @property
    def misplaced(self) -> tuple[str, str] | None:
        """The first two neighbours whose numbers are in another order than their names (9 after 10)."""
        numbered = [(image.name, _numbers(image.stem)) for image in self.images]
        return next(((one, two) for (one, a), (two, b) in pairwise(numbered) if _is_descending(a, b)), None)


def _numbers(stem: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", stem)]


def _is_descending(first: list[str | int], second: list[str | int]) -> bool:
    """Whether the first difference is a number that is smaller in ``second``; texts and numbers alternate."""
    one, two = next(((a, b) for a, b in zip(first, second, strict=False) if a != b), ("", ""))
    return isinstance(one, int) and isinstance(two, int) and one > two
