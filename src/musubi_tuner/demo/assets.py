"""Everything that a first run needs, made on the spot: checkpoint, text encoder, dataset, prompts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.common.atomic import write_text
from musubi_tuner.generation.decode import Sound
from musubi_tuner.generation.write import write_wav
from musubi_tuner.models.audio_vae import SAMPLE_RATE
from musubi_tuner.models.ltx2.config import Version

from .checkpoint import write_checkpoint
from .clips import CLIPS_DIR, shipped_clips
from .fit import read_sound
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

_AUDIO_DATASET = """\
# The sound of the clips alone, for --ltx2_mode audio.

[general]
caption_extension = ".txt"
batch_size = 1

[[datasets]]
audio_directory = "{sounds}"
cache_directory = "{cache}"
"""

_PROMPTS = """\
# One prompt a line. --w width, --h height, --f frames, --s steps, --g guidance, --d seed
A big grey rabbit stands on a green meadow and yawns. Animated film. {options} --d 1
A big grey rabbit crawls out of a dark burrow. Animated film. {options} --d 2
"""
_OPTIONS = "--w {width} --h {height} --f {frames} --s 8 --g 3.0"


@dataclass(frozen=True)
class Assets:
    """Where :func:`write_assets` put things."""

    checkpoint: Path
    gemma: Path
    videos: Path
    dataset: Path
    prompts: Path
    cache: Path
    sounds: Path
    audio_dataset: Path
    audio_cache: Path


def asset_paths(output_dir: Path) -> Assets:
    """The paths below ``output_dir``, whether written yet or not."""
    return Assets(
        checkpoint=output_dir / "ltx2_tiny.safetensors",
        gemma=output_dir / "gemma",
        videos=output_dir / "videos",
        dataset=output_dir / "dataset.toml",
        prompts=output_dir / "prompts.txt",
        cache=output_dir / "cache",
        sounds=output_dir / "sounds",
        audio_dataset=output_dir / "dataset_audio.toml",
        audio_cache=output_dir / "cache_audio",
    )


def write_assets(output_dir: Path, ltx_version: Version) -> Assets:
    """Write a tiny random checkpoint, a tiny Gemma folder, the demo clips, datasets and ``prompts.txt``.

    ``dataset.toml`` has the clips (modes video and av), ``dataset_audio.toml`` their sound (mode audio).

    Args:
        output_dir: is created; files of an earlier call are replaced.
        ltx_version: "2.0" or "2.3".
    """
    paths = asset_paths(output_dir)
    paths.videos.mkdir(parents=True, exist_ok=True)
    paths.sounds.mkdir(exist_ok=True)
    clips = shipped_clips()
    for clip in clips:
        caption = clip.with_suffix(".txt")
        shutil.copyfile(clip, paths.videos / clip.name)
        shutil.copyfile(caption, paths.videos / caption.name)
        shutil.copyfile(caption, paths.sounds / caption.name)
        write_wav(paths.sounds / f"{clip.stem}.wav", Sound(read_sound(clip), SAMPLE_RATE))
    shutil.copyfile(CLIPS_DIR / "ATTRIBUTION.md", paths.videos / "ATTRIBUTION.md")
    write_gemma(paths.gemma, [clip.with_suffix(".txt").read_text(encoding="utf-8") for clip in clips])
    write_checkpoint(paths.checkpoint, ltx_version, clips)
    size = {"width": RESOLUTION[0], "height": RESOLUTION[1], "frames": TARGET_FRAMES}
    write_text(
        paths.dataset,
        _DATASET.format(videos=paths.videos.name, cache=paths.cache.name, **size),
    )
    write_text(paths.audio_dataset, _AUDIO_DATASET.format(sounds=paths.sounds.name, cache=paths.audio_cache.name))
    write_text(paths.prompts, _PROMPTS.format(options=_OPTIONS.format(**size)))
    return paths
