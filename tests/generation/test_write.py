"""Files read back by PyAV: what was written is what plays."""

import wave
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from musubi_tuner.generation.decode import Sound, to_uint8
from musubi_tuner.generation.write import frame_rate, write_mp4, write_png, write_wav

FLASH, BEEP = 12, 0.5  # frame and second of the same moment at 24 frames per second


def frames(count: int = 24, flash: int | None = None) -> torch.Tensor:
    pixels = torch.zeros(count, 64, 96, 3, dtype=torch.uint8)
    pixels[:, :, :48] = torch.tensor([200, 40, 20], dtype=torch.uint8)
    if flash is not None:
        pixels[flash:] = 255
    return pixels


def tone(seconds: float, rate: int, *, start: float = 0.0) -> Sound:
    t = torch.arange(int(seconds * rate)) / rate
    wave_ = 0.5 * torch.sin(2 * torch.pi * 440 * t) * (t >= start)
    return Sound(torch.stack([wave_, wave_]), rate)


@pytest.mark.parametrize("fps", [24, 25, 16, 29.97, 23.976, 12.5])
def test_video_keeps_its_frames_rate_and_duration(tmp_path, fps):
    write_mp4(tmp_path / "a.mp4", frames(17), fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(fps, abs=2e-4)
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert not container.streams.audio
        times = [f.time for f in container.decode(video=0)]
    assert times == pytest.approx([i / fps for i in range(17)], abs=2e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_frame_rates_are_exact():
    assert frame_rate(25.0) == 25
    assert frame_rate(23.976) == frame_rate(23.98) == Fraction(24000, 1001)
    assert frame_rate(29.97) == Fraction(30000, 1001)
    assert frame_rate(12.5) == Fraction(25, 2)
    assert frame_rate(0.25) == Fraction(1, 4)


def test_colours_survive(tmp_path):
    write_mp4(tmp_path / "a.mp4", frames(5), 25)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_range) == (1, 1)  # BT.709, limited
    pixels = frame.to_ndarray(format="rgb24")
    assert np.abs(pixels[32, 20].astype(int) - [200, 40, 20]).max() <= 4


@pytest.mark.parametrize("rate", [24000, 48000])
def test_sound_is_stereo_and_in_step_with_the_picture(tmp_path, rate):
    """A flash and a beep at the same moment are found at the same moment."""
    write_mp4(tmp_path / "a.mp4", frames(24, FLASH), 24, tone(1.0, rate, start=BEEP))
    with av.open(str(tmp_path / "a.mp4")) as container:
        audio = container.streams.audio[0]
        assert (audio.codec_context.name, audio.rate, audio.channels) == ("aac", rate, 2)
        assert float(audio.duration * audio.time_base) == pytest.approx(1.0, abs=0.05)
        flash = next(f.time for f in container.decode(video=0) if f.to_ndarray(format="gray").mean() > 200)
        container.seek(0)
        blocks = [(f.time, f.to_ndarray()) for f in container.decode(audio=0)]
    samples = np.concatenate([b for _, b in blocks], axis=1)
    beep = blocks[0][0] + np.argmax(np.abs(samples[0]) > 0.25) / rate
    assert flash == pytest.approx(BEEP, abs=1e-3)
    assert beep == pytest.approx(BEEP, abs=0.005)


def test_wav_holds_the_samples(tmp_path):
    sound = tone(0.1, 24000)
    write_wav(tmp_path / "a.wav", sound)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (2, 24000, 2)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2)
    np.testing.assert_allclose(samples.T / 32767, sound.waveform.numpy(), atol=1e-4)


def test_wav_clips_instead_of_wrapping(tmp_path):
    write_wav(tmp_path / "a.wav", Sound(torch.full((2, 10), 1.5), 24000))
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert set(np.frombuffer(file.readframes(10), "<i2")) == {32767}


def test_png_is_lossless(tmp_path):
    from PIL import Image

    pixels = torch.randint(0, 256, (32, 64, 3), dtype=torch.uint8)
    write_png(tmp_path / "a.png", pixels)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels.numpy())


def test_pixels_map_from_minus_one_and_one():
    frame = torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 5).expand(3, 1, 5)
    assert to_uint8(frame)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(Exception, match=r".+"):
        write_mp4(tmp_path / "a.mp4", frames(3)[..., :2], 25)
    assert list(tmp_path.iterdir()) == []


def test_the_same_frames_give_the_same_file(tmp_path):
    coarse = torch.randint(0, 255, (45, 12, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moving = coarse.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    written = set()
    for attempt in range(4):
        write_mp4(tmp_path / f"{attempt}.mp4", moving, 24, tone(45 / 24, 24_000))
        written.add((tmp_path / f"{attempt}.mp4").read_bytes())
    assert len(written) == 1
