"""Encoders that are fast and recognisable: latents hold the mean brightness and level they were made from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from musubi_tuner.caching.latent_outputs import LatentRecipe
from musubi_tuner.dataset.buckets import audio_latent_length
from musubi_tuner.dataset.items import EncoderRecord
from musubi_tuner.models.text_encoder import PromptEmbeds

CHANNELS, TOKENS, VIDEO_WIDTH, AUDIO_WIDTH = 4, 8, 5, 3
RECIPE = LatentRecipe(
    "av",
    EncoderRecord("video id"),
    EncoderRecord("audio id"),
    torch.float32,
    torch.float32,
    placeholder_channels=CHANNELS,
)


class FakeVideoVAE:
    """Mean of each cell; ``poison`` names brightness means for which NaN comes out."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.fails: type[Exception] | None = None
        self.largest_batch: int | None = None
        self.poison = False

    def encode(self, pixels: Tensor) -> Tensor:
        assert pixels.min() >= -1
        assert pixels.max() <= 1
        self.batches.append(tuple(pixels.shape))
        if self.fails or (self.largest_batch and len(pixels) > self.largest_batch):
            raise (self.fails or RuntimeError)("the encoder failed")
        cells = torch.nn.functional.avg_pool3d(pixels.mean(1, keepdim=True), (1, 32, 32))[:, :, ::8]
        latents = cells.expand(-1, CHANNELS, -1, -1, -1)
        return latents * float("nan") if self.poison else latents


class FakeAudioVAE:
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.fails = False

    def encode(self, waveform: Tensor) -> Tensor:
        assert waveform.shape[:2] == (1, 2)
        if self.fails:
            raise RuntimeError("the audio encoder failed")
        self.lengths.append(waveform.shape[2])
        level = waveform.abs().mean()
        return level.expand(1, 8, audio_latent_length(waveform.shape[2]), 16).clone()


class FakeTextEncoder:
    """Embeddings that hold the length of the prompt; it reads ``limit`` words."""

    limit = 1000

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.bad: set[str] = set()

    def excess_tokens(self, prompt: str) -> int:
        return max(len(prompt.split()) - self.limit, 0)

    def encode(self, prompts: Sequence[str], mode: str) -> PromptEmbeds:
        if self.bad & set(prompts):
            raise RuntimeError("cannot encode this")
        self.prompts += prompts
        lengths = torch.tensor([float(len(p)) for p in prompts])[:, None, None]
        batch = len(prompts)
        return PromptEmbeds(
            video=lengths.expand(batch, TOKENS, VIDEO_WIDTH),
            audio=None if mode == "video" else lengths.expand(batch, TOKENS, AUDIO_WIDTH),
            mask=torch.ones(batch, TOKENS, dtype=torch.bool),
        )
