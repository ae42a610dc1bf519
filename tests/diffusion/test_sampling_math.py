"""Schedule, Euler steps and guidance against numbers, closed forms and identities."""

import pytest
import torch

from musubi_tuner.common.av import AV
from musubi_tuner.common.errors import UserError
from musubi_tuner.diffusion.guidance import Guidance, guided, perturbations
from musubi_tuner.diffusion.samplers import SAMPLERS, sigma_steps, to_clean
from musubi_tuner.diffusion.schedules import ltx2_sigmas


def test_schedule_of_eight_steps():
    expected = torch.tensor([1, 0.96571, 0.92187, 0.86386, 0.78345, 0.66458, 0.471, 0.1, 0])
    torch.testing.assert_close(ltx2_sigmas(8), expected, atol=6e-6, rtol=0)


@pytest.mark.parametrize("num_steps", [2, 3, 20, 1000])
def test_schedule_falls_from_one_over_a_tenth_to_zero(num_steps):
    sigmas = ltx2_sigmas(num_steps)
    assert sigmas.shape == (num_steps + 1,)
    assert bool((sigmas.diff() < 0).all())
    torch.testing.assert_close(sigmas[[0, -2, -1]], torch.tensor([1.0, 0.1, 0.0]))


def test_schedule_of_one_step():
    assert ltx2_sigmas(1).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="at least 1"):
        ltx2_sigmas(0)


def gaussian_denoiser(mean: float, std: float):
    """The exact posterior mean of clean values drawn from N(mean, std^2)."""

    def denoise(tokens: AV, sigma: float) -> AV:
        gain = (1 - sigma) * std**2 / ((1 - sigma) ** 2 * std**2 + sigma**2)
        return tokens.map(lambda x: mean + gain * (x - (1 - sigma) * mean))

    return denoise


def test_euler_is_exact_on_a_straight_flow():
    """All mass at one point: the flow is a straight line, which any number of steps follows exactly."""
    noise = AV(video=torch.randn(2, 5, 3), audio=torch.randn(2, 4, 3))
    for num_steps in (1, 3, 8):
        result = SAMPLERS["euler"](gaussian_denoiser(1.5, 0.0), noise, sigma_steps(ltx2_sigmas(num_steps)))
        for _, x in result.items():
            torch.testing.assert_close(x, torch.full_like(x, 1.5))


def test_euler_converges_to_the_closed_form_on_a_gaussian():
    """The flow from N(0, 1) to N(m, s^2) with independent ends is x -> m + s x; the error falls as 1 / steps."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[None, :, None]
    exact = 0.7 + 0.4 * x

    def error(num_steps: int) -> float:
        sigmas = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        result = SAMPLERS["euler"](gaussian_denoiser(0.7, 0.4), AV(video=x), sigma_steps(sigmas))
        return float((result.video - exact).abs().max())

    assert error(400) < 5e-3
    assert error(100) / error(400) == pytest.approx(4, rel=0.25)


def test_tokens_with_their_own_level_follow_their_own_flow():
    clean, noise = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    keep = torch.tensor([[1.0, 0.6, 0.0]])
    t0 = 1 - keep  # at sigma 1
    start = clean + t0[..., None] * (noise - clean)

    def denoise(tokens: AV, sigma: float) -> AV:
        return AV(video=to_clean(tokens.video, noise - clean, sigma * (1 - keep)))

    result = SAMPLERS["euler"](denoise, AV(video=start), sigma_steps(ltx2_sigmas(5))).video
    torch.testing.assert_close(result, clean)
    assert torch.equal(result[:, 0], clean[:, 0])


def predictions(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(names)}


def test_neutral_guidance_is_the_conditional_pass():
    guidance = Guidance()
    assert guidance.passes(("video", "audio")) == ("cond",)
    p = predictions("cond", "neg", "ptb", "iso")
    assert guided(guidance, "video", p) is p["cond"]


def test_guidance_formula():
    p = predictions("cond", "neg", "ptb", "iso")
    guidance = Guidance(cfg=3.0, audio_cfg=7.0, stg=1.5, stg_blocks=(1,), modality=2.5)
    assert guidance.passes(("video", "audio")) == ("neg", "cond", "ptb", "iso")
    c = p["cond"]
    for name, cfg in (("video", 3.0), ("audio", 7.0)):
        expected = c + (cfg - 1) * (c - p["neg"]) + 1.5 * (c - p["ptb"]) + 1.5 * (c - p["iso"])
        torch.testing.assert_close(guided(guidance, name, p), expected)


def test_classifier_free_guidance_is_the_usual_form():
    p = predictions("cond", "neg")
    expected = p["neg"] + 4.0 * (p["cond"] - p["neg"])
    torch.testing.assert_close(guided(Guidance(cfg=4.0), "video", p), expected, atol=1e-5, rtol=1e-5)


def test_full_rescale_restores_the_standard_deviation():
    p = predictions("cond", "neg")
    result = guided(Guidance(cfg=6.0, rescale=1.0), "video", p)
    torch.testing.assert_close(result.std(dim=(1, 2)), p["cond"].std(dim=(1, 2)))


def test_passes_follow_the_modalities_at_hand():
    assert Guidance(modality=3.0).passes(("video",)) == ("cond",)
    only_audio = Guidance(cfg=1.0, audio_cfg=4.0)
    assert only_audio.passes(("video",)) == ("cond",)
    assert only_audio.passes(("video", "audio")) == ("neg", "cond")


def test_perturbations_act_on_their_pass_alone():
    guidance = Guidance(cfg=2.0, stg=1.0, stg_blocks=(1,), modality=2.0, stg_mode="stg_v")
    passes = guidance.passes(("video", "audio"))
    p = perturbations(guidance, passes, num_blocks=3, batch=1, device="cpu")
    assert set(p.video_self) == {1}
    assert p.video_self[1].tolist() == [1, 1, 0, 1]
    assert not p.audio_self
    assert set(p.a2v) == set(p.v2a) == {0, 1, 2}
    assert p.a2v[0].tolist() == [1, 1, 1, 0]
    assert perturbations(Guidance(cfg=2.0), ("neg", "cond"), num_blocks=3, batch=1, device="cpu") is None


def test_unknown_stg_block_is_named():
    with pytest.raises(UserError, match=r"\[29\].*blocks 0 to 1"):
        perturbations(Guidance(stg=1.0, stg_blocks=(29,)), ("cond", "ptb"), num_blocks=2, batch=1, device="cpu")
