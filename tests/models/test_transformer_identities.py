"""What must hold whatever the weights: streams, masks, levels, switches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ltx2_tiny import VERSIONS, relative_error, tiny_config, tiny_inputs, tiny_model

from musubi_tuner.common.av import AV
from musubi_tuner.models.attention_backends import attention
from musubi_tuner.models.ltx2.attention import Attention
from musubi_tuner.models.ltx2.inputs import Perturbations

CLOSE = 1e-5
DIFFERENT = 1e-3


def edit(inputs: AV, name: str, **changes) -> AV:
    return replace(inputs, **{name: replace(inputs[name], **changes)})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", ["video", "audio"])
def test_av_model_given_one_stream_is_the_model_of_that_stream(version, mode):
    config = tiny_config(version)
    both = tiny_model(config)
    alone = tiny_model(config, mode)
    alone.load_state_dict({name: both.state_dict()[name] for name in alone.state_dict()})
    inputs = AV(**{mode: tiny_inputs(config, per_token=True)[mode]})
    torch.testing.assert_close(both(inputs)[mode], alone(inputs)[mode], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["video", "audio"])
def test_refuses_a_stream_that_was_not_built(mode):
    config = tiny_config("2.3")
    with pytest.raises(ValueError, match=f"mode '{mode}' was given video and audio"):
        tiny_model(config, mode)(tiny_inputs(config))


@pytest.mark.parametrize("version", ["2.0", "2.3"])
@pytest.mark.parametrize("cross_timestep", ["hybrid", "own", "cross"])
def test_one_level_per_sample_equals_that_level_for_every_token(version, cross_timestep):
    config = tiny_config(version)
    model = tiny_model(config)
    inputs = tiny_inputs(config)
    spread = inputs.map(lambda s: replace(s, timesteps=s.timesteps.expand(-1, s.tokens.shape[1])))
    one, many = (model(x, cross_timestep=cross_timestep) for x in (inputs, spread))
    for name, out in one.items():
        assert relative_error(many[name], out) <= CLOSE


def test_many_distinct_levels_equal_the_samples_run_one_by_one():
    config = tiny_config("2.3")
    model = tiny_model(config)
    inputs = tiny_inputs(config, batch=3)
    levels = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    inputs = edit(inputs, "video", timesteps=levels)
    together = model(inputs)
    parts = ("tokens", "timesteps", "sigma", "coords", "context")
    for i in range(3):
        single = inputs.map(lambda s, i=i: replace(s, **{k: getattr(s, k)[i : i + 1] for k in parts}))
        assert relative_error(model(single).video[0], together.video[i]) <= CLOSE


def test_cross_timesteps_agree_only_when_all_levels_do():
    config = tiny_config("2.3")
    model = tiny_model(config)
    inputs = tiny_inputs(config)
    sigma = inputs.video.sigma
    same = inputs.map(lambda s: replace(s, sigma=sigma, timesteps=sigma[:, None]))
    hybrid, own, cross = (model(same, cross_timestep=mode) for mode in ("hybrid", "own", "cross"))
    for name, out in hybrid.items():
        assert relative_error(own[name], out) <= CLOSE
        assert relative_error(cross[name], out) <= CLOSE
    hybrid, own, cross = (model(inputs, cross_timestep=mode) for mode in ("hybrid", "own", "cross"))
    for name, out in hybrid.items():
        assert relative_error(own[name], out) > DIFFERENT
        assert relative_error(cross[name], out) > DIFFERENT


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_masked_padding_of_audio_changes_nothing(version):
    config = tiny_config(version)
    model = tiny_model(config)
    inputs = tiny_inputs(config, per_token=True)
    audio = inputs.audio
    valid = torch.tensor([1.0] * 5 + [0.0] * 3).expand(2, 1, 8)
    pad = torch.nn.functional.pad
    padded = AV(
        video=replace(inputs.video, cross_mask=valid),
        audio=replace(
            audio,
            tokens=pad(audio.tokens, (0, 0, 0, 3), value=9.0),
            timesteps=pad(audio.timesteps, (0, 3), value=0.7),
            coords=pad(audio.coords, (0, 0, 0, 3), value=1.5),
            attention_mask=valid,
        ),
    )
    expected, got = model(inputs), model(padded)
    assert relative_error(got.video, expected.video) <= CLOSE
    assert relative_error(got.audio[:, :5], expected.audio) <= CLOSE
    unmasked = replace(padded, video=replace(padded.video, cross_mask=None))
    assert relative_error(model(unmasked).video, expected.video) > DIFFERENT


def test_text_mask_equals_shorter_text():
    config = tiny_config("2.3")
    model = tiny_model(config)
    inputs = tiny_inputs(config)
    short = inputs.map(lambda s: replace(s, context=s.context[:, :4]))
    keep = torch.arange(7).expand(2, 7) < 4
    additive = torch.zeros(2, 7).masked_fill(~keep, -1e9)
    for mask in (keep, keep.int(), additive):
        masked = inputs.map(lambda s, mask=mask: replace(s, context_mask=mask))
        for name, out in model(short).items():
            assert relative_error(model(masked)[name], out) <= CLOSE


def test_text_mask_of_zeros_is_finite_and_uniform():
    config = tiny_config("2.3")
    model = tiny_model(config)
    inputs = tiny_inputs(config)
    inputs = edit(inputs, "video", context_mask=torch.zeros(2, 7, dtype=torch.bool))
    shuffled = edit(inputs, "video", context=inputs.video.context.flip(1))
    out = model(inputs).video
    assert out.isfinite().all()
    assert relative_error(model(shuffled).video, out) <= CLOSE


def test_fractional_attention_weight_multiplies_the_share_before_normalisation():
    """Two equal tokens of weight 1/2 weigh as much as one of weight 1."""
    config = tiny_config("2.3")
    model = tiny_model(config, "video")
    video = tiny_inputs(config).video
    double = replace(
        video,
        tokens=torch.cat([video.tokens, video.tokens[:, -1:]], dim=1),
        coords=torch.cat([video.coords, video.coords[:, :, -1:]], dim=2),
        attention_mask=torch.tensor([1.0] * 5 + [0.5, 0.5]).expand(1, 1, 7),
    )
    expected = model(AV(video=video)).video
    got = model(AV(video=double)).video
    assert relative_error(got[:, :6], expected) <= CLOSE
    assert relative_error(got[:, 6], expected[:, 5]) <= CLOSE


def test_cross_mask_separates_what_a_query_may_read():
    """The first half of the video reads two audio tokens, the other half all five."""
    config = tiny_config("2.3", num_layers=1)
    model = tiny_model(config)
    inputs = tiny_inputs(config)
    mask = torch.ones(2, 6, 5)
    mask[:, :3, 2:] = 0
    few = inputs.audio
    few = replace(few, tokens=few.tokens[:, :2], coords=few.coords[:, :, :2])
    # Audio self-attention must see all tokens in both runs, so switch it to its value path.
    skip = Perturbations(audio_self={0: torch.zeros(2)})
    got = model(edit(inputs, "video", cross_mask=mask), skip).video
    expected_first = model(AV(video=inputs.video, audio=few), skip).video
    expected_last = model(inputs, skip).video
    assert relative_error(got[:, :3], expected_first[:, :3]) <= CLOSE
    assert relative_error(got[:, 3:], expected_last[:, 3:]) <= CLOSE


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_tokens_that_do_not_read_text_do_not_feel_it(version):
    config = tiny_config(version, num_layers=1)
    model = tiny_model(config, "audio")
    audio = tiny_inputs(config).audio
    reads = torch.tensor([0.0, 0, 1, 1, 1]).expand(2, 5)
    other_text = replace(audio, context=audio.context + 1)
    first, second = (model(AV(audio=replace(a, reads_text=reads))).audio for a in (audio, other_text))
    torch.testing.assert_close(first[:, :2], second[:, :2])
    assert relative_error(first[:, 2:], second[:, 2:]) > DIFFERENT
    everyone = model(AV(audio=replace(audio, reads_text=torch.ones(2, 5)))).audio
    torch.testing.assert_close(everyone, model(AV(audio=audio)).audio)


def test_token_order_does_not_matter():
    config = tiny_config("2.3")
    model = tiny_model(config)
    inputs = tiny_inputs(config, per_token=True)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    v = inputs.video
    shuffled = edit(
        inputs,
        "video",
        tokens=v.tokens[:, order],
        timesteps=v.timesteps[:, order],
        coords=v.coords[:, :, order],
    )
    expected, got = model(inputs), model(shuffled)
    assert relative_error(got.video, expected.video[:, order]) <= CLOSE
    assert relative_error(got.audio, expected.audio) <= CLOSE


def test_self_attention_sees_only_differences_of_positions():
    config = tiny_config("2.3")
    model = tiny_model(config)
    inputs = tiny_inputs(config)
    moved = inputs.map(lambda s: replace(s, coords=s.coords + torch.tensor([[[[-2.5]]]])))
    for name, out in model(inputs).items():
        assert relative_error(model(moved)[name], out) <= 1e-3


def test_disabled_stream_stays_as_it_is_but_is_still_read():
    config = tiny_config("2.3")
    model = tiny_model(config)
    inputs = tiny_inputs(config)
    frozen = edit(inputs, "audio", enabled=False)
    seen = []
    hook = model.transformer_blocks[-1].register_forward_hook(lambda _m, _a, out: seen.append(out))
    video = model(frozen).video
    hook.remove()
    torch.testing.assert_close(seen[0][1], model.audio_patchify_proj(inputs.audio.tokens), rtol=0, atol=0)
    assert relative_error(video, model(inputs).video) > DIFFERENT
    assert relative_error(video, model(replace(inputs, audio=None)).video) > DIFFERENT
    # Whatever only steps 1, 2 and 4 of the frozen stream read has no influence.
    other_text = edit(frozen, "audio", context=inputs.audio.context + 1)
    torch.testing.assert_close(model(other_text).video, video, rtol=0, atol=0)


def test_perturbations_are_per_sample_and_per_direction():
    config = tiny_config("2.3")
    model = tiny_model(config)
    inputs = tiny_inputs(config)
    plain = model(inputs)
    keep = torch.tensor([1.0, 0.0])
    affected = {"video_self": "video", "audio_self": "audio", "a2v": "video", "v2a": "audio"}
    for field, changed in affected.items():
        out = model(inputs, Perturbations(**{field: {1: keep}}))
        other = "audio" if changed == "video" else "video"
        torch.testing.assert_close(out[changed][0], plain[changed][0])
        assert relative_error(out[changed][1], plain[changed][1]) > DIFFERENT
        if field in ("a2v", "v2a"):  # in the last block the other stream does not feel it any more
            torch.testing.assert_close(out[other], plain[other])
    ones = Perturbations(video_self={0: torch.ones(2)}, a2v={0: torch.ones(2)})
    for name, out in model(inputs, ones).items():
        torch.testing.assert_close(out, plain[name])


def test_attention_without_masks_hands_none_to_the_kernel():
    config = tiny_config("2.3")
    model = tiny_model(config)
    masks = []

    def spy(q, k, v, mask):
        masks.append(mask)
        return attention(q, k, v, mask)

    for module in model.modules():
        if isinstance(module, Attention):
            module.attention_function = spy
    model(tiny_inputs(config))
    assert masks == [None] * 6 * config.num_layers


@pytest.mark.parametrize("version", VERSIONS)
def test_bf16_stays_near_fp32(version):
    config = tiny_config(version)
    exact = tiny_model(config)
    rough = tiny_model(config).to(torch.bfloat16)
    inputs = tiny_inputs(config, per_token=True)
    rounded = inputs.map(lambda s: replace(s, tokens=s.tokens.to(torch.bfloat16), context=s.context.to(torch.bfloat16)))
    for name, out in exact(inputs).items():
        got = rough(rounded)[name]
        assert got.dtype == torch.bfloat16
        assert relative_error(got.float(), out) < 0.05
