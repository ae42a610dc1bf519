"""The audio front end against formulas written out, and the latent arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from components_tiny import write_components

from musubi_tuner.common.errors import UserError
from musubi_tuner.models.audio_vae import AudioVAE, audio_vae_config, latent_length, load_audio_vae, log_mel
from musubi_tuner.models.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> AudioVAE:
    path = tmp_path_factory.mktemp("audio") / "x.safetensors"
    write_components(path, "2.0")
    return load_audio_vae(Checkpoint.open(path), dtype=torch.float32)


def slaney_filters() -> np.ndarray:
    """[513, 64]: triangles on Slaney's scale (linear to 1 kHz, then logarithmic), each of unit area."""

    def to_hz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))

    top = 15 + 27 * math.log(8000 / 1000) / math.log(6.4)
    edges = to_hz(np.linspace(0, top, 66))
    frequencies = np.arange(513) * 16000 / 1024
    filters = np.zeros((513, 64))
    for i, (low, centre, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        rise, fall = (frequencies - low) / (centre - low), (high - frequencies) / (high - centre)
        filters[:, i] = np.clip(np.minimum(rise, fall), 0, None) * 2 / (high - low)
    return filters


def log_mel_by_hand(signal: np.ndarray) -> np.ndarray:
    padded = np.pad(signal, 512, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = np.stack([padded[i : i + 1024] * window for i in range(0, len(padded) - 1023, 160)])
    return np.log(np.maximum(np.abs(np.fft.rfft(frames)) @ slaney_filters(), 1e-5))


def test_log_mel_is_the_formula():
    time = np.arange(5000) / 16000
    noise = np.random.default_rng(0).standard_normal((2, 5000))
    signal = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.01 * noise
    mel = log_mel(torch.from_numpy(signal).float()[None])
    assert mel.shape == (1, 2, 1 + 5000 // 160, 64)
    for channel in range(2):
        expected = torch.from_numpy(log_mel_by_hand(signal[channel])).float()
        torch.testing.assert_close(mel[0, channel], expected, rtol=1e-4, atol=1e-3)


def test_silence_is_the_floor():
    mel = log_mel(torch.zeros(1, 2, 1600))
    torch.testing.assert_close(mel, torch.full_like(mel, math.log(1e-5)))


@pytest.mark.parametrize("samples", [513, 640, 800, 1600, 3200, 16000])
def test_latent_length(vae, samples):
    latents = vae.encode(torch.randn(1, 2, samples))
    assert latents.shape == (1, 2, latent_length(samples), 16)
    assert latent_length(16000) == 26
    assert vae.decode(latents).shape[2] == max(1, 4 * latents.shape[2] - 3)


def test_encode_normalises_in_the_patchified_space(vae):
    waveform = torch.randn(1, 2, 4000)
    reference = vae._module
    with torch.no_grad():
        mode = reference.encode(log_mel(waveform)).latent_dist.mode()  # [1, C, T, 16]
    flat = mode.transpose(1, 2).flatten(2)  # [1, T, C*16]
    expected = (flat - reference.latents_mean) / reference.latents_std
    torch.testing.assert_close(vae.encode(waveform).transpose(1, 2).flatten(2), expected)


def test_what_cannot_be_encoded_is_told(vae):
    with pytest.raises(UserError, match="at least 513 are needed"):
        vae.encode(torch.zeros(1, 2, 512))
    with pytest.raises(ValueError, match=r"\[B, 2, S\]"):
        vae.encode(torch.zeros(1, 1, 16000))


def test_another_front_end_is_refused():
    with pytest.raises(UserError, match=r"stft\.hop_length is 256"):
        audio_vae_config({"preprocessing": {"stft": {"hop_length": 256}}})
