"""What reaches TensorBoard and Weights & Biases, and what must not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import wave
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.saving import SaveConfig
from musubi_tuner.config.tracking import TrackingConfig
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.training.sample_log import film_strip, read_mono
from musubi_tuner.training.tracking import plain_settings, tracker_options

SCRIPT = Path(__file__).parents[2] / "ltx2_train_network.py"
KEY = "local-0123456789abcdef"

# Stands in for the package: notes what it is told in its folder.
WANDB = """
import json, os
from pathlib import Path

def _note(**what):
    with Path(os.environ["WANDB_DIR"], "told.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(what, default=str) + "\\n")

class Run:
    def log(self, values, step=None): _note(log=values, step=step)
    def finish(self): _note(finished=True)

class config:
    update = staticmethod(lambda values, allow_val_change: _note(config=values))

def init(**options):
    _note(init=options, key=os.environ.get("WANDB_API_KEY"))
    return Run()

def _media(kind):
    return lambda path, **options: f"{kind} of {Path(path).stat().st_size} bytes"

Image, Video, Audio = _media("image"), _media("video"), _media("audio")
"""


def test_both_trackers_get_numbers_samples_and_settings_once_a_step(cached_demo, tmp_path: Path):
    assets = cached_demo()
    (tmp_path / "package/wandb").mkdir(parents=True)
    (tmp_path / "package/wandb/__init__.py").write_text(WANDB, encoding="utf-8")
    (tmp_path / "package/wandb-1.0.dist-info").mkdir()
    (tmp_path / "package/wandb-1.0.dist-info/METADATA").write_text("Name: wandb\nVersion: 1.0\n", encoding="utf-8")
    (tmp_path / "trackers.toml").write_text('[wandb]\nentity = "team"\nname = "overruled"\n', encoding="utf-8")
    (tmp_path / "prompts.txt").write_bytes(assets.prompts.read_bytes())
    path = os.pathsep.join([str(tmp_path / "package"), os.environ.get("PYTHONPATH", "")])
    command = [
        *(sys.executable, str(SCRIPT), "--dataset_config", str(assets.dataset)),
        *("--ltx2_checkpoint", str(assets.checkpoint), "--ltx2_mode", "av", "--ltx_version", "2.3"),
        *("--mixed_precision", "no", "--network_dim", "4", "--network_alpha", "4", "--learning_rate", "1e-3"),
        *("--max_train_steps", "2", "--max_data_loader_n_workers", "0", "--output_dir", str(tmp_path / "out")),
        *("--sample_prompts", str(tmp_path / "prompts.txt"), "--use_precached_sample_prompts"),
        *("--sample_every_n_steps", "2", "--log_with", "all", "--logging_dir", str(tmp_path / "logs")),
        *("--log_prefix", "try_", "--log_tracker_name", "project", "--wandb_run_name", "mine", "--log_config"),
        *("--log_tracker_config", str(tmp_path / "trackers.toml"), "--wandb_api_key", KEY),
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"PYTHONPATH": path}
    environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(command, env=environment, timeout=150, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    (folder,) = (tmp_path / "logs").glob("try_*")
    told = [json.loads(line) for line in (folder / "told.jsonl").read_text(encoding="utf-8").splitlines()]
    started, settings, *logs, finished = told
    assert started == {"init": {"project": "project", "entity": "team", "name": "mine"}, "key": KEY}
    assert finished == {"finished": True}
    assert settings["config"]["max_train_steps"] == 2
    steps = [log["step"] for log in logs]
    assert steps == sorted(steps), "a step that goes back would be dropped"
    first = logs[0]["log"]
    expected = {"loss/current", "loss/average", "loss/video", "loss/audio", "lr/unet", "grad_norm", "grad_norm/video"}
    assert expected <= first.keys()
    assert first["tokens_per_second"] > 0
    assert 0 <= first["data_wait_share"] <= 1
    samples = {name: value for log in logs for name, value in log["log"].items() if name.startswith("sample_")}
    assert {name: value.split()[0] for name, value in samples.items()} == {
        **{"sample_0": "video", "sample_0_audio": "audio"},
        **{"sample_1": "video", "sample_1_audio": "audio"},
    }
    board = next((folder / "project").glob("events*")).read_bytes()
    assert all(name.encode() in board for name in (*samples, "loss/current", "grad_norm/audio"))
    written = [file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "told.jsonl"]
    for secret in (KEY, str(tmp_path)):
        assert not any(secret.encode() in content for content in written)
        assert secret not in json.dumps(settings)
    assert KEY not in done.stderr + done.stdout


def test_settings_are_logged_without_secrets_and_paths():
    config = TrainNetworkConfig(
        save=SaveConfig(output_dir=Path("secret/place"), output_name="mine"),
        tracking=TrackingConfig(wandb_api_key=KEY, logging_dir=Path("logs")),
    )
    settings = plain_settings(config)
    assert settings["output_name"] == "mine"
    assert settings["learning_rate"] == 2e-6
    assert not {"output_dir", "logging_dir", "wandb_api_key"} & settings.keys()
    assert all(isinstance(value, (bool, int, float, str)) for value in settings.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [("[wandv]\n", "did you mean 'wandb'"), ("wandb = 3\n", "no table of a tracker"), ("[wandb\n", "not valid TOML")],
)
def test_options_of_trackers_are_checked(tmp_path: Path, text: str, message: str):
    (tmp_path / "options.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        tracker_options(TrackingConfig(log_tracker_config=tmp_path / "options.toml"))


def test_the_flag_wins_over_the_file(tmp_path: Path):
    (tmp_path / "options.toml").write_text('[wandb]\nname = "a"\n[tensorboard]\nflush_secs = 5\n', encoding="utf-8")
    config = TrackingConfig(log_tracker_config=tmp_path / "options.toml")
    assert tracker_options(config) == {"wandb": {"name": "a"}, "tensorboard": {"flush_secs": 5}}
    assert tracker_options(replace(config, wandb_run_name="b"))["wandb"] == {"name": "b"}


def test_a_film_strip_shows_the_first_and_the_last_frame(tmp_path: Path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for grey in np.linspace(0, 255, 13):
            frame = np.full((32, 64, 3), round(grey), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    strip = film_strip(tmp_path / "a.mp4")
    assert strip.shape == (32, 6 * 64, 3)
    shades = strip[16, 32::64, 0].astype(int)
    assert shades[0] < 10
    assert shades[-1] > 245
    assert (np.diff(shades) > 20).all()


def test_sound_becomes_the_mean_of_its_channels(tmp_path: Path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((2, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.array([[16384, 0], [-32768, -32768]], dtype="<i2").tobytes())
    waveform, rate = read_mono(tmp_path / "a.wav")
    assert (waveform.tolist(), rate) == ([[0.25, -1.0]], 8000)
