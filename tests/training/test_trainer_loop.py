"""The loop with a stand-in for the transformer: dropped steps, batches that train nothing, changed data."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from cache_files import one_dataset, write_item
from ltx2_tiny import tiny_config, tiny_model
from torch import nn

from musubi_tuner.common.av import AV
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile, save_safetensors
from musubi_tuner.dataset.batch import SampleKey
from musubi_tuner.dataset.items import TrainingSet
from musubi_tuner.dataset.sampling import BatchPlan
from musubi_tuner.diffusion.balance import BalanceSettings
from musubi_tuner.diffusion.losses import LossTerm
from musubi_tuner.diffusion.timesteps import NoiseLevelSampler
from musubi_tuner.models.ltx2.quantize import Quantization
from musubi_tuner.quantization.linear import pack_linear
from musubi_tuner.quantization.packed import Packed
from musubi_tuner.training import culprits as culprits_module
from musubi_tuner.training import tally as tally_module
from musubi_tuner.training import trainer as trainer_module
from musubi_tuner.training.audio_watch import AudioWatch
from musubi_tuner.training.compute import Compute, make_scaler
from musubi_tuner.training.culprits import non_finite_tensors
from musubi_tuner.training.fused_backward import FusedBackward
from musubi_tuner.training.lr_plan import FactorPlan
from musubi_tuner.training.lr_schedulers import ScheduleSettings
from musubi_tuner.training.reports import StepReport
from musubi_tuner.training.state import Progress
from musubi_tuner.training.step import TaskSettings
from musubi_tuner.training.supervision import SupervisionSettings
from musubi_tuner.training.trainer import LoopSettings, Trainer


@dataclass
class View:
    """A batch whose losses are ``factor`` times the parameter; a modality of None is absent."""

    video: float | None = 1.0
    audio: float | None = None
    num_tokens: int = 1
    keys: tuple[SampleKey, ...] = ()
    level: float = 0.5

    @property
    def sigma(self) -> torch.Tensor:
        return torch.tensor([self.level])


@dataclass
class Loader:
    views: list[View]
    plan: BatchPlan = field(default_factory=lambda: BatchPlan(TrainingSet("video", ()), seed=0))

    def batches_per_epoch(self, world_size: int = 1) -> int:
        return len(self.views)

    def epoch(self, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1):
        yield from self.views[start:]


@dataclass
class Recorder:
    reports: list[StepReport] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)

    def on_start(self, progress):
        pass

    def on_step(self, report, progress):
        self.reports.append(report)
        self.positions.append((progress.global_step, progress.epoch, progress.batch_in_epoch))

    def on_epoch_end(self, epoch, progress):
        self.epochs.append(epoch)

    def on_end(self, progress):
        pass


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(model, view, task):
        values = AV(video=view.video, audio=view.audio)
        # The parameter takes part in the video only.
        return {
            name: LossTerm(model.weight * value if name == "video" else torch.tensor([value]))
            for name, value in values.items()
        }

    monkeypatch.setattr(trainer_module, "view_losses", losses)
    monkeypatch.setattr(Trainer, "_view", lambda self, batch, epoch: batch)


def run(
    views: list[View],
    *,
    steps: int,
    plan=None,
    progress=None,
    accumulation=1,
    scaler=None,
    lr=0.1,
    watch=None,
    actions=(),
    norm_groups=None,
    fused=False,
):
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    task = TaskSettings(NoiseLevelSampler(), seed=0, device=torch.device("cpu"), dtype=torch.float32)
    loop = LoopSettings(steps, accumulation, 0.0, FactorPlan("constant", ScheduleSettings(steps), (lr,)))
    recorder = Recorder()
    Trainer(
        model,
        [model.weight],
        optimizer,
        Loader(views, plan) if plan else Loader(views),
        task,
        loop,
        progress or Progress(seed=0),
        [recorder],
        scaler,
        watch or AudioWatch(),
        actions,
        norm_groups(model) if norm_groups else {},
        FusedBackward(optimizer) if fused else None,
    ).run()
    return model.weight.item(), recorder


def test_a_short_last_window_is_divided_by_the_full_count_and_ends_the_epoch():
    weight, recorder = run([View(1.0), View(1.0), View(1.0)], steps=3, accumulation=2, lr=0.1)
    assert recorder.positions == [(1, 0, 2), (2, 1, 0), (3, 1, 2)]
    assert recorder.epochs == [0]
    assert weight == pytest.approx(1 - 0.1 - 0.05 - 0.1)


def test_losses_are_means_over_the_batches_that_have_the_modality():
    _, recorder = run([View(1.0, audio=3.0), View(2.0)], steps=1, accumulation=2)
    (report,) = recorder.reports
    assert report.losses == {"video": pytest.approx(1.5), "audio": pytest.approx(3.0)}
    assert report.loss == pytest.approx((4.0 + 2.0) / 2)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_batch_that_reaches_nothing_trained_does_not_stop_the_run(scaled: bool):
    """As a LoRA of the video stream alone meets a batch of sound."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    weight, recorder = run([View(None, audio=5.0), View(1.0)], steps=2, scaler=scaler)
    assert [r.stepped for r in recorder.reports] == [False, True]
    assert weight == pytest.approx(0.9)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_process_without_a_batch_takes_part_in_the_step(monkeypatch: pytest.MonkeyPatch, precision: str):
    """Its own loader is empty, the gradients and losses of another process arrive."""
    scaler = make_scaler(Compute(None, torch.device("cpu"), torch.float32, precision), Progress(seed=0))
    arriving = scaler.get_scale() if scaler else 1.0

    def average(parameters):
        assert all(p.grad is None for p in parameters)
        for p in parameters:
            p.grad = torch.full_like(p, 0.5 * arriving)

    # loss, video, audio, silence; gradient norm; four ranges of noise levels; tokens: sums, then counts
    other = torch.tensor(
        [[3.0, 3.0, 0.0, 0.0, 0.5, 0.0, 3.0, 0.0, 0.0, 7.0], [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]]
    )
    monkeypatch.setattr(trainer_module, "average_gradients", average)
    monkeypatch.setattr(tally_module, "sum_over_processes", lambda own, device: own + other)
    monkeypatch.setattr(Loader, "batches_per_epoch", lambda self, world_size: 1)
    weight, recorder = run([], steps=2, scaler=scaler)
    assert recorder.positions == [(1, 1, 0), (2, 2, 0)]
    assert [(r.loss, r.losses, r.num_tokens, r.stepped) for r in recorder.reports] == [
        (3.0, {"video": 3.0}, 7, True)
    ] * 2
    assert recorder.reports[0].scalars == {"loss/sigma_0.25-0.50": 3.0}
    assert weight == pytest.approx(1 - 2 * 0.1 * 0.5)


@pytest.mark.parametrize("way", ["plain", "scaled", "fused"])
def test_a_non_finite_loss_drops_one_step_only(way: str):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if way == "scaled" else None
    progress, views = Progress(seed=0), [View(float("nan")), View(1.0)]
    weight, recorder = run(views, steps=2, progress=progress, scaler=scaler, fused=way == "fused")
    assert [r.stepped for r in recorder.reports] == [False, True]
    assert weight == pytest.approx(0.9)
    assert progress.skipped_steps == 1
    assert progress.epoch_losses == [pytest.approx(1.0)]


def test_the_cache_that_makes_steps_non_finite_is_named_once(tmp_path: Path, caplog):
    items = [write_item(tmp_path, name, audio_steps=3) for name in ("a", "b")]
    file = SafetensorsFile(items[1].audio)
    tensors = {key: t * float("nan") if t.is_floating_point() else t for key, t in file.read()}
    save_safetensors(tensors, file.path, file.metadata)
    plan = BatchPlan(one_dataset(items), seed=0)
    bad = View(float("nan"), keys=(SampleKey("a"), SampleKey("b")))
    with caplog.at_level(logging.ERROR):
        run([bad, View(float("nan"), keys=(SampleKey("a"),)), View()], steps=6, plan=plan)
    assert [m for m in caplog.messages if "NaN" in m] == [
        f"{file.path}: holds NaN or infinity, or cannot be read; delete it and cache it again"
    ]


def test_a_base_weight_that_makes_steps_non_finite_is_named_once(monkeypatch: pytest.MonkeyPatch, caplog):
    searched = []

    def search(model):
        searched.append(model)
        return iter(["blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b"])

    monkeypatch.setattr(culprits_module, "non_finite_tensors", search)
    with caplog.at_level(logging.ERROR):
        run([View(1.0)], steps=1)
        assert not searched, "a good step costs nothing"
        run([View(float("nan")), View(1.0), View(float("nan"))], steps=6)
    assert len(searched) == 1
    (message,) = [m for m in caplog.messages if "base model" in m]
    assert "4 tensors" in message
    assert "(blocks.0.a, blocks.0.b, blocks.1.a, ...)" in message


LAYER = "transformer_blocks.1.attn1.to_q"
HELD = {None: ["weight"], "fp8": ["weight", "weight_scale"], "int8": ["weight_scale"], "nf4": ["weight_scale"]}


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_found_however_it_is_held(kind: str | None, value: float):
    model = tiny_model(tiny_config("2.3"))
    assert not list(non_finite_tensors(model))
    weight = model.get_submodule(LAYER).weight
    weight.data[3, 5] = value
    if kind is not None:
        pack_linear(model, LAYER, Quantization(kind).method.quantize(weight.data))
    assert list(non_finite_tensors(model)) == [f"{LAYER}.{tensor}" for tensor in HELD[kind]]


def test_nan_in_stored_fp8_values_is_found():
    model = tiny_model(tiny_config("2.3"))
    weight = model.get_submodule(LAYER).weight.data
    weight[3, 5] = float("nan")
    pack_linear(model, LAYER, Packed(weight.to(torch.float8_e4m3fn), torch.ones(1, 1)))
    assert list(non_finite_tensors(model)) == [f"{LAYER}.weight"]


def test_an_error_ends_the_threads_that_read_ahead_while_its_traceback_is_kept(monkeypatch: pytest.MonkeyPatch):
    ended = []

    def reading(self, *_, **__):
        try:
            yield from self.views
        finally:
            ended.append(True)

    monkeypatch.setattr(Loader, "epoch", reading)
    with pytest.raises(UserError) as error:
        run([View(float("inf"))] * 30, steps=30)
    assert error.tb is not None
    assert ended


@pytest.mark.parametrize("fused", [False, True])
def test_twenty_non_finite_losses_in_a_row_end_the_run(fused: bool):
    with pytest.raises(UserError, match="20 steps in a row"):
        run([View(float("inf"))] * 30, steps=30, fused=fused)


def test_a_step_within_the_backward_pass_reports_as_one_after_it():
    views = [View(None, audio=5.0), View(3.0, audio=1.0)]
    (weight, recorder), (expected, plain) = (run(views, steps=2, fused=fused) for fused in (True, False))
    assert weight == expected == pytest.approx(0.7)
    assert [(r.stepped, r.grad_norm) for r in recorder.reports] == [(False, 0.0), (True, pytest.approx(3.0))]
    assert [r.losses for r in recorder.reports] == [r.losses for r in plain.reports]


def test_a_state_from_the_middle_of_a_longer_epoch_does_not_hang(caplog: pytest.LogCaptureFixture):
    """Some clips were removed between saving and resuming."""
    progress = Progress(seed=0, global_step=5, epoch=1, batch_in_epoch=5, batches_per_epoch=7)
    _, recorder = run([View()] * 4, steps=7, progress=progress)
    assert recorder.positions == [(6, 2, 1), (7, 2, 2)]
    assert "4 batches an epoch, 7 when the state was saved" in caplog.text


def test_the_loss_of_a_step_has_the_balance_of_the_steps_before():
    """Two of four batches have sound: P goes 1, 0.75, 0.625, and the audio term counts 1 / P."""
    watch = AudioWatch(balance=BalanceSettings("inv_freq", beta=0.5))
    progress = Progress(seed=0)
    views = [View(1.0, audio=3.0), View(1.0)] * 4
    _, recorder = run(views, steps=3, accumulation=2, lr=0.0, watch=watch, progress=progress)
    for report, presence in zip(recorder.reports, (1.0, 0.75, 0.625), strict=True):
        assert report.loss == pytest.approx((1 + 3 / presence + 1) / 2)
        assert report.losses["audio"] == pytest.approx(3.0), "losses of a modality are reported as they are"
        assert report.scalars["loss/audio_weight_effective"] == pytest.approx(1 / presence)
    assert progress.audio_balance["presence"] == pytest.approx(0.5625)


def test_a_dropped_step_leaves_the_running_losses_alone():
    watch = AudioWatch(balance=BalanceSettings("ema_mag", ema_decay=0.5))
    progress = Progress(seed=0)
    run([View(float("nan"), audio=3.0), View(2.0)], steps=2, watch=watch, progress=progress, lr=0.0)
    assert progress.audio_balance["video_loss"] == pytest.approx(1.5), "start 1, then 2"


def test_too_little_sound_ends_the_run_when_it_should():
    watch = AudioWatch(supervision=SupervisionSettings("error", warmup=4, interval=2, min_ratio=0.6))
    progress = Progress(seed=0)
    with pytest.raises(UserError, match="2 of 4 training batches"):
        run([View(1.0, audio=1.0), View(1.0)] * 9, steps=9, watch=watch, progress=progress)
    assert progress.global_step == 3


def test_weight_actions_run_once_after_each_step_that_was_made():
    """Not after a micro-batch, not after a dropped step."""
    calls = []

    def action(step: int) -> dict[str, float]:
        calls.append(step)
        return {"max_norm/keys_scaled": float(step)}

    views = [View(1.0), View(1.0), View(float("nan")), View(1.0), View(1.0), View(1.0)]
    _, recorder = run(views, steps=3, accumulation=2, actions=[action])
    assert calls == [1, 3]
    assert [r.scalars.get("max_norm/keys_scaled") for r in recorder.reports] == [1.0, None, 3.0]


def test_losses_are_told_apart_by_noise_level():
    _, recorder = run([View(1.0, level=0.1), View(3.0, level=0.2), View(5.0, level=1.0)], steps=1, accumulation=3)
    assert recorder.reports[0].scalars == {"loss/sigma_0.00-0.25": 2.0, "loss/sigma_0.75-1.00": 5.0}
    assert recorder.reports[0].num_tokens == 3


def test_gradient_norms_of_groups_are_those_before_clipping():
    """The gradient is 3; a group without any gradient is not reported."""
    _, recorder = run([View(3.0)], steps=1, norm_groups=lambda m: {"video": [m.weight], "audio": [torch.ones(1)]})
    (report,) = recorder.reports
    assert {k: v for k, v in report.scalars.items() if "norm" in k} == {"grad_norm/video": pytest.approx(3.0)}
    assert report.grad_norm == pytest.approx(3.0)


def test_a_slow_loader_shows_in_the_share_of_waiting(monkeypatch: pytest.MonkeyPatch):
    def slow(self, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1):
        for view in self.views[start:]:
            time.sleep(0.1)
            yield view

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "epoch", slow)
        _, recorder = run([View()] * 3, steps=3)
    assert all(report.wait_share > 0.5 for report in recorder.reports)
    _, quick = run([View()] * 3, steps=3)
    assert quick.reports[-1].wait_share < 0.5
    assert recorder.reports[0].peak_memory > 2**24
