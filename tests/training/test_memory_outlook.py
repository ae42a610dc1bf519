"""Runs tell their memory before anything is loaded, refuse what cannot fit, and explain a lack of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from musubi_tuner.common.devices import _room_in_container, is_out_of_memory
from musubi_tuner.common.errors import UserError
from musubi_tuner.ltx2_train_network import main as train
from musubi_tuner.memory.activations import layer_sizes
from musubi_tuner.training import memory_outlook, run_parts


def arguments(assets, output: Path, *flags: str) -> list[str]:
    return [
        *("--dataset_config", str(assets.dataset), "--ltx2_checkpoint", str(assets.checkpoint)),
        *("--ltx2_mode", "av", "--ltx_version", "2.3", "--mixed_precision", "no", "--network_dim", "4"),
        *("--network_alpha", "4", "--learning_rate", "1e-3", "--max_train_steps", "1", "--seed", "5"),
        *("--max_data_loader_n_workers", "0", "--output_dir", str(output), "--output_name", "x", *flags),
    ]


def never(*_, **__):
    raise AssertionError("nothing may be loaded")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    """Pretend that so many bytes are free."""
    return lambda nbytes: monkeypatch.setattr(memory_outlook, "free_host_memory", lambda: nbytes)


def test_too_little_memory_is_said_before_loading(cached_demo, tmp_path: Path, capsys, monkeypatch, free):
    free(1 << 20)
    monkeypatch.setattr(run_parts, "load_model", never)
    with pytest.raises(SystemExit) as stop:
        train(arguments(cached_demo(), tmp_path / "out"))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Memory, estimated from sizes" in said
    assert "where 1.0 MiB are free" in said
    assert "--ignore_memory_estimate starts the run all the same" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_the_run_may_be_started_all_the_same(cached_demo, tmp_path: Path, capsys, free):
    free(1 << 20)
    train(arguments(cached_demo(), tmp_path / "out", "--ignore_memory_estimate"))
    said = capsys.readouterr().err
    assert said.index("where 1.0 MiB are free") < said.index("What will be trained")
    assert (tmp_path / "out" / "x.safetensors").exists()


def test_what_fits_is_a_part_of_the_command_line(cached_demo, tmp_path: Path, capsys, monkeypatch, free):
    """Enough for some of the flags, found from the run's own figures, and then used."""
    assets = cached_demo()
    outlooks = []

    def noted(*given):
        outlooks.append(memory_outlook.memory_outlook(*given))
        return outlooks[-1]

    monkeypatch.setattr(run_parts, "memory_outlook", noted)
    train(arguments(assets, tmp_path / "a"))
    train(arguments(assets, tmp_path / "b", "--gradient_checkpointing", "--fp8_base", "--fp8_scaled"))
    plain, small = (outlook.estimate for outlook in outlooks)
    assert small.needed < plain.needed
    capsys.readouterr()
    free(small.needed)
    train(arguments(assets, tmp_path / "c", "--ignore_memory_estimate"))
    said = capsys.readouterr().err
    assert "what fits, the fastest first:" in said
    line = next(line for line in said.splitlines() if line.strip().startswith("--fp8_base"))
    flags = line.partition("   (")[0].split()
    train(arguments(assets, tmp_path / "d", *flags))
    assert "what fits" not in capsys.readouterr().err


@pytest.mark.parametrize("base", ["--int8_base", "--fp8_base --fp8_scaled", "--fp8_base --fp8_scaled --fp8_w8a8"])
def test_another_base_can_be_copied_behind_the_command(cached_demo, tmp_path: Path, capsys, free, base: str):
    given = arguments(cached_demo(), tmp_path / "out", *base.split())
    free(1 << 20)
    with pytest.raises(SystemExit):
        train(given)
    said = capsys.readouterr().err
    flags = said.partition("are free; with ")[2].partition(" it takes about")[0].split()
    assert "--nf4_base" in flags
    free(40 << 30)
    train([*given, *flags, "--dry_run"])
    assert "to NF4" in capsys.readouterr().err


def test_weights_stay_dense_for_a_network_that_reads_them(cached_demo, tmp_path: Path, capsys, free):
    """Proposing a quantised base to LyCORIS's DoRA would be proposing a refusal."""
    free(1 << 20)
    flags = ("--network_module", "lycoris.kohya", "--network_args", "algo=lokr")
    for more, proposed in (((), True), (("dora_wd=True",), False)):
        with pytest.raises(SystemExit):
            train(arguments(cached_demo(), tmp_path / "out", *flags, *more))
        said = capsys.readouterr().err
        assert "which does not fit either" in said
        assert ("--nf4_base" in said) == proposed


def test_scales_of_inputs_and_lengths_are_in_the_estimate(cached_demo, tmp_path: Path, capsys, monkeypatch):
    """AWQ keeps a number for each column of a weight, DoRA one for each row."""
    found = []

    def noted(*given):
        found.append(memory_outlook.memory_outlook(*given).request)
        return memory_outlook.memory_outlook(*given)

    monkeypatch.setattr(run_parts, "memory_outlook", noted)
    for flags in ((), ("--awq_calibration",), ("--network_args", "use_dora=True")):
        train(arguments(cached_demo(), tmp_path / "out", "--nf4_base", *flags, "--dry_run"))
    plain, awq, dora = found
    sizes = layer_sizes(plain.config)
    quantised = [size for name, size in sizes.items() if not name.endswith("to_gate_logits")]
    assert awq.weights.blocks[0] - plain.weights.blocks[0] == 4 * sum(k for _, k in quantised)
    assert dora.trained.params[0] - plain.trained.params[0] == sum(sizes[name][0] for name in plain.trained.blocks[0])


@pytest.mark.parametrize("base", ["--int8_base", "--nf4_base --loftq_init", "--fp8_base --fp8_scaled --fp8_w8a8"])
def test_what_fits_keeps_the_base_or_names_it(cached_demo, tmp_path: Path, capsys, free, base: str):
    free(1 << 20)
    with pytest.raises(SystemExit):
        train(arguments(cached_demo(), tmp_path / "out", *base.split()))
    said = capsys.readouterr().err
    assert ("where these began" in said) == ("--loftq_init" in base)
    assert "which does not fit either" in said
    free(40 << 30)
    train(arguments(cached_demo(), tmp_path / "out", *base.split(), "--dry_run"))
    assert "what fits" not in capsys.readouterr().err


def test_a_tight_run_is_warned_of_and_started(cached_demo, tmp_path: Path, capsys, free, monkeypatch):
    assets = cached_demo()
    outlooks = []
    checked = memory_outlook.MemoryOutlook.check
    monkeypatch.setattr(
        memory_outlook.MemoryOutlook,
        "check",
        lambda self, *, ignore: (outlooks.append(self), checked(self, ignore=ignore))[1],
    )
    train(arguments(assets, tmp_path / "a"))
    free(outlooks[0].estimate.device)
    capsys.readouterr()
    train(arguments(assets, tmp_path / "b"))
    assert "this run takes about" in capsys.readouterr().err
    assert (tmp_path / "b" / "x.safetensors").exists()


def test_the_plan_and_the_summary_show_the_same_estimate(cached_demo, tmp_path: Path, capsys):
    train(arguments(cached_demo(), tmp_path / "out"))
    said = capsys.readouterr().err
    lines = said.splitlines()
    total = next(line for line in lines if line.startswith("sum ")).removeprefix("sum").strip()
    assert (
        next(line for line in lines if line.startswith("memory, about"))
        .removeprefix("memory, about")
        .strip()[: len(total)]
        == total
    )
    assert f"of the process, estimated {total}" in next(line for line in lines if line.startswith("peak memory"))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 PiB"), MemoryError()]
)
def test_out_of_memory_in_training_is_one_message(error, cached_demo, tmp_path: Path, capsys, monkeypatch):
    def too_large(*_, **__):
        raise error

    monkeypatch.setattr("musubi_tuner.training.trainer.view_losses", too_large)
    with pytest.raises(SystemExit) as stop:
        train(arguments(cached_demo(), tmp_path / "out"))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "error: out of memory on cpu" in said
    assert "The estimate was" in said
    assert "--gradient_checkpointing" in said
    assert "Traceback" not in said


def test_other_errors_keep_their_traceback(cached_demo, tmp_path: Path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("musubi_tuner.training.trainer.view_losses", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        train(arguments(cached_demo(), tmp_path / "out"))


def test_only_a_lack_of_memory_counts_as_one():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_container_may_have_less_than_its_machine(tmp_path: Path):
    files = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 5\ninactive_file 100\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert _room_in_container(tmp_path) == 400
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    assert _room_in_container(tmp_path) is None
    assert _room_in_container(tmp_path / "absent") is None


def test_several_processes_share_the_host(monkeypatch: pytest.MonkeyPatch, free, cached_demo, tmp_path: Path, capsys):
    free(3 << 40)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(run_parts, "load_model", stop_here)
    with pytest.raises(SystemExit):
        train(arguments(cached_demo(), tmp_path / "out"))
    assert "free now" in (said := capsys.readouterr().err)
    assert "1024.0 GiB" in said


def stop_here(*_, **__):
    raise UserError("far enough")
