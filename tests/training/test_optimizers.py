"""Optimizers: against their published update rules, their options, and the weights that they evaluate."""

from __future__ import annotations

import math

import pytest
import torch

from musubi_tuner.common.errors import UserError
from musubi_tuner.training.optimizers import (
    create_optimizer,
    evaluation_weights,
    is_schedule_free,
    learning_rates,
    parse_key_values,
)


def gradients(steps: int, *shape: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(steps)]


def start(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def trained(
    name: str, args: list[str], lr: float, *, shape=(6, 4), steps: int = 5, same_way: bool = False
) -> torch.Tensor:
    parameter = torch.nn.Parameter(start(*shape))
    optimizer = create_optimizer(name, [{"params": [parameter], "lr": lr, "label": "unet"}], args)
    if is_schedule_free(optimizer):
        optimizer.train()
    for gradient in gradients(steps, *shape):
        parameter.grad = gradient.abs() if same_way else gradient.clone()
        optimizer.step()
    if is_schedule_free(optimizer):
        optimizer.eval()
    return parameter.detach()


def adamw(lr: float, *, decay: float, steps: int = 5, betas=(0.9, 0.999), shape=(6, 4)) -> torch.Tensor:
    p, m, v = start(*shape), 0.0, 0.0
    for t, g in enumerate(gradients(steps, *shape), 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        p = p * (1 - lr * decay) - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-8)
    return p


@pytest.mark.parametrize("name", ["", "AdamW", "adamw", "torch.optim.AdamW"])
def test_adamw(name: str):
    expected = adamw(0.01, decay=0.05)
    assert torch.allclose(trained(name, ["weight_decay=0.05"], 0.01), expected, rtol=1e-12)


def test_lion():
    """Chen et al. 2023, arXiv:2302.06675, algorithm 2."""
    lr, (b1, b2), decay, p, m = 0.01, (0.9, 0.99), 0.1, start(6, 4), 0.0
    for g in gradients(5, 6, 4):
        p, m = p - lr * (torch.sign(b1 * m + (1 - b1) * g) + decay * p), b2 * m + (1 - b2) * g
    assert torch.allclose(trained("Lion", ["weight_decay=0.1"], lr), p, rtol=1e-12)


def test_prodigy():
    """Mishchenko and Defazio 2023, arXiv:2306.06101, algorithm 4 with a decay of its own for the estimate."""
    (b1, b2), d0, p0 = (0.9, 0.999), 1e-3, start(6, 4)
    b3 = math.sqrt(b2)
    p, m, v, s, r, d, d_max = p0.clone(), 0.0, 0.0, 0.0, 0.0, d0, d0
    for g in gradients(8, 6, 4):
        g = g.abs()  # always the same way, so that the distance grows
        r = b3 * r + (d / d0) * d * (g * (p0 - p)).sum()
        s = b3 * s + (d / d0) * d * g
        m, v = b1 * m + (1 - b1) * d * g, b2 * v + (1 - b2) * d * d * g * g
        estimate = float(r / s.abs().sum())
        step = d
        d = max(d, estimate) if d == d0 else d
        d_max = max(d_max, estimate)
        d = min(d_max, d * math.inf)
        p = p - step * m / (v.sqrt() + d * 1e-8)
    # The package keeps the estimate in float32.
    assert torch.allclose(trained("Prodigy", ["d0=1e-3"], 1.0, steps=8, same_way=True), p, rtol=1e-4, atol=1e-5)
    assert d > d0, "the case moves the estimate"


def test_schedule_free_evaluates_the_mean_of_its_fast_weights():
    """Defazio et al. 2024, arXiv:2405.15682: with a constant rate the evaluated weights are the mean of all z."""
    b2, lr = 0.999, 0.01
    z, v = start(6, 4), 0.0
    fast = []
    for t, g in enumerate(gradients(6, 6, 4), 1):
        v = b2 * v + (1 - b2) * g * g
        z = z - lr * g / ((v / (1 - b2**t)).sqrt() + 1e-8)  # the gradients do not depend on the weights here
        fast.append(z)
    mean = torch.stack(fast).mean(0)
    assert torch.allclose(trained("AdamWScheduleFree", [], lr, steps=6), mean, rtol=1e-9)


def newton_schulz(g: torch.Tensor) -> torch.Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / g.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def test_muon_makes_matrices_orthogonal_and_gives_adamw_the_rest():
    matrix, vector = torch.nn.Parameter(start(4, 6).float()), torch.nn.Parameter(start(5).float())
    optimizer = create_optimizer("Muon", [{"params": [matrix, vector], "lr": 0.1, "label": "unet"}])
    assert [g["label"] for g in optimizer.param_groups] == ["unet", "unet adamw"]
    matrix.grad, vector.grad = gradients(1, 4, 6)[0].float(), gradients(1, 5)[0].float()
    before, gradient = matrix.detach().clone(), matrix.grad.clone()
    optimizer.step()
    # As large as AdamW's update, 0.2 sqrt(max(rows, columns)) times an orthogonal one (Liu et al. 2025).
    expected = 0.1 * 0.2 * math.sqrt(6) * newton_schulz(gradient)
    assert torch.allclose(before - matrix, expected, atol=2e-3), "it is computed in bfloat16"
    moved = start(5).float() - vector.detach()
    assert torch.allclose(moved, 0.1 * gradients(1, 5)[0].float().sign(), rtol=1e-4)


def test_came():
    """Luo et al. 2023, arXiv:2307.02047, algorithm 2."""
    lr, (b1, b2, b3), p = 0.01, (0.9, 0.999, 0.9999), start(6, 4)
    r = c = u_r = u_c = 0.0
    m = torch.zeros(6, 4, dtype=torch.float64)

    def rsqrt(rows, columns):
        return ((rows / rows.mean())[:, None] * columns[None, :]).rsqrt()

    for g in gradients(5, 6, 4):
        square = g * g + 1e-30
        r, c = b2 * r + (1 - b2) * square.mean(1), b2 * c + (1 - b2) * square.mean(0)
        update = g * rsqrt(r, c)
        update = update / max(1.0, float(update.square().mean().sqrt()))
        m = b1 * m + (1 - b1) * update
        instability = (update - m).square() + 1e-16
        u_r, u_c = b3 * u_r + (1 - b3) * instability.mean(1), b3 * u_c + (1 - b3) * instability.mean(0)
        p = p - lr * m * rsqrt(u_r, u_c)
    assert torch.allclose(trained("CAME", [], lr), p, rtol=1e-9)


# --- options ---


def one_group(lr: float = 1e-3) -> list[dict]:
    return [{"params": [torch.nn.Parameter(torch.zeros(8, 4))], "lr": lr, "label": "unet"}]


@pytest.mark.parametrize(
    ("kind", "args", "message"),
    [
        ("AdamWW", [], "torch.optim has no class AdamWW"),
        ("nowhere.Opt", [], "pip install nowhere"),
        ("math.pi", [], "math.pi is no subclass of torch.optim.Optimizer"),
        ("torch.nn.Linear", [], "torch.nn.Linear is no subclass of torch.optim.Optimizer"),
        (".Opt", [], "expected the name of a class"),
        ("LBFGS", [], "needs a closure"),
        ("AdamW", ["betas"], "expected key=value"),
        ("AdamW", ["bates=(0.9,0.99)"], "no option 'bates' (did you mean 'betas'?); known: betas, eps, weight_decay"),
        ("AdamW", ["betas=(2,3)"], "Invalid beta"),
        ("AdamW", ["lr=1"], "--learning_rate"),
        ("Lion", ["weigth_decay=0.1"], "did you mean 'weight_decay'"),
        ("AdamW8bit", ["min_8bit_sizes=1"], "did you mean 'min_8bit_size'"),
        ("Adafactor", ["relative_steps=False"], "did you mean 'relative_step'"),
    ],
)
def test_bad_optimizer_flags(kind: str, args: list[str], message: str):
    with pytest.raises(UserError) as caught:
        create_optimizer(kind, one_group(), args)
    assert message in str(caught.value)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="--optimizer_type Lion8bit needs the package bitsandbytes: pip install"):
        create_optimizer("Lion8bit", one_group())


def test_values_are_literals_and_bare_words_strings():
    pairs = ["betas=(0.9, 0.99)", "mode=fast", "on=True", "nothing=None", "path=a=b", "lr=1e-4"]
    assert parse_key_values(pairs, "--x") == {
        "betas": (0.9, 0.99),
        "mode": "fast",
        "on": True,
        "nothing": None,
        "path": "a=b",
        "lr": 1e-4,
    }


def test_prodigy_takes_one_rate_only():
    with pytest.raises(UserError, match="single learning rate"):
        create_optimizer("Prodigy", one_group(1.0) + one_group(0.5))


def test_adafactor_with_relative_step_is_given_no_rate():
    optimizer = create_optimizer("Adafactor", one_group())
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["relative_step"]) == (None, True)
    forced = create_optimizer("Adafactor", one_group(), ["warmup_init=True", "relative_step=False"])
    assert (forced.param_groups[0]["lr"], forced.param_groups[0]["relative_step"]) == (None, True)
    given = create_optimizer("Adafactor", one_group(), ["relative_step=False"])
    assert given.param_groups[0]["lr"] == 1e-3


# --- what it says of itself ---


def test_rates_that_are_logged():
    optimizer = create_optimizer("Prodigy", one_group(0.5), ["d0=1e-3"])
    assert learning_rates(optimizer) == {"unet": 0.5, "d*lr/unet": pytest.approx(5e-4)}
    parameter = torch.nn.Parameter(torch.full((2, 2), 3.0))
    adafactor = create_optimizer("Adafactor", [{"params": [parameter], "lr": 1e-3, "label": "unet"}])
    assert learning_rates(adafactor) == {"unet": 0.0}, "before the first step there is none"
    parameter.grad = torch.ones(2, 2)
    adafactor.step()
    assert learning_rates(adafactor) == {"unet": pytest.approx(3.0 * 1e-2)}


def test_looking_at_the_evaluation_weights_changes_nothing():
    def run(look: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        parameter = torch.nn.Parameter(start(6, 4).float())
        groups = [{"params": [parameter], "lr": 0.01, "label": "unet"}]
        optimizer = create_optimizer("AdamWScheduleFree", groups)
        optimizer.train()
        seen = None
        for step, gradient in enumerate(gradients(6, 6, 4)):
            parameter.grad = gradient.float()
            optimizer.step()
            if look and step > 0:  # after one step all weights are the same
                in_training = parameter.detach().clone()
                with evaluation_weights(optimizer):
                    seen = parameter.detach().clone()
                assert torch.equal(parameter, in_training)
                assert not torch.equal(seen, in_training)
        return parameter.detach(), seen

    looked, seen = run(look=True)
    assert torch.equal(looked, run(look=False)[0])
    assert torch.allclose(seen, trained("AdamWScheduleFree", [], 0.01, steps=6).float(), rtol=1e-4, atol=1e-6)
