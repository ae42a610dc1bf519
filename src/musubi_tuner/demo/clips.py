"""The clips that ship with the project: where they lie, and how they were cut.

Four pieces of "Big Buck Bunny", (c) Blender Foundation, www.bigbuckbunny.org, CC BY 3.0, with captions of ours.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from musubi_tuner.common.atomic import atomic_path

CLIPS_DIR = Path(__file__).parent / "clips"

FRAMES_PER_CLIP = 33
SIZE = (384, 216)
FPS = 25
SAMPLE_RATE = 48000


def shipped_clips() -> list[Path]:
    """The clips, each with a ``.txt`` caption beside it."""
    return sorted(CLIPS_DIR.glob("*.mp4"))


def cut_clips(source: Path, output_dir: Path) -> list[Path]:
    """Cut ``source`` (25 fps) into consecutive pieces of 33 frames with stereo sound.

    This made the files in ``clips/`` from the first seconds of the burrow scene; it is kept so that they can be
    made again. Captions were written by hand after looking at the frames.
    """
    frames = _read_frames(source)
    sound = _read_sound(source)
    paths = []
    for index, start in enumerate(range(0, len(frames) - FRAMES_PER_CLIP + 1, FRAMES_PER_CLIP), start=1):
        first, last = (n * SAMPLE_RATE // FPS for n in (start, start + FRAMES_PER_CLIP))
        path = output_dir / f"bunny_{index}.mp4"
        _write_clip(path, frames[start : start + FRAMES_PER_CLIP], sound[:, first:last])
        paths.append(path)
    return paths


def _read_frames(source: Path) -> list[np.ndarray]:
    """Frames [H, W, 3] uint8 at :data:`SIZE`."""
    with av.open(str(source)) as container:
        return [
            frame.reformat(*SIZE, format="rgb24", interpolation="AREA").to_ndarray()
            for frame in container.decode(video=0)
        ]


def _read_sound(source: Path) -> np.ndarray:
    """Samples [2, S] float32 at :data:`SAMPLE_RATE`."""
    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=SAMPLE_RATE)
    with av.open(str(source)) as container:
        parts = [
            part.to_ndarray() for frame in [*container.decode(audio=0), None] for part in resampler.resample(frame)
        ]
    return np.concatenate(parts, axis=1)


def _write_clip(path: Path, frames: list[np.ndarray], sound: np.ndarray) -> None:
    with atomic_path(path) as temporary, av.open(str(temporary), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"crf": "20", "preset": "veryslow"})
        video.width, video.height = SIZE
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="stereo")
        audio.bit_rate = 128_000
        for array in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), format="fltp", layout="stereo")
        frame.sample_rate = SAMPLE_RATE
        frame.time_base = Fraction(1, SAMPLE_RATE)
        frame.pts = 0
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
