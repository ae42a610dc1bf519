"""An NF4 file that was quantised for LoRAs of LoftQ: the same run as from the original, and nothing else with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_calibrated_runs import LOFTQ, on, quantised, same_files
from test_training_runs import arguments, refused

from musubi_tuner.config.loftq_names import loftq_path
from musubi_tuner.ltx2_generate_video import main as generate
from musubi_tuner.ltx2_merge_lora_to_model import main as merge
from musubi_tuner.ltx2_train_network import main as train
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.keys import transformer_keys
from musubi_tuner.networks.files.lora_reader import load_lora
from musubi_tuner.quantization.nf4 import dequantize_nf4

OWN = ("--loftq_init", "--loftq_own_base", "--network_dim", "4")


@pytest.fixture(scope="module")
def own_base(cached_demo, tmp_path_factory) -> Path:
    """Of rank 4 and two rounds, with its factors beside it; not to be written to."""
    return quantised(cached_demo().checkpoint, tmp_path_factory.mktemp("own"), *OWN)


def copied(base: Path, folder: Path) -> Path:
    for path in (base, loftq_path(base, 4)):
        shutil.copy(path, folder)
    return folder / base.name


def with_metadata(path: Path, **changed: str | None) -> None:
    with safe_open(path, "pt") as file:
        described = {**file.metadata(), **changed}
    save_file(load_file(path), path, metadata={k: v for k, v in described.items() if v is not None})


def names_of(path: Path) -> dict[str, str]:
    return transformer_keys(Checkpoint.open(path).tensors)


@pytest.mark.parametrize(("mode", "rounds", "preset"), [("av", 3, "no_gates"), ("video", 2, "t2v")])
def test_trains_like_the_original_to_the_bit(cached_demo, tmp_path: Path, logged, mode, rounds, preset):
    assets = cached_demo("2.3", mode)
    own = (*OWN, "--loftq_iters", str(rounds), "--lora_target_preset", preset)
    target = quantised(assets.checkpoint, tmp_path, *own)
    flags = (*LOFTQ, "--lora_target_preset", preset, "--save_state_on_train_end")
    train(arguments(assets, tmp_path / "dynamic", *flags, "--loftq_iters", str(rounds), mode=mode))
    dynamic = dict(logged)
    logged.clear()
    train(on(target, arguments(assets, tmp_path / "file", *flags, mode=mode)))
    assert logged == dynamic
    for name in (
        "x.safetensors",
        "x.comfy.safetensors",
        "x-state/network.safetensors",
        "x-state/optimizer.safetensors",
    ):
        assert same_files(tmp_path / "dynamic" / name, tmp_path / "file" / name), name
    ranks = {module.info.rank for module in load_lora(tmp_path / "file/x.safetensors").modules.values()}
    assert ranks == {8}, "trained less what the start was, for the original base"


def test_weights_with_factors_are_nearer_to_the_original_the_more_rounds(cached_demo, tmp_path: Path):
    source, errors, key = cached_demo().checkpoint, [], "transformer_blocks.0.attn1.to_q"
    weight = load_file(source)[names_of(source)[f"{key}.weight"]].double()
    for rounds in (0, 2, 6):
        (tmp_path / f"{rounds}").mkdir()
        target = quantised(source, tmp_path / f"{rounds}", *((*OWN, "--loftq_iters", f"{rounds}") if rounds else ()))
        tensors, names = load_file(target), names_of(target)
        scale = tensors[names[f"{key}.scale_weight"]].squeeze(-1)
        dense = dequantize_nf4(tensors[names[f"{key}.weight"]], scale.float(), torch.float32).double()
        if rounds:
            assert scale.dtype == torch.float32
            factors, prefix = load_file(loftq_path(target, 4)), f"lora_unet_{key.replace('.', '_')}"
            bare = float((weight - dense).norm())
            dense = dense + factors[f"{prefix}.lora_B"].double() @ factors[f"{prefix}.lora_A"].double()
            assert bare > errors[0], "without its factors the base is worse than plain NF4"
        errors.append(float((weight - dense).norm()))
    assert errors[2] < errors[1] < errors[0]


def test_only_the_targets_are_other_weights(cached_demo, own_base: Path, tmp_path: Path):
    plain = load_file(quantised(cached_demo().checkpoint, tmp_path))
    own, names = load_file(own_base), names_of(own_base)
    assert own.keys() == plain.keys()
    corrected = {key.rpartition(".")[0] for key in load_file(loftq_path(own_base, 4))}
    with safe_open(loftq_path(own_base, 4), "pt") as file:
        described = file.metadata()
    flat = {key: f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}" for name, key in names.items()}
    changed = {flat[key] for key in own if not key.endswith(".scale_weight") and not torch.equal(own[key], plain[key])}
    assert changed == corrected
    assert any("attn1_to_q" in name for name in corrected)
    assert not any("_ff_" in name for name in corrected), "the default preset adapts attention"
    assert len(described.pop("nf4_base_hash")) == 64
    assert described == {
        "loftq_rank": "4",
        "loftq_iters": "2",
        "nf4_block_size": "32",
        "num_modules": str(len(corrected)),
        "loftq_targets": "t2v",
    }
    with safe_open(own_base, "pt") as file:
        marks = file.metadata()
    assert (marks["loftq_base_rank"], marks["loftq_base_iters"], marks["nf4_quantized"]) == ("4", "2", "true")


def test_resume_is_exact_and_wants_the_same_base(cached_demo, own_base: Path, tmp_path: Path, logged, capsys):
    base = copied(own_base, tmp_path)
    flags = (*LOFTQ, "--save_state", "--save_every_n_steps", "2")
    train(on(base, arguments(cached_demo(), tmp_path / "whole", *flags, steps=4)))
    expected = {step: dict(values) for step, values in logged.items() if step > 2}
    logged.clear()
    resume = ("--resume", str(tmp_path / "whole/x-step00000002-state"))
    train(on(base, arguments(cached_demo(), tmp_path / "resumed", *flags, *resume, steps=4)))
    assert logged == expected
    assert same_files(tmp_path / "whole/x.safetensors", tmp_path / "resumed/x.safetensors")
    again = on(base, arguments(cached_demo(), tmp_path / "other", *flags, *resume, steps=4))
    quantised(cached_demo().checkpoint, tmp_path, *OWN, "--loftq_iters", "3")
    assert "was saved with loftq_iters 2 (now 3)" in refused(again, capsys)
    quantised(cached_demo().checkpoint, tmp_path, "--loftq_init", "--network_dim", "4")
    assert "loftq_own_base True (now None)" in refused(again, capsys)


MISUSES = {
    ("--nf4_base",): "--nf4_base --loftq_init --network_dim 4 only; for all else use the original",
    (): "its NF4 weights lack what a LoRA of rank 4 starts at",
    ("--fp8_base",): "its NF4 weights lack what a LoRA of rank 4 starts at",
    (*LOFTQ, "--network_dim", "8"): "are for LoRAs of rank 4 (--loftq_own_base), got --network_dim 8",
    (*LOFTQ, "--lora_target_preset", "full"): "of --lora_target_preset t2v, and of their layers there are",
    (*LOFTQ, "--network_args", "exclude_patterns=['.*to_v']"): "that the network leaves out",
    (*LOFTQ, "--network_args", "audio_dim=2"): "all modules have to have the rank of the file",
    (*LOFTQ, "--awq_calibration"): "holds NF4 weights already; --awq_calibration needs full precision",
}


@pytest.mark.parametrize("flags", MISUSES, ids=" ".join)
def test_training_otherwise_is_refused(cached_demo, own_base: Path, tmp_path: Path, capsys, monkeypatch, flags):
    def never(*_, **__):
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr("musubi_tuner.assembly.transformer.load_transformer", never)
    assert MISUSES[flags] in refused(on(own_base, arguments(cached_demo(), tmp_path / "out", *flags)), capsys)


def test_other_rounds_are_told(cached_demo, own_base: Path, tmp_path: Path, capsys):
    train(on(own_base, arguments(cached_demo(), tmp_path, *LOFTQ, "--loftq_iters", "5", steps=1)))
    said = capsys.readouterr().err
    assert "--loftq_iters 5 has no effect: demo-nf4.safetensors was quantised with 2" in said


def test_generating_refuses_it(cached_demo, own_base: Path, tmp_path: Path, capsys):
    shape = ("--width", "64", "--height", "64", "--sample_num_frames", "9", "--sample_steps", "1")
    files = (
        "--ltx2_checkpoint",
        str(own_base),
        "--gemma_root",
        str(cached_demo().gemma),
        "--output_dir",
        str(tmp_path),
    )
    with pytest.raises(SystemExit):
        generate([*files, "--nf4_base", "--prompt", "a rabbit", *shape])
    assert "for all else use the original, or an NF4 file without --loftq_own_base" in capsys.readouterr().err


def test_merging_refuses_it(own_base: Path, tmp_path: Path, capsys):
    layer = "diffusion_model.transformer_blocks.0.attn1.to_q"
    factors = {f"{layer}.lora_A.weight": torch.zeros(2, 8), f"{layer}.lora_B.weight": torch.zeros(8, 2)}
    save_file(factors, tmp_path / "lora.safetensors")
    lora = ("--lora_weight", str(tmp_path / "lora.safetensors"))
    with pytest.raises(SystemExit):
        merge(["--ltx2_checkpoint", str(own_base), *lora, "--save_merged_model", str(tmp_path / "x.safetensors")])
    assert "holds NF4 weights, a copy for training and generating; give the original" in capsys.readouterr().err


def test_quantising_it_again_is_refused(own_base: Path, tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        quantised(own_base, tmp_path, *OWN)
    assert "is quantised already (NF4); give the bf16 file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_factors_of_other_weights_rounds_or_none_are_refused(cached_demo, own_base: Path, tmp_path: Path, capsys):
    command = on(tmp_path / own_base.name, arguments(cached_demo(), tmp_path / "out", *LOFTQ))
    base = copied(own_base, tmp_path)
    factors = loftq_path(base, 4)
    (tmp_path / "plain").mkdir()
    plain = quantised(cached_demo().checkpoint, tmp_path / "plain", "--loftq_init", "--network_dim", "4")

    factors.unlink()
    assert "was made with it (--loftq_own_base) and lacks its factors; put it back" in refused(command, capsys)
    shutil.copy(loftq_path(plain, 4), factors)
    assert "holds factors of 1 rounds, expected 2" in refused(command, capsys)
    with_metadata(factors, loftq_iters="2")
    assert "its factors belong to other weights than those of demo-nf4.safetensors" in refused(command, capsys)
    shutil.copy(loftq_path(own_base, 4), factors)
    with_metadata(factors, nf4_base_hash=None)
    assert "its factors belong to other weights" in refused(command, capsys)
    shutil.copy(loftq_path(own_base, 4), factors)
    shutil.copy(plain, base)
    assert "demo-nf4.safetensors is not marked as them" in refused(command, capsys)


def test_factors_that_are_not_finite_are_refused(cached_demo, own_base: Path, tmp_path: Path, capsys):
    base = copied(own_base, tmp_path)
    factors = load_file(loftq_path(base, 4))
    key = max(factors)
    factors[key][0, 0] = float("nan")
    with safe_open(loftq_path(base, 4), "pt") as file:
        described = file.metadata()
    save_file(factors, loftq_path(base, 4), metadata=described)
    message = refused(on(base, arguments(cached_demo(), tmp_path / "out", *LOFTQ)), capsys)
    assert f"demo-nf4.loftq_r4.safetensors: {key} holds NaN or infinity" in message


def test_weights_that_are_not_finite_leave_no_file(cached_demo, tmp_path: Path, capsys):
    source = tmp_path / "source.safetensors"
    state = load_file(cached_demo().checkpoint)
    key = next(key for key in state if key.endswith("transformer_blocks.1.attn1.to_q.weight"))
    state[key][0, 0] = float("inf")
    with safe_open(cached_demo().checkpoint, "pt") as file:
        save_file(state, source, metadata=file.metadata())
    with pytest.raises(SystemExit):
        quantised(source, tmp_path, *OWN)
    assert "transformer_blocks.1.attn1.to_q.weight holds NaN or infinity" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_the_original_is_not_taken_for_factors(cached_demo, tmp_path: Path, capsys):
    """Or it would be replaced by them, or removed as those of an earlier file."""
    source = loftq_path(tmp_path / "demo-nf4.safetensors", 4)
    shutil.copy(cached_demo().checkpoint, source)
    with pytest.raises(SystemExit):
        quantised(source, tmp_path, *OWN)
    assert "has the name of a file of factors beside --output_model demo-nf4.safetensors" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("rank", ["four", "0", "-4", None])
def test_a_mark_that_is_none_is_refused(cached_demo, own_base: Path, tmp_path: Path, capsys, rank):
    base = copied(own_base, tmp_path)
    with_metadata(base, loftq_base_rank=rank)
    message = refused(on(base, arguments(cached_demo(), tmp_path / "out", *LOFTQ)), capsys)
    assert "its metadata says loftq_base_rank" in message


def test_factors_of_the_file_that_is_replaced_go(cached_demo, own_base: Path, tmp_path: Path, capsys):
    base = copied(own_base, tmp_path)
    capsys.readouterr()
    quantised(cached_demo().checkpoint, tmp_path, "--loftq_init", "--loftq_own_base", "--network_dim", "2")
    assert {path.name for path in tmp_path.iterdir()} == {base.name, loftq_path(base, 2).name}
    assert "demo-nf4.loftq_r4.safetensors: removed" in capsys.readouterr().err


@pytest.mark.parametrize("failing", [1, 5])
def test_a_failure_leaves_both_files_as_they_were(cached_demo, own_base: Path, tmp_path: Path, monkeypatch, failing):
    """The factors get their name before the weights get theirs."""
    from musubi_tuner.networks.file_tools import write_loftq

    copied(own_base, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    calls, alternate = [], write_loftq.quantize_with_factors

    def breaks(*given, **named):
        calls.append(1)
        if len(calls) == failing:
            raise OSError("no space left")
        return alternate(*given, **named)

    monkeypatch.setattr(write_loftq, "quantize_with_factors", breaks)
    with pytest.raises((OSError, SystemExit)):
        quantised(cached_demo().checkpoint, tmp_path, *OWN, "--loftq_iters", "3")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


RULES = {
    ("--loftq_own_base",): "--loftq_own_base needs --loftq_init",
    (*OWN, "--loftq_iters", "1"): "--loftq_own_base needs --loftq_iters 2 or more",
    (
        "--loftq_init",
        "--network_dim",
        "4",
        "--lora_target_preset",
        "v2v",
    ): "--lora_target_preset needs --loftq_own_base",
    (*OWN, "--format", "int8"): "--loftq_init needs --format nf4",
    (*OWN[:-1], "9999"): "so no rank 9999; lower --network_dim",
}


@pytest.mark.parametrize("flags", RULES, ids=" ".join)
def test_quantising_refuses(cached_demo, tmp_path: Path, capsys, flags):
    with pytest.raises(SystemExit):
        quantised(cached_demo().checkpoint, tmp_path, *flags)
    assert RULES[flags] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
