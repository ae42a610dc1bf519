"""Files of rendered samples to the trackers."""

from __future__ import annotations

import wave
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

_STRIP_FRAMES = 6
_STRIP_HEIGHT = 192  # pixels, at most


def _log_to_tensorboard(writer: Any, name: str, paths: Iterable[Path], step: int) -> None:
    """Pictures as they are, videos as a strip of frames (a moving one would need moviepy), sound in mono."""
    for path in paths:
        if path.suffix in (".png", ".mp4"):
            picture = np.asarray(Image.open(path).convert("RGB")) if path.suffix == ".png" else film_strip(path)
            writer.add_image(_named(name, path), picture, global_step=step, dataformats="HWC")
        elif path.suffix == ".wav":
            waveform, rate = read_mono(path)
            writer.add_audio(_named(name, path), waveform, global_step=step, sample_rate=rate)
    writer.flush()


def _log_to_wandb(run: Any, name: str, paths: Iterable[Path], step: int) -> None:
    """The files as they are."""
    import wandb

    kinds = {
        ".png": lambda path: wandb.Image(path),
        ".mp4": lambda path: wandb.Video(path, format="mp4"),
        ".wav": lambda path: wandb.Audio(path),
    }
    media = {_named(name, path): kinds[path.suffix](str(path)) for path in paths if path.suffix in kinds}
    if media:
        run.log(media, step=step)


# By the name of Accelerate's tracker: (its writer or run, name of the sample, files, step).
LOG_SAMPLE: Mapping[str, Callable[[Any, str, Iterable[Path], int], None]] = {
    "tensorboard": _log_to_tensorboard,
    "wandb": _log_to_wandb,
}


def _named(name: str, path: Path) -> str:
    """``sample_0``, and with an ending where one sample has several files."""
    if path.suffix == ".wav":
        return f"{name}_audio"
    return f"{name}_av" if path.stem.endswith("_av") else name


def film_strip(path: Path) -> np.ndarray:
    """Frames spread evenly over a video, from the first to the last, side by side; uint8 [H, W, 3]."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    count = min(_STRIP_FRAMES, len(frames))
    chosen = [frames[round(i)] for i in np.linspace(0, len(frames) - 1, count)]
    strip = Image.fromarray(np.concatenate(chosen, axis=1))
    strip.thumbnail((strip.width, _STRIP_HEIGHT))
    return np.asarray(strip)


def read_mono(path: Path) -> tuple[np.ndarray, int]:
    """The mean of the channels of a 16-bit WAV file, float32 [1, N] in [-1, 1], and its sample rate."""
    with wave.open(str(path), "rb") as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").reshape(-1, file.getnchannels())
        return (samples.mean(axis=1) / 32768).astype(np.float32)[None], file.getframerate()
