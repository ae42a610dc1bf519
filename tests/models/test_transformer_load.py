"""Loading from a checkpoint file: what is read, where it goes, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from ltx2_tiny import VERSIONS, tiny_config, tiny_inputs, tiny_model, tiny_section
from safetensors.torch import save_file

from musubi_tuner.common.av import AV
from musubi_tuner.common.errors import UserError
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.keys import in_mode
from musubi_tuner.models.ltx2.load import load_transformer

PREFIX = "model.diffusion_model."


@pytest.fixture
def write(tmp_path):
    """Write a checkpoint like the official ones and open it."""

    def write_file(version="2.3", *, edit=lambda state: None, metadata=True, prefix=PREFIX) -> Checkpoint:
        state = {prefix + name: t.clone() for name, t in tiny_model(tiny_config(version)).state_dict().items()}
        state["vae.encoder.conv_in.conv.weight"] = torch.zeros(3)
        state[prefix + "video_embeddings_connector.learnable_registers"] = torch.zeros(4)
        edit(state)
        path = tmp_path / "model.safetensors"
        config = json.dumps({"transformer": tiny_section(version), "vae": None})
        save_file(state, path, metadata={"config": config} if metadata else None)
        return Checkpoint.open(path)

    return write_file


def load(checkpoint, mode="av", dtype=torch.float32):
    return load_transformer(checkpoint, mode=mode, dtype=dtype, device="cpu")


@pytest.mark.parametrize("mode", ["av", "video", "audio"])
@pytest.mark.parametrize("version", VERSIONS)
def test_round_trip(write, version, mode):
    model = load(write(version), mode)
    original = tiny_model(tiny_config(version))
    expected = {n: t for n, t in original.state_dict().items() if in_mode(n, mode)}
    assert model.config == original.config
    assert set(model.state_dict()) == set(expected)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    assert not any(p.requires_grad for p in model.parameters())
    inputs = tiny_inputs(model.config)
    inputs = inputs if mode == "av" else AV(**{mode: inputs[mode]})
    for name, out in model(inputs).items():
        torch.testing.assert_close(out, original(inputs)[name], rtol=0, atol=0)


def test_dtype(write):
    model = load(write(), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_only_the_streams_tensors_are_read(write):
    checkpoint = write()
    read = []

    class Spy:
        path, metadata, config, tensors = (getattr(checkpoint, n) for n in ("path", "metadata", "config", "tensors"))

        def read(self, keys, **options):
            read.extend(keys)
            return checkpoint.read(keys, **options)

    load(Spy(), "audio")
    assert read
    assert all(in_mode(key.removeprefix(PREFIX), "audio") for key in read)


def test_without_metadata(write):
    model = load(write(metadata=False, prefix=""))
    assert model.config.num_attention_heads == 2  # told by the gates
    assert model.config.av_ca_timestep_scale_multiplier == 1000.0


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(write):
    def spoil(state):
        del state[PREFIX + "transformer_blocks.1.attn1.to_q.weight"]
        state[PREFIX + "transformer_blocks.0.attn1.to_q.surplus"] = torch.ones(1)
        state[PREFIX + "proj_out.bias"] = torch.zeros(9)

    with pytest.raises(UserError) as error:
        load(write(edit=spoil))
    message = str(error.value)
    assert "model.safetensors" in message
    assert "1 tensors are missing: transformer_blocks.1.attn1.to_q.weight" in message
    assert "1 tensors have no place in the model: transformer_blocks.0.attn1.to_q.surplus" in message
    assert "proj_out.bias is [9], expected [4]" in message


def test_an_absent_stream_is_missed_only_by_a_model_that_needs_it(write):
    def drop_audio(state):
        for key in [k for k in state if k.startswith(PREFIX) and not in_mode(k.removeprefix(PREFIX), "video")]:
            del state[key]

    checkpoint = write(edit=drop_audio)
    load(checkpoint, "video")
    with pytest.raises(UserError, match="tensors are missing: audio_scale_shift_table"):
        load(checkpoint, "av")


def test_meta_tensors_left_behind_are_noticed(write):
    checkpoint = write()

    class Forgetful:
        path, metadata, config, tensors = (getattr(checkpoint, n) for n in ("path", "metadata", "config", "tensors"))

        def read(self, keys, **options):
            return checkpoint.read(list(keys)[1:], **options)

    with pytest.raises(AssertionError, match="1 tensors were not loaded"):
        load(Forgetful())
