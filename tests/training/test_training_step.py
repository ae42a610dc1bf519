"""One batch through noising, the transformer and the loss: samples of a batch do not touch each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ltx2_tiny import diffusers_twin, run_diffusers, tiny_config, tiny_model
from torch.nn.functional import pad

from musubi_tuner.common.av import AV
from musubi_tuner.dataset.batch import AudioLatents, Batch, SampleKey, TextEmbeds, VideoLatents
from musubi_tuner.diffusion.level_pool import LevelPool
from musubi_tuner.diffusion.losses import total
from musubi_tuner.diffusion.timesteps import NoiseLevelSampler
from musubi_tuner.training.step import TaskSettings, prepare_view, view_losses

CONFIG = {"in_channels": 128, "out_channels": 128, "audio_in_channels": 128, "audio_out_channels": 128}


def model_of(version: str):
    return tiny_model(tiny_config(version, **CONFIG))


def settings(**options) -> TaskSettings:
    defaults = {"sampler": NoiseLevelSampler(), "seed": 3, "device": torch.device("cpu"), "dtype": torch.float32}
    return TaskSettings(**{**defaults, **options})


def batch_of(*lengths: int, version: str, grid=(3, 2, 2)) -> Batch:
    """One sample for each number of audio steps, 0 = without sound; sample i is the same in any batch."""
    g = [torch.Generator().manual_seed(index) for index in range(len(lengths))]
    widths = (20, 20) if version == "2.0" else (32, 24)
    longest = max(lengths)
    sounds = [torch.randn(8, n, 16, generator=gi) for n, gi in zip(lengths, g, strict=True)]
    return Batch(
        video=VideoLatents(
            torch.stack([torch.randn(128, *grid, generator=gi) for gi in g]), torch.full((len(g),), 25.0)
        ),
        audio=AudioLatents(
            torch.stack([pad(s, (0, 0, 0, longest - s.shape[1])) for s in sounds]), torch.tensor(lengths)
        ),
        text=TextEmbeds(*(torch.stack([torch.randn(5, w, generator=gi) for gi in g]) for w in widths), mask=None),
        keys=tuple(SampleKey(f"clip_{index}") for index in range(len(g))),
    )


def alone(batch: Batch, index: int) -> Batch:
    """The batch of one of its samples, without the padding that the others caused."""
    one = slice(index, index + 1)
    length = int(batch.audio.lengths[index])
    return replace(
        batch,
        video=VideoLatents(batch.video.latents[one], batch.video.fps[one]),
        audio=AudioLatents(batch.audio.latents[one, :, :length], batch.audio.lengths[one]) if length else None,
        text=TextEmbeds(batch.text.video[one], batch.text.audio[one], None),
        keys=batch.keys[one],
    )


@pytest.mark.parametrize("first_frame_p", [0.0, 1.0])
@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_losses_of_a_batch_are_those_of_its_samples_alone(version: str, first_frame_p: float):
    """Neither padding nor a neighbour without sound leaks into a sample."""
    model, task = model_of(version), settings(first_frame_p=first_frame_p)
    batch = batch_of(6, 3, 0, version=version)
    together = view_losses(model, prepare_view(batch, task, epoch=0, num_blocks=2), task)
    for index in range(3):
        single = view_losses(model, prepare_view(alone(batch, index), task, epoch=0, num_blocks=2), task)
        assert ("audio" in single) == (index < 2)
        for name, term in single.items():
            torch.testing.assert_close(together[name].value[index], term.value[0], rtol=1e-5, atol=1e-6)
    assert together["audio"].valid.tolist() == [True, True, False]


def test_no_row_of_attention_is_hidden_as_a_whole():
    """Fused kernels make NaN of such rows: a batch with one soundless sample would never train."""
    view = prepare_view(batch_of(6, 3, 0, version="2.3"), settings(), epoch=0, num_blocks=2)
    for mask in (view.inputs.audio.attention_mask, view.inputs.video.cross_mask):
        assert bool((mask.amax(dim=-1) == 1).all())
    equal = prepare_view(batch_of(6, 0, version="2.3"), settings(), epoch=0, num_blocks=2)
    assert equal.inputs.audio.attention_mask is None, "no padding, so the fastest kernels apply"
    assert float(equal.tokens.audio.weight[1].sum()) == 0


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_loss_is_the_flow_matching_error_of_the_reference_model(version: str):
    """Written out with diffusers' model, clean latents and the drawn noise, first frame kept clean."""
    model, task = model_of(version), settings(first_frame_p=1.0, weights=AV(video=2.0, audio=0.5))
    batch = batch_of(4, 4, version=version)
    view = prepare_view(batch, task, epoch=1, num_blocks=2)
    loss = total(view_losses(model, view, task))

    video, audio = view.tokens.video, view.tokens.audio
    latents = batch.video.latents.permute(0, 2, 3, 4, 1).reshape(2, 12, 128)
    sound = batch.audio.latents.permute(0, 2, 1, 3).reshape(2, 4, 128)
    level = video.sigma[:, None] * torch.cat([torch.zeros(4), torch.ones(8)])  # the first 2 x 2 tokens stay clean
    assert torch.equal(audio.sigma, video.sigma)
    inputs = AV(
        video=replace(
            view.inputs.video,
            tokens=(1 - level[..., None]) * latents + level[..., None] * video.noise,
            timesteps=level,
            sigma=video.sigma,
        ),
        audio=replace(
            view.inputs.audio,
            tokens=(1 - video.sigma[:, None, None]) * sound + video.sigma[:, None, None] * audio.noise,
        ),
    )
    prediction = run_diffusers(diffusers_twin(model), inputs)
    video_error = (prediction.video - (video.noise - latents))[:, 4:].square().mean()
    audio_error = (prediction.audio - (audio.noise - sound)).square().mean()
    torch.testing.assert_close(loss, 2 * video_error + 0.5 * audio_error, rtol=1e-5, atol=1e-6)


def test_missing_sound_is_trained_as_silence_of_lower_weight():
    """With the regulariser a clip without sound is trained as if its sound were cached as zeros."""
    model, version = model_of("2.3"), "2.3"
    batch = batch_of(6, 0, version=version)
    task = settings(silence_weight=0.25, weights=AV(video=1.0, audio=2.0))
    view = prepare_view(batch, task, epoch=0, num_blocks=2)
    terms = view_losses(model, view, task)

    zeros = torch.zeros(1, 8, 17, 16)  # as long as 17 pixel frames at 25 fps
    cached = replace(
        batch,
        audio=AudioLatents(torch.cat([pad(batch.audio.latents[:1], (0, 0, 0, 17 - 6)), zeros]), torch.tensor([6, 17])),
    )
    plain = view_losses(model, prepare_view(cached, settings(), epoch=0, num_blocks=2), settings())
    assert view.perturbations is None
    torch.testing.assert_close(terms["video"].value, plain["video"].value)
    torch.testing.assert_close(terms["audio"].mean(), plain["audio"].value[0])
    torch.testing.assert_close(terms["audio_silence"].mean(), plain["audio"].value[1])
    weighed = plain["video"].mean() + (2.0 * plain["audio"].value[0] + 0.5 * plain["audio"].value[1]) / 2
    torch.testing.assert_close(total(terms), weighed)


def test_silence_changes_nothing_where_all_clips_have_sound():
    model, batch = model_of("2.0"), batch_of(6, 3, version="2.0")
    plain, filled = settings(), settings(silence_weight=0.25)
    views = [prepare_view(batch, task, epoch=0, num_blocks=2) for task in (plain, filled)]
    losses = [total(view_losses(model, view, task)) for view, task in zip(views, (plain, filled), strict=True)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("independent", [False, True])
def test_levels_come_from_the_pool(independent: bool):
    batch = batch_of(6, 3, version="2.3")
    pool = LevelPool(3, 4, batch.keys)
    sampler = NoiseLevelSampler(sampling="uniform")
    task = settings(sampler=sampler, level_pool=pool, independent_audio_timestep=independent)
    tokens = prepare_view(batch, task, epoch=2, num_blocks=2).tokens
    shares = pool.deal(2, batch.keys)
    torch.testing.assert_close(tokens.video.sigma, shares.video.float())
    torch.testing.assert_close(tokens.audio.sigma, (shares.audio if independent else shares.video).float())
    free = prepare_view(batch, replace(task, level_pool=None), epoch=2, num_blocks=2).tokens
    assert torch.equal(free.video.noise, tokens.video.noise)
