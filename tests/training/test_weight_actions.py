"""What acts on weights between steps: the running average alone, average and max-norm in whole runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from musubi_tuner.common.errors import UserError
from musubi_tuner.ltx2_train_network import main as train
from musubi_tuner.networks.files.lora_reader import load_lora
from musubi_tuner.training.weights import WeightAverage


def test_average_is_its_closed_form():
    module = torch.nn.Linear(3, 2).to(torch.bfloat16)
    average = WeightAverage(module, 0.9, every=2)
    expected = {n: p.detach().double() for n, p in module.named_parameters()}
    for step in range(1, 8):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.25 * step)
        average(step)
        if step % 2 == 0:
            expected = {n: 0.9 * expected[n] + 0.1 * p.detach().double() for n, p in module.named_parameters()}
    for name, value in average.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.allclose(value.double(), expected[name], atol=1e-6)


def test_applied_average_is_seen_and_then_gone():
    module = torch.nn.Linear(3, 2).to(torch.bfloat16)
    average = WeightAverage(module, 0.5)
    with torch.no_grad():
        module.weight.add_(1.0)
    average(1)
    in_training = module.weight.detach().clone()
    with average.applied():
        assert torch.equal(module.weight, average.state_dict()["weight"])
        assert module.weight.dtype == torch.float32
    assert module.weight.dtype == torch.bfloat16
    assert torch.equal(module.weight, in_training)


def test_average_of_another_network_is_refused():
    average = WeightAverage(torch.nn.Linear(3, 2), 0.5)
    with pytest.raises(UserError, match="another network"):
        average.load_state_dict(WeightAverage(torch.nn.Linear(4, 2), 0.5).state_dict())


# --- whole runs ---


def arguments(assets, output: Path, *extra: str, steps: int, mixed: str = "no") -> list[str]:
    return [
        *("--dataset_config", str(assets.dataset), "--ltx2_checkpoint", str(assets.checkpoint)),
        *("--ltx2_mode", "av", "--ltx_version", "2.3", "--mixed_precision", mixed, "--network_dim", "4"),
        *("--network_alpha", "4", "--learning_rate", "1e-3", "--seed", "5", "--max_data_loader_n_workers", "0"),
        *("--max_train_steps", str(steps), "--output_dir", str(output), "--output_name", "x", *extra),
    ]


RESUMED = {
    "average and limit": (
        *("--ema_decay", "0.8", "--ema_update_every", "2", "--scale_weight_norms", "0.02"),
        *("--lr_scheduler", "rex", "--lr_warmup_steps", "2", "--audio_lr", "5e-4"),
        *("--network_args", "loraplus_lr_ratio=4"),
    ),
    "schedule-free": ("--optimizer_type", "AdamWScheduleFree"),
    "Prodigy": ("--optimizer_type", "Prodigy", "--learning_rate", "1"),
    "scheduler class": (
        *("--lr_scheduler_type", "OneCycleLR", "--lr_scheduler_args", "max_lr=1e-3", "total_steps=8"),
        *("--optimizer_type", "Lion8bit"),
    ),
    "bf16 throughout": ("--full_bf16", "--mixed_precision", "bf16", "--optimizer_type", "Adafactor"),
}


@pytest.mark.parametrize("flags", RESUMED.values(), ids=RESUMED)
def test_eight_steps_equal_four_and_resumed_four(cached_demo, tmp_path: Path, logged, flags: tuple[str, ...]):
    """The straight run saves nothing on its way, the other does: saving must not change it either."""
    assets = cached_demo()
    train(arguments(assets, tmp_path / "straight", "--save_state", *flags, steps=8))
    straight = dict(logged)
    logged.clear()
    half = ("--save_state", "--save_every_n_steps", "4", *flags)
    train(arguments(assets, tmp_path / "half", *half, steps=8))
    assert logged == straight
    for path in (*(tmp_path / "half").glob("x*.safetensors"), tmp_path / "half" / "x-state"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    logged.clear()
    state = tmp_path / "half" / "x-step00000004-state"
    train(arguments(assets, tmp_path / "half", "--save_state", "--resume", str(state), *flags, steps=8))
    epoch = {4: {"loss/epoch": straight[4]["loss/epoch"]}}  # due after the epoch that the state ends
    assert logged == epoch | {step: values for step, values in straight.items() if step > 4}
    files = ["x-state/network.safetensors", "x-state/optimizer.safetensors", "x.safetensors"]
    if "--ema_decay" in flags:
        files += ["x-state/ema.safetensors", "x-ema.safetensors", "x-ema.comfy.safetensors"]
    for name in files:
        one, other = (load_file(tmp_path / run / name) for run in ("straight", "half"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one), name


def test_average_limit_and_groups_of_a_run(cached_demo, tmp_path: Path, logged):
    flags = ("--ema_decay", "0.5", "--scale_weight_norms", "0.005", "--save_every_n_steps", "1", "--audio_lr", "5e-4")
    plus = ("--network_args", "loraplus_lr_ratio=4", "--save_last_n_steps", "1", "--save_precision", "fp32")
    train(arguments(cached_demo(), tmp_path, *flags, *plus, steps=3))
    groups = {"unet_video": 1e-3, "unet_video plus": 4e-3, "unet_audio": 5e-4, "unet_audio plus": 2e-3}
    assert {k: v for k, v in logged[3].items() if k.startswith("lr/")} == {f"lr/{k}": v for k, v in groups.items()}
    assert logged[3]["max_norm/keys_scaled"] > 0
    assert logged[3]["max_norm/max_key_norm"] <= 0.005 * 1.0001
    for module in load_lora(tmp_path / "x.safetensors").modules.values():
        assert (module.up @ module.down).norm() <= 0.005 * 1.0001
    # Two weight files of neighbouring steps: the last average is half the previous one and half the weights.
    averages = [load_file(tmp_path / f"x-step{n:08d}-ema.safetensors") for n in (2, 3)]
    weights = load_file(tmp_path / "x-step00000003.safetensors")
    for name in (n for n in weights if not n.endswith("alpha")):
        assert torch.allclose(averages[1][name], 0.5 * averages[0][name] + 0.5 * weights[name], atol=1e-7)
    assert not list(tmp_path.glob("x-step00000001*")), "rotation takes the average along"
    with safe_open(tmp_path / "x-ema.safetensors", "pt") as file:
        assert file.metadata()["ss_ema_decay"] == "0.5"
        assert file.metadata()["ss_scale_weight_norms"] == "0.005"


def test_prodigy_logs_its_distance(cached_demo, tmp_path: Path, logged):
    train(arguments(cached_demo(), tmp_path, "--optimizer_type", "Prodigy", "--learning_rate", "0.5", steps=2))
    assert logged[1]["lr/unet"] == 0.5
    assert logged[1]["lr/d*lr/unet"] == pytest.approx(0.5e-6)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_full_precision_trains_and_saves_in_that_dtype(cached_demo, tmp_path: Path, logged, precision: str):
    flags = (f"--full_{precision}", "--save_state", "--learning_rate", "1e-2")
    train(arguments(cached_demo(), tmp_path, *flags, steps=3, mixed=precision))
    state = load_file(tmp_path / "x-state/network.safetensors")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert {v.dtype for k, v in state.items() if not k.endswith("alpha")} == {dtype}
    assert any(v.abs().max() > 0 for k, v in state.items() if "lora_up" in k)


def test_schedule_free_saves_the_averaged_weights(cached_demo, tmp_path: Path, logged):
    flags = ("--optimizer_type", "AdamWScheduleFree", "--save_state", "--save_precision", "fp32")
    train(arguments(cached_demo(), tmp_path, *flags, "--learning_rate", "1e-2", steps=4))
    in_training = load_file(tmp_path / "x-state/network.safetensors")
    z = load_file(tmp_path / "x-state/optimizer.safetensors")
    saved = load_file(tmp_path / "x.safetensors")
    for name in (n for n in saved if not n.endswith("alpha")):
        # y = 0.9 x + 0.1 z, the interpolation that is trained
        assert torch.allclose(0.9 * saved[name] + 0.1 * z[f"state/{name}/z"], in_training[name], atol=1e-6)
    assert any(not torch.equal(saved[n], in_training[n]) for n in saved)


REFUSED = {
    "average": (["--ema_decay", "1"], "--ema_decay: expected between 0 and 1"),
    "every": (["--ema_update_every", "3"], "--ema_update_every needs --ema_decay"),
    "limit": (["--scale_weight_norms", "0"], "--scale_weight_norms: expected more than 0"),
    "both": (["--full_fp16", "--full_bf16"], "--full_fp16 and --full_bf16 exclude each other"),
    "precision": (["--full_bf16", "--mixed_precision", "fp16"], "--full_bf16 needs --mixed_precision bf16, got fp16"),
    "adafactor": (["--lr_scheduler", "adafactor", "--lr_warmup_steps", "5"], "takes no --lr_warmup_steps"),
    "adafactor alone": (["--lr_scheduler", "adafactor"], "is for --optimizer_type Adafactor"),
    "warm-up": (["--lr_warmup_steps", "1.5"], "--lr_warmup_steps: expected whole steps"),
    "schedule option": (["--lr_scheduler", "rex", "--lr_scheduler_args", "alpha=1"], "rex has no option 'alpha'"),
    "class option": (["--lr_scheduler_type", "StepLR"], "StepLR refuses them"),
    "optimizer option": (["--optimizer_args", "beta=1"], "AdamW has no option 'beta' (did you mean 'betas'?)"),
    "one rate": (["--optimizer_type", "Prodigy", "--audio_lr", "1e-5"], "single learning rate"),
    "lora+": (["--network_args", "loraplus_lr_ratio=0"], "loraplus_lr_ratio=0: expected a number above 0"),
    "lr_args": (["--lr_args", "audio=fast"], "expected pattern=rate"),
    "averages": (["--optimizer_type", "AdamWScheduleFree", "--ema_decay", "0.9"], "averages the weights itself"),
}


@pytest.mark.parametrize(("flags", "expected"), REFUSED.values(), ids=REFUSED)
def test_refused_before_the_checkpoint_is_opened(tmp_path: Path, capsys, flags: list[str], expected: str):
    for name in ("model.safetensors", "data.toml"):
        (tmp_path / name).write_text("not read", encoding="utf-8")
    paths = ["--ltx2_checkpoint", str(tmp_path / "model.safetensors"), "--dataset_config", str(tmp_path / "data.toml")]
    with pytest.raises(SystemExit) as stop:
        train([*paths, "--output_dir", str(tmp_path / "out"), *flags])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


def test_a_schedule_longer_than_the_run_is_refused_before_the_model_is_loaded(
    cached_demo, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("musubi_tuner.training.run_parts.load_model", lambda *a: pytest.fail("the model was loaded"))
    flags = ("--lr_scheduler", "warmup_stable_decay", "--lr_warmup_steps", "8", "--lr_decay_steps", "50%")
    with pytest.raises(SystemExit):
        train(arguments(cached_demo(), tmp_path, *flags, steps=10))
    assert "8 warm-up steps and 5 steps of decay are more than the run's 10" in capsys.readouterr().err
