"""Training with LoftQ and AWQ: from dense and from NF4 files, resumed, saved, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_training_runs import arguments, refused

from musubi_tuner.ltx2_quantize_model import main as quantize
from musubi_tuner.ltx2_train_network import main as train
from musubi_tuner.networks.files.lora_reader import load_lora
from musubi_tuner.training import calibration, run_parts

LOFTQ = ("--nf4_base", "--loftq_init")
AWQ = ("--nf4_base", "--awq_calibration", "--awq_num_batches", "2")


def quantised(source: Path, folder: Path, *flags: str) -> Path:
    target = folder / "demo-nf4.safetensors"
    quantize(["--input_model", str(source), "--output_model", str(target), "--calc_device", "cpu", *flags])
    return target


def on(checkpoint: Path, command: list[str]) -> list[str]:
    command[command.index("--ltx2_checkpoint") + 1] = str(checkpoint)
    return command


def same_files(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_stored_factors_train_like_dynamic_ones(cached_demo, tmp_path: Path, logged):
    source = cached_demo().checkpoint
    target = quantised(source, tmp_path, "--loftq_init", "--network_dim", "4")
    flags = (*LOFTQ, "--loftq_iters", "1", "--gradient_checkpointing", "--save_state_on_train_end")
    train(arguments(cached_demo(), tmp_path / "dynamic", *flags))
    dynamic = dict(logged)
    logged.clear()
    train(on(target, arguments(cached_demo(), tmp_path / "file", *flags)))
    assert logged == dynamic
    assert same_files(tmp_path / "dynamic/x.safetensors", tmp_path / "file/x.safetensors")
    state = "x-state/network.safetensors"
    assert same_files(tmp_path / "dynamic" / state, tmp_path / "file" / state)


def test_factors_come_beside_the_plain_nf4_file(cached_demo, tmp_path: Path):
    source = cached_demo().checkpoint
    (tmp_path / "plain").mkdir()
    plain = quantised(source, tmp_path / "plain")
    target = quantised(source, tmp_path, "--loftq_init", "--network_dim", "4")
    assert plain.read_bytes() == target.read_bytes()
    with safe_open(tmp_path / "demo-nf4.loftq_r4.safetensors", "pt") as file:
        described, keys = file.metadata(), set(file.keys())
    assert len(described.pop("nf4_base_hash")) == 64
    modules = {key.rpartition(".")[0] for key in keys}
    expected = {"loftq_rank": "4", "loftq_iters": "1", "nf4_block_size": "32", "num_modules": str(len(modules))}
    assert described == expected
    assert {"lora_unet_transformer_blocks_0_audio_to_video_attn_to_out_0.lora_A"} <= keys


def test_more_rounds_for_a_file_are_warned_of(cached_demo, tmp_path: Path, capsys):
    quantised(cached_demo().checkpoint, tmp_path, "--loftq_init", "--network_dim", "4", "--loftq_iters", "3")
    assert "--loftq_iters 3: files get one round" in capsys.readouterr().err


def test_nothing_trained_leaves_the_original_model(cached_demo, tmp_path: Path):
    """The files are for the original base, so they do not hold the correction."""
    flags = (*LOFTQ, "--learning_rate", "1e-30", "--save_state_on_train_end")
    train(arguments(cached_demo(), tmp_path, *flags, steps=1))
    for name in ("x.safetensors", "x.comfy.safetensors"):
        assert all(module.delta().abs().max() < 1e-25 for module in load_lora(tmp_path / name).modules.values())
    state = load_file(tmp_path / "x-state/network.safetensors")
    ups = [t for key, t in state.items() if key.endswith("lora_up.weight")]
    assert ups
    assert all(up.any() for up in ups)


@pytest.mark.parametrize("flags", [(*LOFTQ, "--full_bf16"), (*AWQ, "--loftq_init")], ids=["loftq", "awq and loftq"])
def test_resume_is_exact(cached_demo, tmp_path: Path, logged, flags):
    full = "--full_bf16" in flags
    precision = ("--mixed_precision", "bf16") if full else ()
    command = (*flags, *precision, "--gradient_checkpointing", "--save_state", "--save_every_n_steps", "2")
    train(arguments(cached_demo(), tmp_path / "whole", *command, steps=4))
    expected = {step: dict(values) for step, values in logged.items()}
    logged.clear()
    state = tmp_path / "whole/x-step00000002-state"
    train(arguments(cached_demo(), tmp_path / "resumed", *command, "--resume", str(state), steps=4))
    assert logged == {step: values for step, values in expected.items() if step > 2}
    assert same_files(tmp_path / "whole/x.safetensors", tmp_path / "resumed/x.safetensors")


def test_resuming_with_another_base_is_refused(cached_demo, tmp_path: Path, capsys):
    train(arguments(cached_demo(), tmp_path, *LOFTQ, "--save_state_on_train_end", steps=1))
    command = arguments(cached_demo(), tmp_path, "--nf4_base", "--resume", str(tmp_path / "x-state"), steps=2)
    assert "was saved with loftq_iters 2 (now None)" in refused(command, capsys)
    other = (*LOFTQ, "--nf4_block_size", "64", "--resume", str(tmp_path / "x-state"))
    assert "nf4_block_size 32 (now 64)" in refused(arguments(cached_demo(), tmp_path, *other, steps=2), capsys)


def test_metadata_says_how_the_base_was_held(cached_demo, tmp_path: Path):
    train(arguments(cached_demo(), tmp_path, *AWQ, "--loftq_init", "--gradient_checkpointing_cpu_offload", steps=1))
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        described = file.metadata()
    expected = {
        "ss_loftq_init": "True",
        "ss_awq_calibration": "True",
        "ss_nf4_base": "True",
        "ss_fp8_base": "False",
        "ss_int8_base": "False",
        "ss_fp8_w8a8": "False",
        "ss_gradient_checkpointing_cpu_offload": "True",
        "ss_vae_name": cached_demo().checkpoint.name,
        "ss_i2v_training": "True",
        "ss_network_dim": "8",
    }
    assert {key: described.get(key) for key in expected} == expected
    assert "ss_v2v_training" not in described


@pytest.mark.parametrize("mode", ["av", "video"])
def test_calibration_changes_the_base(cached_demo, tmp_path: Path, logged, mode):
    assets, losses = cached_demo("2.3", mode), {}
    for alpha in (None, "0", "0.5"):
        flags = ("--nf4_base",) if alpha is None else (*AWQ, "--awq_alpha", alpha)
        train(arguments(assets, tmp_path / f"{alpha}", *flags, mode=mode, steps=1))
        losses[alpha] = logged.pop(1)["loss/current"]
    assert losses["0"] == losses[None], "no strength, no change"
    assert 0 < abs(losses["0.5"] - losses[None]) < 0.05 * losses[None]


def test_the_inputs_are_those_of_the_base_with_what_is_merged_into_it(cached_demo, tmp_path: Path, monkeypatch):
    """In plain NF4 the base that is measured is the one that a run without AWQ has."""
    train(arguments(cached_demo(), tmp_path / "first", steps=1))
    merged = ("--base_weights", str(tmp_path / "first/x.safetensors"), "--base_weights_multiplier", "20")
    bases, measure, load = [], calibration.measure, run_parts.load_model

    def measured(transformer, *given):
        bases.append({k: t.clone() for k, t in transformer.state_dict().items()})
        return measure(transformer, *given)

    def loaded(*given):
        transformer, network = load(*given)
        bases.append(transformer.state_dict())
        return transformer, network

    monkeypatch.setattr(calibration, "measure", measured)
    train(arguments(cached_demo(), tmp_path / "awq", *AWQ, *merged, steps=1))
    monkeypatch.setattr(run_parts, "load_model", loaded)
    train(arguments(cached_demo(), tmp_path / "plain", "--nf4_base", *merged, steps=1))
    train(arguments(cached_demo(), tmp_path / "bare", "--nf4_base", steps=1))
    found, expected, bare = bases
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert not all(torch.equal(bare[key], tensor) for key, tensor in expected.items())


def test_swapped_blocks_are_calibrated_alike(cached_demo, tmp_path: Path, logged):
    train(arguments(cached_demo(), tmp_path / "plain", *AWQ, "--gradient_checkpointing"))
    plain = dict(logged)
    logged.clear()
    train(arguments(cached_demo(), tmp_path / "swap", *AWQ, "--gradient_checkpointing", "--blocks_to_swap", "1"))
    assert logged == plain


def test_files_that_do_not_fit_are_refused(cached_demo, tmp_path: Path, capsys):
    target = quantised(cached_demo().checkpoint, tmp_path, "--loftq_init", "--network_dim", "8")
    message = refused(on(target, arguments(cached_demo(), tmp_path / "out", *LOFTQ)), capsys)
    assert "only of rank 8; use --network_dim 8" in message
    message = refused(on(target, arguments(cached_demo(), tmp_path / "out", *AWQ)), capsys)
    assert "holds NF4 weights already; --awq_calibration needs full precision" in message
    assert not (tmp_path / "out").exists()


def test_factors_of_other_weights_are_refused(cached_demo, tmp_path: Path, capsys):
    """The file of factors stays behind when another model is quantised to the same name without them."""
    source = cached_demo().checkpoint
    quantised(source, tmp_path, "--loftq_init", "--network_dim", "4")
    state = load_file(source)
    key = max(key for key in state if key.endswith("transformer_blocks.1.audio_ff.net.2.weight"))
    state[key] = -state[key]
    with safe_open(source, "pt") as file:
        save_file(state, tmp_path / "other.safetensors", metadata=file.metadata())
    target = quantised(tmp_path / "other.safetensors", tmp_path)
    message = refused(on(target, arguments(cached_demo(), tmp_path / "out", *LOFTQ)), capsys)
    assert "demo-nf4.loftq_r4.safetensors: its factors belong to other weights than those of demo-nf4" in message


RULES = {
    ("--loftq_init",): ["--loftq_init needs --nf4_base"],
    ("--fp8_base", "--loftq_init", "--awq_calibration"): [
        "--loftq_init needs --nf4_base",
        "--awq_calibration needs --nf4_base",
    ],
    ("--int8_base", "--loftq_init", "--awq_calibration"): [
        "--loftq_init needs --nf4_base",
        "--awq_calibration needs --nf4_base",
    ],
    (*AWQ, "--loftq_init", "--fp8_w8a8"): ["--fp8_w8a8 needs --fp8_base"],
    ("--nf4_base", "--loftq_iters", "3"): ["--loftq_iters needs --loftq_init"],
    (*LOFTQ, "--loftq_iters", "0"): ["--loftq_iters: expected at least 1, got 0"],
    (*LOFTQ, "--scale_weight_norms", "1"): ["--loftq_init and --scale_weight_norms exclude each other"],
    ("--nf4_base", "--awq_alpha", "0.5", "--awq_num_batches", "3"): [
        "--awq_alpha needs --awq_calibration",
        "--awq_num_batches needs --awq_calibration",
    ],
    (*AWQ, "--awq_alpha", "1.5"): ["--awq_alpha: expected 0 to 1, got 1.5"],
    ("--nf4_base", "--awq_calibration", "--awq_num_batches", "0"): ["--awq_num_batches: expected at least 1"],
}


@pytest.mark.parametrize("flags", RULES, ids=" ".join)
def test_combinations_that_are_refused(cached_demo, tmp_path: Path, capsys, flags):
    message = refused(arguments(cached_demo(), tmp_path, *flags), capsys)
    assert all(expected in message for expected in RULES[flags])


def test_the_start_is_said_once(cached_demo, tmp_path: Path, capsys):
    weights = tmp_path / "weights.safetensors"
    weights.touch()
    command = arguments(cached_demo(), tmp_path, *LOFTQ, "--network_weights", str(weights))
    assert "--loftq_init and --network_weights exclude each other" in refused(command, capsys)
    at = command.index("--network_dim")
    assert "--loftq_init needs --network_dim" in refused(command[:at] + command[at + 2 :], capsys)


QUANTISE_RULES = {
    ("--loftq_init",): "--loftq_init needs --network_dim",
    ("--network_dim", "4"): "--network_dim needs --loftq_init",
    ("--loftq_iters", "3"): "--loftq_iters needs --loftq_init",
    ("--loftq_init", "--network_dim", "4", "--loftq_iters", "0"): "--loftq_iters: expected at least 1",
    ("--format", "int8", "--loftq_init", "--network_dim", "4"): "--loftq_init needs --format nf4",
    ("--format", "int8", "--nf4_block_size", "64"): "--nf4_block_size needs --format nf4",
    ("--loftq_init", "--network_dim", "9999"): "so no rank 9999; lower --network_dim",
}


@pytest.mark.parametrize("flags", QUANTISE_RULES, ids=" ".join)
def test_quantising_refuses(cached_demo, tmp_path: Path, capsys, flags):
    with pytest.raises(SystemExit):
        quantised(cached_demo().checkpoint, tmp_path, *flags)
    assert QUANTISE_RULES[flags] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_targets_that_are_not_quantised_are_said_before_weights_are_read(
    cached_demo, tmp_path: Path, capsys, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr("musubi_tuner.assembly.transformer.load_transformer", never)
    gates = ("--network_args", "include_patterns=['.*to_gate_logits']")
    said = refused(arguments(cached_demo(), tmp_path, *LOFTQ, *gates), capsys)
    assert "none of the adapted layers is quantised; change the LoRA targets" in said
