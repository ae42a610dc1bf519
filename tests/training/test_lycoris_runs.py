"""Runs with LyCORIS networks: on every base, resumed, from files, generated with, and what is refused at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_network_runs import without
from test_training_runs import arguments, refused

from musubi_tuner.ltx2_generate_video import main as generate
from musubi_tuner.ltx2_train_network import main as train

LOKR = ("--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "factor=4", "dropout=0.1")
DOKR = ("--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "dora_wd=True")


def test_resumed_exactly_with_every_way_of_saving_memory(cached_demo, tmp_path: Path, logged):
    """Interrupted or not, swapped, recomputed and averaged or not: the same weights."""
    flags = (*LOKR, "--scale_weight_norms", "0.5", "--ema_decay", "0.9")
    saving = ("--gradient_checkpointing", "--blocks_to_swap", "1")
    train(arguments(cached_demo(), tmp_path / "whole", *flags, steps=4))
    whole = dict(logged)
    train(arguments(cached_demo(), tmp_path / "part", *flags, *saving, "--save_state", steps=2))
    state = next((tmp_path / "part").glob("*-state"))
    train(arguments(cached_demo(), tmp_path / "part", *flags, *saving, "--resume", str(state), steps=4))
    for name in ("x.safetensors", "x-ema.safetensors", "x.comfy.safetensors"):
        one, other = (load_file(tmp_path / run / name) for run in ("whole", "part"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert {step: whole[step] for step in (3, 4)} == {step: logged[step] for step in (3, 4)}
    with safe_open(tmp_path / "whole" / "x.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert metadata["ss_lora_target_preset"] == "no_gates"
    assert json.loads(metadata["ss_network_args"])["algo"] == "lokr"


QUANTISED = {"nf4": ("--nf4_base",), "fp8": ("--fp8_base", "--fp8_scaled"), "int8": ("--int8_base",)}


@pytest.mark.parametrize("base", QUANTISED.values(), ids=QUANTISED)
def test_on_a_quantised_base(base, cached_demo, tmp_path: Path, capsys):
    command = arguments(cached_demo(), tmp_path, *LOKR, *base, "--learning_rate", "1e-2", steps=2)
    train(command)
    second = [t for k, t in load_file(tmp_path / "x.safetensors").items() if k.endswith("lokr_w2_b")]
    assert second
    assert all(t.isfinite().all() and t.any() for t in second)
    command = arguments(cached_demo(), tmp_path / "out", *DOKR, *base, steps=1)
    message = refused(command, capsys)
    assert "LyCORIS dora_wd reads the base weights, quantised here" in message
    assert not (tmp_path / "out").exists()


def test_dora_from_a_file_wants_dense_weights_as_well(cached_demo, tmp_path: Path, capsys):
    assets, module = cached_demo(), DOKR[:2]
    train(arguments(assets, tmp_path / "first", *DOKR, steps=1))
    weights = ("--network_weights", str(tmp_path / "first" / "x.safetensors"), "--dim_from_weights")
    command = without(
        arguments(assets, tmp_path / "out", *module, *weights, steps=1), "--network_dim", "--network_alpha"
    )
    message = refused([*command, "--nf4_base"], capsys)
    assert "LyCORIS dora_wd reads the base weights, quantised here" in message
    assert not (tmp_path / "out").exists()


def test_a_mixed_network_with_dora_from_a_file_goes_on_and_generates(cached_demo, tmp_path: Path):
    assets, config = cached_demo(), tmp_path / "x.toml"
    config.write_text(
        '[network]\nbase_algo = "lokr"\nbase_dora_wd = true\n[network.modules."*audio*"]\nalgo = "loha"\ndim = 2\n'
        "[network.init]\nlokr_norm = 1e-3\n",
        encoding="utf-8",
    )
    flags = ("--network_module", "lycoris.kohya", "--lycoris_config", str(config), "--learning_rate", "1e-2")
    train(arguments(assets, tmp_path / "first", *flags, steps=2))
    first = tmp_path / "first" / "x.safetensors"
    keys = load_file(first)
    assert any(k.endswith("hada_w1_a") for k in keys)
    assert any(k.endswith("attn1_to_q.dora_scale") for k in keys)
    module = ("--network_module", "lycoris.kohya", "--network_weights", str(first), "--dim_from_weights")
    again = arguments(assets, tmp_path / "second", *module, "--learning_rate", "0", "--audio_lr", "1e-3", steps=1)
    train(without(again, "--network_dim", "--network_alpha"))
    second = load_file(tmp_path / "second" / "x.safetensors")
    assert second.keys() == keys.keys()
    assert all(torch.equal(second[k], t) for k, t in keys.items() if "audio" not in k)
    comfy = first.with_name("x.comfy.safetensors")
    plain, own, theirs, off = (
        sampled(assets, tmp_path / str(number), *flags)
        for number, flags in enumerate(
            [(), ("--lora_weight", str(first)), ("--lora_weight", str(comfy)), off_flags(first)]
        )
    )
    for key, tensor in plain.items():
        assert torch.equal(off[key], tensor)
        difference = (own[key] - tensor).norm()
        assert (own[key] - theirs[key]).norm() < 0.2 * difference


def off_flags(file: Path) -> tuple[str, ...]:
    return ("--lora_weight", str(file), "--lora_multiplier", "0")


def sampled(assets, output: Path, *flags: str) -> dict[str, torch.Tensor]:
    argv = ["--ltx2_checkpoint", str(assets.checkpoint), "--ltx2_mode", "av", "--gemma_root", str(assets.gemma)]
    argv += ["--prompt", "a fox", "--height", "64", "--width", "64", "--sample_num_frames", "9", "--seed", "3"]
    argv += ["--sample_steps", "2", "--device", "cpu", "--mixed_precision", "no", "--output_type", "latent"]
    generate([*argv, "--output_dir", str(output), *flags])
    return load_file(next(output.glob("*.safetensors")))


def test_what_is_refused_before_the_model_is_loaded(cached_demo, tmp_path: Path, capsys):
    config = tmp_path / "x.toml"
    config.write_text('[network]\nbase_algo = "lokr"\nbase_factr = 4\n', encoding="utf-8")
    lycoris = ("--network_module", "lycoris.kohya")
    cases = {
        ("--lycoris_config", str(config)): "--lycoris_config: only with --network_module lycoris.kohya",
        ("--init_lokr_norm", "0.1"): "--init_lokr_norm: only with --network_module lycoris.kohya",
        (*lycoris, "--lycoris_config", str(config)): "did you mean 'base_factor'",
        (*lycoris, "--lycoris_config", str(tmp_path / "none.toml")): "none.toml",
        (*lycoris, "--network_args", "algo=lokrr"): "did you mean 'lokr'",
        (*lycoris, "--network_args", "algo=ia3"): "ComfyUI reads no IA3; add --no_convert_to_comfy",
        (*lycoris, "--network_args", "algo=lora", "--init_lokr_norm", "0.1"): "needs algo lokr; got lora",
        (*lycoris, "--init_lokr_norm", "-1"): "--init_lokr_norm: expected more than 0",
        (*lycoris, "--network_args", "modules.*attn9*.dim=2"): "matches none of the",
        (*lycoris, "--network_dim", "0"): "--network_dim",
        (*lycoris, "--nf4_base", "--loftq_init"): "--loftq_init needs --network_module networks.lora_ltx2",
    }
    for flags, message in cases.items():
        assert message in refused(arguments(cached_demo(), tmp_path / "out", *flags), capsys), flags
    assert not (tmp_path / "out").exists()
