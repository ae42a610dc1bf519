"""Learning-rate schedules against closed forms and against the schedulers of transformers, diffusers and torch."""

from __future__ import annotations

import pytest
import torch
from diffusers.optimization import get_piecewise_constant_schedule
from transformers import get_scheduler

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.optimizer import OptimizerConfig, steps_or_share
from musubi_tuner.training.lr_plan import make_plan, schedule_settings
from musubi_tuner.training.lr_schedulers import (
    SCHEDULES,
    ScheduleSettings,
    check_schedule,
    lr_factor,
    resolve_steps,
)
from musubi_tuner.training.optimizers import create_optimizer

TOTAL = 40
LR = 3e-4


def sgd(*rates: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate, "label": str(i)} for i, rate in enumerate(rates)
    ]
    return torch.optim.SGD(groups, lr=rates[0])


def followed(scheduler, steps: int = TOTAL) -> list[float]:
    """The rate of each step of a scheduler object."""
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def factors(name: str, settings: ScheduleSettings) -> list[float]:
    check_schedule(name, settings)
    return [lr_factor(name, step, settings) for step in range(settings.total_steps)]


REFERENCES = {
    "constant": ("constant", {}, {}),
    "constant_with_warmup": ("constant_with_warmup", {}, {}),
    "linear": ("linear", {}, {}),
    "cosine ignores cycles": ("cosine", {"num_cycles": 3}, {}),
    "restarts": ("cosine_with_restarts", {"num_cycles": 3}, {"num_cycles": 3}),
    "floor": ("cosine_with_min_lr", {"min_lr_ratio": 0.1}, {"min_lr_rate": 0.1}),
    "floor, cycles": (
        "cosine_with_min_lr",
        {"min_lr_ratio": 0.1, "num_cycles": 3},
        {"min_lr_rate": 0.1, "num_cycles": 1.5},
    ),
    "polynomial": ("polynomial", {"power": 2.0}, {"power": 2.0}),
    "polynomial, end": ("polynomial", {"options": {"lr_end": 1e-5}}, {"lr_end": 1e-5}),
    "inverse_sqrt": ("inverse_sqrt", {}, {}),
    "inverse_sqrt, timescale": ("inverse_sqrt", {"timescale": 5}, {"timescale": 5}),
    "stable": ("warmup_stable_decay", {"decay_steps": 11}, {"num_decay_steps": 11}),
    "stable, floor, cycles": (
        "warmup_stable_decay",
        {"decay_steps": 11, "min_lr_ratio": 0.2, "num_cycles": 2},
        {"num_decay_steps": 11, "min_lr_ratio": 0.2, "num_cycles": 1.0},
    ),
    "stable, types": (
        "warmup_stable_decay",
        {"decay_steps": 11, "options": {"warmup_type": "1-sqrt", "decay_type": "1-sqrt"}},
        {"num_decay_steps": 11, "warmup_type": "1-sqrt", "decay_type": "1-sqrt"},
    ),
    "stable, cosine rise": (
        "warmup_stable_decay",
        {"decay_steps": 11, "options": {"warmup_type": "cosine", "decay_type": "linear"}},
        {"num_decay_steps": 11, "warmup_type": "cosine", "decay_type": "linear"},
    ),
}


@pytest.mark.parametrize(("name", "ours", "theirs"), REFERENCES.values(), ids=REFERENCES)
@pytest.mark.parametrize("warmup", [0, 7])
def test_equals_transformers(name: str, ours: dict, theirs: dict, warmup: int):
    if name == "constant":
        warmup = 0
    reference = get_scheduler(
        name, sgd(LR), num_warmup_steps=warmup, num_training_steps=TOTAL, scheduler_specific_kwargs=dict(theirs)
    )
    settings = ScheduleSettings(TOTAL, warmup, learning_rate=LR, **ours)
    assert [LR * f for f in factors(name, settings)] == pytest.approx(followed(reference), rel=1e-9, abs=1e-15)


def test_piecewise_constant_equals_diffusers():
    rules = "1:10,0.1:20,0.5:30,0.005"
    reference = get_piecewise_constant_schedule(sgd(1.0), rules)
    settings = ScheduleSettings(TOTAL, options={"step_rules": rules})
    assert factors("piecewise_constant", settings) == followed(reference)


def test_rex_is_its_formula():
    found = factors("rex", ScheduleSettings(TOTAL, 8))
    left = [1 - s / 32 for s in range(32)]
    assert found[8:] == pytest.approx([0.01 + 0.99 * z / (0.1 + 0.9 * z) for z in left])
    assert found[:9] == pytest.approx([0.01 + 0.99 * s / 8 for s in range(9)])
    assert lr_factor("rex", TOTAL, ScheduleSettings(TOTAL, 8)) == pytest.approx(0.01)
    with_options = ScheduleSettings(TOTAL, min_lr_ratio=0.0, options={"rex_alpha": 0.5, "rex_beta": 0.5})
    assert factors("rex", with_options)[20] == pytest.approx(0.5 / 0.75)


@pytest.mark.parametrize("name", [n for n in SCHEDULES.names() if n != "adafactor"])
def test_every_schedule_is_a_function_of_the_step(name: str):
    settings = ScheduleSettings(TOTAL, 5, 10, min_lr_ratio=0.1, learning_rate=LR, options={"step_rules": "1:10,0.1"})
    forwards = [lr_factor(name, s, settings) for s in range(TOTAL)]
    assert [lr_factor(name, s, settings) for s in reversed(range(TOTAL))] == forwards[::-1]
    assert all(0 <= f <= 1 for f in forwards)


REFUSED = {
    "min ratio": ("cosine_with_min_lr", {}, "--lr_scheduler_min_lr_ratio"),
    "option": ("rex", {"options": {"rex_alfa": 0.2}}, "did you mean 'rex_alpha'"),
    "no options": ("linear", {"options": {"power": 2}}, "it takes none"),
    "no number": ("rex", {"options": {"rex_alpha": "big"}}, "expected a number"),
    "alpha": ("rex", {"options": {"rex_alpha": 0}}, "expected alpha > 0"),
    "type": ("warmup_stable_decay", {"options": {"decay_type": "cos"}}, "expected one of linear, cosine, 1-sqrt"),
    "long": ("warmup_stable_decay", {"warmup_steps": 30, "decay_steps": 11}, "more than the run's 40"),
    "rules": ("piecewise_constant", {}, "step_rules=1:100"),
    "rules, order": ("piecewise_constant", {"options": {"step_rules": "10:1;0.1"}}, "expected factor:step"),
    "polynomial": ("polynomial", {"learning_rate": 1e-7}, "below --learning_rate"),
    "adafactor": ("adafactor", {}, "--optimizer_type Adafactor"),
}


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_a_schedule_cannot_work_with(name: str, settings: dict, message: str):
    with pytest.raises(UserError) as caught:
        check_schedule(name, ScheduleSettings(TOTAL, **settings))
    assert message in str(caught.value)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"cosin.*did you mean 'cosine'.*constant_with_warmup"):
        lr_factor("cosin", 0, ScheduleSettings(10))


@pytest.mark.parametrize(("text", "steps"), [("100", 100), ("0.1", 20), ("10%", 20), ("0", 0), ("1", 1)])
def test_warmup_in_steps_or_share(text: str, steps: int):
    assert resolve_steps(steps_or_share(text), 200) == steps


@pytest.mark.parametrize("text", ["1.5", "-1", "x", "150%"])
def test_bad_warmup(text: str):
    with pytest.raises(ValueError, match="expected whole steps"):
        steps_or_share(text)


# --- plans: rates of groups at a step ---


def plan_rates(config: OptimizerConfig, optimizer: torch.optim.Optimizer, steps: range) -> list[list[float]]:
    plan = make_plan(config, schedule_settings(config, TOTAL), optimizer)
    rates = []
    for step in steps:
        plan.apply(optimizer, step)
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


def test_each_group_is_scaled_from_its_own_rate():
    config = OptimizerConfig(lr_scheduler="rex", lr_warmup_steps=0.25, learning_rate=1e-3)
    for step, (one, other) in enumerate(plan_rates(config, sgd(1e-3, 5e-5), range(TOTAL))):
        factor = lr_factor("rex", step, ScheduleSettings(TOTAL, 10))
        assert (one, other) == (pytest.approx(1e-3 * factor), pytest.approx(5e-5 * factor))


CLASSES = {
    "StepLR": (["step_size=7", "gamma=0.5"], torch.optim.lr_scheduler.StepLR),
    "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts": (
        ["T_0=9", "T_mult=2", "eta_min=1e-5"],
        torch.optim.lr_scheduler.CosineAnnealingWarmRestarts,
    ),
    "ExponentialLR": (["gamma=0.9"], torch.optim.lr_scheduler.ExponentialLR),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("start", [0, 17])
def test_scheduler_class_gives_its_rates_from_any_step_on(name: str, start: int):
    """Also where a resumed run begins."""
    args, cls = CLASSES[name]
    config = OptimizerConfig(lr_scheduler_type=name, lr_scheduler_args=tuple(args), learning_rate=1e-3)
    numbers = {k: (float(v) if "." in v or "e" in v else int(v)) for k, v in (a.split("=") for a in args)}
    reference = followed(cls(sgd(1e-3), **numbers))
    assert [r[0] for r in plan_rates(config, sgd(1e-3), range(start, TOTAL))] == reference[start:]


def test_a_class_that_moves_the_momentum_moves_it_in_the_optimizer():
    config = OptimizerConfig(lr_scheduler_type="OneCycleLR", lr_scheduler_args=("max_lr=1e-3", f"total_steps={TOTAL}"))
    ours = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    plan = make_plan(config, schedule_settings(config, TOTAL), ours)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=1e-3, total_steps=TOTAL)
    seen = set()
    for step in range(TOTAL):
        plan.apply(ours, step)
        one, other = ours.param_groups[0], theirs.param_groups[0]
        assert (one["lr"], one["betas"]) == (other["lr"], other["betas"])
        seen.add(one["betas"])
        theirs.step()
        if step < TOTAL - 1:
            scheduler.step()
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("StepLRR", [], "has no class StepLRR"),
        ("StepLR", ["gama=1"], "refuses them"),
        ("ReduceLROnPlateau", [], "needs metrics at each step"),
        ("OneCycleLR", ["max_lr=1", "total_steps=5"], "refuses them"),
        ("math.sin", [], "not a scheduler class"),
        ("nowhere.Rates", [], "pip install nowhere"),
    ],
)
def test_bad_scheduler_classes(name: str, args: list[str], message: str):
    config = OptimizerConfig(lr_scheduler_type=name, lr_scheduler_args=tuple(args))
    with pytest.raises(UserError) as caught:
        make_plan(config, schedule_settings(config, TOTAL), sgd(1.0))
    assert message in str(caught.value)


def test_adafactor_with_relative_step_keeps_its_own_rates():
    """Its rule: min(1e-2, 1/sqrt(t)) times the root mean square of the parameter."""
    parameter = torch.nn.Parameter(torch.full((4, 4), 2.0))
    groups = [{"params": [parameter], "lr": 1e-4, "label": "unet"}]
    optimizer = create_optimizer("Adafactor", groups)
    config = OptimizerConfig(lr_scheduler="adafactor", learning_rate=1e-4)
    plan = make_plan(config, schedule_settings(config, TOTAL), optimizer)
    plan.apply(optimizer, 3)
    assert optimizer.param_groups[0]["lr"] is None
    parameter.grad = torch.ones(4, 4)
    optimizer.step()
    # One step: the update's root mean square is 1 (clipped), the rate 1e-2 times the parameter's, 2.
    assert parameter.detach() == pytest.approx(torch.full((4, 4), 2.0 - 0.02).numpy(), rel=1e-5)


def test_polynomial_falls_to_its_end_for_the_main_rate():
    config = OptimizerConfig(lr_scheduler="polynomial", learning_rate=1e-4, lr_scheduler_power=1.0)
    settings = schedule_settings(config, TOTAL)
    assert 1e-4 * lr_factor("polynomial", TOTAL, settings) == pytest.approx(1e-7)
    assert lr_factor("polynomial", 0, settings) == pytest.approx(1.0)
