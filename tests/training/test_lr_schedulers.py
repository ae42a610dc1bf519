"""Learning-rate schedules against closed forms and against transformers' schedulers."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.training import steps_or_share
from musubi_tuner.training.lr_schedulers import SCHEDULES, ScheduleSettings, lr_factor, resolve_steps


@pytest.mark.parametrize(
    "name",
    ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr"],
)
@pytest.mark.parametrize("warmup", [0, 7])
def test_equals_transformers(name: str, warmup: int):
    if name == "constant" and warmup:
        pytest.skip("constant has no warm-up")
    total = 40
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    extra = {"cosine_with_restarts": {"num_cycles": 3}, "cosine_with_min_lr": {"min_lr_rate": 0.1}}.get(name, {})
    reference = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=extra
    )
    settings = ScheduleSettings(total, warmup, num_cycles=3, min_lr_ratio=0.1)
    for step in range(total + 1):
        assert lr_factor(name, step, settings) == pytest.approx(reference.get_last_lr()[0], abs=1e-9), step
        optimizer.step()
        reference.step()


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"cosin.*did you mean 'cosine'.*constant_with_warmup"):
        lr_factor("cosin", 0, ScheduleSettings(10))
    assert "cosine" in SCHEDULES


def test_min_lr_needs_its_ratio():
    with pytest.raises(UserError, match="--lr_scheduler_min_lr_ratio"):
        lr_factor("cosine_with_min_lr", 5, ScheduleSettings(10))


@pytest.mark.parametrize(("text", "steps"), [("100", 100), ("0.1", 20), ("10%", 20), ("0", 0), ("1", 1)])
def test_warmup_in_steps_or_share(text: str, steps: int):
    assert resolve_steps(steps_or_share(text), 200) == steps


@pytest.mark.parametrize("text", ["1.5", "-1", "x", "150%"])
def test_bad_warmup(text: str):
    with pytest.raises(ValueError, match="expected whole steps"):
        steps_or_share(text)
