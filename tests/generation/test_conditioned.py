"""Samples with a given first frame or with references: what the transformer is shown, and what comes out."""

from dataclasses import replace

import pytest
import torch
from ltx2_tiny import tiny_config, tiny_model

from musubi_tuner.common.av import AV
from musubi_tuner.common.errors import UserError
from musubi_tuner.conditioning.intrinsic import first_frame_keep
from musubi_tuner.dataset.batch import TextEmbeds
from musubi_tuner.diffusion.samplers import to_clean
from musubi_tuner.diffusion.schedules import ltx2_sigmas
from musubi_tuner.diffusion.tokens import (
    NoisedTokens,
    audio_coords,
    patchify_audio,
    patchify_video,
    unpatchify_video,
    video_coords,
)
from musubi_tuner.generation.conditioned import condition
from musubi_tuner.generation.conditions import SampleLatents, check_conditions
from musubi_tuner.generation.pipeline import generate_latents, initial_noise
from musubi_tuner.generation.prompt_cache import EncodedPrompt
from musubi_tuner.generation.prompts import SamplePrompt

PROMPT = SamplePrompt(prompt="a cat", width=96, height=64, frame_count=17, sample_steps=3, seed=4)
GRID = (3, 2, 3)
FRAME = GRID[1] * GRID[2]
CPU = torch.device("cpu")
GUIDANCE = {
    "none": {},
    "cfg": {"cfg_scale": 4.0},
    "rescaled": {"cfg_scale": 4.0, "guidance_rescale": 0.7},
    "all": {"cfg_scale": 3.0, "stg_scale": 1.0, "modality_scale": 2.0, "guidance_rescale": 1.0},
}


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def model(request):
    channels = {f"{s}{d}_channels": 8 for s in ("", "audio_") for d in ("in", "out")}
    return tiny_model(tiny_config(request.param, **channels))


@pytest.fixture(scope="module")
def encoded(model) -> EncodedPrompt:
    g, config = torch.Generator().manual_seed(2), model.config
    widths = (20, 20) if config.has_caption_projection else (config.width, config.audio_width)
    text = [TextEmbeds(*(torch.randn(1, 7, w, generator=g) for w in widths), mask=None) for _ in range(2)]
    return EncodedPrompt(*text)


@pytest.fixture(scope="module")
def latents() -> SampleLatents:
    g = torch.Generator().manual_seed(9)
    return SampleLatents(
        image=torch.randn(1, 8, 1, *GRID[1:], generator=g),
        reference=torch.randn(1, 8, 2, *GRID[1:], generator=g),
        reference_audio=torch.randn(1, 8, 5, 1, generator=g),
    )


def generate(model, encoded, prompt=PROMPT, mode="av", **options) -> AV:
    return generate_latents(model, encoded, prompt, mode=mode, device=CPU, dtype=torch.float32, **options)


def inputs_of(model, encoded, prompt=PROMPT, mode="av", **options) -> tuple[list, AV]:
    """What the transformer was shown at each step, and the sample."""
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        return seen, generate(model, encoded, prompt, mode, **options)
    finally:
        hook.remove()


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_first_frame_is_in_the_sample_bit_for_bit(model, encoded, latents, guidance, dtype):
    model, prompt = model.to(dtype), replace(PROMPT, **GUIDANCE[guidance])
    try:
        sample = generate_latents(
            model, encoded, prompt, mode="av", device=CPU, dtype=dtype, latents=SampleLatents(latents.image)
        )
    finally:
        model.to(torch.float32)
    assert torch.equal(sample.video[:, :, :1], latents.image)
    assert not torch.isclose(sample.video[:, :, 1:], initial_noise(prompt, "av", channels=8).video[:, :, 1:]).any()
    assert sample.audio.isfinite().all()


def test_tokens_of_the_first_frame_are_at_level_0_throughout(model, encoded, latents):
    prompt = replace(PROMPT, cfg_scale=2.0)
    seen, _ = inputs_of(model, encoded, prompt, latents=SampleLatents(latents.image))
    given = patchify_video(latents.image)
    for step, sigma in zip(seen, ltx2_sigmas(prompt.sample_steps)[:-1], strict=True):
        video, audio = step.video, step.audio
        assert torch.equal(video.timesteps[:, :FRAME], torch.zeros(2, FRAME))
        assert torch.equal(video.timesteps[:, FRAME:], sigma.expand(2, 2 * FRAME))
        assert torch.equal(video.sigma, sigma.expand(2)), "the sample's own level is not that of its first frame"
        assert torch.equal(audio.timesteps, sigma.expand(2, 1))
        assert torch.equal(video.tokens[:, :FRAME], given.expand(2, -1, -1))


def test_without_the_mask_all_tokens_are_said_to_be_as_noisy(model, encoded, latents):
    first = SampleLatents(latents.image)
    seen, sample = inputs_of(model, encoded, latents=first, fixed_level=False)
    assert all(step.video.timesteps.shape == (1, 1) for step in seen)
    assert torch.equal(sample.video[:, :, :1], latents.image)
    assert not torch.allclose(sample.video, generate(model, encoded, latents=first).video)


def noised(model, prompt, *, clean=None) -> NoisedTokens:
    """The state of training at level 1."""
    noise = patchify_video(initial_noise(prompt, "video", channels=8).video)
    n = noise.shape[1]
    return NoisedTokens(
        clean=torch.zeros_like(noise) if clean is None else clean,
        noise=noise,
        t=torch.ones(1, n),
        sigma=torch.ones(1),
        coords=video_coords(GRID, torch.tensor([25.0])),
        weight=torch.ones(1, n),
        grid=GRID,
        target=slice(0, n),
    )


def test_one_step_equals_the_conditioning_of_training(model, encoded, latents):
    """With one step the sample is the prediction of the clean tokens from pure noise."""
    one = replace(PROMPT, sample_steps=1)
    sample = generate(model, encoded, one, "video", latents=SampleLatents(latents.image)).video
    clean = torch.zeros(1, 8, *GRID)
    clean[:, :, :1] = latents.image
    state = noised(model, one, clean=patchify_video(clean)).freeze(first_frame_keep(GRID)[None])
    with torch.no_grad():
        velocity = model(AV(video=state.as_input(encoded.positive.video, None, dtype=torch.float32))).video
    expected = to_clean(state.noisy, velocity, state.t)
    torch.testing.assert_close(sample, unpatchify_video(expected, GRID))


def test_one_step_with_references_by_hand(model, encoded, latents):
    one = replace(PROMPT, sample_steps=1)
    sample = generate(model, encoded, one, latents=replace(latents, image=None))
    noise = initial_noise(one, "av", channels=8)
    fps = torch.tensor([25.0])
    parts = {
        "video": (
            *(patchify_video(x) for x in (latents.reference, noise.video)),
            *(video_coords(grid, fps) for grid in ((2, *GRID[1:]), GRID)),
        ),
        "audio": (
            *(patchify_audio(x) for x in (latents.reference_audio, noise.audio)),
            *(audio_coords(steps, 1) for steps in (5, one.audio_steps)),
        ),
    }
    seen, _ = inputs_of(model, encoded, one, latents=replace(latents, image=None))
    for name, (reference, target, own, coords) in parts.items():
        stream, m = seen[0][name], reference.shape[1]
        assert torch.equal(stream.tokens, torch.cat([reference, target], dim=1))
        assert torch.equal(stream.coords, torch.cat([own, coords], dim=2))
        assert stream.timesteps[0].tolist() == [0.0] * m + [1.0] * target.shape[1]
        assert stream.sigma.tolist() == [1.0]
    with torch.no_grad():
        velocity = model(seen[0])
    video = parts["video"][1] - velocity.video[:, 2 * FRAME :]
    audio = parts["audio"][1] - velocity.audio[:, 5:]
    torch.testing.assert_close(sample.video, unpatchify_video(video, GRID))
    torch.testing.assert_close(patchify_audio(sample.audio), audio)


def test_references_steer_the_sample_but_are_not_in_it(model, encoded, latents):
    plain = generate(model, encoded)
    for one in ({"reference": latents.reference}, {"reference_audio": latents.reference_audio}):
        sample = generate(model, encoded, latents=SampleLatents(**one))
        for name, x in sample.items():
            assert x.shape == plain[name].shape
            assert not torch.allclose(x, plain[name])


def test_reference_and_first_frame_together(model, encoded, latents):
    seen, sample = inputs_of(model, encoded, mode="video", latents=SampleLatents(latents.image, latents.reference))
    assert torch.equal(sample.video[:, :, :1], latents.image)
    assert (seen[0].video.timesteps[0, : 3 * FRAME] == 0).all(), "two latent frames of reference, then the first frame"
    assert (seen[0].video.timesteps[0, 3 * FRAME :] == 1).all()


def test_a_smaller_reference_covers_the_whole_picture(latents):
    prompt = replace(PROMPT, width=192, height=128)
    coords = condition(prompt, SampleLatents(reference=latents.reference), "video", CPU).video.coords
    reference, target = coords[0, 1:, : 2 * FRAME], coords[0, 1:, 2 * FRAME :]
    assert reference.amax(dim=(1, 2)).tolist() == target.amax(dim=(1, 2)).tolist() == [128, 192]
    assert coords[0, 0, : 2 * FRAME].max() == pytest.approx(9 / 25), "time is not stretched"


@pytest.mark.parametrize("size", [(96, 128), (128, 64), (64, 64)])
def test_a_reference_of_another_shape_is_refused(latents, size):
    prompt = replace(PROMPT, width=size[0], height=size[1])
    with pytest.raises(UserError, match=f"96x64 pixels for samples of {size[0]}x{size[1]}"):
        condition(prompt, SampleLatents(reference=latents.reference), "video", CPU)


def test_negative_positions_end_one_step_before_the_sample(latents):
    only = SampleLatents(reference_audio=latents.reference_audio)
    bounds = condition(PROMPT, only, "av", CPU, negative_positions=True).audio.coords[0, 0]
    torch.testing.assert_close(bounds[4], torch.tensor([-0.08, -0.04]))
    assert bounds[:5].max() <= -0.04 + 1e-6
    assert torch.equal(bounds[5:], condition(PROMPT, only, "av", CPU).audio.coords[0, 0, 5:])
    assert bounds[5, 0] == 0


@pytest.mark.parametrize(
    ("field", "mode", "message"),
    [
        ("image_path", "audio", r"prompt 1 \(a cat\): --i gives a first frame, but no video is generated"),
        ("v2v_ref_path", "audio", "--v gives a video reference, but no video"),
        ("ref_audio_path", "video", "--ra gives an audio reference, but no audio"),
    ],
)
def test_conditions_on_what_is_not_generated_are_refused(field, mode, message):
    prompts = [PROMPT, replace(PROMPT, **{field: "x"})]
    with pytest.raises(UserError, match=message):
        check_conditions(prompts, mode)
    check_conditions(prompts, "av")
