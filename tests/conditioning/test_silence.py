"""Silence in place of missing sound."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from musubi_tuner.conditioning.silence import fill_silence, part_silence
from musubi_tuner.dataset.batch import AudioLatents, Batch, SampleKey, TextEmbeds, VideoLatents
from musubi_tuner.diffusion.losses import LossTerm, total


def batch(*lengths: int, frames: int = 3, fps: float = 25.0) -> Batch:
    count, longest = len(lengths), max(lengths)
    sound = (
        torch.ones(count, 8, longest, 16) * (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, :, None]
    )
    return Batch(
        video=VideoLatents(torch.ones(count, 128, frames, 2, 2), torch.full((count,), fps)),
        audio=AudioLatents(sound, torch.tensor(lengths)) if longest else None,
        text=TextEmbeds(torch.ones(count, 4, 8), torch.ones(count, 4, 8), None),
        keys=tuple(SampleKey(f"clip_{i}") for i in range(count)),
    )


@pytest.mark.parametrize(
    ("frames", "fps", "steps"),
    [(1, 25.0, 1), (1, 30.0, 1), (3, 25.0, 17), (6, 24.0, 42), (6, 50.0, 20), (16, 25.0, 121)],
)
def test_silence_lasts_as_long_as_the_picture(frames: int, fps: float, steps: int):
    """25 latent steps a second, rounded down, of 8 (frames - 1) + 1 pixel frames."""
    filled, silent = fill_silence(batch(0, 0, frames=frames, fps=fps))
    assert silent.tolist() == [True, True]
    assert filled.audio.lengths.tolist() == [steps, steps]
    assert filled.audio.latents.shape == (2, 8, steps, 16)
    assert not bool(filled.audio.latents.any())


@pytest.mark.parametrize("sound", [5, 40])
def test_only_missing_sound_is_filled(sound: int):
    before = batch(sound, 0)
    filled, silent = fill_silence(before)
    assert silent.tolist() == [False, True]
    assert filled.audio.lengths.tolist() == [sound, 17]
    assert torch.equal(filled.audio.latents[0, :, :sound], before.audio.latents[0])
    assert float(filled.audio.latents.sum()) == float(before.audio.latents.sum())


def test_nothing_to_fill():
    whole = batch(5, 3)
    assert fill_silence(whole) == (whole, None)
    sound_alone = replace(batch(5, 3), video=None)
    assert fill_silence(sound_alone) == (sound_alone, None)


def test_parts_of_the_audio_term_are_its_mean_with_a_weight_for_each_sample():
    value = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    silent = torch.tensor([False, True, False, True])
    whole = {"audio": LossTerm(value, 0.5, torch.ones(4, dtype=torch.bool))}
    parts = part_silence(whole, silent, 0.1)
    assert float(parts["audio"].mean()) == 2.5
    assert float(parts["audio_silence"].mean()) == 5.0
    loss = total(parts)
    weights = torch.tensor([0.5, 0.05, 0.5, 0.05])
    assert float(loss) == pytest.approx(float((weights * value).mean()))
    loss.backward()
    torch.testing.assert_close(value.grad, weights / 4)


def test_a_batch_of_silence_alone_has_no_term_of_sound():
    terms = {"video": LossTerm(torch.ones(2)), "audio": LossTerm(torch.ones(2), 2.0, torch.ones(2, dtype=torch.bool))}
    parts = part_silence(terms, torch.tensor([True, True]), 0.25)
    assert list(parts) == ["video", "audio_silence"]
    assert float(total(parts)) == pytest.approx(1 + 2 * 0.25)
    assert part_silence(terms, None, 0.25) is terms
