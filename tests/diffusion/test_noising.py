"""Batches to noised tokens: the flow's definition, padding, and independence of the batch."""

from dataclasses import replace

import pytest
import torch

from musubi_tuner.common.errors import UserError
from musubi_tuner.dataset.batch import AudioLatents, Batch, SampleKey, TextEmbeds, VideoLatents
from musubi_tuner.diffusion.noising import noise_batch, sample_generators
from musubi_tuner.diffusion.timesteps import NoiseLevelSampler
from musubi_tuner.diffusion.tokens import patchify_audio, patchify_video, video_coords

SAMPLER = NoiseLevelSampler()


def item(index: int, *, steps: int, video: bool = True, audio: bool = True) -> Batch:
    """One sample whose content depends on ``index``."""
    g = torch.Generator().manual_seed(index)
    return Batch(
        video=VideoLatents(torch.randn(1, 128, 3, 2, 2, generator=g), torch.tensor([25.0])) if video else None,
        audio=AudioLatents(
            torch.randn(1, 8, max(steps, 1), 16, generator=g),
            torch.tensor([steps]),
            None if video else torch.tensor([[5, 2, 2]]),
        )
        if audio
        else None,
        text=TextEmbeds(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8), None),
        keys=(SampleKey(f"clip_{index}"),),
    )


def join(*items: Batch) -> Batch:
    """Stack, zero-padding the sound to the longest."""
    longest = max((i.audio.latents.shape[2] for i in items if i.audio), default=0)
    pad = lambda x: torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[2]))  # noqa: E731
    first = items[0]
    return replace(
        first,
        video=first.video
        and VideoLatents(torch.cat([i.video.latents for i in items]), torch.cat([i.video.fps for i in items])),
        audio=first.audio
        and AudioLatents(
            torch.cat([pad(i.audio.latents) for i in items]),
            torch.cat([i.audio.lengths for i in items]),
            None if first.video else torch.cat([i.audio.virtual_grid for i in items]),
        ),
        keys=tuple(k for i in items for k in i.keys),
    )


def noised(batch: Batch, *, seed: int = 7, epoch: int = 0, **options):
    generators = sample_generators(seed, "noise", epoch, batch.keys)
    return noise_batch(batch, sampler=SAMPLER, generators=generators, **options)


def test_noisy_and_target_are_the_flow_between_clean_and_noise():
    batch = item(1, steps=10)
    tokens = noised(batch)
    for t, clean in (
        (tokens.video, patchify_video(batch.video.latents)),
        (tokens.audio, patchify_audio(batch.audio.latents)),
    ):
        assert torch.equal(t.clean, clean)
        sigma = t.sigma[:, None, None]
        torch.testing.assert_close(t.noisy, (1 - sigma) * clean + sigma * t.noise)
        torch.testing.assert_close(t.velocity, t.noise - clean)
        assert t.t.shape == (1, 1)
        assert t.valid is None
        assert {x.dtype for x in (t.clean, t.noise, t.t, t.sigma, t.coords, t.weight)} == {torch.float32}


def test_noise_is_standard_normal_and_differs_between_modalities_samples_and_epochs():
    batch = join(item(1, steps=10), item(2, steps=10))
    a, b = noised(batch), noised(batch, epoch=1)
    assert float(a.video.noise.mean()) == pytest.approx(0, abs=0.08)
    assert float(a.video.noise.std()) == pytest.approx(1, abs=0.06)
    assert not torch.equal(a.video.noise[0], a.video.noise[1])
    assert not torch.equal(a.video.noise, b.video.noise)
    assert not torch.equal(a.video.noise[0, :10], a.audio.noise[0])


def test_a_sample_draws_the_same_alone_and_in_any_batch():
    one, two, three = item(1, steps=10), item(2, steps=4), item(3, steps=7)
    together = noised(join(one, two, three), independent_audio=True)
    swapped = noised(join(three, one), independent_audio=True)
    alone = noised(one, independent_audio=True)
    for other, row in ((together, 0), (swapped, 1)):
        for name, t in alone.items():
            n = t.clean.shape[1]
            assert torch.equal(other[name].noise[row, :n], t.noise[0])
            assert torch.equal(other[name].sigma[row], t.sigma[0])


def test_noise_does_not_depend_on_the_flags():
    batch = item(1, steps=10)
    shared, independent = noised(batch), noised(batch, independent_audio=True)
    fixed = noised(batch, quantiles=torch.tensor([0.25]))
    for other in (independent, fixed):
        assert torch.equal(shared.video.noise, other.video.noise)
        assert torch.equal(shared.audio.noise, other.audio.noise)
    grid = torch.tensor([batch.video.latents.shape[2:]])
    assert torch.equal(fixed.video.sigma, SAMPLER.quantile(0.25, grid))
    assert torch.equal(fixed.audio.sigma, fixed.video.sigma)


def test_audio_shares_the_level_unless_independent():
    batch = join(item(1, steps=10), item(2, steps=10))
    shared, independent = noised(batch), noised(batch, independent_audio=True)
    assert torch.equal(shared.audio.sigma, shared.video.sigma)
    assert torch.equal(independent.video.sigma, shared.video.sigma)
    assert not torch.equal(independent.audio.sigma, shared.video.sigma)


def test_padding_has_no_weight_and_is_marked():
    tokens = noised(join(item(1, steps=10), item(2, steps=4)))
    audio = tokens.audio
    assert audio.valid.sum(dim=1).tolist() == [10, 4]
    assert torch.equal(audio.weight, audio.valid.float())
    assert bool((audio.noisy[1, 4:] == 0).all())
    assert tokens.video.valid is None


def test_sample_without_sound_beside_others_has_no_weight():
    tokens = noised(join(item(1, steps=10), item(2, steps=0)))
    assert tokens.audio.weight.sum(dim=1).tolist() == [10, 0]
    assert tokens.video.weight.sum(dim=1).tolist() == [12, 12]


def test_batch_in_which_nothing_has_sound_is_video_only():
    tokens = noised(join(item(1, steps=0), item(2, steps=0)))
    assert tokens.audio is None
    assert torch.equal(tokens.video.noise, noised(join(item(1, steps=9), item(2, steps=9))).video.noise)


def test_audio_mode_shifts_by_the_virtual_grid():
    batch = item(1, steps=10, video=False)
    bigger = replace(batch, audio=replace(batch.audio, virtual_grid=torch.tensor([[500, 2, 2]])))
    small, big = noised(batch), noised(bigger)
    assert small.video is None
    # 20 virtual tokens are below the clamp, 2000 are not: sigmoid(mu + z) with the same z.
    shift = float(torch.logit(big.audio.sigma.double()) - torch.logit(small.audio.sigma.double()))
    assert shift == pytest.approx((2000 - 1024) * 1.1 / 3072, abs=1e-4)


@pytest.mark.parametrize("grid", [None, torch.tensor([[1, 1, 1]])])
def test_audio_mode_without_geometry_says_to_cache_again(grid):
    batch = item(1, steps=10, video=False)
    with pytest.raises(UserError, match=r"clip_1: .*ltx2_cache_latents.py with --ltx2_mode audio"):
        noised(replace(batch, audio=replace(batch.audio, virtual_grid=grid)))


def test_half_precision_caches_are_raised_to_fp32():
    batch = item(1, steps=10)
    half = replace(batch, video=replace(batch.video, latents=batch.video.latents.bfloat16()))
    assert noised(half).video.noisy.dtype == torch.float32


def test_positions_follow_the_frame_rate_of_each_batch():
    """Batches of one size: what is kept of one must not be taken for another of other frame rates."""
    batch = item(1, steps=4)
    for fps in (25.0, 50.0, 25.0):
        video = replace(batch.video, fps=torch.full_like(batch.video.fps, fps))
        tokens = noised(replace(batch, video=video)).video
        assert torch.equal(tokens.coords, video_coords(tokens.grid, video.fps))
