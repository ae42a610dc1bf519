"""Runs with DoRA and rsLoRA, from files, and on a base with LoRAs merged into it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_training_runs import arguments, refused

from musubi_tuner.ltx2_train_network import main as train

DORA = ("--network_args", "use_dora=True", "use_rslora=True", "rank_pattern={'attn1': 2}")


def without(command: list[str], *flags: str) -> list[str]:
    """A command less some flags with one value each."""
    kept = list(command)
    for flag in flags:
        if flag in kept:
            del kept[kept.index(flag) : kept.index(flag) + 2]
    return kept


@pytest.fixture
def lora(cached_demo, tmp_path: Path) -> Path:
    train(arguments(cached_demo(), tmp_path / "first", "--network_args", "rank_pattern={'attn1': 2}", steps=2))
    return tmp_path / "first" / "x.safetensors"


def test_dora_trains_saves_both_formats_and_resumes_exactly(cached_demo, tmp_path: Path, logged):
    flags = (*DORA, "--gradient_checkpointing", "--blocks_to_swap", "1", "--convert_to_comfy")
    train(arguments(cached_demo(), tmp_path / "whole", *flags, steps=4))
    whole = dict(logged)
    train(arguments(cached_demo(), tmp_path / "part", *flags, "--save_state", steps=2))
    logged.clear()
    state = next((tmp_path / "part").glob("*-state"))
    train(arguments(cached_demo(), tmp_path / "part", *flags, "--resume", str(state), steps=4))
    assert {step: whole[step] for step in (3, 4)} == {step: logged[step] for step in (3, 4)}
    one, other = (load_file(tmp_path / run / "x.safetensors") for run in ("whole", "part"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert any(key.endswith(".dora_scale") for key in one)
    with safe_open(tmp_path / "whole" / "x.comfy.safetensors", "pt") as file:
        assert any(key.endswith(".dora_scale") for key in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("flags", [("--nf4_base",), ("--fp8_base", "--fp8_scaled")], ids=["nf4", "fp8"])
def test_dora_on_a_quantised_base(cached_demo, tmp_path: Path, logged, flags):
    train(
        arguments(
            cached_demo(), tmp_path, *DORA, *flags, "--gradient_checkpointing", "--learning_rate", "1e-2", steps=3
        )
    )
    lengths = {k: t for k, t in load_file(tmp_path / "x.safetensors").items() if k.endswith(".dora_scale")}
    assert lengths
    assert all(t.isfinite().all() for t in lengths.values())


def test_dim_from_weights_goes_on_with_the_modules_of_the_file(cached_demo, tmp_path: Path, lora: Path):
    command = arguments(
        cached_demo(), tmp_path / "second", "--network_weights", str(lora), "--dim_from_weights", steps=1
    )
    train(without(command, "--network_dim", "--network_alpha"))
    before, after = load_file(lora), load_file(tmp_path / "second" / "x.safetensors")
    assert {k: (t.shape, t.item() if t.dim() == 0 else None) for k, t in before.items()} == {
        k: (t.shape, t.item() if t.dim() == 0 else None) for k, t in after.items()
    }


def test_base_weights_are_part_of_the_model(cached_demo, tmp_path: Path, logged, lora: Path):
    """Merged with strength 1 the file gives the loss that training goes on from; with 0.0 it changes nothing."""

    def loss(name, *flags):
        train(arguments(cached_demo(), tmp_path / name, *flags, steps=1))
        return logged.pop(1)["loss/video"]

    plain = loss("plain")
    merged = loss("merged", "--base_weights", str(lora))
    continued = loss("continued", "--network_weights", str(lora), "--network_args", "rank_pattern={'attn1': 2}")
    assert merged == pytest.approx(continued, rel=1e-4)
    assert merged != pytest.approx(plain, rel=1e-6)
    assert loss("off", "--base_weights", str(lora), "--base_weights_multiplier", "0.0") == plain
    with safe_open(tmp_path / "merged" / "x.safetensors", "pt") as file:
        assert json.loads(file.metadata()["ss_base_weights"]) == ["x.safetensors"]


def test_resuming_needs_the_same_base_weights(cached_demo, tmp_path: Path, capsys, lora: Path):
    flags = ("--base_weights", str(lora))
    train(arguments(cached_demo(), tmp_path / "run", *flags, "--save_state", steps=1))
    state = next((tmp_path / "run").glob("*-state"))
    command = arguments(cached_demo(), tmp_path / "run", "--resume", str(state), steps=2)
    assert "was saved with base_weights" in refused(command, capsys)


def test_what_is_refused_before_the_model_is_loaded(cached_demo, tmp_path: Path, capsys, lora: Path):
    broken = tmp_path / "broken.safetensors"
    save_file({k: t * float("nan") for k, t in load_file(lora).items()}, broken)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 2)}, foreign)
    cases = {
        ("--dim_from_weights",): "--dim_from_weights needs --network_weights",
        ("--base_weights", str(lora), "--base_weights_multiplier", "1", "2"): "2 values for 1 files",
        ("--base_weights", str(tmp_path / "none.safetensors")): "none.safetensors: not found",
        ("--base_weights", str(foreign)): "a LoRA of another model",
        ("--base_weights", str(broken)): "alpha is nan",
        ("--network_args", "rank_pattern={'attn9': 2}"): "'attn9' is found in none of the",
        ("--network_args", "use_doora=True"): "did you mean 'use_dora'",
        ("--nf4_base", "--loftq_init", "--network_args", "use_dora=True"): "--loftq_init and --network_args use_dora",
        ("--network_weights", str(lora), "--dim_from_weights", "--network_args", "use_dora=True"): "those of the file",
    }
    for flags, message in cases.items():
        assert message in refused(arguments(cached_demo(), tmp_path / "out", *flags), capsys)
    assert not (tmp_path / "out").exists()
