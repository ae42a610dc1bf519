"""State folders: exact, whole or absent, and free of anything that executes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from musubi_tuner.common.errors import UserError
from musubi_tuner.training.optimizers import create_optimizer, is_schedule_free
from musubi_tuner.training.state import (
    Progress,
    find_latest_state,
    read_progress,
    restore_network,
    restore_optimizer,
    save_state,
)


class Net(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a = torch.nn.Linear(96, 64)
        self.b = torch.nn.Linear(64, 80)
        self.unused = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.b(self.a(x))


def groups(net: Net) -> list[dict]:
    return [
        {"params": [*net.a.parameters(), *net.unused.parameters()], "lr": 1e-2, "label": "first"},
        {"params": list(net.b.parameters()), "lr": 1e-3, "label": "second"},
    ]


def names(net: Net, optimizer) -> list[str]:
    by_id = {id(p): n for n, p in net.named_parameters()}
    return [by_id[id(p)] for g in optimizer.param_groups for p in g["params"]]


def steps(net: Net, optimizer, start: int, stop: int) -> None:
    for i in range(start, stop):
        x = torch.randn(8, 96, generator=torch.Generator().manual_seed(i)).to(net.a.weight.dtype)
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS = {
    "AdamW": [],
    "AdamW, plain loop": ["fused=False", "foreach=False", "amsgrad=True"],
    "AdamW8bit": ["min_8bit_size=64"],
    "PagedAdamW8bit": ["min_8bit_size=64"],
    "PagedAdam8bit": ["min_8bit_size=64"],
    "Lion8bit": ["min_8bit_size=64"],
    "bitsandbytes.optim.AdEMAMix8bit": ["min_8bit_size=64"],
    "Adafactor": [],
    "Adafactor, warm-up of its own": ["warmup_init=True", "beta1=0.9"],
    "Adafactor, given rates": ["relative_step=False", "scale_parameter=False"],
    "Lion": ["weight_decay=0.1"],
    "Prodigy": ["d0=1e-4", "bias_correction=True", "safeguard_warmup=True"],
    "AdamWScheduleFree": ["warmup_steps=3"],
    "CAME": [],
    "Muon": ["weight_decay=0.01"],
    "SGD": ["momentum=0.9"],
    "torch.optim.RMSprop": ["centered=True"],
    "torch.optim.NAdam": [],
    "torch.optim.Adagrad": [],
    "pytorch_optimizer.AdaBelief": [],
    "pytorch_optimizer.SOAP": [],
    "prodigyopt.Prodigy": [],
    "schedulefree.AdamWScheduleFree": [],
}
ONE_RATE = ("Prodigy", "prodigyopt.Prodigy")


def make_optimizer(name: str, net: Net) -> torch.optim.Optimizer:
    kind = name.partition(",")[0]
    if kind.partition(".")[0] in ("prodigyopt", "schedulefree"):
        pytest.importorskip(kind.partition(".")[0])
    own = groups(net)
    if kind in ONE_RATE:
        own = [{**group, "lr": 1.0} for group in own]
    optimizer = create_optimizer(kind, own, OPTIMIZERS[name])
    if is_schedule_free(optimizer):
        optimizer.train()
    return optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_restored_optimizer_continues_bit_for_bit(tmp_path: Path, kind: str, dtype: torch.dtype):
    straight = Net(0).to(dtype)
    optimizer = make_optimizer(kind, straight)
    start = [p.detach().clone() for p in straight.parameters()]
    steps(straight, optimizer, 0, 5)
    if dtype == torch.float32:  # the first steps of a warm-up are too small for bfloat16
        assert not all(torch.equal(a, b) for a, b in zip(start, straight.parameters(), strict=True)), "it learns"
    save_state(
        tmp_path / "x-state",
        progress=Progress(seed=3, global_step=5, epoch_losses=[0.1, 0.2]),
        network=straight.state_dict(),
        optimizer=optimizer,
        parameter_names=names(straight, optimizer),
        settings={"mode": "av"},
    )
    steps(straight, optimizer, 5, 10)

    resumed = Net(1).to(dtype)
    other = make_optimizer(kind, resumed)
    progress, settings, scalars = read_progress(tmp_path / "x-state")
    restore_network(tmp_path / "x-state", resumed)
    restore_optimizer(tmp_path / "x-state", scalars, other, names(resumed, other))
    steps(resumed, other, 5, 10)

    assert (progress.seed, progress.global_step, progress.epoch_losses) == (3, 5, [0.1, 0.2])
    assert settings == {"mode": "av"}
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def saved(folder: Path, step: int = 1) -> Net:
    net = Net(0)
    optimizer = create_optimizer("AdamW", groups(net))
    steps(net, optimizer, 0, 1)
    save_state(
        folder,
        progress=Progress(seed=0, global_step=step),
        network=net.state_dict(),
        optimizer=optimizer,
        parameter_names=names(net, optimizer),
        settings={},
    )
    return net


def test_folder_holds_only_safetensors_and_json(tmp_path: Path):
    saved(tmp_path / "x-state")
    assert sorted(p.name for p in (tmp_path / "x-state").iterdir()) == [
        "network.safetensors",
        "optimizer.safetensors",
        "training_state.json",
    ]
    json.loads((tmp_path / "x-state" / "training_state.json").read_text(encoding="utf-8"))
    assert [p.name for p in tmp_path.iterdir()] == ["x-state"]


def test_a_failed_save_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved(tmp_path / "x-state", step=1)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("musubi_tuner.training.state.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        saved(tmp_path / "x-state", step=2)
    assert read_progress(tmp_path / "x-state")[0].global_step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x-state"]


def test_latest_state_is_the_highest_complete_one(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name, step in (("run-step00000010-state", 10), ("run-step00000020-state", 20), ("other-state", 99)):
        saved(tmp_path / name, step)
    (tmp_path / "run-step00000030-state").mkdir()
    broken = tmp_path / "run-state"
    broken.mkdir()
    (broken / "training_state.json").write_text("{", encoding="utf-8")
    assert find_latest_state(tmp_path, "run") == tmp_path / "run-step00000020-state"
    assert "run-state" in caplog.text
    assert find_latest_state(tmp_path, "nothing") is None


def test_wrong_things_to_resume_from(tmp_path: Path):
    file = tmp_path / "lora.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(UserError, match="--network_weights"):
        read_progress(file)
    with pytest.raises(UserError, match="is not a folder"):
        read_progress(tmp_path / "missing")
    (tmp_path / "foreign").mkdir()
    with pytest.raises(UserError, match="has no training_state.json"):
        read_progress(tmp_path / "foreign")
    saved(tmp_path / "x-step00000010-state")
    with pytest.raises(UserError, match="it holds x-step00000010-state: give the path"):
        read_progress(tmp_path)


def test_other_optimizer_or_network_is_refused(tmp_path: Path):
    saved(tmp_path / "x-state")
    _, _, scalars = read_progress(tmp_path / "x-state")
    net = Net(0)
    sgd = create_optimizer("SGD", groups(net))
    with pytest.raises(UserError, match="AdamW.*SGD"):
        restore_optimizer(tmp_path / "x-state", scalars, sgd, names(net, sgd))
    adamw = create_optimizer("AdamW", groups(net)[:1])
    with pytest.raises(UserError, match="network flags"):
        restore_optimizer(tmp_path / "x-state", scalars, adamw, names(net, adamw))


def test_an_optimizer_that_keeps_what_json_cannot_hold_is_named(tmp_path: Path):
    net = Net(0)
    optimizer = create_optimizer("SGD", groups(net))
    optimizer.param_groups[0]["hook"] = print
    with pytest.raises(UserError, match="SGD keeps a builtin_function_or_method .group/0/hook"):
        save_state(
            tmp_path / "x-state",
            progress=Progress(seed=0),
            network=net.state_dict(),
            optimizer=optimizer,
            parameter_names=names(net, optimizer),
            settings={},
        )
    assert not list(tmp_path.iterdir())


def test_other_groups_are_refused(tmp_path: Path):
    net = saved(tmp_path / "x-state")
    _, _, scalars = read_progress(tmp_path / "x-state")
    merged = [{"params": [p for g in groups(net) for p in g["params"]], "lr": 1e-3, "label": "unet"}]
    optimizer = create_optimizer("AdamW", merged)
    with pytest.raises(UserError, match="2 groups of parameters, but this run has 1"):
        restore_optimizer(tmp_path / "x-state", scalars, optimizer, names(net, optimizer))


def test_a_state_of_another_rank_or_alpha_is_refused(tmp_path: Path):
    net = saved(tmp_path / "x-state")
    wider = Net(0)
    wider.b = torch.nn.Linear(64, 81)
    with pytest.raises(UserError, match=r"2 of 6 tensors: b\.\w+ is \[80\b.* \(float32\), here \[81\b"):
        restore_network(tmp_path / "x-state", wider)
    net.register_buffer("alpha", torch.tensor(1.0))
    with pytest.raises(UserError, match="alpha"):
        restore_network(tmp_path / "x-state", net)


def test_damaged_states_are_named(tmp_path: Path):
    net = saved(tmp_path / "x-state")
    (tmp_path / "x-state" / "network.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="network.safetensors: cannot be read"):
        restore_network(tmp_path / "x-state", net)
    (tmp_path / "x-state" / "training_state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="is damaged"):
        read_progress(tmp_path / "x-state")


def test_autoresume_leaves_a_run_whose_name_starts_the_same_alone(tmp_path: Path):
    saved(tmp_path / "run2-state", 99)
    saved(tmp_path / "run-two-step00000050-state", 50)
    assert find_latest_state(tmp_path, "run") is None
    saved(tmp_path / "run-000003-state", 3)
    assert find_latest_state(tmp_path, "run") == tmp_path / "run-000003-state"


def test_a_state_of_accelerate_is_named_and_not_read(tmp_path: Path):
    for name in ("model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (tmp_path / name).write_bytes(b"never read")
    with pytest.raises(UserError, match="is a state of accelerate .optimizer.bin.") as caught:
        read_progress(tmp_path)
    assert f"--network_weights {tmp_path / 'model.safetensors'}" in str(caught.value)


@pytest.mark.parametrize("name", ["network.safetensors", "optimizer.safetensors"])
def test_autoresume_skips_a_state_with_a_truncated_file(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str):
    for step in (10, 20):
        saved(tmp_path / f"run-step{step:08d}-state", step)
    broken = tmp_path / "run-step00000020-state" / name
    broken.write_bytes(broken.read_bytes()[:-1])
    assert find_latest_state(tmp_path, "run") == tmp_path / "run-step00000010-state"
    assert f"{name} is truncated" in caplog.text


def test_a_state_without_a_file_is_skipped_and_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    saved(tmp_path / "run-state", 4)
    (tmp_path / "run-state" / "optimizer.safetensors").unlink()
    assert find_latest_state(tmp_path, "run") is None
    assert "skipping" in caplog.text
    with pytest.raises(UserError, match="optimizer.safetensors does not exist"):
        read_progress(tmp_path / "run-state")
