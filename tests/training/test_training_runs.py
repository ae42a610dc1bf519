"""``ltx2_train_network.py`` on the demo's caches: exact resume, outputs, and the errors a user can cause."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from musubi_tuner.ltx2_train_network import main as train
from musubi_tuner.networks.files.lora_reader import load_lora


def arguments(assets, output: Path, *extra: str, steps: int = 2, mode: str = "av", version: str = "2.3") -> list[str]:
    return [
        *("--dataset_config", str(assets.audio_dataset if mode == "audio" else assets.dataset)),
        *(
            "--ltx2_checkpoint",
            str(assets.checkpoint),
            "--ltx2_mode",
            mode,
            "--ltx_version",
            version,
            "--ltx_version_check_mode",
            "error",
        ),
        *("--mixed_precision", "no", "--network_dim", "4", "--network_alpha", "4", "--learning_rate", "1e-3"),
        *("--max_train_steps", str(steps), "--seed", "5", "--max_data_loader_n_workers", "0"),
        *("--output_dir", str(output), "--output_name", "x", *extra),
    ]


EXACT_RESUME = {
    "plain": ("--gradient_checkpointing",),
    "accumulation, dropout, cosine": (
        *("--gradient_accumulation_steps", "3", "--network_dropout", "0.3", "--lr_scheduler", "cosine"),
        *("--lr_warmup_steps", "2", "--gradient_checkpointing", "--caption_dropout_rate", "0.4"),
        *("--ltx2_first_frame_conditioning_p", "0.5", "--independent_audio_timestep"),
    ),
    "balance, buckets": (
        *(
            "--audio_loss_balance_mode",
            "ema_mag",
            "--audio_loss_balance_ema_decay",
            "0.5",
            "--num_timestep_buckets",
            "3",
        ),
        *("--audio_silence_regularizer", "--audio_supervision_mode", "warn", "--independent_audio_timestep"),
        *("--timestep_sampling", "qinglong_flux", "--min_timestep", "100", "--preserve_distribution_shape"),
    ),
    "8-bit optimizer": ("--optimizer_type", "AdamW8bit"),
}


@pytest.mark.parametrize("flags", EXACT_RESUME.values(), ids=EXACT_RESUME)
def test_ten_steps_equal_five_and_resumed_five(cached_demo, tmp_path: Path, logged, flags: tuple[str, ...]):
    assets = cached_demo()
    train(arguments(assets, tmp_path / "straight", "--save_state", *flags, steps=10))
    straight = dict(logged)
    logged.clear()
    # The first half is a run of ten steps that stops at five, so that its schedule is the same.
    train(arguments(assets, tmp_path / "half", "--save_state", "--save_every_n_steps", "5", *flags, steps=10))
    for leftover in ("x.safetensors", "x.comfy.safetensors"):
        (tmp_path / "half" / leftover).unlink()
    shutil.rmtree(tmp_path / "half" / "x-state")
    first = {step: values for step, values in logged.items() if step <= 5}
    logged.clear()
    state = tmp_path / "half" / "x-step00000005-state"
    workers = ("--max_data_loader_n_workers", "2")  # changes nothing, also where an epoch had begun without
    train(arguments(assets, tmp_path / "half", "--save_state", "--resume", str(state), *workers, *flags, steps=10))

    assert sorted(logged) == [6, 7, 8, 9, 10]
    assert {**first, **logged} == straight, "every loss, gradient norm and learning rate"
    for name in ("x-state/network.safetensors", "x-state/optimizer.safetensors", "x.safetensors"):
        one, other = (load_file(tmp_path / run / name) for run in ("straight", "half"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one), name


def test_autoresume_takes_the_latest_state_and_finishes(cached_demo, tmp_path: Path, logged):
    flags = ("--save_state", "--save_every_n_steps", "2", "--autoresume")
    train(arguments(cached_demo(), tmp_path, *flags, steps=4))
    shutil.rmtree(tmp_path / "x-state")
    epoch = {4: {"loss/epoch": logged[4]["loss/epoch"]}}
    logged.clear()
    train(arguments(cached_demo(), tmp_path, *flags, steps=4))
    assert logged == epoch, "the state of step 4 leaves nothing to do but what is due after its epoch"
    shutil.rmtree(tmp_path / "x-state")
    shutil.rmtree(tmp_path / "x-step00000004-state")
    train(arguments(cached_demo(), tmp_path, *flags, steps=4))
    assert sorted(logged) == [3, 4]


def test_a_run_that_died_before_an_epoch_was_told_of_logs_it_when_resumed(
    cached_demo, tmp_path: Path, logged, monkeypatch
):
    """Epochs of 4 steps; the state of step 4 is saved, and the run dies before the end of the epoch."""
    flags = ("--save_state", "--save_every_n_steps", "2")
    train(arguments(cached_demo(), tmp_path / "straight", *flags, steps=6))
    straight = dict(logged)
    assert [step for step, values in straight.items() if "loss/epoch" in values] == [4]
    logged.clear()
    with monkeypatch.context() as context:
        context.setattr("musubi_tuner.training.tracking.ScalarLog.on_epoch_end", die)
        with pytest.raises(RuntimeError, match="died"):
            train(arguments(cached_demo(), tmp_path / "died", *flags, steps=6))
    assert "loss/epoch" not in logged[4]
    train(arguments(cached_demo(), tmp_path / "died", *flags, "--autoresume", steps=6))
    assert logged == straight


def die(*_, **__) -> None:
    raise RuntimeError("died")


def test_workers_change_nothing(cached_demo, tmp_path: Path):
    assets = cached_demo()
    train(arguments(assets, tmp_path / "none", "--save_state", steps=6))
    train(arguments(assets, tmp_path / "two", "--save_state", "--max_data_loader_n_workers", "2", steps=6))
    one, other = (load_file(tmp_path / run / "x-state/network.safetensors") for run in ("none", "two"))
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("version", ["2.0", "2.3"])
@pytest.mark.parametrize("mode", ["video", "av", "audio"])
def test_every_version_and_mode_trains(cached_demo, tmp_path: Path, logged, version: str, mode: str):
    assets = cached_demo(version, mode)
    train(arguments(assets, tmp_path, "--gradient_checkpointing", mode=mode, version=version))
    losses = {name for name in logged[2] if name.startswith("loss/")}
    assert ("loss/audio" in losses) == (mode != "video")
    assert ("loss/video" in losses) == (mode != "audio")
    lora = load_lora(tmp_path / "x.safetensors")
    moved = {name for name, module in lora.modules.items() if module.up.abs().max() > 0}
    assert any("audio" in name for name in moved) == (mode != "video")
    assert any("audio" not in name for name in moved) == (mode != "audio")


def test_files_of_a_run(cached_demo, tmp_path: Path):
    flags = ("--save_every_n_steps", "2", "--save_last_n_steps", "2", "--save_checkpoint_metadata", "--save_state")
    train(arguments(cached_demo(), tmp_path, *flags, steps=7))
    names = {p.name for p in tmp_path.iterdir()}
    kept = {"x-step00000004", "x-step00000006", "x"}
    wanted = {f"{stem}{end}" for stem in kept for end in (".safetensors", ".comfy.safetensors", ".json", "-state")}
    assert names == wanted
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = file.metadata()
        assert all(not k.startswith("lora_unet_model_") for k in file.keys())  # noqa: SIM118
    assert metadata["ss_ltx_version"] == "2.3"
    assert metadata["ss_shifted_logit_mode"] == "stretched"
    assert metadata["modelspec.architecture"] == "LTX2/lora"
    assert metadata["ss_steps"] == "7"
    assert "sshs_model_hash" in metadata
    sidecar = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert sidecar["step"] == 7
    assert sidecar["loss"] > 0
    assert sidecar["loss_audio"] > 0


def test_only_the_comfy_file_when_asked(cached_demo, tmp_path: Path):
    train(arguments(cached_demo(), tmp_path, "--no_save_original_lora", "--no_metadata"))
    assert [p.name for p in tmp_path.iterdir()] == ["x.comfy.safetensors"]
    with safe_open(tmp_path / "x.comfy.safetensors", "pt") as file:
        assert not any(k.startswith("modelspec") for k in file.metadata())
        assert all(k.startswith("diffusion_model.") for k in file.keys())  # noqa: SIM118


def test_network_weights_start_a_run(cached_demo, tmp_path: Path):
    assets = cached_demo()
    train(arguments(assets, tmp_path / "first"))
    weights = str(tmp_path / "first" / "x.comfy.safetensors")
    train(
        arguments(
            assets, tmp_path / "second", "--network_weights", weights, "--learning_rate", "0", "--audio_lr", "1e-9"
        )
    )
    first, second = (load_lora(tmp_path / run / "x.safetensors") for run in ("first", "second"))
    video = [name for name in first.modules if "audio" not in name]
    assert video
    for name in video:
        torch.testing.assert_close(second.modules[name].delta(), first.modules[name].delta(), atol=1e-4, rtol=2e-2)


def test_previews_are_written_and_do_not_disturb_training(cached_demo, tmp_path: Path):
    assets = cached_demo()
    train(arguments(assets, tmp_path / "without", "--save_state", steps=4))
    previews = (
        *("--sample_prompts", str(assets.prompts), "--use_precached_sample_prompts", "--sample_at_first"),
        *("--sample_every_n_steps", "2", "--sample_merge_audio", "--vae_dtype", "fp32"),
    )
    train(arguments(assets, tmp_path / "with", "--save_state", *previews, steps=4))
    one, other = (load_file(tmp_path / run / "x-state/network.safetensors") for run in ("without", "with"))
    assert all(torch.equal(one[k], other[k]) for k in one)
    samples = [p.name for p in (tmp_path / "with" / "sample").iterdir()]
    assert sum(name.endswith("_av.mp4") for name in samples) == 6, "two prompts at three moments"
    assert sum(name.startswith("x_e000000_") for name in samples) == 6
    assert sum(name.startswith("x_000004_") for name in samples) == 6


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of a run that must not start."""
    with pytest.raises(SystemExit) as stop:
        train(argv)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text[text.index("error: ") :]


def test_wrong_version_is_named(cached_demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    message = refused(arguments(cached_demo(), tmp_path / "out", version="2.0"), capsys)
    assert "use --ltx_version 2.3" in message
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    message = refused(["--ltx2_checkpoint", str(tmp_path / "no.safetensors"), "--output_dir", str(tmp_path)], capsys)
    assert "no.safetensors: not found" in message
    assert "--dataset_config is required" in message


def test_unavailable_features_are_one_message(cached_demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = ("--self_flow", "--crepa")
    message = refused(arguments(cached_demo(), tmp_path, *flags), capsys)
    assert message.count("not available") == 1
    assert all(flag in message for flag in flags)


def test_caches_of_another_checkpoint_are_refused(cached_demo, tmp_path: Path, capsys):
    assets = cached_demo()
    tensors = load_file(assets.checkpoint)
    for key in ("vae.encoder.conv_in.conv.weight", "text_embedding_projection.video_aggregate_embed.weight"):
        tensors[key] = tensors[key] + 0.5
    with safe_open(assets.checkpoint, "pt") as file:
        save_file(tensors, tmp_path / "other.safetensors", file.metadata())
    argv = arguments(assets, tmp_path / "out")
    argv[argv.index("--ltx2_checkpoint") + 1] = str(tmp_path / "other.safetensors")
    message = refused(argv, capsys)
    assert "python ltx2_cache_latents.py --dataset_config" in message
    assert "python ltx2_cache_text_encoder_outputs.py --dataset_config" in message
    assert not (tmp_path / "out").exists()


def test_caches_of_another_mode_are_refused(cached_demo, tmp_path: Path, capsys):
    message = refused(arguments(cached_demo("2.3", "video"), tmp_path / "out", mode="av"), capsys)
    assert "ltx2_cache_text_encoder_outputs.py" in message
    assert "--ltx2_mode av" in message


def test_no_caches_at_all(demo_assets, tmp_path: Path, capsys):
    message = refused(arguments(demo_assets(), tmp_path / "out"), capsys)
    assert "latent caches 0" in message
    assert "run ltx2_cache_latents.py" in message


def test_a_checkpoint_without_a_transformer(cached_demo, tmp_path: Path, capsys):
    save_file({"vae.encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    argv = arguments(cached_demo(), tmp_path / "out")
    argv[argv.index("--ltx2_checkpoint") + 1] = str(tmp_path / "vae.safetensors")
    assert "vae.safetensors has no transformer" in refused(argv, capsys)


def test_a_truncated_checkpoint(cached_demo, tmp_path: Path, capsys):
    assets = cached_demo()
    whole = assets.checkpoint.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    argv = arguments(assets, tmp_path / "out")
    argv[argv.index("--ltx2_checkpoint") + 1] = str(tmp_path / "cut.safetensors")
    assert "cut.safetensors" in refused(argv, capsys)


OTHERWISE = {
    "accumulation": (("--gradient_accumulation_steps", "2"), "gradient_accumulation_steps 1 (now 2)"),
    "optimizer": (("--optimizer_type", "Lion"), "optimizer_type torch.optim.adamw.AdamW (now pytorch_optimizer"),
    "targets": (("--lora_target_preset", "audio"), "use the same network flags"),
    "rank": (("--network_dim", "5"), "here [5, "),
    "alpha": (("--network_alpha", "2"), "(float32), here 2.0 (float32); use the same network flags (--network_dim"),
    "dtype": (("--mixed_precision", "bf16", "--full_bf16"), "--full_fp16, --full_bf16"),
    "algorithm": (("--network_args", "use_dora=True"), "dora_scale is not there, here ["),
    "network": (("--network_module", "lycoris.kohya", "--network_args", "algo=loha"), "network_module networks.lora"),
    "groups": (("--audio_lr", "1e-5"), "but this run "),
}


@pytest.mark.parametrize(("flags", "expected"), OTHERWISE.values(), ids=OTHERWISE)
def test_resuming_otherwise_is_refused_before_the_model_is_opened(
    saved_state: Path, cached_demo, tmp_path: Path, capsys, monkeypatch, flags: tuple[str, ...], expected: str
):
    monkeypatch.setattr("musubi_tuner.assembly.transformer.load_transformer", die)
    message = refused(arguments(cached_demo(), tmp_path, "--resume", str(saved_state), *flags), capsys)
    assert expected in message
    assert str(saved_state) in message
    assert not list(tmp_path.iterdir())


def test_resuming_alike_comes_to_the_model(saved_state: Path, cached_demo, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("musubi_tuner.assembly.transformer.load_transformer", die)
    with pytest.raises(RuntimeError, match="died"):
        train(arguments(cached_demo(), tmp_path, "--resume", str(saved_state)))


@pytest.fixture(scope="module")
def saved_state(cached_demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a short run without further flags. Read only."""
    folder = tmp_path_factory.mktemp("saved")
    train(arguments(cached_demo(), folder, "--save_state", steps=1))
    return folder / "x-state"


def test_a_bad_prompt_file_is_said_before_the_model_loads(cached_demo, tmp_path: Path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat --q 3\n", encoding="utf-8")
    flags = ("--sample_prompts", str(prompts), "--sample_at_first", "--use_precached_sample_prompts")
    message = refused(arguments(cached_demo(), tmp_path / "out", *flags), capsys)
    assert "p.txt:1" in message or "p.txt" in message
    assert not (tmp_path / "out").exists()


def standard_command(assets, output: Path) -> list[str]:
    """The usual AV command of a musubi-tuner user, with this test's paths, sizes and number of steps."""
    return [
        *("--mixed_precision", "bf16", "--dataset_config", str(assets.dataset)),
        *("--gemma_load_in_8bit", "--gemma_root", str(assets.gemma), "--separate_audio_buckets"),
        *("--ltx2_checkpoint", str(assets.checkpoint), "--ltx_version", "2.3", "--ltx_version_check_mode", "error"),
        *("--ltx2_mode", "av", "--fp8_base", "--fp8_scaled", "--blocks_to_swap", "1", "--sdpa"),
        *("--gradient_checkpointing", "--learning_rate", "1e-4", "--network_module", "networks.lora_ltx2"),
        *("--network_dim", "32", "--network_alpha", "32", "--timestep_sampling", "shifted_logit_normal"),
        *("--sample_at_first", "--sample_every_n_epochs", "5", "--sample_prompts", str(assets.prompts)),
        *("--sample_with_offloading", "--sample_tiled_vae", "--sample_vae_tile_size", "512"),
        *("--sample_vae_tile_overlap", "64", "--sample_vae_temporal_tile_size", "48"),
        *("--sample_vae_temporal_tile_overlap", "8", "--sample_merge_audio"),
        *("--output_dir", str(output), "--output_name", "ltx23_lora", "--max_train_steps", "2"),
    ]


def test_standard_command_runs(cached_demo, tmp_path: Path, capsys):
    command = standard_command(cached_demo(), tmp_path)
    if not torch.cuda.is_available():
        assert "CUDA" in refused(command, capsys), "8-bit Gemma needs a GPU"
        command.remove("--gemma_load_in_8bit")
    train(command)
    written = {p.name for p in tmp_path.iterdir()}
    assert written == {"ltx23_lora.safetensors", "ltx23_lora.comfy.safetensors", "sample"}
    assert any(p.name.endswith("_av.mp4") for p in (tmp_path / "sample").iterdir())
