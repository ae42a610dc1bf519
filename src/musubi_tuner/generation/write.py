"""Pictures, videos and sound to files, each whole or not at all."""

from __future__ import annotations

import wave
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from PIL import Image
from torch import Tensor

from musubi_tuner.common.atomic import atomic_path
from musubi_tuner.common.errors import UserError

from .decode import Sound

_CRF = "17"  # nearly transparent, so that artefacts on screen are the model's
# x264's propagation of quality along time (macroblock tree) gives other bytes in each run for the same frames.
_REPEATABLE = "mbtree=0"
_BT709 = 1
_LIMITED_RANGE = 1
_AUDIO_FRAME = 1024  # samples a frame of AAC
_AUDIO_BIT_RATE = 192_000
_MAX_DENOMINATOR = 65535


def write_png(path: Path, frame: Tensor) -> None:
    """A uint8 frame [H, W, 3]."""
    with atomic_path(path) as temporary:
        Image.fromarray(frame.numpy()).save(temporary)


def write_wav(path: Path, sound: Sound) -> None:
    """16-bit PCM."""
    with atomic_path(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(sound.waveform.shape[0])
        file.setsampwidth(2)
        file.setframerate(sound.sample_rate)
        file.writeframes(_int16(sound.waveform).T.tobytes())


def write_mp4(path: Path, frames: Tensor, fps: float, sound: Sound | None = None) -> None:
    """H.264 (yuv420p, BT.709) and, with sound, stereo AAC.

    Args:
        path: the file.
        frames: uint8 [F, H, W, 3]; H and W are even.
        fps: frames per second, stored exactly.
        sound: starts with the first frame.

    Raises:
        UserError: PyAV was built without a H.264 encoder.
    """
    with (
        atomic_path(path) as temporary,
        av.open(str(temporary), "w", options={"movflags": "+faststart"}) as container,
    ):
        video = _video_stream(container, frames, frame_rate(fps))
        audio = None if sound is None else container.add_stream("aac", rate=sound.sample_rate, layout="stereo")
        if audio is not None:
            audio.bit_rate = _AUDIO_BIT_RATE
        for frame in _video_frames(frames):
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None:
            for frame in _audio_frames(sound):
                container.mux(audio.encode(frame))
            container.mux(audio.encode())


def frame_rate(fps: float) -> Fraction:
    """The fraction that ``fps`` was rounded from: 23.976 and 29.97 are multiples of 1000/1001."""
    nominal = round(fps)
    ntsc = Fraction(nominal * 1000, 1001)
    if nominal and fps != nominal and abs(fps - ntsc) < 5e-3:
        return ntsc
    return Fraction(fps).limit_denominator(_MAX_DENOMINATOR)


def _video_stream(container: OutputContainer, frames: Tensor, rate: Fraction) -> av.VideoStream:
    codec = next((name for name in ("libx264", "h264") if name in av.codecs_available), None)
    if codec is None:
        raise UserError("this build of PyAV has no H.264 encoder; install the av wheel from PyPI")
    stream = container.add_stream(codec, rate=rate)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.options = {"crf": _CRF, "x264-params": _REPEATABLE}
    context = stream.codec_context
    # Untagged, players guess the colours by the size of the picture.
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED_RANGE
    return stream


def _video_frames(frames: Tensor) -> Iterator[av.VideoFrame]:
    for index, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels.numpy()), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
        frame.pts = index  # in units of the stream's frame rate
        yield frame


def _audio_frames(sound: Sound) -> Iterator[av.AudioFrame]:
    samples = np.ascontiguousarray(sound.waveform.numpy())  # [2, N]
    for start in range(0, samples.shape[1], _AUDIO_FRAME):
        block = np.ascontiguousarray(samples[:, start : start + _AUDIO_FRAME])
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
        frame.sample_rate = sound.sample_rate
        frame.pts = start
        frame.time_base = Fraction(1, sound.sample_rate)
        yield frame


def _int16(waveform: Tensor) -> np.ndarray:
    return np.round(waveform.clamp(-1, 1).numpy() * 32767).astype("<i2")
