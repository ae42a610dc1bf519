"""LoRA files merged into the base model while it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora_samples import random_network
from ltx2_tiny import tiny_config, tiny_inputs, tiny_model, tiny_section
from safetensors.torch import save_file

from musubi_tuner.common.errors import UserError
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.load import load_transformer, transformer_shapes
from musubi_tuner.models.ltx2.quantize import Quantization
from musubi_tuner.models.ltx2.quantize_file import quantize_file
from musubi_tuner.networks.merge_on_load import open_base_weights, weight_edits
from musubi_tuner.quantization.packed import Int8, Nf4, dequantize

PREFIX = "model.diffusion_model."
WIDTHS = {"audio_attention_head_dim": 16, "audio_cross_attention_dim": 32}
NAME = "transformer_blocks.0.attn1.to_q"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    model = tiny_model(tiny_config("2.3", **WIDTHS), dtype=torch.bfloat16)
    state = {PREFIX + name: t.clone() for name, t in model.state_dict().items()}
    path = tmp_path / "model.safetensors"
    save_file(state, path, metadata={"config": json.dumps({"transformer": tiny_section("2.3", **WIDTHS)})})
    return Checkpoint.open(path)


@pytest.fixture
def files(checkpoint: Checkpoint, tmp_path: Path) -> list[Path]:
    """A LoRA as ComfyUI has it, and a DoRA of other targets and rank."""
    model = load(checkpoint)
    lora = random_network(model, dim=3, alpha=5.0)
    dora = random_network(model, dim=2, seed=7, use_dora=True, lora_target_preset="v2v")
    dora.apply_to(model)
    with torch.no_grad():
        for module in dora.modules_by_name.values():
            module.dora_scale.mul_(1.2)
    return [
        lora.save_weights(tmp_path / "one.safetensors", None, fmt="comfy"),
        dora.save_weights(tmp_path / "two.safetensors", None),
    ]


def load(checkpoint, edits=None, quantization=None, dtype=torch.float32):
    return load_transformer(checkpoint, mode="av", dtype=dtype, device="cpu", quantization=quantization, edits=edits)


def edits_of(checkpoint, files, multipliers=()):
    return weight_edits(open_base_weights(files, multipliers), transformer_shapes(checkpoint, "av"))


def applied(model, files, multipliers):
    """The model with the files attached instead."""
    from musubi_tuner.networks.lora_ltx2 import create_network_from_weights

    for file, multiplier in zip(files, multipliers, strict=True):
        create_network_from_weights(multiplier, file, model).apply_to(model)
    return model


@pytest.mark.parametrize("multipliers", [(), (0.5,), (0.5, -1.0)])
def test_merged_files_act_like_attached_ones(checkpoint, files, multipliers):
    merged = load(checkpoint, edits_of(checkpoint, files, multipliers))
    attached = applied(load(checkpoint), files, [*multipliers, 1.0, 1.0][:2])
    inputs = tiny_inputs(merged.config)
    for name, value in merged(inputs).items():
        torch.testing.assert_close(value, attached(inputs)[name], rtol=1e-4, atol=1e-5)


def test_the_sum_is_rounded_once(checkpoint, files):
    edits = edits_of(checkpoint, files)
    exact = load(checkpoint, edits).get_submodule(NAME).weight
    rounded = load(checkpoint, edits, dtype=torch.bfloat16).get_submodule(NAME).weight
    assert torch.equal(rounded, exact.to(torch.bfloat16))


def test_quantising_comes_after_merging(checkpoint, files):
    edits = edits_of(checkpoint, files)
    exact = load(checkpoint, edits, dtype=torch.bfloat16).get_submodule(NAME).weight
    for quantization in (Quantization("nf4"), Quantization("fp8", requantise=True)):
        layer = load(checkpoint, edits, quantization).get_submodule(NAME)
        wanted = quantization.method.quantize(exact)
        assert torch.equal(layer.weight.view(torch.uint8), wanted.weight.view(torch.uint8))
        assert torch.equal(layer.weight_scale, wanted.scale)


def test_fp8_files_are_scaled_anew(checkpoint, files, tmp_path):
    state = {}
    for key, tensor in load(checkpoint).state_dict().items():
        state[PREFIX + key] = tensor.to(torch.bfloat16)
    key = f"{PREFIX}{NAME}.weight"
    scale = state[key].float().abs().amax() / 448
    fp8 = {
        key: (state[key].float() / scale).to(torch.float8_e4m3fn),
        f"{key.removesuffix('weight')}weight_scale": scale,
    }
    path = tmp_path / "fp8.safetensors"
    save_file({**state, **fp8}, path, metadata={"config": json.dumps({"transformer": tiny_section("2.3", **WIDTHS)})})
    file = Checkpoint.open(path)
    edits = edits_of(file, files)
    layer = load(file, edits, Quantization("fp8")).get_submodule(NAME)
    before = dequantize(fp8[key], scale.view(1, 1), torch.float32)
    wanted = edits[f"{NAME}.weight"](before)
    assert layer.weight_scale.shape == (1, 1)
    found = layer.dense_weight(torch.float32)
    # Half a step of e4m3: 2^-4 of a value, or of the smallest normal number below it.
    allowed = (wanted.abs() / 16).clamp(min=layer.weight_scale.item() * 2**-9)
    assert ((found - wanted).abs() <= allowed * 1.001).all()
    assert (wanted - before).abs().max() > 5 * (found - wanted).abs().max()


@pytest.mark.parametrize("method", [Nf4(), Int8()], ids=["nf4", "int8"])
def test_quantised_copies_are_refused(checkpoint, files, tmp_path, method):
    kind = type(method).__name__.lower()
    path = tmp_path / f"{kind}.safetensors"
    quantize_file(checkpoint.path, path, method=method, device="cpu")
    file = Checkpoint.open(path)
    with pytest.raises(UserError, match=rf"{kind}\.safetensors: --base_weights cannot be merged into {kind.upper()}"):
        load(file, edits_of(file, files), Quantization(kind))


def test_a_lora_of_another_model_is_refused(checkpoint, files):
    shapes = {**transformer_shapes(checkpoint, "av"), f"{NAME}.weight": (64, 64)}
    with pytest.raises(UserError, match="32 -> 32 features, the model's has 64 -> 64"):
        weight_edits(open_base_weights(files, ()), shapes)
    del shapes[f"{NAME}.weight"]
    with pytest.raises(UserError, match="one.safetensors: 1 of its .* belongs to another model"):
        weight_edits(open_base_weights(files, ()), shapes)
