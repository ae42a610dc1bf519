"""Masks and references of a batch in a training step: samples do not touch each other, draws stay the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_training_step import alone, batch_of, model_of, settings

from musubi_tuner.common.av import AV
from musubi_tuner.conditioning.reference import AudioReferenceRules
from musubi_tuner.dataset.batch import AudioLatents, Batch, VideoLatents
from musubi_tuner.diffusion.losses import total
from musubi_tuner.training.step import prepare_view, view_losses

GRID = (3, 2, 2)


def masked_batch(*lengths: int) -> Batch:
    """Sample i keeps the first i + 1 cells of its first frame, and the first i steps of its sound."""
    batch = batch_of(*lengths, version="2.3", grid=GRID)
    video, audio = torch.zeros(len(lengths), *GRID), torch.zeros(len(lengths), max(lengths))
    for index, length in enumerate(lengths):
        video[index].flatten()[: index + 1] = 1.0
        audio[index, : min(index, length)] = 1.0
    return replace(batch, masks=AV(video, audio))


def masked_alone(batch: Batch, index: int) -> Batch:
    masks = AV(batch.masks.video[index : index + 1], batch.masks.audio[index : index + 1])
    length = int(batch.audio.lengths[index])
    return replace(alone(batch, index), masks=replace(masks, audio=masks.audio[:, :length] if length else None))


def view_of(batch: Batch, **options):
    return prepare_view(batch, settings(**options), epoch=0, num_blocks=2)


def test_masked_tokens_are_clean_unsupervised_and_without_gradient():
    batch = masked_batch(6, 3)
    view, free = view_of(batch), view_of(replace(batch, masks=AV()))
    for name, t in view.tokens.items():
        kept = batch.masks[name].flatten(1) > 0
        assert torch.equal(t.noisy[kept], t.clean[kept])
        assert float(t.weight[kept].sum()) == 0
        assert torch.equal(t.noise, free.tokens[name].noise)
        assert torch.equal(t.sigma, free.tokens[name].sigma)
        assert torch.equal(t.noisy[~kept], free.tokens[name].noisy[~kept])
        assert torch.equal(t.weight[~kept], free.tokens[name].weight[~kept])


def test_losses_of_masked_batches_are_those_of_the_samples_alone():
    model, task, batch = model_of("2.3"), settings(), masked_batch(6, 3, 0)
    together = view_losses(model, view_of(batch), task)
    for index in range(3):
        single = view_losses(model, view_of(masked_alone(batch, index)), task)
        assert ("audio" in single) == (index < 2)
        for name, term in single.items():
            torch.testing.assert_close(together[name].value[index], term.value[0], rtol=1e-5, atol=1e-6)


def test_masks_of_sounds_are_no_longer_than_these_beside_longer_silence():
    batch = masked_batch(6, 3, 0)
    view, plain = view_of(batch, silence_weight=1.0), view_of(batch)
    assert view.tokens.audio.grid[0] > plain.tokens.audio.grid[0] == 6
    assert torch.equal(view.tokens.audio.weight[:2, :6], plain.tokens.audio.weight[:2])
    assert bool((view.tokens.audio.weight[2] == 1).all())


def test_empty_masks_are_no_masks():
    batch = batch_of(6, 3, version="2.3", grid=GRID)
    view = view_of(replace(batch, masks=AV(torch.zeros(2, *GRID), torch.zeros(2, 6))))
    for name, t in view_of(batch).tokens.items():
        assert torch.equal(view.tokens[name].t, t.t), "still one level a sample"
        assert torch.equal(view.tokens[name].weight, t.weight)


def test_samples_that_are_masked_as_a_whole_train_nothing():
    model, task, batch = model_of("2.3"), settings(), batch_of(6, 3, version="2.3", grid=GRID)
    parameter = model.patchify_proj.weight.requires_grad_()
    masks = AV(torch.ones(2, *GRID), torch.ones(2, 6))
    masks.video[0] = 0
    masks.audio[0] = 0
    terms = view_losses(model, view_of(replace(batch, masks=masks)), task)
    first = view_losses(model, view_of(alone(batch, 0)), task)
    for name, term in terms.items():
        assert term.valid.tolist() == [True, False]
        torch.testing.assert_close(term.mean(), first[name].mean(), rtol=1e-5, atol=1e-6)
    full = AV(torch.ones(2, *GRID), torch.ones(2, 6))
    loss = total(view_losses(model, view_of(replace(batch, masks=full)), task))
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(parameter.grad.abs().max()) == 0


def with_references(batch: Batch) -> Batch:
    """Every sample with a picture of one frame and a sound of its own length."""
    count = batch.size
    g = [torch.Generator().manual_seed(100 + index) for index in range(count)]
    sound = torch.zeros(count, 8, 4, 16)
    for index in range(count):
        sound[index, :, : 4 - index] = torch.randn(8, 4 - index, 16, generator=g[index])
    pictures = torch.stack([torch.randn(128, 1, 1, 1, generator=gi) for gi in g])
    return replace(
        batch,
        references=AV(
            VideoLatents(pictures, batch.video.fps),
            AudioLatents(sound, torch.arange(4, 4 - count, -1)),
        ),
    )


def reference_alone(batch: Batch, index: int) -> Batch:
    one, length = slice(index, index + 1), int(batch.references.audio.lengths[index])
    video, audio = batch.references.video, batch.references.audio
    return replace(
        alone(batch, index),
        references=AV(
            VideoLatents(video.latents[one], video.fps[one]),
            AudioLatents(audio.latents[one, :, :length], audio.lengths[one]),
        ),
    )


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_references_change_no_draw(version: str):
    """Noise levels are shifted by the number of target tokens, which references do not add to."""
    batch = batch_of(6, 3, version=version, grid=GRID)
    plain, view = view_of(batch), view_of(with_references(batch))
    for name, t in view.tokens.items():
        assert torch.equal(t.sigma, plain.tokens[name].sigma)
        assert torch.equal(t.noisy[:, t.target], plain.tokens[name].noisy)
        assert torch.equal(view.inputs[name].sigma, plain.inputs[name].sigma)


@pytest.mark.parametrize(
    "rules",
    [
        AudioReferenceRules(),
        AudioReferenceRules(negative_positions=True, hidden_from_video=True, hidden_from_text=True),
    ],
    ids=["free", "all rules"],
)
def test_losses_of_batches_with_references_are_those_of_the_samples_alone(rules: AudioReferenceRules):
    model, task = model_of("2.3"), settings(audio_reference=rules, first_frame_p=1.0)
    batch = with_references(batch_of(6, 3, version="2.3", grid=GRID))
    together = view_losses(model, prepare_view(batch, task, epoch=0, num_blocks=2), task)
    for index in range(2):
        view = prepare_view(reference_alone(batch, index), task, epoch=0, num_blocks=2)
        for name, term in view_losses(model, view, task).items():
            torch.testing.assert_close(together[name].value[index], term.value[0], rtol=1e-5, atol=1e-6)
