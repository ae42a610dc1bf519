"""What runs write: verdict, metadata, which formats; and what stops them before they write something bad."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_training_runs import arguments, refused

from musubi_tuner.ltx2_train_network import main as train
from musubi_tuner.networks import lora_network
from musubi_tuner.networks.files.lora_reader import load_lora
from musubi_tuner.networks.targets import modality_of
from musubi_tuner.training.trainer import Trainer


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def break_weight(monkeypatch: pytest.MonkeyPatch):
    """``break_weight(step, value)``: a weight of the sound gets a value after that step, however finite its loss."""
    original = Trainer._optimizer_step

    def at(step: int, value: float) -> None:
        def broken(self, *args, **kwargs):
            report = original(self, *args, **kwargs)
            if self.progress.global_step == step:
                with torch.no_grad():
                    self.parameters[-1].view(-1)[0] = value
            return report

        monkeypatch.setattr(Trainer, "_optimizer_step", broken)

    return at


SAVES = ("--save_state", "--save_every_n_steps", "2", "--save_last_n_steps", "1", "--save_checkpoint_metadata")


def test_verdict_in_log_and_metadata(cached_demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(arguments(cached_demo(), tmp_path, "--save_precision", "float"))
    log = capsys.readouterr().err
    lora = load_lora(tmp_path / "x.safetensors")
    for name in ("x.safetensors", "x.comfy.safetensors"):
        verdict = json.loads(metadata(tmp_path / name)["ss_verdict"])
        assert verdict["finite"] is True
        assert verdict["modules"] == len(lora.modules)
        for stream, found in verdict["streams"].items():
            deltas = [m.delta().flatten() for n, m in lora.modules.items() if modality_of(n) == stream]
            assert found["modules"] == len(deltas)
            assert found["norm"] == pytest.approx(torch.cat(deltas).norm().item(), rel=1e-4)
    assert log.count("I saved and read back x.safetensors, x.comfy.safetensors: change video ") == 1
    assert "has not changed" not in log


def test_sound_that_was_asked_for_and_did_not_change_is_a_warning(cached_demo, tmp_path: Path, capsys):
    train(arguments(cached_demo(), tmp_path, "--lr_args", "audio_=0"))
    log = capsys.readouterr().err
    assert "audio was asked for and has not changed in 2 steps" in log
    assert "video was asked for" not in log
    assert json.loads(metadata(tmp_path / "x.safetensors")["ss_verdict"])["streams"]["audio"]["norm"] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_weight_stops_the_run_before_it_is_saved(cached_demo, tmp_path: Path, capsys, break_weight, value):
    """After a step whose loss and gradient were finite."""
    train(arguments(cached_demo(), tmp_path, *SAVES, steps=2))
    (tmp_path / "x.safetensors").unlink()
    before = contents(tmp_path)
    break_weight(4, value)
    message = refused(arguments(cached_demo(), tmp_path, *SAVES, "--autoresume", steps=6), capsys)
    assert "step 4: lora_unet_transformer_blocks_" in message
    assert "lora_up.weight holds NaN or infinity" in message
    assert contents(tmp_path) == before, "the last good files and states are all there, and no others"


def test_a_broken_weight_is_found_at_the_step_that_it_spoils(cached_demo, tmp_path: Path, capsys, break_weight):
    """Long before the save, and without waiting for twenty dropped steps."""
    break_weight(1, float("nan"))
    message = refused(arguments(cached_demo(), tmp_path, steps=30), capsys)
    assert "step 2: lora_unet_" in message
    assert list(tmp_path.iterdir()) == []


def test_weights_whose_product_overflows_are_not_saved_as_good(cached_demo, tmp_path: Path, capsys):
    """Every weight is finite, the change that they make is not."""
    flags = ("--learning_rate", "1e30", "--save_state", "--save_every_n_steps", "1")
    message = refused(arguments(cached_demo(), tmp_path, *flags, steps=4), capsys)
    assert "video and audio" in message
    assert "overflows" in message
    assert {p.name for p in tmp_path.iterdir()} <= {
        *("x-step00000001.safetensors", "x-step00000001.comfy.safetensors", "x-step00000001-state")
    }


def test_a_file_that_reads_back_wrong_stops_the_run(cached_demo, tmp_path: Path, capsys, monkeypatch):
    train(arguments(cached_demo(), tmp_path, *SAVES, steps=2))
    (tmp_path / "x.safetensors").unlink()
    before = contents(tmp_path)
    original = lora_network.save_lora

    def weaker(lora, path, fmt, **kwargs):
        if fmt == "comfy":
            lora = replace(lora, modules={n: replace(m, up=m.up * 0.5) for n, m in lora.modules.items()})
        return original(lora, path, fmt, **kwargs)

    monkeypatch.setattr(lora_network, "save_lora", weaker)
    flags = (*SAVES, "--autoresume", "--no_save_original_lora")
    message = refused(arguments(cached_demo(), tmp_path, *flags, steps=4), capsys)
    assert "x-step00000004.comfy" in message
    assert "modules change by" in message
    assert contents(tmp_path) == before


def test_an_optimizer_with_nan_is_no_state_to_resume_from(cached_demo, tmp_path: Path, capsys, monkeypatch):
    original = Trainer._optimizer_step

    def poisoned(self, *args, **kwargs):
        report = original(self, *args, **kwargs)
        if self.progress.global_step == 4:
            self.optimizer.state[self.parameters[0]]["exp_avg"].view(-1)[0] = float("nan")
        return report

    monkeypatch.setattr(Trainer, "_optimizer_step", poisoned)
    message = refused(arguments(cached_demo(), tmp_path, *SAVES, steps=6), capsys)
    assert "step 4: the optimizer's state/lora_unet_" in message
    assert {p.name for p in tmp_path.glob("*-state")} == {"x-step00000002-state"}


def test_metadata_that_flags_set(cached_demo, tmp_path: Path):
    words = {name: f"a {name}" for name in ("title", "author", "description", "license", "tags")}
    flags = [word for name, value in words.items() for word in (f"--metadata_{name}", value)]
    train(arguments(cached_demo(), tmp_path, *flags, "--metadata_reso", "768,512", "--metadata_arch", "mine", steps=1))
    found = metadata(tmp_path / "x.comfy.safetensors")
    assert {name: found[f"modelspec.{name}"] for name in words} == words
    assert found["modelspec.resolution"] == "768x512"
    assert found["modelspec.architecture"] == "mine"


def test_metadata_without_such_flags(cached_demo, tmp_path: Path):
    train(arguments(cached_demo(), tmp_path, steps=1))
    found = metadata(tmp_path / "x.safetensors")
    assert found["modelspec.title"] == "x"
    assert found["modelspec.resolution"] == "1280x720"
    assert found["modelspec.architecture"] == "LTX2/lora"
    assert "modelspec.author" not in found


@pytest.mark.parametrize("value", ["768,512,3", "wide", "0,512"])
def test_a_wrong_resolution(tmp_path: Path, capsys, value: str):
    assert "--metadata_reso" in refused(["--metadata_reso", value], capsys)


def test_no_format_at_all_keeps_the_original(cached_demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(arguments(cached_demo(), tmp_path, "--no_convert_to_comfy", "--no_save_original_lora", steps=1))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert "the original is kept" in capsys.readouterr().err


def test_sidecar_holds_what_there_is(cached_demo, tmp_path: Path):
    assets = cached_demo("2.3", "video")
    train(arguments(assets, tmp_path, "--save_checkpoint_metadata", steps=1, mode="video"))
    sidecar = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert set(sidecar) == {"step", "epoch", "timestamp", "loss", "loss_avg", "lr", "loss_video"}
    assert (sidecar["step"], sidecar["epoch"], sidecar["lr"]) == (1, 0, 1e-3)
    assert sidecar["loss"] == sidecar["loss_avg"] == pytest.approx(sidecar["loss_video"])


def test_epoch_files_steps_files_and_states_rotate_by_their_own_rules(cached_demo, tmp_path: Path):
    """Twelve steps are three epochs of four; the last of them is the end itself."""
    flags = (
        *("--save_state", "--save_every_n_epochs", "1", "--save_last_n_epochs", "1"),
        *("--save_every_n_steps", "2", "--save_last_n_steps", "4", "--save_last_n_steps_state", "2"),
    )
    train(arguments(cached_demo(), tmp_path, *flags, "--no_convert_to_comfy", steps=12))
    # Step s removes s - keep - 1, rounded down to a multiple of every: files 2, 4, 6 and states 2, 4, 6, 8.
    loras = {f"x-step{n:08d}.safetensors" for n in (8, 10, 12)} | {"x-000002.safetensors", "x.safetensors"}
    states = {f"x-step{n:08d}-state" for n in (10, 12)} | {"x-000002-state", "x-state"}
    assert {p.name for p in tmp_path.iterdir()} == loras | states


def test_another_worker_count_and_previews_change_nothing_after_resuming(cached_demo, tmp_path: Path):
    assets = cached_demo()
    flags = ("--save_state", "--save_every_n_steps", "3", "--network_dropout", "0.3", "--caption_dropout_rate", "0.5")
    train(arguments(assets, tmp_path / "straight", *flags, steps=6))
    previews = (
        *("--sample_prompts", str(assets.prompts), "--use_precached_sample_prompts", "--vae_dtype", "fp32"),
        *("--sample_every_n_steps", "5", "--max_data_loader_n_workers", "2"),
    )
    state = tmp_path / "straight" / "x-step00000003-state"
    train(arguments(assets, tmp_path / "resumed", *flags, *previews, "--resume", str(state), steps=6))
    assert any((tmp_path / "resumed" / "sample").iterdir())
    for name in ("x-state/network.safetensors", "x-state/optimizer.safetensors", "x.safetensors"):
        one, other = (load_file(tmp_path / run / name) for run in ("straight", "resumed"))
        assert all(torch.equal(one[k], other[k]) for k in one), name


def test_previews_that_a_kill_prevented_are_rendered_on_resuming(cached_demo, tmp_path: Path):
    """The state of a step is saved before its previews are rendered, which may take long."""
    assets, prompts = cached_demo(), tmp_path / "prompts.txt"
    text = assets.prompts.read_text(encoding="utf-8")
    prompts.write_text(re.sub(r" --w .*", " --w 64 --h 64 --f 1 --s 1", text), encoding="utf-8")
    flags = (
        *("--save_state", "--save_every_n_steps", "4", "--sample_every_n_steps", "4", "--sample_every_n_epochs", "1"),
        *("--sample_prompts", str(prompts), "--use_precached_sample_prompts", "--sample_disable_audio"),
    )
    train(arguments(assets, tmp_path / "out", *flags, steps=5))
    straight = previews(tmp_path / "out")
    assert len(straight) == 4
    shutil.rmtree(tmp_path / "out" / "x-state")  # of step 5: the run goes on from step 4
    for path in (tmp_path / "out" / "sample").iterdir():
        if "_000004_01_" in path.name or "_e000001_" in path.name:
            path.unlink()
    kept = set((tmp_path / "out" / "sample").iterdir())
    train(arguments(assets, tmp_path / "out", *flags, "--autoresume", steps=5))
    assert kept <= set((tmp_path / "out" / "sample").iterdir()), "what is there is not rendered again"
    assert previews(tmp_path / "out") == straight


def previews(output: Path) -> dict[str, list[bytes]]:
    """Contents by names without the time of day."""
    found: dict[str, list[bytes]] = {}
    for path in (output / "sample").iterdir():
        found.setdefault(re.sub(r"_\d{14}", "", path.name), []).append(path.read_bytes())
    return found


def test_the_same_optimizer_by_another_spelling_resumes_and_a_finished_run_says_so(cached_demo, tmp_path: Path, capsys):
    train(arguments(cached_demo(), tmp_path, "--save_state", steps=2))
    flags = ("--autoresume", "--optimizer_type", "torch.optim.AdamW")
    train(arguments(cached_demo(), tmp_path, *flags, steps=3))
    assert metadata(tmp_path / "x.safetensors")["ss_steps"] == "3"
    capsys.readouterr()
    train(arguments(cached_demo(), tmp_path, "--autoresume", "--save_state", steps=1))
    assert "nothing is left to train: the state is at step 2 and the run ends at step 1" in capsys.readouterr().err
