"""Small media whose content tells where it came from: numbered frames, sound of clicks and tones."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

BITS = 8


def index_frame(index: int, size: tuple[int, int] = (128, 64)) -> np.ndarray:
    """uint8 [H, W, 3]: bit ``b`` of ``index`` is the ``b``-th vertical bar, white for 1."""
    width, height = size
    bars = np.array([255 * (index >> b & 1) for b in range(BITS)], dtype=np.uint8)
    row = np.repeat(bars, width // BITS)
    return np.repeat(np.broadcast_to(row, (height, width))[..., None], 3, axis=2).copy()


def read_index(pixels: np.ndarray) -> int:
    """The index of a frame, also after resizing."""
    width = pixels.shape[1]
    centres = [(2 * b + 1) * width // (2 * BITS) for b in range(BITS)]
    return sum(int(pixels[:, c - 1 : c + 2].mean() > 128) << b for b, c in enumerate(centres))


def write_video(
    path: Path,
    frames: int | Sequence[np.ndarray],
    *,
    fps: Fraction | float = 25,
    size: tuple[int, int] = (128, 64),
    times: Sequence[float] | None = None,
    rotation: int = 0,
    sound: np.ndarray | None = None,
    rate: int = 48_000,
    layout: str = "stereo",
    sound_start: float = 0.0,
    sound_codec: str = "pcm_s16le",
    options: dict[str, str] | None = None,
) -> Path:
    """Write numbered (or given) frames, at ``times`` seconds if given, and float sound [C, S]."""
    images = [index_frame(i, size) for i in range(frames)] if isinstance(frames, int) else list(frames)
    fps = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=fps, options={"crf": "8", "preset": "ultrafast", **(options or {})})
        video.height, video.width = images[0].shape[:2]
        video.pix_fmt = "yuv420p"
        if times is not None:
            video.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            if not hasattr(video, "set_display_rotation"):
                pytest.skip("this PyAV cannot write rotated videos")
            video.set_display_rotation(rotation)
        audio = out.add_stream(sound_codec, rate=rate, layout=layout) if sound is not None else None
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        if audio is not None:
            _mux_sound(out, audio, sound, rate, layout, sound_start)
    return path


def write_sound(
    path: Path, sound: np.ndarray, *, rate: int = 48_000, layout: str = "stereo", codec="pcm_s16le"
) -> Path:
    """Write float sound [C, S] alone."""
    with av.open(str(path), "w") as out:
        _mux_sound(out, out.add_stream(codec, rate=rate, layout=layout), sound, rate, layout, 0.0)
    return path


def _mux_sound(out, stream, sound, rate, layout, start) -> None:
    first = round(start * rate)
    for begin in range(0, sound.shape[1], 1024):
        block = np.ascontiguousarray(sound[:, begin : begin + 1024].T, dtype=np.float32).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(block, format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, first + begin, Fraction(1, rate)
        for converted in av.AudioResampler(stream.codec_context.format, layout, rate).resample(frame):
            converted.pts, converted.time_base = frame.pts, frame.time_base
            out.mux(stream.encode(converted))
    out.mux(stream.encode())


def tone(seconds: float, *, hertz: float = 440.0, rate: int = 48_000, channels: int = 2) -> np.ndarray:
    """float32 [C, S] of half amplitude."""
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[None].astype(np.float32), channels, axis=0)


def clicks(seconds: float, at: Sequence[float], *, rate: int = 48_000, channels: int = 2) -> np.ndarray:
    """Silence with 5 ms bursts of 1 kHz that begin at the given seconds."""
    wave = np.zeros((channels, round(seconds * rate)), dtype=np.float32)
    burst = 0.8 * np.sin(2 * np.pi * 1000 * np.arange(rate // 200) / rate)
    for second in at:
        first = round(second * rate)
        part = wave[:, first : first + len(burst)]
        part += burst[: part.shape[1]]
    return wave


def onsets(wave: np.ndarray, rate: int, *, threshold: float = 0.2) -> list[float]:
    """Seconds at which the first channel becomes loud after 50 ms below the threshold."""
    loud = np.flatnonzero(np.abs(wave[0]) > threshold)
    if not len(loud):
        return []
    starts = loud[np.insert(np.diff(loud) > 0.05 * rate, 0, True)]
    return [float(s / rate) for s in starts]


def pitch(wave: np.ndarray, rate: int) -> float:
    """The strongest frequency of the first channel in Hz."""
    part = wave[0] * np.hanning(wave.shape[1])
    spectrum = np.abs(np.fft.rfft(part, n=1 << 18))
    return float(np.argmax(spectrum) * rate / (1 << 18))
