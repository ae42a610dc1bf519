"""Keep maps and what freezing does to noise, weights and gradients."""

import pytest
import torch

from musubi_tuner.common.av import AV
from musubi_tuner.common.seeding import generator
from musubi_tuner.conditioning import intrinsic
from musubi_tuner.conditioning.intrinsic import (
    apply_keep,
    condition_first_frame,
    condition_masks,
    draw_gates,
    first_frame_keep,
    mask_keep,
    prefix_keep,
    spatial_crop_keep,
    suffix_keep,
)
from musubi_tuner.diffusion.losses import task_losses, total
from musubi_tuner.diffusion.tokens import NoisedTokens

GRID = (4, 2, 3)
N = 24


def tokens(batch: int = 4, grid: tuple[int, int, int] = GRID, level: float = 0.7) -> NoisedTokens:
    n = grid[0] * grid[1] * grid[2]
    g = torch.Generator().manual_seed(0)
    return NoisedTokens(
        clean=torch.randn(batch, n, 5, generator=g),
        noise=torch.randn(batch, n, 5, generator=g),
        t=torch.full((batch, 1), level),
        sigma=torch.full((batch,), level),
        coords=torch.zeros(batch, 3, n, 2),
        weight=torch.ones(batch, n),
        grid=grid,
        target=slice(0, n),
    )


def gens(count: int) -> list[torch.Generator]:
    return [generator("gate", i) for i in range(count)]


def test_conditioned_tokens_are_bitwise_clean_unsupervised_and_without_gradient():
    t = condition_first_frame(AV(video=tokens()), 1.0, gens(4)).video
    first, rest = slice(0, 6), slice(6, N)
    assert torch.equal(t.noisy[:, first], t.clean[:, first])
    assert bool((t.t[:, first] == 0).all())
    assert bool((t.weight[:, first] == 0).all())
    torch.testing.assert_close(t.noisy[:, rest], tokens().noisy[:, rest])
    assert torch.equal(t.sigma, tokens().sigma)
    prediction = torch.randn_like(t.clean).requires_grad_()
    total(task_losses(AV(video=prediction), AV(video=t))).backward()
    assert bool((prediction.grad[:, first] == 0).all())
    assert bool((prediction.grad[:, rest] != 0).all())


def test_probability_zero_and_undrawn_batches_stay_at_one_level_a_sample():
    before = AV(video=tokens())
    assert condition_first_frame(before, 0.0, gens(4)) is before
    undrawn = apply_keep(before.video, first_frame_keep(GRID), torch.zeros(4, dtype=torch.bool))
    assert undrawn is before.video
    assert undrawn.t.shape == (4, 1)


def test_each_sample_draws_for_itself():
    gates = draw_gates(0.3, gens(1000))
    assert float(gates.float().mean()) == pytest.approx(0.3, abs=0.05)
    t = condition_first_frame(AV(video=tokens(8)), 0.5, gens(8)).video
    conditioned = (t.t[:, 0] == 0).tolist()
    assert True in conditioned
    assert False in conditioned
    alone = [bool(draw_gates(0.5, [generator("gate", i)])[0]) for i in range(8)]
    assert conditioned == alone


@pytest.mark.parametrize("grid", [(1, 2, 3), (1, 1, 1)])
def test_single_images_are_not_conditioned(grid):
    before = AV(video=tokens(grid=grid))
    assert condition_first_frame(before, 1.0, gens(4)) is before


def test_condition_that_covers_the_clip_is_not_applied():
    before = tokens()
    assert apply_keep(before, prefix_keep(GRID, 4), torch.ones(4, dtype=torch.bool)) is before


def test_audio_alone_has_no_first_frame():
    before = AV(audio=tokens())
    assert condition_first_frame(before, 1.0, gens(4)) is before


def test_prefix_and_suffix_together_leave_nothing_to_learn():
    everyone = torch.ones(4, dtype=torch.bool)
    t = apply_keep(tokens(), prefix_keep(GRID, 3), everyone)
    t = apply_keep(t, suffix_keep(GRID, 1), everyone)
    assert float(t.weight.sum()) == 0
    assert float(t.t.abs().sum()) == 0


def test_prefix_and_suffix_maps():
    assert torch.equal(first_frame_keep(GRID), prefix_keep(GRID, 1))
    assert prefix_keep(GRID, 2).tolist() == [1.0] * 12 + [0.0] * 12
    assert suffix_keep(GRID, 1).tolist() == [0.0] * 18 + [1.0] * 6
    assert suffix_keep((5, 1, 1), 2).tolist() == [0, 0, 0, 1, 1]  # a sound


def test_crop_is_in_pixels_and_clamped():
    assert spatial_crop_keep(GRID, (0, 0, 32, 64)).reshape(GRID).sum(dim=(1, 2)).tolist() == [2.0] * 4
    assert float(spatial_crop_keep(GRID, (0, 0, 9999, 9999)).min()) == 1
    inside = spatial_crop_keep(GRID, (32, 64, 64, 96)).reshape(GRID)
    assert float(inside[:, 1, 2].min()) == 1
    assert float(inside.sum()) == 4


def test_soft_masks_scale_the_level_and_compose_by_product():
    mask = torch.full((4, *GRID), 0.25)
    everyone = torch.ones(4, dtype=torch.bool)
    t = apply_keep(tokens(level=0.8), mask_keep(mask), everyone)
    torch.testing.assert_close(t.t, torch.full((4, N), 0.6))
    assert float(t.weight.sum()) == 0
    twice = apply_keep(t, mask_keep(mask), everyone)
    torch.testing.assert_close(twice.t, torch.full((4, N), 0.45))
    assert mask_keep(mask, threshold=0.5).max() == 0
    assert mask_keep(mask, threshold=0.2).min() == 1


@pytest.mark.parametrize(("marked", "told"), [(24, True), (23, False)])
def test_a_mask_over_the_whole_clip_is_told(monkeypatch: pytest.MonkeyPatch, marked: int, told: bool):
    messages: list[str] = []
    monkeypatch.setattr(intrinsic, "warn_once", lambda logger, key, text, *values: messages.append(text % values))
    mask = torch.zeros(4, N)
    mask[1, :marked] = 1.0
    masked = condition_masks(AV(video=tokens()), AV(video=mask.reshape(4, *GRID))).video
    assert masked.weight.sum(dim=1).tolist() == [N, N - marked, N, N]
    assert bool(messages) == told


@pytest.mark.parametrize(("lengths", "told"), [([5, 3], True), ([5, 4], False), ([5, 0], False)])
def test_a_mask_over_a_shorter_sound_is_told(monkeypatch: pytest.MonkeyPatch, lengths: list[int], told: bool):
    messages: list[str] = []
    monkeypatch.setattr(intrinsic, "warn_once", lambda logger, key, text, *values: messages.append(text % values))
    mask = torch.zeros(2, 5)
    mask[1, :3] = 1.0
    condition_masks(AV(audio=tokens(2, (5, 1, 1))), AV(audio=mask), torch.tensor(lengths))
    assert bool(messages) == told


def test_blending_clean_values_is_the_flow_point_at_a_lower_level():
    t, keep = tokens(), mask_keep(torch.rand(4, *GRID))
    frozen = t.freeze(keep)
    blended = keep[..., None] * t.clean + (1 - keep[..., None]) * t.noisy
    torch.testing.assert_close(frozen.noisy, blended)


def test_maps_address_the_target_behind_references():
    from dataclasses import replace

    t = replace(tokens(grid=(2, 2, 2)), grid=(1, 2, 2), target=slice(4, 8))
    kept = apply_keep(t, torch.tensor([1.0, 0, 0, 0]), torch.ones(4, dtype=torch.bool))
    assert kept.t[0].tolist() == pytest.approx([0.7] * 4 + [0.0] + [0.7] * 3)
