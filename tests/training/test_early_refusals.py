"""Flags that name what does not exist are refused before anything is read, let alone a model loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from musubi_tuner.ltx2_train_network import main as train

REFUSED = {
    "schedule": (["--lr_scheduler", "cosin"], "did you mean 'cosine'"),
    "floor": (["--lr_scheduler", "cosine_with_min_lr"], "--lr_scheduler_min_lr_ratio"),
    "optimizer": (["--optimizer_type", "AdamWW"], "torch.optim has no class AdamWW"),
    "network option": (["--network_args", "loraplus"], "expected key=value, got 'loraplus'"),
    "network of another model": (["--network_module", "networks.lora_wan"], "no such module (did you mean"),
    "no network": (["--network_module", "networks.lora"], "no function create_network"),
    "name with a folder": (["--output_name", "a/b"], "--output_name 'a/b': expected a name for files"),
    "no name": (["--output_name", ""], "--output_name '': expected a name for files"),
    "no optimizer": (["--optimizer_type", "torch.nn.Linear"], "no subclass of torch.optim.Optimizer"),
    "quota of sound": (
        ["--min_audio_batches_per_accum", "3", "--gradient_accumulation_steps", "2"],
        "--min_audio_batches_per_accum 3: expected at most --gradient_accumulation_steps (2)",
    ),
    "negative quota": (["--min_audio_batches_per_accum", "-1"], "--min_audio_batches_per_accum: expected 0 or more"),
    "probability of sound": (["--audio_batch_probability", "1.5"], "--audio_batch_probability: expected 0 to 1, got 1"),
    "both samplers": (
        ["--min_audio_batches_per_accum", "1", "--audio_batch_probability", "0"],
        "--min_audio_batches_per_accum and --audio_batch_probability exclude each other",
    ),
    "rotation": (["--save_every_n_steps", "5", "--save_last_n_steps", "0"], "--save_last_n_steps: expected at least 1"),
}


@pytest.mark.parametrize(("flags", "expected"), REFUSED.values(), ids=REFUSED)
def test_refused_before_the_checkpoint_is_opened(tmp_path: Path, capsys, flags: list[str], expected: str):
    for name in ("model.safetensors", "data.toml"):
        (tmp_path / name).write_text("not read", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        train(
            [
                *("--ltx2_checkpoint", str(tmp_path / "model.safetensors")),
                *("--dataset_config", str(tmp_path / "data.toml"), "--output_dir", str(tmp_path / "out"), *flags),
            ]
        )
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_a_broken_network_weights_file_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "lora.safetensors").write_bytes(b"no lora")
    (tmp_path / "data.toml").write_text("", encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"never opened")
    argv = ["--network_weights", str(tmp_path / "lora.safetensors"), "--dataset_config", str(tmp_path / "data.toml")]
    argv += ["--ltx2_checkpoint", str(tmp_path / "model.safetensors"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        train(argv)
    assert stop.value.code == 2
    assert "lora.safetensors" in capsys.readouterr().err
