"""Parity with diffusers over the whole product of release, streams, rope, levels, masks and perturbations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ltx2_tiny import diffusers_twin, run_diffusers, tiny_config, tiny_inputs, tiny_model
from test_transformer_parity import assert_same, with_grad

from musubi_tuner.common.av import AV
from musubi_tuner.models.ltx2.inputs import ModalityInput, Perturbations


def masked(inputs: AV[ModalityInput]) -> AV[ModalityInput]:
    """With text hidden from both streams and some video tokens hidden from each other."""
    g = torch.Generator().manual_seed(3)
    text = (torch.rand(2, 7, generator=g) < 0.6).long()
    text[:, 0] = 1
    own = (torch.rand(2, 6, 6, generator=g) < 0.7).float()
    own.diagonal(dim1=1, dim2=2).fill_(1)
    return AV(
        video=replace(inputs.video, context_mask=text, attention_mask=own),
        audio=replace(inputs.audio, context_mask=text),
    )


@pytest.mark.parametrize("skip", ["nothing", "self-attention", "other stream", "both"])
@pytest.mark.parametrize("mask", [False, True], ids=["open", "masked"])
@pytest.mark.parametrize("per_token", [False, True], ids=["one level", "level per token"])
@pytest.mark.parametrize("rope", ["split", "interleaved"])
@pytest.mark.parametrize("mode", ["av", "video", "audio"])
@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_outputs_and_gradients(version: str, mode: str, rope: str, per_token: bool, mask: bool, skip: str):
    config = tiny_config(version, rope_type=rope)
    both = tiny_model(config)
    model = both
    if mode != "av":
        model = tiny_model(config, mode)
        model.load_state_dict({name: both.state_dict()[name] for name in model.state_dict()})
    skips_self = skip in ("self-attention", "both")
    isolated = skip in ("other stream", "both") or mode != "av"
    inputs = tiny_inputs(config, per_token=per_token)
    inputs = masked(inputs) if mask else inputs
    a, b = with_grad(inputs), with_grad(inputs)

    keep, off = torch.tensor([0.0, 1.0]), {0: torch.zeros(2), 1: torch.zeros(2)}
    switches = {"video_self": {1: keep}, "audio_self": {1: keep}} if skips_self else {}
    if isolated and mode == "av":
        switches |= {"a2v": off, "v2a": off}
    ours = model(a if mode == "av" else AV(**{mode: a[mode]}), Perturbations(**switches))
    guidance = {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": keep} if skips_self else {}
    twin = diffusers_twin(both, perturbed_attn=skips_self)
    theirs = run_diffusers(twin, b, isolate_modalities=isolated, **guidance)
    assert_same(ours, a, theirs if mode == "av" else AV(**{mode: theirs[mode]}), b)
