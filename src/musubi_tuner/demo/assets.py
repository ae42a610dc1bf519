"""Everything that a first run needs, made on the spot: checkpoint, text encoder, dataset, prompts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.common.atomic import write_text
from musubi_tuner.models.ltx2.config import Version

from .checkpoint import write_checkpoint
from .clips import CLIPS_DIR, shipped_clips
from .gemma import write_gemma

RESOLUTION = (192, 128)
TARGET_FRAMES = 17

_DATASET = """\
# A few short clips with captions (.txt beside each .mp4). Directories are relative to this file.

[general]
resolution = [{width}, {height}]  # width, height; the area of a bucket
caption_extension = ".txt"
batch_size = 1
enable_bucket = true  # keep the aspect ratio of the clip

[[datasets]]
video_directory = "{videos}"
cache_directory = "{cache}"
target_frames = [{frames}]  # 8k + 1
frame_extraction = "head"
"""

_PROMPTS = """\
# One prompt a line: --w width, --h height, --f frames, --d seed, --s steps, --g guidance, --n negative prompt
A big grey rabbit stands on a green meadow and yawns. Animated film. --w {width} --h {height} --f {frames} --d 1 --s 8 --g 3.0 --n blurry, distorted
A big grey rabbit crawls out of a dark burrow. Animated film. --w {width} --h {height} --f {frames} --d 2 --s 8 --g 3.0 --n blurry, distorted
"""


@dataclass(frozen=True)
class Assets:
    """Where :func:`write_assets` put things."""

    checkpoint: Path
    gemma: Path
    videos: Path
    dataset: Path
    prompts: Path
    cache: Path


def asset_paths(output_dir: Path) -> Assets:
    """The paths below ``output_dir``, whether written yet or not."""
    return Assets(
        checkpoint=output_dir / "ltx2_tiny.safetensors",
        gemma=output_dir / "gemma",
        videos=output_dir / "videos",
        dataset=output_dir / "dataset.toml",
        prompts=output_dir / "prompts.txt",
        cache=output_dir / "cache",
    )


def write_assets(output_dir: Path, ltx_version: Version) -> Assets:
    """Write a tiny random checkpoint, a tiny Gemma folder, the demo clips, ``dataset.toml`` and ``prompts.txt``.

    Args:
        output_dir: is created; files of an earlier call are replaced.
        ltx_version: "2.0" or "2.3".
    """
    paths = asset_paths(output_dir)
    paths.videos.mkdir(parents=True, exist_ok=True)
    clips = shipped_clips()
    for clip in clips:
        for file in (clip, clip.with_suffix(".txt")):
            shutil.copyfile(file, paths.videos / file.name)
    shutil.copyfile(CLIPS_DIR / "ATTRIBUTION.md", paths.videos / "ATTRIBUTION.md")
    write_gemma(paths.gemma, [clip.with_suffix(".txt").read_text(encoding="utf-8") for clip in clips])
    write_checkpoint(paths.checkpoint, ltx_version, clips)
    size = {"width": RESOLUTION[0], "height": RESOLUTION[1], "frames": TARGET_FRAMES}
    write_text(
        paths.dataset,
        _DATASET.format(videos=paths.videos.name, cache=paths.cache.name, **size),
    )
    write_text(paths.prompts, _PROMPTS.format(**size))
    return paths
