"""Training and generating with quantised base weights, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training_runs import arguments, refused

from musubi_tuner.ltx2_generate_video import main as generate
from musubi_tuner.ltx2_quantize_model import main as quantize
from musubi_tuner.ltx2_train_network import main as train


@pytest.fixture
def nf4_checkpoint(cached_demo, tmp_path: Path) -> Path:
    target = tmp_path / "demo-nf4.safetensors"
    quantize(["--input_model", str(cached_demo().checkpoint), "--output_model", str(target), "--calc_device", "cpu"])
    return target


def test_prequantised_file_trains_like_the_original(cached_demo, tmp_path: Path, logged, nf4_checkpoint: Path):
    command = arguments(cached_demo(), tmp_path / "dynamic", "--nf4_base", "--gradient_checkpointing")
    train(command)
    dynamic = dict(logged)
    logged.clear()
    command = arguments(cached_demo(), tmp_path / "file", "--nf4_base", "--gradient_checkpointing")
    command[command.index("--ltx2_checkpoint") + 1] = str(nf4_checkpoint)
    train(command)
    assert logged == dynamic, "its caches are current, and every loss is the same"
    one, other = (load_file(tmp_path / run / "x.safetensors") for run in ("dynamic", "file"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_loss_is_near_that_of_the_dense_model(cached_demo, tmp_path: Path, logged):
    losses = {}
    fp8_flags = ("--fp8_base", "--fp8_scaled")
    nf4_flags = ("--nf4_base", "--quantize_device", "cpu")
    for flags in ((), fp8_flags, (*fp8_flags, "--fp8_w8a8"), ("--int8_base",), nf4_flags):
        train(arguments(cached_demo(), tmp_path / "-".join(("run", *flags)), *flags, steps=1))
        losses[flags] = logged.pop(1)["loss/video"]
    dense, fp8, products, int8, nf4 = losses.values()
    assert 0 < abs(int8 - dense) < 0.002 * dense
    assert 0 < abs(fp8 - dense) < 0.005 * dense
    assert 0 < abs(products - dense) < 0.01 * dense
    assert products != fp8
    assert 0 < abs(nf4 - dense) < 0.05 * dense


def test_generating_from_an_nf4_file(cached_demo, tmp_path: Path, capsys, nf4_checkpoint: Path):
    assets = cached_demo()
    command = [
        *("--ltx2_checkpoint", str(nf4_checkpoint), "--gemma_root", str(assets.gemma), "--prompt", "a clip"),
        *("--width", "64", "--height", "64", "--sample_num_frames", "9", "--sample_steps", "2", "--seed", "1"),
        *("--output_dir", str(tmp_path / "out"), "--output_type", "latent", "--mixed_precision", "no"),
    ]
    with pytest.raises(SystemExit):
        generate(command)
    assert "holds NF4 weights; add --nf4_base" in capsys.readouterr().err
    generate([*command, "--nf4_base"])
    from_file = load_file(next((tmp_path / "out").glob("*.safetensors")))
    command[1] = str(assets.checkpoint)
    command[command.index("--output_dir") + 1] = str(tmp_path / "dynamic")
    generate([*command, "--nf4_base"])
    dynamic = load_file(next((tmp_path / "dynamic").glob("*.safetensors")))
    assert all(torch.equal(from_file[name], dynamic[name]) for name in dynamic)


def test_an_nf4_file_without_the_flag_is_refused_before_anything_else(cached_demo, tmp_path, capsys, nf4_checkpoint):
    command = arguments(cached_demo(), tmp_path)
    command[command.index("--ltx2_checkpoint") + 1] = str(nf4_checkpoint)
    assert "holds NF4 weights; add --nf4_base" in refused(command, capsys)
    said = refused([*command, "--fp8_base", "--fp8_scaled"], capsys)
    assert (
        "add --nf4_base instead of --fp8_base --fp8_scaled, or" in said
    )  # --fp8_scaled left over would be refused next


RULES = {
    ("--fp8_base", "--nf4_base"): "--fp8_base and --nf4_base exclude each other",
    ("--int8_base", "--nf4_base"): "--int8_base and --nf4_base exclude each other",
    ("--fp8_scaled",): "--fp8_scaled needs --fp8_base",
    ("--fp8_w8a8",): "--fp8_w8a8 needs --fp8_base",
    ("--nf4_base", "--fp8_w8a8"): "--fp8_w8a8 needs --fp8_base",
    ("--fp8_base", "--fp8_w8a8_backward", "dense"): "--fp8_w8a8_backward needs --fp8_w8a8",
    ("--quantize_device", "gpu"): "--quantize_device needs --fp8_base, --int8_base or --nf4_base",
    ("--nf4_block_size", "64"): "--nf4_block_size needs --nf4_base",
    ("--nf4_base", "--nf4_block_size", "48"): "--nf4_block_size 48: expected one of 32, 64",
}


@pytest.mark.parametrize("flags", RULES, ids=" ".join)
def test_combinations_that_are_refused(cached_demo, tmp_path: Path, capsys, flags: tuple[str, ...]):
    assert RULES[flags] in refused(arguments(cached_demo(), tmp_path, *flags), capsys)


def test_environment_names_the_device(cached_demo, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LTX2_NF4_CALC_DEVICE", "tpu")
    message = refused(arguments(cached_demo(), tmp_path, "--nf4_base"), capsys)
    assert "LTX2_NF4_CALC_DEVICE=tpu: expected one of cpu, cuda, gpu" in message


@pytest.mark.parametrize("name", ["same", "folder", "neither"])
def test_quantising_refuses_paths(cached_demo, tmp_path: Path, capsys, name: str):
    source = cached_demo().checkpoint
    given = {
        "same": (source.parent / "." / source.name, "are the same file"),
        "folder": (tmp_path, "is a folder"),
        "neither": (None, "--output_model is required"),
    }
    path, message = given[name]
    with pytest.raises(SystemExit):
        quantize(["--input_model", str(source), *(("--output_model", str(path)) if path else ())])
    assert message in capsys.readouterr().err
