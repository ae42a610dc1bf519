"""The table at the end of a run, and launches that are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from musubi_tuner.common.errors import UserError
from musubi_tuner.training.distributed import check_launch
from musubi_tuner.training.state import Progress
from musubi_tuner.training.summary import RunSummary, duration, written_files


def test_the_summary_counts_the_steps_of_this_run():
    progress = Progress(seed=0, global_step=30, skipped_steps=2, epoch_losses=[1.0, 2.0])
    summary = RunSummary(10, progress, 50.0, {"val_loss": 0.25}, (Path("a"), Path("b")), "2.0 GiB")
    assert summary.rows() == [
        ["steps", "30 (20 since step 10)"],
        ["time", "0:00:50"],
        ["seconds a step", "2.50"],
        ["average loss", "1.5000"],
        ["val loss", "0.2500"],
        ["peak memory", "2.0 GiB"],
        ["dropped steps", 2],
        ["file", "a"],
        ["", "b"],
    ]


def test_a_run_with_nothing_left_to_do_has_a_summary():
    assert RunSummary(5, Progress(seed=0, global_step=5), 1.0, {}, (), "1.0 GiB").rows() == [
        ["steps", "5 (0 since step 5)"],
        ["time", "0:00:01"],
        ["peak memory", "1.0 GiB"],
        ["dropped steps", 0],
    ]


def test_only_files_of_the_run_are_listed(tmp_path: Path):
    for name, age in (
        ("x.safetensors", 0),
        ("x-step00000002.safetensors", 5),
        ("x-old.safetensors", 100),
        ("y.txt", 0),
    ):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert [p.name for p in written_files(tmp_path, "x", since=990)] == ["x-step00000002.safetensors", "x.safetensors"]


def test_durations_carry_over():
    assert [duration(s) for s in (0.4, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]


@pytest.mark.parametrize(("variable", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed")])
def test_configurations_that_split_the_model_are_refused(variable: str, name: str):
    check_launch({f"ACCELERATE_USE_{variable}": "false"})
    with pytest.raises(UserError, match=f"accelerate is set up for {name}.*accelerate config again"):
        check_launch({f"ACCELERATE_USE_{variable}": "true"})
