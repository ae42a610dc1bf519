"""Reference tokens before the target: where they are, what they leave alone, what they do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ltx2_tiny import tiny_config, tiny_model

from musubi_tuner.common.av import AV
from musubi_tuner.common.seeding import generator
from musubi_tuner.conditioning.intrinsic import condition_first_frame, condition_masks
from musubi_tuner.conditioning.reference import (
    AudioReferenceRules,
    prepend_references,
    reference_audio_coords,
    reference_video_coords,
)
from musubi_tuner.dataset.batch import AudioLatents, VideoLatents
from musubi_tuner.diffusion.losses import task_losses, total
from musubi_tuner.diffusion.tokens import NoisedTokens, audio_coords, video_coords

GRID, HALF = (3, 4, 2), (2, 2, 1)
STEPS = 6
FPS = torch.tensor([25.0, 12.5])
ALL_RULES = AudioReferenceRules(negative_positions=True, hidden_from_video=True, hidden_from_text=True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def targets() -> AV[NoisedTokens]:
    """Two samples; the sound of the second is padded by two steps."""
    sigma = torch.tensor([0.7, 0.4])

    def one(count: int, channels: int, coords: torch.Tensor, grid) -> NoisedTokens:
        return NoisedTokens(
            clean=random(2, count, channels, seed=1),
            noise=random(2, count, channels, seed=2),
            t=sigma[:, None],
            sigma=sigma,
            coords=coords,
            weight=torch.ones(2, count),
            grid=grid,
            target=slice(0, count),
        )

    audio = one(STEPS, 128, audio_coords(STEPS, 2), (STEPS, 1, 1))
    valid = torch.arange(STEPS) < torch.tensor([[STEPS], [STEPS - 2]])
    return AV(
        video=one(24, 4, video_coords(GRID, FPS), GRID),
        audio=replace(audio, weight=valid.float(), valid=valid),
    )


def references(seed: int = 5) -> AV:
    """The reference sound of the first sample is padded by three steps."""
    sound = random(2, 8, 5, 16, seed=seed)
    sound[0, :, 2:] = 0
    return AV(
        video=VideoLatents(random(2, 4, *HALF, seed=seed), FPS),
        audio=AudioLatents(sound, torch.tensor([2, 5])),
    )


def test_targets_stay_bit_for_bit_what_they_were():
    before, after = targets(), prepend_references(targets(), references(), ALL_RULES)
    for name, count in (("video", 4), ("audio", 5)):
        old, new = before[name], after[name]
        assert new.target == slice(count, count + old.clean.shape[1])
        for field in ("clean", "noise", "noisy", "velocity", "weight"):
            assert torch.equal(getattr(new, field)[:, new.target], getattr(old, field)), field
        assert torch.equal(new.t[:, new.target], old.t.expand_as(old.weight))
        assert torch.equal(new.coords[:, :, new.target], old.coords)
        assert torch.equal(new.sigma, old.sigma)
        assert new.grid == old.grid
    assert torch.equal(after.audio.valid[:, 5:], before.audio.valid)


def test_reference_tokens_are_clean_and_teach_nothing():
    after = prepend_references(targets(), references())
    for name, t in after.items():
        own = slice(0, t.target.start)
        assert torch.equal(t.noisy[:, own], t.clean[:, own])
        assert float(t.t[:, own].abs().max()) == 0
        prediction = torch.randn_like(t.clean).requires_grad_()
        only = AV(**{name: t})
        total(task_losses(AV(**{name: prediction}), only)).backward()
        assert float(prediction.grad[:, own].abs().max()) == 0
        supervised = t.weight[:, t.target] > 0
        assert bool((prediction.grad[:, t.target][supervised] != 0).all())


def test_the_loss_is_that_of_the_target_alone():
    before, after = targets(), prepend_references(targets(), references())
    predictions = before.map(lambda t: torch.randn_like(t.clean))
    longer = after.map_named(
        lambda name, t: torch.cat([torch.randn(2, t.target.start, t.clean.shape[2]), predictions[name]], dim=1)
    )
    alone, with_references = task_losses(predictions, before), task_losses(longer, after)
    for name in ("video", "audio"):
        torch.testing.assert_close(with_references[name].value, alone[name].value)


def test_positions_of_a_smaller_reference_cover_the_target():
    coords = reference_video_coords(HALF, GRID, FPS).unflatten(2, HALF)  # [B, 3, F, H, W, 2]
    target = video_coords(GRID, FPS).unflatten(2, GRID)
    for axis in (1, 2):
        assert float(coords[:, axis].min()) == float(target[:, axis].min()) == 0
        assert float(coords[:, axis].max()) == float(target[:, axis].max())
    assert coords[0, 1, 0, :, 0].tolist() == [[0, 64], [64, 128]]
    assert coords[0, 2, 0, 0].tolist() == [[0, 64]]
    assert torch.equal(coords[:, 0, :, 0, 0], target[:, 0, : HALF[0], 0, 0]), "the target's clock, from 0"
    with pytest.raises(ValueError, match="no whole ratio"):
        reference_video_coords((1, 3, 2), GRID, FPS)


def test_reference_sounds_start_at_0_or_end_before_it():
    lengths = torch.tensor([5, 2])
    assert torch.equal(reference_audio_coords(5, lengths, negative=False), audio_coords(5, 2))
    coords = reference_audio_coords(5, lengths, negative=True)[:, 0]
    torch.testing.assert_close(coords[0, 4], torch.tensor([-0.08, -0.04]))
    torch.testing.assert_close(coords[1, 1], torch.tensor([-0.08, -0.04]))
    assert float(coords[0].max()) <= -0.04 + 1e-6
    widths = coords[..., 1] - coords[..., 0]
    torch.testing.assert_close(widths[0], torch.tensor([0.01, 0.04, 0.04, 0.04, 0.04]))


def test_rules_of_reference_sounds_reach_the_masks():
    free = prepend_references(targets(), references()).audio
    assert free.reads_text is None
    assert free.seen_by_other is None
    t = prepend_references(targets(), references(), ALL_RULES)
    expected = [False] * 5 + [True] * STEPS
    assert t.audio.reads_text.tolist() == [expected] * 2
    assert t.audio.seen_by_other.tolist() == [expected] * 2
    inputs = model_inputs(t)
    assert inputs.video.cross_mask[0, 0].tolist() == [0.0] * 5 + [1.0] * 6
    assert inputs.video.cross_mask[1, 0].tolist() == [0.0] * 5 + [1.0] * 4 + [0.0] * 2
    assert inputs.audio.attention_mask[0, 0].tolist() == [1.0] * 2 + [0.0] * 3 + [1.0] * 6
    assert inputs.audio.reads_text[0].tolist() == [0.0] * 5 + [1.0] * 6


def test_references_of_no_use_are_left_alone():
    only = replace(targets(), audio=None)
    assert prepend_references(only, replace(references(), video=None)) == only
    assert prepend_references(only, AV()) == only


def test_first_frame_and_masks_act_on_the_target_in_any_order():
    mask = AV(video=torch.rand(2, *GRID))
    gates = [generator("gate", i) for i in range(2)]
    before = condition_masks(condition_first_frame(targets(), 1.0, gates), mask)
    one = prepend_references(before, references()).video
    after = prepend_references(targets(), references())
    other = condition_masks(condition_first_frame(after, 1.0, gates), mask).video
    for field in ("t", "weight", "noisy"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field
    assert float(one.t[:, 4 : 4 + 8].abs().max()) == 0
    assert float(one.t[:, 12:].max()) > 0


# --- in the transformer -------------------------------------------------------------------------------------

CHANNELS = {"audio_in_channels": 128, "audio_out_channels": 128}


def model_inputs(tokens: AV[NoisedTokens], width: int = 32, audio_width: int = 24):
    contexts = AV(random(2, 5, width, seed=8), random(2, 5, audio_width, seed=9))
    others = AV(video=tokens.audio, audio=tokens.video)
    return tokens.map_named(lambda name, t: t.as_input(contexts[name], None, other=others[name], dtype=torch.float32))


def permuted(inputs, orders: AV[torch.Tensor]):
    """The same inputs with each stream's tokens in another order."""

    def one(name: str, stream):
        order, other = orders[name], orders["audio" if name == "video" else "video"]

        def along(tensor: torch.Tensor | None, dim: int, index: torch.Tensor) -> torch.Tensor | None:
            return None if tensor is None else tensor.index_select(dim, index)

        return replace(
            stream,
            tokens=along(stream.tokens, 1, order),
            timesteps=along(stream.timesteps, 1, order),
            coords=along(stream.coords, 2, order),
            attention_mask=along(stream.attention_mask, 2, order),
            cross_mask=along(stream.cross_mask, 2, other),
            reads_text=along(stream.reads_text, 1, order),
        )

    return inputs.map_named(one)


@pytest.mark.parametrize("rules", [AudioReferenceRules(), ALL_RULES], ids=["free", "all rules"])
@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_the_order_of_segments_does_not_change_the_target(version: str, rules: AudioReferenceRules):
    config = tiny_config(version, **CHANNELS)
    model, width = tiny_model(config), (20, 20) if version == "2.0" else (32, 24)
    tokens = prepend_references(targets(), references(), rules)
    inputs = model_inputs(tokens, *width)
    before = model(inputs)
    behind = tokens.map(lambda t: torch.arange(t.clean.shape[1]).roll(-t.target.start))
    shuffled = tokens.map(lambda t: torch.randperm(t.clean.shape[1], generator=torch.Generator().manual_seed(4)))
    for orders in (behind, shuffled):
        after = model(permuted(inputs, orders))
        for name, order in orders.items():
            restored = torch.empty_like(after[name]).index_copy(1, order, after[name])
            valid = torch.ones_like(tokens[name].weight, dtype=torch.bool)
            if tokens[name].valid is not None:
                valid = tokens[name].valid
            torch.testing.assert_close(restored[valid], before[name][valid], rtol=1e-5, atol=1e-5)


def test_the_target_sees_its_reference_and_nobody_elses():
    model = tiny_model(tiny_config("2.3", **CHANNELS))
    mine, theirs = references(seed=5), references(seed=6)
    mixed = AV(
        video=VideoLatents(torch.stack([mine.video.latents[0], theirs.video.latents[1]]), FPS),
        audio=AudioLatents(torch.stack([mine.audio.latents[0], theirs.audio.latents[1]]), mine.audio.lengths),
    )
    one, other = (prepend_references(targets(), r) for r in (mine, mixed))
    before, after = model(model_inputs(one)), model(model_inputs(other))
    for name, t in one.items():
        torch.testing.assert_close(after[name][0, t.target], before[name][0, t.target])
        assert float((after[name][1, t.target] - before[name][1, t.target]).abs().max()) > 1e-3


def test_what_pads_a_reference_sound_is_not_heard():
    model = tiny_model(tiny_config("2.3", **CHANNELS))
    clean = references()
    noisy = replace(clean, audio=replace(clean.audio, latents=clean.audio.latents.clone()))
    noisy.audio.latents[0, :, 2:] = 100.0
    before, after = (model(model_inputs(prepend_references(targets(), r))) for r in (clean, noisy))
    torch.testing.assert_close(after.video, before.video)
    torch.testing.assert_close(after.audio[0, 5:], before.audio[0, 5:])
