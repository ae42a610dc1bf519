"""Several processes train what one process with more accumulation trains, also when only some have sound."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked_ranks import needs_fork, train_by_ranks
from safetensors.torch import load_file

from musubi_tuner.demo.assets import asset_paths
from musubi_tuner.ltx2_train_network import main as train

TIMINGS = ("step_seconds", "tokens_per_second", "data_wait_share", "peak_memory_gib")
SCRIPT = Path(__file__).parents[2] / "ltx2_train_network.py"


def arguments(assets, output: Path, *extra: str) -> list[str]:
    return [
        *("--dataset_config", str(assets.dataset), "--ltx2_checkpoint", str(assets.checkpoint), "--ltx2_mode", "av"),
        *("--mixed_precision", "no", "--network_dim", "4", "--network_alpha", "4", "--learning_rate", "1e-3"),
        *("--max_train_steps", "4", "--seed", "5", "--max_data_loader_n_workers", "0", "--network_dropout", "0.2"),
        *("--audio_loss_balance_mode", "inv_freq", "--audio_loss_balance_beta", "0.3", "--num_timestep_buckets", "2"),
        *("--audio_supervision_mode", "warn", "--audio_supervision_warmup_steps", "0"),
        *("--output_dir", str(output), "--output_name", "x", "--save_state", *extra),
        *("--logging_dir", str(output / "logs"), "--validate_every_n_steps", "2"),
    ]


def add_validation(assets) -> None:
    """Three of the clips once more, as a validation dataset: it cannot be dealt evenly to two processes either."""
    cache = assets.cache.with_name("cache_validation")
    shutil.copytree(assets.cache, cache)
    sorted(cache.glob("*_audio.safetensors"))[0].unlink()
    stem = min(path.stem for path in assets.videos.glob("*.mp4"))
    for file in cache.glob(f"{stem}_*"):
        file.unlink(missing_ok=True)
    text = assets.dataset.read_text(encoding="utf-8")
    section = text.partition("[[datasets]]")[2].replace('"cache"', '"cache_validation"')
    assets.dataset.write_text(f"{text}\n[[validation_datasets]]{section}", encoding="utf-8")


def test_two_processes_equal_one_that_accumulates_two_batches(cached_demo, tmp_path: Path, capsys):
    """Of three clips one has no sound, and an epoch cannot be shared evenly.

    In some steps the processes report different losses, in others one of them has nothing to train on; they must not
    hang. The quota of batches with sound is one of the step, and so the same for both.
    """
    shutil.copytree(cached_demo().checkpoint.parent, tmp_path / "assets")
    assets = asset_paths(tmp_path / "assets")
    add_validation(assets)
    caches = assets.checkpoint.parent / "cache"
    sounds = sorted(caches.glob("*_audio.safetensors"))
    sounds[0].unlink()
    (caches / sounds[1].name.replace("_audio", "")).unlink()
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    quota = ("--min_audio_batches_per_accum", "1")
    train(arguments(assets, tmp_path / "one", *quota, "--gradient_accumulation_steps", "2"))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *(str(SCRIPT), *arguments(assets, tmp_path / "two", *quota)),
    ]
    done = subprocess.run(command, env=environment, timeout=150, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for said in (capsys.readouterr().err, done.stderr):
        assert "sound in the first epoch: 2 of 3 batches (67%), 2 of 3 samples (67%)" in said
    first, second = (load_file(tmp_path / run / "x-state/network.safetensors") for run in ("one", "two"))
    assert first.keys() == second.keys()
    progress = [
        json.loads((tmp_path / run / "x-state/training_state.json").read_text())["progress"] for run in ("one", "two")
    ]
    for name in ("audio_balance", "audio_supervision"):
        assert progress[0][name] == progress[1][name]
    assert 0.3 < progress[0]["audio_balance"]["presence"] < 1
    assert progress[0]["audio_supervision"] == {"expected": 6, "supervised": 4}
    numbers = [logged(tmp_path / run) for run in ("one", "two")]
    names = {"val_loss", "val_loss_video", "val_loss_audio", "loss/current", "grad_norm/audio", "loss/sigma_0.75-1.00"}
    assert names <= numbers[0].keys() == numbers[1].keys()
    for name, values in numbers[0].items():
        if name not in TIMINGS:
            assert numbers[1][name] == pytest.approx(values, rel=1e-4), name
    assert list(numbers[1]["val_loss"]) == [2, 4]
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def logged(output: Path) -> dict[str, dict[int, float]]:
    """All scalars in TensorBoard's files, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (output / "logs").glob("*/network_train")
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def trained(output: Path) -> dict:
    """Tensors and counters of a finished run."""
    folder = output / "x-state"
    progress = json.loads((folder / "training_state.json").read_text(encoding="utf-8"))["progress"]
    return {
        "tensors": load_file(folder / "network.safetensors"),
        "losses": progress["epoch_losses"],
        "last": progress["last_step"],
        "balance": progress["audio_balance"],
        "sound": progress["audio_supervision"],
    }


def two_and_one(command: Callable[..., list[str]], folder: Path) -> tuple[dict, dict]:
    """What two processes train, and what one does that takes their batches in turn."""
    train_by_ranks(command(folder / "two"), 2, folder / "log")
    train(command(folder / "one", "--gradient_accumulation_steps", "2"))
    return trained(folder / "two"), trained(folder / "one")


def check_equal(two: dict, one: dict) -> None:
    for name in ("losses", "last", "balance", "sound"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name
    torch.testing.assert_close(two["tensors"], one["tensors"], rtol=1e-4, atol=1e-6)
    assert any(t.any() for name, t in one["tensors"].items() if "lora_up" in name), "nothing was trained"


@needs_fork
def test_two_processes_equal_one_on_sounds_alone(cached_demo, tmp_path: Path):
    """Of three sounds the second process gets one an epoch, and nothing in every other step."""
    shutil.copytree(cached_demo(mode="audio").checkpoint.parent, tmp_path / "assets")
    assets = asset_paths(tmp_path / "assets")
    first = min(path.stem for path in assets.sounds.glob("*.wav"))
    for file in assets.audio_cache.glob(f"{first}_*"):
        file.unlink()

    def command(output: Path, *extra: str) -> list[str]:
        return [
            *("--dataset_config", str(assets.audio_dataset), "--ltx2_checkpoint", str(assets.checkpoint)),
            *("--ltx2_mode", "audio", "--mixed_precision", "no", "--network_dim", "4", "--learning_rate", "1e-3"),
            *("--max_train_steps", "4", "--seed", "5", "--max_data_loader_n_workers", "0", "--network_dropout", "0.2"),
            *("--audio_loss_balance_mode", "inv_freq", "--audio_loss_balance_beta", "0.3"),
            *("--output_dir", str(output), "--output_name", "x", "--save_state", *extra),
        ]

    check_equal(*two_and_one(command, tmp_path))


@needs_fork
def test_two_processes_equal_one_on_batches_in_part_with_sound(cached_demo, tmp_path: Path):
    """Batches of two clips, of four of which two have no sound: batches with both, with one and with no sound."""
    shutil.copytree(cached_demo().checkpoint.parent, tmp_path / "assets")
    assets = asset_paths(tmp_path / "assets")
    for sound in sorted(assets.cache.glob("*_audio.safetensors"))[:2]:
        sound.unlink()
    text = assets.dataset.read_text(encoding="utf-8").replace("batch_size = 1", "batch_size = 2\nnum_repeats = 3")
    assets.dataset.write_text(text, encoding="utf-8")

    def command(output: Path, *extra: str) -> list[str]:
        base = arguments(assets, output, "--audio_batch_probability", "0.3", *extra)
        cut = base.index("--logging_dir")
        return base[:cut] + base[cut + 4 :]

    two, one = two_and_one(command, tmp_path)
    check_equal(two, one)
    assert one["sound"]["expected"] == 8
    assert 0 < one["sound"]["supervised"] < 8
