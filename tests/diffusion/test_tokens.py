"""Token order, positions and masks."""

from dataclasses import replace

import torch

from musubi_tuner.diffusion.tokens import (
    NoisedTokens,
    audio_coords,
    patchify_audio,
    patchify_video,
    unpatchify_audio,
    unpatchify_video,
    video_coords,
)

GRID = (3, 2, 4)


def test_video_tokens_go_frame_by_frame_and_row_by_row():
    latents = torch.randn(2, 5, *GRID)
    tokens = patchify_video(latents)
    assert torch.equal(tokens[1, (2 * 2 + 1) * 4 + 3], latents[1, :, 2, 1, 3])
    assert torch.equal(unpatchify_video(tokens, GRID), latents)


def test_audio_tokens_are_channel_major():
    latents = torch.randn(2, 8, 5, 16)
    tokens = patchify_audio(latents)
    assert float(tokens[0, 3, 6 * 16 + 11]) == float(latents[0, 6, 3, 11])
    assert torch.equal(unpatchify_audio(tokens), latents)


def test_video_positions_are_seconds_and_pixels():
    coords = video_coords(GRID, torch.tensor([25.0, 10.0])).unflatten(2, GRID)  # [B, 3, F, H, W, 2]
    frames = torch.tensor([[0.0, 1.0], [1.0, 9.0], [9.0, 17.0]])  # frame 0 alone, then groups of 8
    torch.testing.assert_close(coords[0, 0, :, 1, 2], frames / 25)
    torch.testing.assert_close(coords[1, 0, :, 0, 0], frames / 10)
    assert coords[0, 1, 2, :, 3].tolist() == [[0, 32], [32, 64]]
    assert coords[0, 2, 0, 1].tolist() == [[0, 32], [32, 64], [64, 96], [96, 128]]
    assert coords.dtype == torch.float32


def test_audio_positions_are_seconds():
    expected = torch.tensor([[0, 0.01], [0.01, 0.05], [0.05, 0.09], [0.09, 0.13]])
    coords = audio_coords(4, 2)
    assert coords.shape == (2, 1, 4, 2)
    torch.testing.assert_close(coords[1, 0], expected)


def test_positions_of_a_long_sound_stay_distinct():
    assert audio_coords(1500, 1)[0, 0, :, 0].unique().numel() == 1500


def tokens(count: int, grid: tuple[int, int, int]) -> NoisedTokens:
    return NoisedTokens(
        clean=torch.randn(2, count, 4),
        noise=torch.randn(2, count, 4),
        t=torch.full((2, 1), 0.5),
        sigma=torch.full((2,), 0.5),
        coords=torch.zeros(2, 1, count, 2),
        weight=torch.ones(2, count),
        grid=grid,
        target=slice(0, count),
    )


def test_model_input_masks_padding_in_both_streams():
    video, audio = tokens(6, (1, 2, 3)), tokens(3, (3, 1, 1))
    audio = replace(audio, valid=torch.tensor([[True, True, True], [True, False, False]]))
    context = torch.randn(2, 7, 5)
    seen = audio.as_input(context, None, other=video, dtype=torch.bfloat16)
    assert seen.attention_mask.tolist() == [[[1, 1, 1]], [[1, 0, 0]]]
    assert seen.cross_mask is None
    looking = video.as_input(context, None, other=audio, dtype=torch.bfloat16)
    assert looking.attention_mask is None
    assert looking.cross_mask.tolist() == [[[1, 1, 1]], [[1, 0, 0]]]
    assert (looking.tokens.dtype, looking.context.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {looking.timesteps.dtype, looking.sigma.dtype, looking.coords.dtype} == {torch.float32}


def test_tokens_hidden_from_the_other_stream_join_the_padding():
    video = tokens(6, (1, 2, 3))
    audio = replace(
        tokens(3, (3, 1, 1)),
        valid=torch.tensor([[True, True, True], [True, True, False]]),
        seen_by_other=torch.tensor([[False, True, True], [False, True, True]]),
    )
    looking = video.as_input(torch.zeros(2, 1, 1), None, other=audio, dtype=torch.float32)
    assert looking.cross_mask.tolist() == [[[0, 1, 1]], [[0, 1, 0]]]
