"""Samplers of batches with sound: what the start of a run says of them, refuses and does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cache_files import one_dataset

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.data import DataConfig
from musubi_tuner.config.optimizer import OptimizerConfig
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.dataset.audio_mixing import AudioProbability, AudioQuota
from musubi_tuner.dataset.items import CachedItem
from musubi_tuner.dataset.sampling import BatchPlan
from musubi_tuner.ltx2_train_network import main as train
from musubi_tuner.training.audio_batches import audio_mixing, report_sound
from musubi_tuner.training.trainer import Trainer


def plan(silent: int, sounding: int, mixing=None, mode: str = "av", **options) -> BatchPlan:
    item = CachedItem("", Path(), Path(), (1, 1, 1), 6, 25.0)
    items = [replace(item, base=f"{i}", audio_steps=26 * (i >= silent)) for i in range(silent + sounding)]
    return BatchPlan(one_dataset(items, mode, **options), seed=0, mixing=mixing)


def config(accumulation: int = 1, **data) -> TrainNetworkConfig:
    return TrainNetworkConfig(
        data=DataConfig(**data), optimizer=OptimizerConfig(gradient_accumulation_steps=accumulation)
    )


@pytest.mark.parametrize(
    ("flags", "world_size", "mixing"),
    [
        ({}, 2, None),
        ({"min_audio_batches_per_accum": 2}, 1, AudioQuota(2, window=4)),
        ({"min_audio_batches_per_accum": 2}, 3, AudioQuota(2, window=12)),
        ({"audio_batch_probability": 0.0}, 2, AudioProbability(0.0)),
        ({"audio_batch_probability": 0.25}, 2, AudioProbability(0.25)),
    ],
)
def test_a_window_is_one_step_of_all_processes(flags: dict, world_size: int, mixing) -> None:
    assert audio_mixing(config(accumulation=4, **flags), world_size) == mixing


def test_the_share_of_sound_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        report_sound(plan(6, 4, batch_size=2, num_repeats=2, separate_audio_buckets=True), "av")
    assert caplog.messages == ["sound in the first epoch: 4 of 10 batches (40%), 8 of 20 samples (40%)"]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_little_sound_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    report_sound(plan(9, 1), "av")
    (message,) = warnings_of(caplog)
    assert "raise num_repeats of the datasets with sound" in message


@pytest.mark.parametrize("mode", ["video", "audio"])
def test_other_modes_are_not_bothered(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        report_sound(plan(0, 5, mode=mode), mode)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("mixing", "flag"),
    [(AudioQuota(1, 2), "--min_audio_batches_per_accum 1"), (AudioProbability(0.5), "--audio_batch_probability 0.5")],
    ids=["quota", "probability"],
)
@pytest.mark.parametrize(("mode", "advice"), [("av", "ltx2_cache_latents.py"), ("video", "--ltx2_mode av")])
def test_without_any_sound_the_samplers_are_refused(mixing, flag: str, mode: str, advice: str) -> None:
    with pytest.raises(UserError) as error:
        report_sound(plan(5, 0, mixing), mode)
    assert str(error.value).startswith(f"{flag}: none of the 5 batches has sound; ")
    assert advice in str(error.value)
    assert str(error.value).endswith(f"or leave {flag.split()[0]} out")


def test_a_sampler_without_effect_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    report_sound(plan(0, 5, AudioProbability(0.5)), "av")
    assert warnings_of(caplog) == ["--audio_batch_probability 0.5 has no effect: every batch has sound"]


def test_a_quota_that_cannot_last_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    report_sound(plan(7, 5, AudioQuota(2, window=3)), "av")
    (message,) = warnings_of(caplog)
    assert "last for 3 of the 4 steps of an epoch" in message
    caplog.clear()
    report_sound(plan(6, 6, AudioQuota(2, window=4)), "av")
    assert warnings_of(caplog) == []


# --- whole runs ---------------------------------------------------------------------------------------------


def arguments(assets, output: Path, *extra: str, mode: str = "av") -> list[str]:
    return [
        *("--dataset_config", str(assets.dataset), "--ltx2_checkpoint", str(assets.checkpoint), "--ltx2_mode", mode),
        *("--mixed_precision", "no", "--network_dim", "4", "--max_train_steps", "1", "--seed", "5"),
        *("--max_data_loader_n_workers", "0", "--output_dir", str(output), *extra),
    ]


def test_mode_video_is_refused_before_the_model_is_loaded(cached_demo, tmp_path: Path, capsys, monkeypatch) -> None:
    def never(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("musubi_tuner.training.run_parts.load_model", never)
    with pytest.raises(SystemExit) as stop:
        train(arguments(cached_demo(), tmp_path, "--audio_batch_probability", "0.5", mode="video"))
    assert stop.value.code == 2
    assert "--audio_batch_probability 0.5: none of the 4 batches has sound" in capsys.readouterr().err


def test_keeping_workers_needs_no_flag_and_the_flag_is_told_so(
    cached_demo, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(Trainer, "run", lambda self: None)
    train(arguments(cached_demo(), tmp_path, "--persistent_data_loader_workers"))
    assert "--persistent_data_loader_workers has no effect: threads read batches" in capsys.readouterr().err


def test_the_plan_of_a_run_follows_the_flags(cached_demo, tmp_path: Path, monkeypatch) -> None:
    plans = []
    monkeypatch.setattr(Trainer, "run", lambda self: plans.append(self.loader.plan))
    train(
        arguments(
            *(cached_demo(), tmp_path, "--gradient_accumulation_steps", "2", "--min_audio_batches_per_accum", "1")
        )
    )
    assert plans[0].mixing == AudioQuota(1, window=2)
