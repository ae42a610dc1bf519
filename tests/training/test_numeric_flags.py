"""Flags of timesteps and losses: defaults, ranges, and what needs which mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from musubi_tuner.cli.parser import flag_specs, parse
from musubi_tuner.config.rules_training import all_rules
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.diffusion.timesteps import NoiseLevelSampler
from musubi_tuner.ltx2_train_network import main as train
from musubi_tuner.training.show_timesteps import bin_shares, level_quantiles

DEFAULTS = {
    "timestep_sampling": "shifted_logit_normal",
    "logit_std": 1.0,
    "logit_mean": 0.0,
    "shifted_logit_mode": None,
    "shifted_logit_eps": 1e-3,
    "shifted_logit_uniform_prob": 0.1,
    "shifted_logit_shift": None,
    "min_timestep": None,
    "max_timestep": None,
    "preserve_distribution_shape": False,
    "num_timestep_buckets": None,
    "discrete_flow_shift": 1.0,
    "sigmoid_scale": 1.0,
    "weighting_scheme": "none",
    "mode_scale": 1.29,
    "guidance_scale": 1.0,
    "show_timesteps": None,
    "independent_audio_timestep": False,
    "loss_type": "mse",
    "huber_delta": 1.0,
    "video_loss_weight": 1.0,
    "audio_loss_weight": 1.0,
    "audio_loss_balance_mode": "none",
    "audio_loss_balance_beta": 0.01,
    "audio_loss_balance_eps": 0.05,
    "audio_loss_balance_min": 0.05,
    "audio_loss_balance_max": 4.0,
    "audio_loss_balance_ema_init": 1.0,
    "audio_loss_balance_target_ratio": 0.33,
    "audio_loss_balance_ema_decay": 0.99,
    "caption_dropout_rate": 0.0,
    "audio_silence_regularizer": False,
    "audio_silence_regularizer_weight": 1.0,
    "audio_supervision_mode": "off",
    "audio_supervision_warmup_steps": 50,
    "audio_supervision_check_interval": 50,
    "audio_supervision_min_ratio": 0.9,
}


def test_defaults():
    specs = {spec.name: spec for spec in flag_specs(TrainNetworkConfig)}
    assert {name: specs[name].default for name in DEFAULTS} == DEFAULTS


def violations(tmp_path: Path, *flags: str) -> list[str]:
    for name in ("model", "data"):
        (tmp_path / name).touch()
    files = ["--ltx2_checkpoint", str(tmp_path / "model"), "--dataset_config", str(tmp_path / "data")]
    argv = [*files, "--output_dir", str(tmp_path / "out"), *flags]
    return all_rules(parse(TrainNetworkConfig, argv, prog="x.py", description=""))


WRONG = [
    ("num_timestep_buckets", "1"),
    ("discrete_flow_shift", "0"),
    ("sigmoid_scale", "-1"),
    ("logit_std", "0"),
    ("audio_loss_balance_beta", "0"),
    ("audio_loss_balance_beta", "1.1"),
    ("audio_loss_balance_eps", "0"),
    ("audio_loss_balance_min", "-0.1"),
    ("audio_loss_balance_max", "0.01"),
    ("audio_loss_balance_ema_init", "0"),
    ("audio_loss_balance_target_ratio", "-1"),
    ("audio_loss_balance_ema_decay", "0"),
    ("audio_loss_balance_ema_decay", "1"),
    ("audio_silence_regularizer_weight", "-1"),
    ("audio_supervision_warmup_steps", "-1"),
    ("audio_supervision_check_interval", "0"),
    ("audio_supervision_min_ratio", "1.5"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_out_of_range_is_the_one_violation(tmp_path: Path, name: str, value: str):
    (message,) = violations(tmp_path, f"--{name}", value)
    assert f"--{name}" in message
    assert value in message


def test_values_at_the_ends_of_their_ranges(tmp_path: Path):
    ends = {
        "num_timestep_buckets": "2",
        "audio_loss_balance_beta": "1",
        "audio_loss_balance_min": "0",
        "audio_loss_balance_target_ratio": "0",
        "audio_silence_regularizer_weight": "0",
        "audio_supervision_warmup_steps": "0",
        "audio_supervision_check_interval": "1",
        "audio_supervision_min_ratio": "1",
    }
    assert violations(tmp_path, *(word for name, value in ends.items() for word in (f"--{name}", value))) == []
    assert violations(tmp_path, "--audio_loss_balance_min", "2", "--audio_loss_balance_max", "2") == []


def test_an_initial_share_of_batches_above_one(tmp_path: Path):
    init = ("--audio_loss_balance_ema_init", "1.5", "--ltx2_mode", "av", "--audio_loss_balance_mode")
    assert violations(tmp_path, *init, "ema_mag") == []
    (message,) = violations(tmp_path, *init, "inv_freq")
    assert "at most 1" in message


@pytest.mark.parametrize(
    ("flags", "modes"),
    [
        (("--audio_loss_balance_mode", "ema_mag"), {"av"}),
        (("--audio_loss_balance_mode", "inv_freq"), {"av", "audio"}),
        (("--audio_silence_regularizer",), {"av"}),
        (("--audio_supervision_mode", "warn"), {"av"}),
    ],
)
def test_flags_about_sound_need_a_mode_with_sound(tmp_path: Path, flags: tuple[str, ...], modes: set[str]):
    for mode in ("video", "av", "audio"):
        found = violations(tmp_path, "--ltx2_mode", mode, *flags)
        assert bool(found) == (mode not in modes)
        assert all(f"--ltx2_mode {' or '.join(sorted(modes, reverse=True))}, got {mode}" in text for text in found)


def test_balance_is_refused_where_the_datasets_make_the_mode_audio(demo_assets, tmp_path: Path, capsys):
    assets = demo_assets("2.3")  # not cached: the flags are refused first
    argv = ["--dataset_config", str(assets.audio_dataset), "--ltx2_checkpoint", str(assets.checkpoint)]
    argv += ["--ltx_version", "2.3", "--ltx2_mode", "av", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        train([*argv, "--audio_loss_balance_mode", "ema_mag"])
    assert "ema_mag needs --ltx2_mode av, got audio" in capsys.readouterr().err


def test_show_timesteps_needs_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    size = ("--width", "128", "--height", "64", "--sample_num_frames", "17")
    train(["--show_timesteps", "console", "--timestep_sampling", "uniform", *size])
    text = capsys.readouterr().out
    assert "3 latent frames of 2 x 4; mean 0.500, median 0.500" in text
    assert text.count(" 5.0%") == 20
    train(["--show_timesteps", "image", "--output_dir", str(tmp_path)])
    with Image.open(tmp_path / "timesteps.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 16)) > 2


def test_shown_shares_are_those_of_the_distribution():
    """A level x has the unshifted level x / (3 - 2 x), whose logit is standard normal."""
    sampler = NoiseLevelSampler(sampling="shift", flow_shift=3.0)
    shares = bin_shares(level_quantiles(sampler, (3, 2, 2)))
    edges = torch.linspace(0, 1, 21, dtype=torch.float64)
    below = torch.special.ndtr(torch.logit(edges / (3 - 2 * edges)))
    torch.testing.assert_close(torch.tensor(shares, dtype=torch.float64), below.diff(), atol=2e-4, rtol=0)
