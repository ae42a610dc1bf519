"""Official file -> diffusers module: names, configuration and numbers, for every component."""

from __future__ import annotations

import json

import pytest
import torch
from components_tiny import Components, small_config, write_components

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile, save_safetensors
from musubi_tuner.models.audio_vae import load_audio_vae, load_vocoder, vocoder_config, vocoder_name
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.component_loading import build_empty
from musubi_tuner.models.connectors import connectors_name, load_connectors
from musubi_tuner.models.video_vae import load_video_vae
from musubi_tuner.models.video_vae_layout import (
    KNOWN_CONFIGS,
    diffusers_config,
    infer_config,
    to_diffusers_name,
    to_official_name,
)


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def components(request, tmp_path_factory) -> Components:
    path = tmp_path_factory.mktemp("components") / f"{request.param}.safetensors"
    return write_components(path, request.param)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def rewrite(source, target, *, keep=lambda key: True, rename=lambda key: key, metadata=None):
    """Copy a file with some of its keys under other names."""
    file = SafetensorsFile(source)
    tensors = {rename(key): tensor for key, tensor in file.read() if keep(key)}
    save_safetensors(tensors, target, file.metadata if metadata is None else metadata)
    return Checkpoint.open(target)


def test_video_vae(components):
    vae = load_video_vae(Checkpoint.open(components.path), dtype=torch.float32)
    reference = components.video_vae
    pixels = random(2, 3, 9, 64, 96)
    mean, std = (t.view(1, -1, 1, 1, 1) for t in (reference.latents_mean, reference.latents_std))
    with torch.no_grad():
        mode = reference.encode(pixels).latent_dist.mode()
        latents = vae.encode(pixels)
        assert torch.equal(latents, (mode - mean) / std)
        assert torch.equal(vae.decode(latents), reference.decode(latents * std + mean).sample.clamp(-1, 1))
    assert (vae.spatial_stride, vae.temporal_stride, vae.latent_channels) == (32, 8, 16)


def test_audio_vae(components):
    vae = load_audio_vae(Checkpoint.open(components.path), dtype=torch.float32)
    reference = components.audio_vae
    latents = random(2, 2, 5, 16)
    # In the patchified space [B, T, C*16] the statistics are plain per-channel vectors.
    flat = latents.transpose(1, 2).flatten(2) * reference.latents_std + reference.latents_mean
    with torch.no_grad():
        expected = reference.decode(flat.unflatten(2, (2, 16)).transpose(1, 2)).sample
    assert torch.equal(vae.decode(latents), expected)
    assert expected.shape == (2, 2, 4 * 5 - 3, 64)


def test_vocoder_is_fp32_and_scales_time(components):
    vocoder = load_vocoder(Checkpoint.open(components.path))
    mel = random(1, 2, 12, 64)
    rate = {"2.0": 24000, "2.3": 48000}[components.version]
    assert vocoder.sample_rate == rate
    with torch.no_grad():
        expected = components.vocoder(mel)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sound = vocoder.to_waveform(mel)
    assert torch.equal(sound, expected)
    assert sound.dtype == torch.float32
    assert sound.shape == (1, 2, 12 * rate // 100)
    assert expected.std() > 1e-4


def test_connectors(components):
    connectors = load_connectors(Checkpoint.open(components.path), dtype=torch.float32)
    assert (connectors.hidden_size, connectors.num_states, connectors.num_registers) == (32, 5, 128)
    states = random(2, 128, 32, 5)
    mask = torch.zeros(2, 128, dtype=torch.int64)
    mask[0, -3:] = mask[1, -70:] = 1
    with torch.no_grad():
        expected = components.connectors(states, mask)
    video, audio, out_mask = connectors(states, mask)
    assert torch.equal(video, expected[0])
    assert torch.equal(audio, expected[1])
    assert out_mask.all()
    widths = {"2.0": (32, 32), "2.3": (256, 128)}[components.version]
    assert (video.shape[-1], audio.shape[-1]) == widths


def test_connectors_see_only_the_tokens(components):
    connectors = load_connectors(Checkpoint.open(components.path), dtype=torch.float32)
    states = random(1, 128, 32, 5)
    mask = torch.zeros(1, 128, dtype=torch.int64)
    mask[0, -7:] = 1
    other = states.clone()
    other[:, :-7] = 100.0
    torch.testing.assert_close(connectors(states, mask)[0], connectors(other, mask)[0])


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_a_video_vae_reads_only_its_keys(components, half, monkeypatch):
    checkpoint = Checkpoint.open(components.path)
    read = []
    original = checkpoint.read
    monkeypatch.setattr(
        checkpoint, "read", lambda keys, **options: original(read.extend(keys) or list(keys), **options)
    )
    vae = load_video_vae(checkpoint, dtype=torch.float32, encoder=half == "encoder", decoder=half == "decoder")
    assert {key.split(".")[1] for key in read} == {half, "per_channel_statistics"}
    with pytest.raises(ValueError, match="without its"):
        vae.decode(random(1, 16, 1, 2, 2)) if half == "encoder" else vae.encode(random(1, 3, 1, 32, 32))


def test_stand_alone_vae_file(components, tmp_path):
    """Bare encoder.* / decoder.* keys; the fingerprint is that of the full file."""
    path = tmp_path / "vae.safetensors"
    checkpoint = rewrite(
        components.path, path, keep=lambda k: k.startswith("vae."), rename=lambda k: k.removeprefix("vae.")
    )
    full = Checkpoint.open(components.path)
    assert checkpoint.has("video_vae_encoder")
    assert not checkpoint.has("audio_vae")
    assert not checkpoint.has("transformer")
    assert checkpoint.encoder_id("video_vae") == full.encoder_id("video_vae")
    pixels = random(1, 3, 1, 32, 32)
    ours, theirs = (load_video_vae(c, dtype=torch.float32, decoder=False).encode(pixels) for c in (checkpoint, full))
    assert torch.equal(ours, theirs)


def test_missing_component_is_named(components, tmp_path):
    checkpoint = rewrite(components.path, tmp_path / "x.safetensors", keep=lambda k: k.startswith("vae.encoder"))
    with pytest.raises(UserError, match=r"x\.safetensors has no audio VAE \(no key starting with 'audio_vae\.'\)"):
        load_audio_vae(checkpoint, dtype=torch.float32)
    for load in (load_vocoder, lambda c: load_connectors(c, dtype=torch.float32)):
        with pytest.raises(UserError, match="use the full checkpoint"):
            load(checkpoint)
    with pytest.raises(UserError, match="no video VAE decoder"):
        load_video_vae(checkpoint, dtype=torch.float32, encoder=False)
    with pytest.raises(UserError, match="no transformer"):
        checkpoint.require("transformer", "training")


def test_tensors_that_do_not_fit_the_metadata_are_named(components, tmp_path):
    lost = "vae.encoder.conv_in.conv.weight"
    checkpoint = rewrite(components.path, tmp_path / "x.safetensors", keep=lambda k: k != lost)
    with pytest.raises(UserError, match=r"video VAE: .*1 missing \(encoder\.conv_in\.conv\.weight\)"):
        load_video_vae(checkpoint, dtype=torch.float32, decoder=False)


def test_fingerprints_tell_encoders_apart(components, tmp_path):
    full = Checkpoint.open(components.path)
    # Another transformer changes nothing; other statistics change the video VAE only.
    file = SafetensorsFile(components.path)
    tensors = dict(file.read())
    tensors["model.diffusion_model.patchify_proj.weight"] = torch.ones(4, 4)
    tensors["vae.decoder.conv_in.conv.weight"] += 1
    save_safetensors(tensors, tmp_path / "a.safetensors", file.metadata)
    tensors["vae.per_channel_statistics.mean-of-means"] += 1
    save_safetensors(tensors, tmp_path / "b.safetensors", file.metadata)
    a, b = (Checkpoint.open(tmp_path / f"{name}.safetensors") for name in "ab")
    for kind in ("video_vae", "audio_vae", "text"):
        assert a.encoder_id(kind) == full.encoder_id(kind)
        assert (b.encoder_id(kind) == full.encoder_id(kind)) == (kind != "video_vae")
    assert len({full.encoder_id(kind) for kind in ("video_vae", "audio_vae", "text")}) == 3
    without = rewrite(components.path, tmp_path / "c.safetensors", keep=lambda k: k.startswith("vocoder"))
    assert without.encoder_id("text") is None


def test_metadata_values(components):
    checkpoint = Checkpoint.open(components.path)
    assert checkpoint.version == components.version
    assert checkpoint.metadata["model_version"] == f"{components.version}.0"
    assert checkpoint.config["vae"]["latent_channels"] == 16


def test_a_null_section_is_absent(components, tmp_path):
    metadata = {"config": json.dumps({"transformer": {"num_layers": 1}, "vae": None})}
    checkpoint = rewrite(components.path, tmp_path / "x.safetensors", metadata=metadata)
    assert set(checkpoint.config) == {"transformer"}


# Pairs written by hand, so that a map and its inverse cannot be wrong together.
VIDEO_NAMES = {
    "2.0": {
        "encoder.conv_in.conv.weight": "encoder.conv_in.conv.weight",
        "encoder.down_blocks.0.res_blocks.3.conv1.conv.weight": "encoder.down_blocks.0.resnets.3.conv1.conv.weight",
        "encoder.down_blocks.1.conv.conv.weight": "encoder.down_blocks.0.downsamplers.0.conv.conv.weight",
        "encoder.down_blocks.7.conv.conv.bias": "encoder.down_blocks.3.downsamplers.0.conv.conv.bias",
        "encoder.down_blocks.8.res_blocks.1.conv2.conv.bias": "encoder.mid_block.resnets.1.conv2.conv.bias",
        "decoder.up_blocks.0.res_blocks.4.conv1.conv.bias": "decoder.mid_block.resnets.4.conv1.conv.bias",
        "decoder.up_blocks.1.conv.conv.weight": "decoder.up_blocks.0.upsamplers.0.conv.conv.weight",
        "decoder.up_blocks.2.res_blocks.0.conv1.conv.weight": "decoder.up_blocks.0.resnets.0.conv1.conv.weight",
        "decoder.up_blocks.6.res_blocks.0.conv1.conv.weight": "decoder.up_blocks.2.resnets.0.conv1.conv.weight",
        "per_channel_statistics.mean-of-means": "latents_mean",
        "per_channel_statistics.std-of-means": "latents_std",
    },
    "2.3": {
        "decoder.up_blocks.7.conv.conv.weight": "decoder.up_blocks.3.upsamplers.0.conv.conv.weight",
        "decoder.up_blocks.8.res_blocks.1.conv1.conv.weight": "decoder.up_blocks.3.resnets.1.conv1.conv.weight",
    },
}


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_video_vae_names_of_the_real_size(version):
    from diffusers import AutoencoderKLLTX2Video

    config = diffusers_config(KNOWN_CONFIGS[version])
    real = build_empty(lambda: AutoencoderKLLTX2Video(**config)).state_dict()
    for official, ours in VIDEO_NAMES[version].items():
        assert to_diffusers_name(official, config) == ours
        assert ours in real
    officials = [to_official_name(name, config) for name in real]
    assert len(set(officials)) == len(real)
    assert [to_diffusers_name(name, config) for name in officials] == list(real)
    assert to_diffusers_name("per_channel_statistics.mean-of-stds", config) is None
    assert infer_config(officials) is KNOWN_CONFIGS[version]
    assert infer_config(n for n in officials if n.startswith("encoder.")) is KNOWN_CONFIGS[version]
    if version == "2.3":  # the public report of the released file counts 170 tensors
        assert len(real) == 170


def test_vocoder_names():
    pairs = {
        "ups.0.weight": "upsamplers.0.weight",
        "vocoder.resblocks.2.acts1.0.upsample.filter": "vocoder.resnets.2.acts1.0.upsample.filter",
        "vocoder.resblocks.2.acts1.0.downsample.lowpass.filter": "vocoder.resnets.2.acts1.0.downsample.filter",
        "bwe_generator.conv_pre.bias": "bwe_generator.conv_in.bias",
        "bwe_generator.act_post.upsample.filter": "bwe_generator.act_out.upsample.filter",
        "conv_post.weight": "conv_out.weight",
        "mel_stft.mel_basis": "mel_stft.mel_basis",
    }
    assert {name: vocoder_name(name) for name in pairs} == pairs


def test_the_inner_vocoder_of_two_is_bounded():
    config = vocoder_config(small_config("2.3")["vocoder"])
    assert (config["final_act_fn"], config["bwe_final_act_fn"]) == ("clamp", None)
    assert vocoder_config({})["final_act_fn"] == "tanh"


def test_connector_names():
    pairs = {
        "video_embeddings_connector.transformer_1d_blocks.0.attn1.q_norm.weight": (
            "video_connector.transformer_blocks.0.attn1.norm_q.weight"
        ),
        "audio_embeddings_connector.learnable_registers": "audio_connector.learnable_registers",
        "text_embedding_projection.aggregate_embed.weight": "text_proj_in.weight",
        "text_embedding_projection.video_aggregate_embed.bias": "video_text_proj_in.bias",
    }
    assert {name: connectors_name(name) for name in pairs} == pairs
