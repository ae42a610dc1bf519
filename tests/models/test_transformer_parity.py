"""Our transformer against diffusers' with the same random weights, in fp32: outputs and input gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ltx2_tiny import (
    VERSIONS,
    diffusers_twin,
    relative_error,
    run_diffusers,
    tiny_config,
    tiny_inputs,
    tiny_model,
)
from torch import Tensor

from musubi_tuner.common.av import AV
from musubi_tuner.models.ltx2.inputs import ModalityInput, Perturbations

TOLERANCE = 1e-5


def with_grad(inputs: AV[ModalityInput]) -> AV[ModalityInput]:
    return inputs.map(
        lambda s: replace(
            s,
            tokens=s.tokens.clone().requires_grad_(True),
            context=s.context.clone().requires_grad_(True),
        )
    )


def gradients(inputs: AV[ModalityInput], outputs: AV[Tensor]) -> list[Tensor]:
    """Of one random functional of all outputs, to tokens and text of the streams with an output."""
    generator = torch.Generator().manual_seed(5)
    total = sum((out * torch.randn(out.shape, generator=generator)).sum() for _, out in outputs.items())
    leaves = [leaf for name, _ in outputs.items() for leaf in (inputs[name].tokens, inputs[name].context)]
    return torch.autograd.grad(total, leaves)


def assert_same(ours: AV[Tensor], our_inputs, theirs: AV[Tensor], their_inputs) -> None:
    for name, out in ours.items():
        assert relative_error(out, theirs[name]) <= TOLERANCE, name
    pairs = zip(gradients(our_inputs, ours), gradients(their_inputs, theirs), strict=True)
    for ours_grad, theirs_grad in pairs:
        assert relative_error(ours_grad, theirs_grad) <= TOLERANCE


def compare(config, inputs: AV[ModalityInput], cross_timestep="hybrid", **extra) -> None:
    model = tiny_model(config)
    twin = diffusers_twin(model)
    ours_in, theirs_in = with_grad(inputs), with_grad(inputs)
    assert_same(
        model(ours_in, cross_timestep=cross_timestep),
        ours_in,
        run_diffusers(twin, theirs_in, cross_timestep, **extra),
        theirs_in,
    )


@pytest.mark.parametrize("cross_timestep", ["hybrid", "own", "cross"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_av(version, per_token, cross_timestep):
    config = tiny_config(version)
    compare(config, tiny_inputs(config, per_token=per_token), cross_timestep)


@pytest.mark.parametrize("version", VERSIONS)
def test_interleaved_rope(version):
    config = tiny_config(version, rope_type="interleaved")
    compare(config, tiny_inputs(config, per_token=True))


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("rope_type", ["split", "interleaved"])
def test_negative_and_scaled_positions(rope_type, precision):
    config = tiny_config("2.3", rope_type=rope_type, frequencies_precision=precision)
    inputs = tiny_inputs(config)
    stretch = torch.tensor([1.0, 2.0, 2.0])[:, None, None]
    moved = AV(
        video=replace(inputs.video, coords=inputs.video.coords * stretch),
        audio=replace(inputs.audio, coords=inputs.audio.coords - 3.0),
    )
    compare(config, moved)


@pytest.mark.parametrize("version", VERSIONS)
def test_text_and_self_masks(version):
    config = tiny_config(version)
    inputs = tiny_inputs(config, per_token=True)
    generator = torch.Generator().manual_seed(3)
    text = (torch.rand(2, 7, generator=generator) < 0.6).long()
    text[:, 0] = 1
    own = (torch.rand(2, 6, 6, generator=generator) < 0.7).float()
    own.diagonal(dim1=1, dim2=2).fill_(1)
    masked = AV(
        video=replace(inputs.video, context_mask=text, attention_mask=own),
        audio=replace(inputs.audio, context_mask=text),
    )
    compare(config, masked)


def test_keyframe_marker():
    config = tiny_config("2.5")
    inputs = tiny_inputs(config)
    mask = torch.tensor([1.0, 1, 0, 0, 0, 0]).expand(2, 6).unsqueeze(-1)
    marked = replace(inputs, video=replace(inputs.video, keyframes_mask=mask))
    compare(config, marked)
    model = tiny_model(config)
    assert relative_error(model(marked).video, model(inputs).video) > 1e-3


@pytest.mark.parametrize("flag", [{"use_prompt_adaln_single": False}, {"av_ca_timestep_scale_multiplier": 1.0}])
def test_flags_of_no_release(flag):
    config = tiny_config("2.3", **flag)
    compare(config, tiny_inputs(config))


@pytest.mark.parametrize("mode", ["video", "audio"])
@pytest.mark.parametrize("version", VERSIONS)
def test_one_stream_alone(version, mode):
    config = tiny_config(version)
    both = tiny_model(config)
    alone = tiny_model(config, mode)
    alone.load_state_dict({name: both.state_dict()[name] for name in alone.state_dict()})
    twin = diffusers_twin(both)
    ours_in, theirs_in = (with_grad(tiny_inputs(config, per_token=True)) for _ in range(2))
    ours = alone(AV(**{mode: ours_in[mode]}))
    theirs = run_diffusers(twin, theirs_in, isolate_modalities=True)
    assert_same(ours, ours_in, AV(**{mode: theirs[mode]}), theirs_in)


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_skipped_self_attention(version):
    config = tiny_config(version)
    model = tiny_model(config)
    twin = diffusers_twin(model, perturbed_attn=True)
    keep = torch.tensor([0.0, 1.0])
    ours_in, theirs_in = (with_grad(tiny_inputs(config)) for _ in range(2))
    ours = model(ours_in, Perturbations(video_self={1: keep}, audio_self={1: keep}))
    theirs = run_diffusers(
        twin, theirs_in, spatio_temporal_guidance_blocks=[1], perturbation_mask=keep, isolate_modalities=False
    )
    assert_same(ours, ours_in, theirs, theirs_in)
    assert relative_error(ours.video[0], model(ours_in).video[0]) > 1e-3


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_isolated_modalities(version):
    config = tiny_config(version)
    model = tiny_model(config)
    off = {0: torch.zeros(2), 1: torch.zeros(2)}
    ours_in, theirs_in = (with_grad(tiny_inputs(config)) for _ in range(2))
    ours = model(ours_in, Perturbations(a2v=off, v2a=off))
    theirs = run_diffusers(diffusers_twin(model), theirs_in, isolate_modalities=True)
    assert_same(ours, ours_in, theirs, theirs_in)
