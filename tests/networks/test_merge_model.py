"""LoRAs merged into checkpoints: the result is the model with the LoRAs applied, and the file is whole or absent."""

from __future__ import annotations

import json

import ltx2_tiny
import pytest
import torch
from checkpoint_files import PREFIX, contents, load, save_checkpoint, save_fp8_checkpoint, tiny_weights
from lora_samples import random_lora, random_network

from musubi_tuner.common.safetensors_io import SafetensorsFile
from musubi_tuner.ltx2_merge_lora_to_model import main
from musubi_tuner.models.ltx2.quantize import is_target
from musubi_tuner.models.ltx2.quantize_file import quantize_file
from musubi_tuner.networks.base_weights import BaseWeights
from musubi_tuner.networks.files.lora_reader import load_lora
from musubi_tuner.networks.files.lora_writer import save_lora
from musubi_tuner.quantization.packed import Int8, Nf4

Q = "transformer_blocks.0.attn1.to_q"
WEIGHT = f"{PREFIX}{Q}.weight"


@pytest.fixture
def base(tmp_path):
    return save_checkpoint(tmp_path / "base.safetensors", tiny_weights())


@pytest.fixture
def lora(tmp_path):
    return save_lora(random_lora({Q: (4, 32, 32, 2.0)}), tmp_path / "lora.safetensors")


def merge(base, loras, *options):
    target = base.with_name("merged.safetensors")
    main(["--ltx2_checkpoint", str(base), "--lora_weight", *map(str, loras), "--save_merged_model", str(target),
          "--device", "cpu", *options])  # fmt: skip
    return target


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_merged_equals_applied(tmp_path, version):
    """Two LoRAs of different formats, ranks and strengths give the output of the model that carries both."""
    base = save_checkpoint(tmp_path / "base.safetensors", tiny_weights(version), version)
    model = load(base)
    networks = [random_network(model, rank, 3.0, seed=rank, lora_target_preset="full") for rank in (2, 5)]
    files = [
        n.save_weights(tmp_path / f"{fmt}.safetensors", None, fmt=fmt)
        for n, fmt in zip(networks, ("native", "diffusers"), strict=True)
    ]
    inputs = ltx2_tiny.tiny_inputs(model.config)
    for network, strength in zip(networks, (0.5, -1.5), strict=True):
        network.multiplier = strength
        network.apply_to(model)
        network.eval()
    merged = load(merge(base, files, "--lora_multiplier", "0.5", "-1.5"))
    with torch.no_grad():
        plain, applied = load(base)(inputs), dict(model(inputs).items())
        for name, value in merged(inputs).items():
            assert ltx2_tiny.relative_error(value, applied[name]) < 1e-5
            assert ltx2_tiny.relative_error(value, dict(plain.items())[name]) > 0.1


def test_only_the_adapted_weights_change(base, lora):
    before, after = contents(base), contents(merge(base, [lora]))
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert set(before) == set(after)
    assert changed == [WEIGHT]
    metadata = SafetensorsFile(base.with_name("merged.safetensors")).metadata
    assert metadata["config"] == SafetensorsFile(base).metadata["config"]
    assert json.loads(metadata["merged_loras"]) == [{"file": "lora.safetensors", "multiplier": 1.0}]


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_sum_is_rounded_once_to_the_dtype(base, lora, name):
    dtype = getattr(torch, name)
    after = contents(merge(base, [lora], "--dtype", name))
    exact = contents(base)[WEIGHT] + load_lora(lora).modules[Q].delta()
    assert torch.equal(after[WEIGHT], exact.to(dtype))
    assert {t.dtype for k, t in after.items() if k.startswith(PREFIX)} == {dtype}
    assert after["vae.decoder.conv_in.conv.weight"].dtype == torch.float32


def test_opposite_strengths_give_the_base_back(base, lora, tmp_path):
    other = save_lora(load_lora(lora), tmp_path / "same.safetensors", "comfy")
    after = contents(merge(base, [lora, other], "--lora_multiplier", "1", "-1"))
    torch.testing.assert_close(after[WEIGHT], contents(base)[WEIGHT], rtol=0, atol=1e-6)


@pytest.mark.parametrize("suffix", [".weight_scale", ".scale_weight"])
def test_fp8_base_keeps_its_layout_with_a_fresh_scale(tmp_path, lora, suffix):
    base = save_fp8_checkpoint(tmp_path / "base.safetensors", tiny_weights(dtype=torch.bfloat16), suffix=suffix)
    exact = BaseWeights(base).dense(f"{Q}.weight") + load_lora(lora).modules[Q].delta()
    before, after = contents(base), contents(merge(base, [lora]))
    scale = PREFIX + Q + suffix
    assert {k: (t.dtype, t.shape) for k, t in before.items()} == {k: (t.dtype, t.shape) for k, t in after.items()}
    # Whatever else is FP8 is copied as it is.
    same = {k for k in before if torch.equal(before[k].float(), after[k].float())}
    assert set(before) - same == {WEIGHT, scale}
    torch.testing.assert_close(after[scale], exact.abs().max() / 448)
    error = (after[WEIGHT].float() * after[scale] - exact).abs()
    assert (error <= exact.abs() / 16 + after[scale] * 2**-9).all()  # half a step of e4m3's three bits


def test_fp8_output_of_a_dense_base_is_read_as_official_files_are(base, lora):
    path = merge(base, [lora], "--dtype", "fp8")
    after, metadata = contents(path), SafetensorsFile(path).metadata
    names = [k.removeprefix(PREFIX) for k in contents(base)]
    targets = {n for n in names if is_target(n)}
    assert {k.removeprefix(PREFIX) for k, t in after.items() if t.dtype == torch.float8_e4m3fn} == targets
    layers = json.loads(metadata["_quantization_metadata"])["layers"]
    assert set(layers) == {PREFIX + n.removesuffix(".weight") for n in targets}
    exact = contents(base)[WEIGHT] + load_lora(lora).modules[Q].delta()
    dense = dict(load(path).named_parameters())[f"{Q}.weight"]
    assert float((dense - exact).norm() / exact.norm()) < 0.04


def test_dense_output_of_an_fp8_base_has_no_scales(tmp_path, lora):
    base = save_fp8_checkpoint(tmp_path / "base.safetensors", tiny_weights(dtype=torch.bfloat16))
    path = merge(base, [lora], "--dtype", "float32")
    after, weights = contents(path), BaseWeights(base)
    assert not [k for k in after if k.endswith(("_scale", "scale_weight"))]
    for name in weights.keys:
        if name.endswith("to_k.weight"):
            assert torch.equal(after[PREFIX + name], weights.dense(name))


def test_change_that_rounding_removes_is_told(tmp_path, capsys):
    base = save_checkpoint(tmp_path / "base.safetensors", tiny_weights(dtype=torch.bfloat16))
    tiny = save_lora(random_lora({Q: (4, 32, 32, 1e-5)}), tmp_path / "lora.safetensors")
    merge(base, [tiny])
    printed = capsys.readouterr()
    assert "keep the LoRA as a file of its own" in printed.err
    lost = float(printed.out.split("rounding error ")[1].split("%")[0])
    assert 50 < lost < 200


SMALL = {Q: (2, 31, 32, None)}
ELSEWHERE = {"transformer_blocks.7.attn1.to_q": (2, 32, 32, None), Q: (2, 32, 32, None)}


@pytest.mark.parametrize(
    ("lora", "arguments", "message"),
    [
        (SMALL, [], "lora.safetensors: transformer_blocks.0.attn1.to_q is made for a layer of 31 -> 32"),
        (ELSEWHERE, [], "1 of its 2 modules have no weight in base.safetensors (transformer_blocks.7"),
        ({Q: (2, 32, 32, None)}, ["--lora_multiplier", "0"], "nothing to merge"),
        ({Q: (2, 32, 32, None)}, ["--lora_multiplier", "1", "2"], "2 values for 1 files"),
        ({Q: (2, 32, 32, None)}, ["--lora_multiplier", "1e30", "--dtype", "float16"], "overflows as float16"),
        ({Q: (2, 32, 32, None)}, ["--save_merged_model", "{base}"], "this is one of the inputs"),
        ({Q: (2, 32, 32, None)}, ["--save_merged_model", "x.pt"], "has to end in .safetensors"),
        ({Q: (2, 32, 32, None)}, ["--ltx2_checkpoint", "{lora}"], "no diffusion transformer found"),
        ({Q: (2, 32, 32, None)}, ["--lora_weight", "{base}"], "is no LoRA"),
    ],
)
def test_bad_requests_give_one_message_and_no_file(tmp_path, base, capsys, lora, arguments, message):
    path = save_lora(random_lora(lora), tmp_path / "lora.safetensors")
    before = base.read_bytes()
    with pytest.raises(SystemExit) as status:
        merge(base, [path], *(a.format(base=base, lora=path) for a in arguments))
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "lora.safetensors"]
    assert base.read_bytes() == before


def test_nan_is_refused(tmp_path, base, capsys):
    broken = random_lora({Q: (2, 32, 32, None)})
    broken.modules[Q].up[0, 0] = float("nan")
    path = save_lora(broken, tmp_path / "nan.safetensors", require_finite=False)
    with pytest.raises(SystemExit):
        merge(base, [path])
    assert "holds NaN or infinity; the LoRA is broken" in capsys.readouterr().err
    assert not (tmp_path / "merged.safetensors").exists()


@pytest.mark.parametrize("method", [Nf4(), Int8()], ids=["NF4", "INT8"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "fp8"])
def test_quantised_copies_are_refused(tmp_path, base, lora, capsys, method, dtype):
    """They keep their marks, so what is merged into them would be read as what it is not."""
    copy = tmp_path / "copy.safetensors"
    quantize_file(base, copy, method=method, device="cpu")
    with pytest.raises(SystemExit):
        merge(copy, [lora], "--dtype", dtype)
    assert f"holds {type(method).__name__.upper()} weights, a copy for training" in capsys.readouterr().err
    assert not (tmp_path / "merged.safetensors").exists()


@pytest.mark.parametrize("fp8", [False, True])
def test_rows_at_a_time_give_what_whole_weights_give(tmp_path, lora, monkeypatch, fp8):
    save = save_fp8_checkpoint if fp8 else save_checkpoint
    base = save(tmp_path / "base.safetensors", tiny_weights(dtype=torch.bfloat16))
    whole = contents(merge(base, [lora]))
    monkeypatch.setattr("musubi_tuner.quantization.rows._ELEMENTS", 100)  # three rows of 32
    parts = contents(merge(base, [lora]))
    for key, tensor in whole.items():
        torch.testing.assert_close(parts[key].float(), tensor.float(), rtol=2**-3 if fp8 else 2**-7, atol=1e-6)
