"""The optimizer's step within the backward pass, against the step after it: the same weights, bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.config.optimizer import OptimizerConfig
from musubi_tuner.ltx2_train_network import main as train
from musubi_tuner.training.fused_backward import FusedBackward
from musubi_tuner.training.gradients import clip_each
from musubi_tuner.training.optimization import check_fused_backward
from musubi_tuner.training.optimizers import create_optimizer, is_schedule_free

CPU = torch.device("cpu")
OPTIMIZERS = {
    "AdamW": (),
    "AdamW of loops": ("fused=False", "foreach=False"),
    "AdamW8bit": (),
    "PagedAdamW8bit": (),
    "Lion8bit": (),
    "Adafactor": (),
    "Adafactor with given rates": ("relative_step=False", "scale_parameter=False"),
    "Lion": (),
    "AdamWScheduleFree": ("warmup_steps=3",),
    "CAME": (),
    "Muon": (),
    "SGD": ("momentum=0.9",),
}


def model() -> nn.Sequential:
    """The last layer has more than 4096 weights, of which optimizers keep a state in 8 bit."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 80, bias=False))


def optimizer_of(made: nn.Module, name: str) -> torch.optim.Optimizer:
    *first, last = made.parameters()
    groups = [{"params": first, "lr": 1e-2, "label": "a"}, {"params": [last], "lr": 3e-3, "label": "b"}]
    optimizer = create_optimizer(name.partition(" ")[0], groups, OPTIMIZERS[name])
    if is_schedule_free(optimizer):
        optimizer.train()
    return optimizer


def loss_of(made: nn.Module, step: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(step)
    return made(torch.randn(5, 6, generator=draw)).sub(torch.randn(5, 80, generator=draw)).square().sum()


def states(optimizer: torch.optim.Optimizer) -> dict:
    """All that is saved of it, but for the numbers of parameters."""
    document = optimizer.state_dict()
    flat = {(i, k): v for i, state in document["state"].items() for k, v in state.items()}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in document["param_groups"]]
    return flat | {("group", i, k): v for i, group in enumerate(groups) for k, v in group.items()}


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("part_bytes", [0, 3000, None])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_states_are_those_of_a_step_afterwards(name: str, part_bytes: int | None):
    plain, ours = model(), model()
    theirs, optimizer = optimizer_of(plain, name), optimizer_of(ours, name)
    fused = FusedBackward(optimizer, part_bytes=part_bytes)
    for step in range(5):
        loss_of(plain, step).backward()
        theirs.step()
        theirs.zero_grad()
        fused.backward(loss_of(ours, step))
        assert all(p.grad is None for p in ours.parameters())
        assert fused.end_step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    found, expected = states(optimizer), states(theirs)
    assert found.keys() == expected.keys()
    assert [key for key in expected if not same(found[key], expected[key])] == []


def test_each_gradient_is_limited_by_itself():
    plain, ours = model(), model()
    theirs, optimizer = optimizer_of(plain, "SGD"), optimizer_of(ours, "SGD")
    fused = FusedBackward(optimizer, max_norm=0.7, groups={"last": [ours[4].weight]}, part_bytes=0)
    loss_of(plain, 0).backward()
    before = {name: p.grad.norm() for name, p in plain.named_parameters()}
    assert max(before.values()) > 0.7, "else nothing is limited"
    for parameter in plain.parameters():
        torch.nn.utils.clip_grad_norm_(parameter, 0.7)
    theirs.step()
    fused.backward(loss_of(ours, 0))
    norms = fused.norms()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    assert norms["grad_norm"] == pytest.approx(torch.stack([*before.values()]).norm().item())
    assert norms["grad_norm/last"] == pytest.approx(before["4.weight"].item())


def test_small_gradients_are_not_limited():
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([0.1, 0.2, -0.3])
    expected = parameter.grad.clone()
    clip_each([parameter], [parameter.grad.norm()], 1.0)
    assert torch.equal(parameter.grad, expected)


def test_only_a_part_of_the_gradients_exists_at_a_time():
    made = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(64)))
    optimizer, sizes = torch.optim.SGD(made.parameters(), lr=0.1), []
    optimizer.register_step_pre_hook(lambda *_: sizes.append(sum(p.grad is not None for p in made.parameters())))
    FusedBackward(optimizer).backward(made(torch.randn(2, 16)).sum())
    assert sizes == [2] * 32


def test_a_loss_that_is_not_finite_changes_nothing():
    made = model()
    optimizer = optimizer_of(made, "AdamW")
    fused = FusedBackward(optimizer)
    before = [p.detach().clone() for p in made.parameters()]
    fused.backward(loss_of(made, 0) * float("nan"))
    assert not fused.end_step()
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), before, strict=True))
    assert not optimizer.state


def test_nothing_moves_from_the_first_gradient_on_that_is_not_finite():
    """It enters behind the second layer: what the backward pass reached before is stepped, by gradients as they are."""
    plain, made = model(), model()
    theirs, optimizer = optimizer_of(plain, "AdamW"), optimizer_of(made, "AdamW")
    loss_of(plain, 0).backward()
    theirs.step()
    before = [p.detach().clone() for p in made.parameters()]
    fused = FusedBackward(optimizer, part_bytes=0)
    handle = made[2].register_full_backward_hook(lambda module, into, out: tuple(g * float("inf") for g in into))
    fused.backward(loss_of(made, 0))
    handle.remove()
    reached = [made[4].weight, made[2].weight, made[2].bias]
    assert all(
        torch.equal(a, b) for a, b in zip(reached, (plain[4].weight, plain[2].weight, plain[2].bias), strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(list(made.parameters())[:2], before[:2], strict=True))
    assert "3 of 5 weights had moved before that" in fused.steps_before_fault
    assert not fused.norms()["grad_norm"].isfinite()
    assert all(p.grad is None for p in made.parameters())
    assert all(torch.isfinite(p).all() for p in made.parameters())
    fused.end_step()
    fused.backward(loss_of(made, 1))
    assert fused.norms()["grad_norm"].isfinite(), "the next step begins anew"


def test_weights_without_a_gradient_stay():
    """As a LoRA of the sound in a batch without sound."""
    made, idle = model(), nn.Parameter(torch.ones(3))
    fused = FusedBackward(torch.optim.AdamW([*made.parameters(), idle], lr=0.1))
    fused.backward(loss_of(made, 0))
    assert torch.equal(idle.detach(), torch.ones(3))


def test_a_second_backward_pass_of_a_step_is_an_error():
    made = model()
    fused = FusedBackward(optimizer_of(made, "SGD"))
    fused.backward(loss_of(made, 0))
    with pytest.raises(RuntimeError, match="one backward pass is one step"):
        fused.backward(loss_of(made, 1))


def test_other_backward_passes_keep_their_gradients():
    made = model()
    FusedBackward(optimizer_of(made, "SGD"))
    loss_of(made, 0).backward()
    assert all(p.grad is not None for p in made.parameters())


# --- what does not go with it ---


@pytest.mark.parametrize("name", ["Prodigy"])
def test_optimizers_that_look_at_all_weights_are_found_out(name: str):
    settings = OptimizerConfig(optimizer_type=name, learning_rate=1.0, fused_backward_pass=True)
    with pytest.raises(UserError, match="--optimizer_type Prodigy takes all gradients into account"):
        check_fused_backward(settings, "bf16", 1, CPU)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_others_pass(name: str, caplog):
    settings = OptimizerConfig(
        optimizer_type=name.partition(" ")[0],
        optimizer_args=OPTIMIZERS[name],
        learning_rate=1e-3,
        fused_backward_pass=True,
    )
    with caplog.at_level(logging.WARNING):
        check_fused_backward(settings, "bf16", 1, CPU)
    assert "--max_grad_norm 1 limits the gradient of each weight by itself" in caplog.text


def test_what_is_known_after_the_launch_only():
    settings = OptimizerConfig(fused_backward_pass=True)
    with pytest.raises(ConfigErrors) as caught:
        check_fused_backward(settings, "fp16", 2, CPU)
    assert "--mixed_precision fp16" in str(caught.value)
    assert "2 processes" in str(caught.value)
    check_fused_backward(OptimizerConfig(), "fp16", 2, CPU)


# --- whole runs ---

FUSED = ("--fused_backward_pass", "--max_grad_norm", "0")


def run(assets, output: Path, *flags: str, dry: bool = False) -> dict[str, torch.Tensor]:
    code = train(
        [
            *("--dataset_config", str(assets.dataset), "--ltx2_checkpoint", str(assets.checkpoint)),
            *("--ltx2_mode", "av", "--ltx_version", "2.3", "--mixed_precision", "no", "--network_dim", "4"),
            *("--network_alpha", "4", "--learning_rate", "1e-3", "--max_train_steps", "4", "--seed", "5"),
            *("--max_data_loader_n_workers", "0", "--output_dir", str(output), "--output_name", "x"),
            *("--save_precision", "fp32", "--max_grad_norm", "0", "--audio_lr", "5e-4", "--lr_args", "attn2=2e-3"),
            *("--network_args", "loraplus_lr_ratio=4", "--lr_scheduler", "linear", "--lr_warmup_steps", "2", *flags),
        ]
    )
    assert not code
    return {} if dry else load_file(output / "x.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(
    "flags",
    [
        ("--ema_decay", "0.9", "--scale_weight_norms", "0.5"),
        ("--blocks_to_swap", "1", "--gradient_checkpointing_cpu_offload", "--nf4_base"),
        ("--full_bf16", "--mixed_precision", "bf16", "--optimizer_type", "Adafactor", "--lr_warmup_steps", "0"),
    ],
    ids=["average and limit", "swap, offload, nf4", "bf16 Adafactor"],
)
def test_runs_train_the_same(flags: tuple[str, ...], cached_demo, tmp_path: Path):
    assets = cached_demo()
    plain = run(assets, tmp_path / "plain", *flags)
    assert_same(run(assets, tmp_path / "fused", *flags, *FUSED), plain)


def test_resumed_runs_go_on_as_if_unbroken(cached_demo, tmp_path: Path):
    assets = cached_demo()
    whole = run(assets, tmp_path / "whole", *FUSED, "--optimizer_type", "AdamW8bit")
    parts = ("--optimizer_type", "AdamW8bit", "--save_state", "--save_every_n_steps", "2")
    run(assets, tmp_path / "parts", *FUSED, *parts)
    state = next((tmp_path / "parts").glob("*2-state"))
    assert_same(run(assets, tmp_path / "rest", *FUSED, *parts[:2], "--resume", str(state)), whole)


def test_a_dry_run_trains_nothing(cached_demo, tmp_path: Path):
    run(cached_demo(), tmp_path, *FUSED, "--dry_run", dry=True)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--gradient_accumulation_steps", "3"), "cannot add up 3 of them; leave it out, or use a larger batch_size"),
        (("--mixed_precision", "fp16"), "--fused_backward_pass does not go with --mixed_precision fp16"),
        (("--optimizer_type", "torch.optim.LBFGS"), "needs a closure"),
    ],
)
def test_what_cannot_be_is_said_before_anything_loads(flags, said, cached_demo, tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        run(cached_demo(), tmp_path / "out", *FUSED, *flags)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
