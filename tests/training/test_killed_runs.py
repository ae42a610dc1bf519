"""Runs that are killed at any moment, also while they save, and go on with ``--autoresume``."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from killed import needs_fork, run_killed_after, run_killed_at, until_complete
from safetensors.torch import load_file
from test_training_runs import arguments

from musubi_tuner.common.atomic import is_partial
from musubi_tuner.ltx2_train_network import main as train
from musubi_tuner.networks.files.lora_reader import load_lora
from musubi_tuner.training.state import read_progress

pytestmark = needs_fork

# Four clips: an epoch ends with step 2, where a step and an epoch are saved; step 3 removes the files of step 1.
FLAGS = (
    *("--save_state", "--autoresume", "--save_every_n_steps", "1", "--save_last_n_steps", "1"),
    *("--save_every_n_epochs", "1", "--save_last_n_epochs", "1", "--save_checkpoint_metadata"),
    *("--network_dropout", "0.3", "--gradient_accumulation_steps", "2", "--ema_decay", "0.5"),
    *("--max_data_loader_n_workers", "2"),  # threads that read ahead when the process dies
)


def command(assets, output: Path, steps: int) -> list[str]:
    return arguments(assets, output, *FLAGS, steps=steps)


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def check_whole(folder: Path) -> int:
    """Everything that has its name is complete; returns the latest step that can be resumed from."""
    latest = 0
    for path in folder.glob("*") if folder.exists() else ():
        if is_partial(path):
            continue
        if path.suffix == ".safetensors":
            load_lora(path)  # also refuses what is not finite
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            latest = max(latest, read_progress(path)[0].global_step)
            assert load_file(path / "network.safetensors")
            assert load_file(path / "optimizer.safetensors")
    return latest


def check_equal(one: Path, other: Path) -> None:
    """Two finished runs have the same files with the same tensors, counters and losses."""
    assert files(one) == files(other)
    for name in files(one):
        if name.endswith(".safetensors"):
            a, b = load_file(one / name), load_file(other / name)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a), name
        else:
            a, b = (json.loads((run / name).read_text(encoding="utf-8")) for run in (one, other))
            a.pop("timestamp", None), b.pop("timestamp", None)
            assert a == b, name


@pytest.fixture
def straight(cached_demo, tmp_path: Path):
    def get(steps: int) -> Path:
        train(command(cached_demo(), tmp_path / "straight", steps))
        return tmp_path / "straight"

    return get


def test_a_run_killed_between_operations_on_files_loses_nothing(cached_demo, tmp_path: Path, straight):
    """Each attempt gets a few operations further than the one before, so that all kinds of moments are met."""
    output, steps, reached = tmp_path / "killed", 3, [0]

    def attempt(index: int) -> bool:
        killed = run_killed_at(command(cached_demo(), output, steps), output, 8 + 13 * index)
        reached.append(check_whole(output))
        assert reached[-1] >= reached[-2], "what was saved is still there"
        return killed

    kills = until_complete(attempt, limit=60)
    assert kills >= 4
    check_equal(straight(steps), output)


@pytest.mark.slow
def test_a_run_killed_before_every_single_operation(cached_demo, tmp_path: Path, straight):
    whole, steps = straight(3), 3
    for event in range(1, 10_000):
        output = tmp_path / f"at-{event}"
        killed = run_killed_at(command(cached_demo(), output, steps), output, event)
        check_whole(output)
        if killed:
            run_killed_at(command(cached_demo(), output, steps), output, None)
        check_equal(whole, output)
        if not killed:
            break
    assert event > 30


@pytest.mark.slow
def test_a_run_killed_at_random_moments(cached_demo, tmp_path: Path, straight):
    """By another process, so also in the middle of writing a file."""
    output, steps, reached = tmp_path / "killed", 8, [0]
    moments = random.Random(1)

    def attempt(index: int) -> bool:
        killed = run_killed_after(command(cached_demo(), output, steps), moments.uniform(0.1, 1.0 + 0.05 * index))
        reached.append(check_whole(output))
        assert reached[-1] >= reached[-2]
        return killed

    assert until_complete(attempt, limit=200) >= 3
    check_equal(straight(steps), output)


def test_an_epoch_file_that_a_kill_prevented_is_written_on_resuming(cached_demo, tmp_path: Path):
    """The state of the step that ends an epoch is saved before the files of the epoch."""
    output = tmp_path / "out"
    flags = ("--save_state", "--save_every_n_steps", "4", "--save_every_n_epochs", "1", "--save_checkpoint_metadata")
    train(arguments(cached_demo(), output, *flags, steps=6))
    for name in files(output):
        if not name.startswith("x-step00000004"):
            (output / name).unlink()
    for folder in ("x-000001-state", "x-state"):
        (output / folder).rmdir()
    train(arguments(cached_demo(), output, *flags, "--autoresume", steps=6))
    step, epoch = (json.loads((output / f"x-{n}.json").read_text(encoding="utf-8")) for n in ("step00000004", "000001"))
    assert {**step, "timestamp": None} == {**epoch, "timestamp": None}, "with the losses of that step"
    for kind in (".safetensors", ".comfy.safetensors", "-state/optimizer.safetensors"):
        a, b = (load_file(output / f"x-{point}{kind}") for point in ("step00000004", "000001"))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_state_that_was_being_replaced_is_found(cached_demo, tmp_path: Path):
    """Killed after the old folder had moved aside, before the new one got the name: the old one goes on."""
    flags = ("--save_state_on_train_end", "--autoresume")
    train(arguments(cached_demo(), tmp_path / "straight", *flags, steps=4))
    output = tmp_path / "out"
    train(arguments(cached_demo(), output, *flags, steps=2))
    for event in range(12, 60):  # the new files are written by the first dozen changes
        assert run_killed_at(arguments(cached_demo(), output, *flags, steps=4), output, event)
        if not (output / "x-state").exists():
            break
    assert check_whole(output) == 0
    assert len([p for p in output.iterdir() if is_partial(p)]) == 2
    train(arguments(cached_demo(), output, *flags, steps=4))
    check_equal(tmp_path / "straight", output)
