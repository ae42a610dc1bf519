"""The files that prompts are conditioned on: where they lie, and their content ready for the VAEs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.dataset.buckets import Size
from musubi_tuner.dataset.clips import iter_clips
from musubi_tuner.dataset.entries import DatasetEntry
from musubi_tuner.dataset.files import media_kind
from musubi_tuner.dataset.media import read_image
from musubi_tuner.dataset.resize import resize_to_bucket
from musubi_tuner.dataset.sources import SourceItem

from .conditions import Condition, conditions_of, named_prompt
from .prompts import SamplePrompt


def locate(text: str, prompt_file: Path | None) -> Path:
    """The file that a prompt names: beside the prompt file, or else in the working directory."""
    beside = Path(text) if prompt_file is None else prompt_file.parent / text  # an absolute path wins by itself
    # os.path: no error for names that no file can have.
    return Path(text) if os.path.exists(text) and not os.path.exists(beside) else beside  # noqa: PTH110


def require_media(prompts: Sequence[SamplePrompt], prompt_file: Path | None) -> None:
    """Check that the files of all prompts exist, and that they are of the kind that is asked for.

    Raises:
        UserError, ConfigErrors: those that are not, each with its prompt.
    """
    problems = []
    for index, prompt in enumerate(prompts):
        for condition, text in conditions_of(prompt):
            if reason := _unusable(condition, text, locate(text, prompt_file)):
                problems.append(f"{named_prompt(index, prompt)}: {condition.option} {text}: {reason}")
    if problems:
        raise ConfigErrors(problems, "files of sample prompts") if len(problems) > 1 else UserError(problems[0])


def _unusable(condition: Condition, text: str, path: Path) -> str | None:
    if not os.path.isfile(path):  # noqa: PTH113 (no error for names that no file can have)
        return "not found; it is looked for beside the prompt file and in the working directory"
    kind = media_kind(path)
    if condition.name == "image" and kind in ("video", "audio"):
        return f"is a {kind}, expected an image"
    if condition.name == "reference" and kind == "audio":
        return "is a sound, expected an image or a video (--ra takes sound)"
    if condition.name == "reference_audio" and kind == "image":
        return "is an image, expected a sound"
    return None


def digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        hasher = hashlib.sha256()
        while block := file.read(1 << 20):
            hasher.update(block)
        return hasher.hexdigest()


def read_still(path: Path, size: Size) -> np.ndarray:
    """uint8 ``[1, H, W, 3]``, turned as stored, scaled to cover ``size`` (width, height) and cut around its centre.

    Raises:
        MediaError: not an image, or damaged.
    """
    return np.ascontiguousarray(resize_to_bucket(read_image(path), size))[None]


def read_reference(path: Path, size: Size, *, frames: int, fps: float) -> np.ndarray:
    """uint8 ``[F, H, W, 3]``: an image as one frame, of a video the first 8k + 1 frames at ``fps``, at most ``frames``.

    Raises:
        MediaError: neither image nor video, or damaged.
    """
    if media_kind(path) == "image":
        return read_still(path, size)
    entry = DatasetEntry(
        label="sample",
        kind="video",
        source=None,
        cache_directory=Path(),
        resolution=size,
        frame_extraction="full",
        max_frames=frames,
        target_fps=fps,
    )
    item = SourceItem(path, path.stem, caption="", kind="video")
    (clip,) = iter_clips(item, entry, with_audio=False)
    assert clip.pixels is not None
    return clip.pixels
