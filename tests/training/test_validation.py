"""The validation loss: what it depends on, when it is measured, and that training does not notice it."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from musubi_tuner.config.tracking import ValidationConfig
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.dataset.discovery import discover
from musubi_tuner.dataset.schema import load_dataset_config
from musubi_tuner.demo.assets import asset_paths
from musubi_tuner.diffusion.losses import LossTerm
from musubi_tuner.diffusion.timesteps import NoiseLevelSampler
from musubi_tuner.ltx2_train_network import main as train
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.load import load_transformer
from musubi_tuner.training import validation as validation_module
from musubi_tuner.training.state import Progress
from musubi_tuner.training.step import TaskSettings
from musubi_tuner.training.validation import ItemLoss, Validator, summarise, wants_validation

SAMPLER = NoiseLevelSampler(shifted_logit_mode="stretched")
DROPS = {"first_frame_p": 1.0, "caption_dropout_rate": 1.0}  # that validation must not take over
LOSSES = {"video": LossTerm(torch.ones(1))}
TASK = TaskSettings(SAMPLER, seed=3, device=torch.device("cpu"), dtype=torch.float32, **DROPS)


class Log:
    def __init__(self) -> None:
        self.values: dict[int, dict[str, float]] = {}

    def log(self, values, step: int) -> None:
        assert step not in self.values, "measured twice at a step"
        self.values[step] = dict(values)


@pytest.fixture(scope="module")
def parts(cached_demo):
    """The demo's clips as a validation set, and its transformer."""
    assets = cached_demo()
    items = discover(load_dataset_config(assets.dataset, need_sources=False), "av")
    transformer = load_transformer(
        Checkpoint.open(assets.checkpoint), mode="av", dtype=torch.float32, device=torch.device("cpu")
    )
    return items, transformer


def validator(training_set, transformer, *, task=TASK, steps=1, epochs=None, **options) -> Validator:
    optimizer = torch.optim.SGD(transformer.parameters(), lr=0.1)
    return Validator(training_set, task, transformer, nn.Dropout(), optimizer, Log(), steps, epochs, **options)


def test_processes_together_measure_what_one_measures(parts, monkeypatch: pytest.MonkeyPatch):
    alone = validator(*parts).measure()
    tables = []
    monkeypatch.setattr(validation_module, "sum_over_processes", lambda table, device: tables.append(table) or table)
    for rank in range(3):
        validator(*parts, rank=rank, world_size=3).measure()
    monkeypatch.setattr(validation_module, "sum_over_processes", lambda table, device: sum(tables))
    assert validator(*parts, rank=0, world_size=3).measure() == alone


def test_neither_batch_size_nor_random_state_nor_training_matters(parts):
    training_set, transformer = parts
    first = validator(training_set, transformer).measure()
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    batched = replace(
        training_set,
        datasets=tuple(replace(d, batch_size=2, separate_audio_buckets=True) for d in training_set.datasets),
    )
    transformer.train()
    other = validator(batched, transformer)
    assert other.measure() == first
    assert torch.equal(torch.random.get_rng_state(), state)
    assert transformer.training
    assert other.network.training
    assert validator(training_set, transformer, task=replace(TASK, seed=4)).measure() != first


def test_levels_are_quantiles_and_nothing_else_is_drawn(parts, monkeypatch: pytest.MonkeyPatch):
    """Whole clips are denoised with their captions, each at an eighth of the distribution of its own."""
    training_set, transformer = parts
    views = []
    monkeypatch.setattr(validation_module, "view_losses", lambda model, view, task: views.append(view) or LOSSES)
    validator(replace(training_set, datasets=training_set.datasets * 2), transformer).measure()
    shares = [(k + 0.5) / 8 for k in (0, 4, 2, 6, 1, 5, 3, 7)]
    for view, share in zip(views, shares, strict=True):
        video = view.tokens.video
        assert torch.equal(video.sigma, SAMPLER.quantile(share, torch.tensor([video.grid])))
        assert torch.equal(view.tokens.audio.sigma, video.sigma)
        assert torch.equal(video.t, video.sigma[:, None]), "no frame is kept clean"
        assert bool(view.inputs.video.context.any()), "no caption is dropped"


def test_means_over_items_terms_and_levels():
    items = [ItemLoss(3.0, {"video": 1.0, "audio": 2.0}, 0), ItemLoss(5.0, {"video": 5.0}, 0), ItemLoss(1.0, {}, 3)]
    assert summarise(items) == {
        "val_loss": 3.0,
        "val_loss_video": 3.0,
        "val_loss_audio": 2.0,
        "val_loss_sigma_0.00-0.25": 4.0,
        "val_loss_sigma_0.75-1.00": 1.0,
    }
    assert math.isnan(summarise([ItemLoss(math.inf, {}, 0)])["val_loss"])


@pytest.mark.parametrize(
    ("first", "measured"), [(0, [2, 3, 4, 6, 8]), (1, [2, 3, 4, 6, 8]), (3, [3, 4, 6, 8]), (8, [8])]
)
def test_steps_epochs_and_the_end_trigger_once_each(parts, monkeypatch: pytest.MonkeyPatch, first, measured):
    """Epochs of 3 steps; every 2 steps and every epoch; a run of 8 steps that starts after step ``first``.

    Where a state was saved, the run that saved it may have ended before it measured: a resumed run does it.
    """
    listener = validator(*parts, steps=2, epochs=1)
    monkeypatch.setattr(Validator, "measure", lambda self: [ItemLoss(1.0, {}, 0)])

    def at(step: int) -> Progress:
        return Progress(seed=0, global_step=step, epoch=step // 3, batch_in_epoch=step % 3)

    listener.on_start(at(first))
    for step in range(first + 1, 9):
        listener.on_step(None, at(step))
        if step % 3 == 0:
            listener.on_epoch_end(step // 3 - 1, at(step))
    listener.on_end(at(8))
    assert list(listener.tracking.values) == measured
    assert listener.last["val_loss"] == 1.0


def test_the_last_step_is_measured_and_nothing_before_the_first(parts, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Validator, "measure", lambda self: [ItemLoss(1.0, {}, 0)])
    for last, expected in ((5, [5]), (0, [])):
        listener = validator(*parts, steps=10, epochs=1)
        listener.on_start(Progress(seed=0))
        listener.on_end(Progress(seed=0, global_step=last))
        assert list(listener.tracking.values) == expected


@pytest.mark.parametrize(
    ("every", "datasets", "wanted", "said"),
    [(None, (), False, ""), (2, (), False, "has no effect"), (None, (1,), False, "not used"), (2, (1,), True, "")],
)
def test_flags_and_datasets_belong_together(every, datasets, wanted, said, caplog: pytest.LogCaptureFixture):
    config = TrainNetworkConfig(validation=ValidationConfig(validate_every_n_steps=every))
    with caplog.at_level("INFO", "musubi_tuner"):
        assert wants_validation(config, SimpleNamespace(validation=datasets, path="data.toml")) is wanted
    assert said in caplog.text
    assert bool(said) == bool(caplog.records)


def test_training_is_the_same_with_it_and_a_resumed_run_measures_the_same(cached_demo, tmp_path, monkeypatch):
    shutil.copytree(cached_demo().checkpoint.parent, tmp_path / "assets")
    assets = asset_paths(tmp_path / "assets")
    shutil.copytree(assets.cache, assets.cache.with_name("other"))
    text = assets.dataset.read_text(encoding="utf-8")
    section = text.partition("[[datasets]]")[2].replace('"cache"', '"other"')
    assets.dataset.write_text(f"{text}\n[[validation_datasets]]{section}", encoding="utf-8")
    logged: dict[int, dict[str, float]] = {}
    monkeypatch.setattr(
        "musubi_tuner.training.tracking.log_scalars", lambda _, values, step: logged.setdefault(step, {}).update(values)
    )

    def run(name: str, *extra: str) -> dict[int, float]:
        logged.clear()
        train(
            [
                *("--dataset_config", str(assets.dataset), "--ltx2_checkpoint", str(assets.checkpoint)),
                *("--ltx2_mode", "av", "--ltx_version", "2.3", "--mixed_precision", "no", "--learning_rate", "1e-3"),
                *("--network_dim", "4", "--network_alpha", "4", "--network_dropout", "0.3", "--seed", "5"),
                *("--max_train_steps", "4", "--max_data_loader_n_workers", "0", "--num_timestep_buckets", "2"),
                *("--output_dir", str(tmp_path / name), "--output_name", "x", "--save_state", *extra),
            ]
        )
        return {step: values["val_loss"] for step, values in logged.items() if "val_loss" in values}

    validate = ("--validate_every_n_steps", "2", "--save_every_n_steps", "2")
    straight = run("with", *validate)
    assert sorted(straight) == [2, 4]
    assert straight[2] != straight[4]
    assert run("without") == {}
    one, other = (load_file(tmp_path / name / "x-state/network.safetensors") for name in ("with", "without"))
    assert all(torch.equal(one[k], other[k]) for k in one)
    shutil.copytree(tmp_path / "with/x-step00000002-state", tmp_path / "state")
    assert run("resumed", *validate, "--resume", str(tmp_path / "state")) == straight, (
        "what was due at step 2 is done again"
    )
