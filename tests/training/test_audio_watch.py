"""The supervision monitor and what the loop keeps of the balance."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict

import pytest
import torch

from musubi_tuner.common.errors import UserError
from musubi_tuner.diffusion.balance import BalanceSettings
from musubi_tuner.diffusion.losses import LossTerm
from musubi_tuner.training.audio_watch import AudioWatch
from musubi_tuner.training.state import Progress
from musubi_tuner.training.supervision import SupervisionCounts, SupervisionSettings, supervise


def warnings_of(pattern: str, settings: SupervisionSettings, caplog, per_step: int = 1) -> list[int]:
    """Numbers of batches at which there was a warning; ``pattern`` is repeated, x = with sound."""
    counts, found = SupervisionCounts(), []
    for step in range(60 // per_step):
        caplog.clear()
        sound = sum(pattern[(step * per_step + i) % len(pattern)] == "x" for i in range(per_step))
        counts = supervise(counts, settings, batches=per_step, with_sound=sound)
        if caplog.records:
            found.append(counts.expected)
    return found


@pytest.mark.parametrize(
    ("pattern", "per_step", "expected"),
    [
        ("x", 1, []),
        ("x.", 1, [20, 30, 40, 50, 60]),
        ("xxxx.", 1, []),  # exactly the ratio
        ("xxx.", 1, [20, 30, 40, 50, 60]),
        ("x.", 4, [20, 32, 40, 52, 60]),  # a check when a multiple of ten has been passed
    ],
)
def test_checks_after_the_warm_up_at_each_interval(pattern, per_step, expected, caplog: pytest.LogCaptureFixture):
    settings = SupervisionSettings("warn", warmup=15, interval=10, min_ratio=0.8)
    with caplog.at_level(logging.WARNING):
        assert warnings_of(pattern, settings, caplog, per_step) == expected


def test_an_error_says_how_many_and_what_to_do():
    settings = SupervisionSettings("error", warmup=0, interval=5, min_ratio=0.9)
    counts = supervise(SupervisionCounts(), settings, batches=4, with_sound=1)
    with pytest.raises(UserError, match=r"2 of 5 .*\(40%\).*90%.*num_repeats"):
        supervise(counts, settings, batches=1, with_sound=1)


def watch(**options) -> AudioWatch:
    return AudioWatch(0.5, BalanceSettings("inv_freq", beta=0.5), SupervisionSettings("warn"), **options)


def test_numbers_survive_a_state_file():
    progress, resumed = Progress(seed=0), None
    scalars = []
    for step in range(6):
        if step == 3:
            resumed = Progress(**json.loads(json.dumps(asdict(progress))))
        counts = {"loss": 4.0, "audio": float(step % 3), "audio_silence": 1.0}
        scalars.append(watch().observe({"video": 1.0, "audio": 2.0 + step}, counts, progress))
        if resumed is not None:
            assert watch().observe({"video": 1.0, "audio": 2.0 + step}, counts, resumed) == scalars[-1]
    assert resumed == progress
    assert progress.audio_supervision == {"expected": 24, "supervised": 6}, "silence is not counted as sound"
    presence = 1.0
    for step, values in enumerate(scalars):
        assert values["loss/audio_weight_effective"] == pytest.approx(0.5 / presence), "that of the step itself"
        presence = 0.5 * presence + 0.5 * (step % 3) / 4
        assert values["loss/audio_presence_ema"] == pytest.approx(presence)


def test_nothing_is_kept_or_changed_unless_asked_for():
    progress, terms = Progress(seed=0), {"audio": LossTerm(torch.ones(1), 3.0)}
    assert AudioWatch().weigh(terms, progress) is terms
    assert AudioWatch().observe({"audio": 1.0}, {"loss": 1.0, "audio": 1.0}, progress) == {}
    assert progress == Progress(seed=0)
