"""Quantised transformers: from dense files, and from files that are FP8 or NF4 already."""

from __future__ import annotations

import json
import logging
import weakref
from pathlib import Path

import pytest
import torch
from ltx2_tiny import tiny_config, tiny_inputs, tiny_model, tiny_section
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.config import TransformerConfig
from musubi_tuner.models.ltx2.load import build_transformer, load_transformer
from musubi_tuner.models.ltx2.quantize import Quantization, is_target
from musubi_tuner.models.ltx2.quantize_file import quantize_file
from musubi_tuner.quantization.linear import QuantizedLinear
from musubi_tuner.quantization.loftq import quantize_with_factors
from musubi_tuner.quantization.packed import Int8, Nf4

PREFIX = "model.diffusion_model."
WIDTHS = {"audio_attention_head_dim": 16, "audio_cross_attention_dim": 32}  # whole blocks of 32 in both streams
FP8, FP8_SCALED = Quantization("fp8"), Quantization("fp8", requantise=True)
NF4 = Quantization("nf4")
INT8 = Quantization("int8")
BLOCK_0 = f"{PREFIX}transformer_blocks.0."


@pytest.fixture
def write(tmp_path: Path):
    """Write a dense bf16 checkpoint, changed by ``edit``, and open it."""

    def write_file(edit=lambda state: None, metadata=None, version="2.3") -> Checkpoint:
        model = tiny_model(tiny_config(version, **WIDTHS), dtype=torch.bfloat16)
        state = {PREFIX + name: t.clone() for name, t in model.state_dict().items()}
        state["vae.encoder.conv_in.conv.weight"] = torch.randn(3)
        edit(state)
        path = tmp_path / "model.safetensors"
        config = json.dumps({"transformer": tiny_section(version, **WIDTHS)})
        save_file(state, path, metadata={"config": config, **(metadata or {})})
        return Checkpoint.open(path)

    return write_file


def load(checkpoint, quantization=None, mode="av", dtype=torch.float32):
    return load_transformer(checkpoint, mode=mode, dtype=dtype, device="cpu", quantization=quantization)


def packed_layers(model) -> dict[str, QuantizedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def to_fp8(state: dict[str, Tensor], *, scale_suffix: str | None, scale: float = 0.01, where=lambda key: True) -> None:
    """What FP8 exporters do to the linears of the blocks."""
    for key in [k for k in state if is_target(k.removeprefix(PREFIX)) and where(k)]:
        layer = key.removesuffix(".weight")
        factor = scale if scale_suffix else 1.0
        state[key] = (state[key].float() / factor).to(torch.float8_e4m3fn)
        if scale_suffix:
            state[layer + scale_suffix] = torch.tensor(scale)


def with_dense_weights(checkpoint, quantised, dtype=torch.float32):
    """The plain model with the weights that a quantised one acts with."""
    plain = build_transformer(quantised.config, quantised.mode).to_empty(device="cpu")
    state = {n: t for n, t in quantised.state_dict().items() if not n.endswith(".weight_scale")}
    state |= {f"{n}.weight": m.dense_weight(dtype) for n, m in packed_layers(quantised).items()}
    plain.load_state_dict(state, assign=True)
    return plain.requires_grad_(False)


@pytest.mark.parametrize(("version", "expected"), [("2.0", 28), ("2.3", 28)])
@pytest.mark.parametrize("quantization", [FP8_SCALED, INT8, NF4], ids=["fp8", "int8", "nf4"])
def test_linears_of_blocks_are_quantised_and_nothing_else(write, version, expected, quantization):
    model = load(write(version=version), quantization)
    layers = packed_layers(model)
    assert len(layers) == 2 * expected
    assert all(name.startswith("transformer_blocks.") and "gate" not in name for name in layers)
    dense = {n: p.dtype for n, p in model.named_parameters() if n.removesuffix(".weight") not in layers}
    assert set(dense.values()) == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("mode", "count", "elements"), [("video", 10, 268_435_456), ("audio", 10, 67_108_864)])
def test_counts_of_the_true_model(mode, count, elements):
    model = build_transformer(TransformerConfig(num_layers=1), mode)
    targets = {n: p.numel() for n, p in model.named_parameters() if is_target(n)}
    assert (len(targets), sum(targets.values())) == (count, elements)


@pytest.mark.parametrize("mode", ["av", "video", "audio"])
@pytest.mark.parametrize("quantization", [FP8_SCALED, INT8, NF4], ids=["fp8", "int8", "nf4"])
def test_prediction_is_that_of_the_dequantised_weights(write, quantization, mode):
    checkpoint = write()
    model = load(checkpoint, quantization, mode)
    plain = with_dense_weights(checkpoint, model)
    inputs = tiny_inputs(model.config)
    inputs = inputs if mode == "av" else type(inputs)(**{mode: inputs[mode]})
    expected = plain(inputs)
    for name, out in model(inputs).items():
        assert torch.equal(out, expected[name])


def test_scales_of_the_official_layout_are_used(write):
    original = load(write())

    def edit(state):
        to_fp8(state, scale_suffix=".weight_scale", where=lambda key: BLOCK_0 not in key)  # block 0 stays bf16
        for key in [k for k in state if k.endswith(".weight_scale")]:
            layer = key.removesuffix(".weight_scale")
            state[layer + ".input_scale"] = torch.tensor(0.0157)

    model = load(write(edit), FP8)
    layers = packed_layers(model)
    assert len(layers) == 28
    assert all(name.startswith("transformer_blocks.1.") for name in layers)
    for name, layer in layers.items():
        assert layer.weight.dtype == torch.float8_e4m3fn
        weight = original.get_submodule(name).weight
        assert (layer.dense_weight(torch.float32) - weight).abs().max() < 0.07 * weight.abs().max()


def test_layers_described_in_the_metadata(write):
    """The current layout of ComfyUI: formats in the header and beside each weight, one scale each."""

    def edit(state):
        fp8_edit(state)
        text = json.dumps({"format": "float8_e4m3fn"}).encode()
        for key in [k for k in state if k.endswith(".weight_scale")]:
            layer = key.removesuffix(".weight_scale")
            state[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)

    expected = packed_layers(load(write(fp8_edit), FP8))
    layers = packed_layers(load(write(edit, layer_formats("float8_e4m3fn")), FP8))
    assert len(layers) == len(expected) == 56
    for name, layer in layers.items():
        assert torch.equal(layer.dense_weight(torch.float32), expected[name].dense_weight(torch.float32))


@pytest.mark.parametrize("suffix", [".weight_scale", ".scale_weight"])
@pytest.mark.parametrize("prefix", ["diffusion_model.", ""])
def test_files_with_the_transformer_alone(write, prefix, suffix):
    def edit(state):
        to_fp8(state, scale_suffix=suffix)
        state[f"{PREFIX}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
        del state["vae.encoder.conv_in.conv.weight"]
        for key in list(state):
            state[prefix + key.removeprefix(PREFIX)] = state.pop(key)

    layers = packed_layers(load(write(edit), FP8))
    assert len(layers) == 56
    assert all(layer.weight_scale.tolist() == [[pytest.approx(0.01)]] for layer in layers.values())


def test_a_float8_file_of_the_other_kind(write):
    def edit(state):
        fp8_edit(state)
        for key in [k for k in state if state[k].dtype == torch.float8_e4m3fn]:
            state[key] = state[key].float().to(torch.float8_e5m2)

    checkpoint = write(edit)
    state = load_file(checkpoint.path)
    layers = packed_layers(load(checkpoint, FP8))
    assert len(layers) == 56
    for name, layer in layers.items():
        assert layer.weight.dtype == torch.float8_e5m2
        expected = state[f"{PREFIX}{name}.weight"].float() * state[f"{PREFIX}{name}.weight_scale"]
        assert torch.equal(layer.dense_weight(torch.float32), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_older_comfyui_layout(write, shape):
    def edit(state):
        to_fp8(state, scale_suffix=".scale_weight")
        for key in [k for k in state if k.endswith(".scale_weight")]:
            state[key] = state[key].reshape(shape)
            state[key.removesuffix(".scale_weight") + ".scale_input"] = torch.ones(())
        state[f"{PREFIX}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)

    layers = packed_layers(load(write(edit), FP8))
    assert len(layers) == 56
    assert all(layer.weight_scale.tolist() == [[pytest.approx(0.01)]] for layer in layers.values())


def test_scales_by_row_and_block(write):
    rows, blocks = f"{BLOCK_0}attn1.to_q", f"{BLOCK_0}attn1.to_k"

    def edit(state):
        for layer in (rows, blocks):
            state[f"{layer}.weight"] = state[f"{layer}.weight"].to(torch.float8_e4m3fn)
        state[f"{rows}.weight_scale"] = torch.rand(32, 1)
        state[f"{blocks}.weight_scale"] = torch.rand(32, 4, 1)

    checkpoint = write(edit)
    state = load_file(checkpoint.path)
    layers = packed_layers(load(checkpoint, FP8))
    for layer in (rows, blocks):
        weight, scale = state[f"{layer}.weight"].float(), state[f"{layer}.weight_scale"].reshape(32, -1)
        expected = weight * scale.repeat_interleave(32 // scale.shape[1], dim=1)
        assert torch.equal(layers[layer.removeprefix(PREFIX)].dense_weight(torch.float32), expected)


@pytest.mark.parametrize("suffix", [None, ".weight_scale"])
def test_fp8_file_without_the_flag_becomes_dense(write, caplog, suffix):
    checkpoint = write(lambda state: to_fp8(state, scale_suffix=suffix))
    kept = load(checkpoint, FP8)
    with caplog.at_level(logging.WARNING):
        dense = load(checkpoint)
    assert not packed_layers(dense)
    assert "add --fp8_base" in caplog.text
    for name, layer in packed_layers(kept).items():
        assert torch.equal(dense.get_submodule(name).weight, layer.dense_weight(torch.float32))


def test_fp8_outside_the_blocks_becomes_dense(write):
    key = f"{PREFIX}patchify_proj"

    def edit(state):
        to_fp8(state, scale_suffix=".weight_scale")
        state[f"{key}.weight"] = state[f"{key}.weight"].to(torch.float8_e4m3fn)
        state[f"{key}.weight_scale"] = torch.tensor(0.5)

    checkpoint = write(edit)
    stored = load_file(checkpoint.path)[f"{key}.weight"]
    assert torch.equal(load(checkpoint, FP8).patchify_proj.weight, stored.float() * 0.5)


def test_dense_file_with_fp8_base_alone_gets_scales(write, caplog):
    checkpoint = write()
    with caplog.at_level(logging.WARNING):
        alone = load(checkpoint, FP8)
    assert "--fp8_scaled" in caplog.text
    scaled = load(checkpoint, FP8_SCALED)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), scaled.state_dict()[name].view(torch.uint8))


def fp8_edit(state):
    to_fp8(state, scale_suffix=".weight_scale")


def orphan(state):
    state[f"{BLOCK_0}attn1.to_q.weight_scale"] = torch.tensor(1.0)


def int8(state):
    key = f"{BLOCK_0}attn1.to_q.weight"
    state[key] = state[key].to(torch.int8)


def wrong_scale(state):
    fp8_edit(state)
    state[f"{BLOCK_0}attn1.to_q.weight_scale"] = torch.ones(5)


def scaleless(state):
    key = f"{BLOCK_0}attn1.to_q.weight"
    state[key] = torch.zeros(32, 16, dtype=torch.uint8)


def mxfp8(state):
    key = f"{BLOCK_0}attn1.to_q"
    state[f"{key}.weight"] = state[f"{key}.weight"].to(torch.float8_e4m3fn)
    state[f"{key}.weight_scale"] = torch.ones(32, 1).to(torch.float8_e8m0fnu)


def layer_formats(name: str) -> dict[str, str]:
    layers = {f"transformer_blocks.0.attn1.{n}": {"format": name} for n in ("to_q", "to_k")}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


NF4_FILE = {"nf4_quantized": "true", "nf4_block_size": "32"}
REFUSED = {
    "--fp8_scaled on FP8": (fp8_edit, None, FP8_SCALED, "leave out --fp8_scaled"),
    "NF4 of FP8": (fp8_edit, None, NF4, "--nf4_base needs full precision"),
    "int8 of FP8": (fp8_edit, None, INT8, "--int8_base needs full precision"),
    "int8 without scale": (int8, {"int8_quantized": "true"}, INT8, "1 INT8 weights have no scale"),
    "scale without weight": (orphan, None, None, "1 scales belong to no quantised weight"),
    "int8": (int8, None, None, "1 weights are stored as int8"),
    "MXFP8": (mxfp8, None, FP8, "1 scales are stored as float8_e8m0fnu"),
    "a format of layers": (
        fp8_edit,
        layer_formats("float8_e4m3fn_blockwise"),
        FP8,
        "2 layers are in the format float8_",
    ),
    "a scale of another weight": (wrong_scale, None, FP8, "fits no weight"),
    "NF4 without scale": (scaleless, NF4_FILE, NF4, "1 NF4 weights have no scale"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(write, case):
    edit, metadata, quantization, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        load(write(edit, metadata), quantization)


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_nf4_file_is_bit_identical_to_quantising_while_loading(write, tmp_path, dtype, block_size):
    checkpoint = write(lambda state: state.update({k: t.to(dtype) for k, t in state.items()}))
    target = tmp_path / "model-nf4.safetensors"
    count = quantize_file(checkpoint.path, target, method=Nf4(block_size), device="cpu")
    dynamic = load(checkpoint, Quantization("nf4", block_size=block_size))
    assert count == len(packed_layers(dynamic)) > 0
    # The file's block size wins over the flag's.
    stored = load(Checkpoint.open(target), NF4).state_dict()
    assert stored.keys() == dynamic.state_dict().keys()
    for name, tensor in dynamic.state_dict().items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor, stored[name]), name


def test_nf4_file_keeps_all_else(write, tmp_path):
    checkpoint, target = write(metadata={"model_version": "2.3.0"}), tmp_path / "model-nf4.safetensors"
    quantize_file(checkpoint.path, target, method=Nf4(), device="cpu")
    before, after = load_file(checkpoint.path), load_file(target)
    with safe_open(checkpoint.path, "pt") as old, safe_open(target, "pt") as new:
        assert new.metadata() == old.metadata() | NF4_FILE
    for key, tensor in before.items():
        layer = key.removesuffix(".weight")
        if is_target(key.removeprefix(PREFIX)):
            assert after[f"{layer}.nf4_shape"].tolist() == list(tensor.shape)
            assert after[f"{layer}.scale_weight"].shape == (tensor.shape[0], tensor.shape[1] // 32, 1)
        else:
            assert torch.equal(after[key], tensor)
    for other in (None, FP8):
        with pytest.raises(UserError, match="add --nf4_base"):
            load(Checkpoint.open(target), other)
    with pytest.raises(UserError, match="quantised already"):
        quantize_file(target, tmp_path / "twice.safetensors", method=Int8(), device="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_file_is_bit_identical_to_quantising_while_loading(write, tmp_path, dtype):
    checkpoint = write(lambda state: state.update({k: t.to(dtype) for k, t in state.items()}))
    target = tmp_path / "model-int8.safetensors"
    count = quantize_file(checkpoint.path, target, method=Int8(), device="cpu")
    dynamic = load(checkpoint, INT8)
    assert count == len(packed_layers(dynamic)) == 56
    stored = load(Checkpoint.open(target), INT8).state_dict()
    assert stored.keys() == dynamic.state_dict().keys()
    for name, tensor in dynamic.state_dict().items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor, stored[name]), name
    refused = ((None, "add --int8_base,"), (FP8, "instead of --fp8_base"), (NF4, "instead of --nf4_base"))
    for other, message in refused:
        with pytest.raises(UserError, match=message):
            load(Checkpoint.open(target), other)
    with pytest.raises(UserError, match=r"quantised already \(INT8\)"):
        quantize_file(target, tmp_path / "twice.safetensors", method=Nf4(), device="cpu")


@pytest.mark.parametrize("method", [Nf4(), Int8()], ids=["nf4", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_files_of_broken_weights_are_not_written(write, tmp_path, method, value):
    def edit(state):
        state[f"{BLOCK_0}attn1.to_q.weight"][1, 1] = value

    checkpoint = write(edit)
    with pytest.raises(UserError, match=r"0\.attn1\.to_q\.weight holds NaN or infinity"):
        quantize_file(checkpoint.path, tmp_path / "x.safetensors", method=method, device="cpu")
    assert not (tmp_path / "x.safetensors").exists()


def test_rows_that_do_not_fit_stay_dense(write, caplog):
    with caplog.at_level(logging.WARNING):
        layers = packed_layers(load(write(), Quantization("nf4", block_size=128)))
    assert layers.keys() == {f"transformer_blocks.{i}.{s}ff.net.2" for i in range(2) for s in ("", "audio_")}
    assert "52 weights stay dense" in caplog.text


def test_weights_come_and_go_one_by_one(write):
    seen = []

    def watch(name, weight, method):
        assert not any(earlier() is not None for earlier in seen), "an earlier one is still there"
        seen.append(weakref.ref(weight))
        return quantize_with_factors(weight, method.quantize, rank=4, iterations=2, name=name)[0]

    load_transformer(write(), mode="av", dtype=torch.float32, device="cpu", quantization=NF4, quantize=watch)
    assert len(seen) == 56


def test_a_bf16_model_keeps_its_dtypes_when_it_moves(write):
    model = load(write(), NF4, dtype=torch.bfloat16)
    before = {n: t.dtype for n, t in model.state_dict().items()}
    model.to("cpu", torch.bfloat16)
    assert {n: t.dtype for n, t in model.state_dict().items()} == before
    assert {torch.uint8, torch.float32, torch.bfloat16} == set(before.values())
