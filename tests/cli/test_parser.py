"""Flags, config files and their errors."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from musubi_tuner.cli.entry import entry
from musubi_tuner.cli.parser import flag_specs, parse
from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.config.caching import CacheLatentsConfig, CacheTextConfig
from musubi_tuner.config.flag import flag
from musubi_tuner.config.sampling import GenerateVideoConfig
from musubi_tuner.config.training import TrainNetworkConfig


@dataclass(frozen=True)
class Group:
    """Things."""

    path: Path | None = flag(None, "a path")
    mode: Literal["video", "av"] = flag("video", "a choice", aliases=["the_mode"], values={"v": "video", "va": "av"})
    count: int = flag(3, "a number")
    rate: float = flag(0.5, "a rate")
    fast: bool = flag(False, "a switch")
    convert: bool = flag(True, "a switch that is on")
    names: tuple[str, ...] = flag((), "a list")


@dataclass(frozen=True)
class Config:
    group: Group = Group()


def read(*argv: str):
    return parse(Config, argv, prog="x.py", description="")


def test_defaults_are_not_explicit():
    parsed = read()
    assert parsed.config == Config()
    assert parsed.explicit == frozenset()


def test_every_kind_of_value():
    parsed = read(
        "--path",
        "a b/c",
        "--mode",
        "va",
        "--count",
        "7",
        "--rate",
        "1e-4",
        "--fast",
        "--no_convert",
        "--names",
        "p=1",
        "q=2",
    )
    assert parsed.config.group == Group(Path("a b/c"), "av", 7, 1e-4, True, False, ("p=1", "q=2"))
    assert parsed.explicit == {"path", "mode", "count", "rate", "fast", "convert", "names"}


def test_dashes_and_aliases_and_no_forms():
    assert read("--the-mode=va").config.group.mode == "av"
    assert read("--no-convert").config.group.convert is False
    assert read("--fast", "--no-fast").config.group.fast is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cuont", "3"], "unknown flag --cuont (did you mean --count?)"),
        (["--count", "x"], "--count: expected an integer, got 'x'"),
        (["--mode", "vid"], "expected one of video, av"),
        (["stray"], "unexpected argument 'stray'"),
        (["--coun", "3"], "unknown flag --coun"),  # no abbreviations
        (["--loftq_own_base"], "unknown flag --loftq_own_base (a flag of ltx2_quantize_model.py)"),
        (["--rate", "nan"], "--rate: expected a number, got 'nan'"),
        (["--path", "-x"], "--path: expected one argument; one that begins with - is written --path=-x"),
        (["--the_mode"], "--mode: expected one argument"),
        (["--fast=true"], "--fast: takes no value"),
        (["--fast", "true"], "unexpected argument 'true'; switches take no value"),
        (["--path", "a", "b"], "unexpected argument 'b'; a value stands behind its flag; put values with"),
    ],
)
def test_bad_flags_are_one_message(argv: list[str], message: str):
    with pytest.raises(UserError) as caught:
        read(*argv)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", ["-0.5", "-.5", "-5e-1", "-5.E-1"])
def test_negative_numbers_are_values_not_flags(value: str):
    assert read("--rate", value).config.group.rate == -0.5


def test_repeating_a_list_flag_keeps_every_value():
    assert read("--names", "a", "b", "--fast", "--names", "c").config.group.names == ("a", "b", "c")


def test_dashes_within_a_text_are_kept():
    assert read("--names=--well-known cat").config.group.names == ("--well-known cat",)
    assert read("--names", "--a well-known cat").config.group.names == ("--a well-known cat",)


def test_config_file_is_typed_and_the_command_line_wins(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text('the_mode = "va"\nno_convert = true\n[any]\ncount = 9\nrate = 2\nnames = "one"\n', encoding="utf-8")
    parsed = read("--config_file", str(file), "--count", "1")
    assert parsed.config.group == Group(mode="av", count=1, rate=2.0, convert=False, names=("one",))
    assert "mode" in parsed.explicit


def test_config_file_of_a_real_script(tmp_path: Path):
    """Spellings, conversions, tables, switches both ways, and who wins."""
    file = tmp_path / "run.toml"
    file.write_text(
        'dataset_config = "d.toml"\ncompile_dynamic = true\n'
        '[model]\nltx_mode = "va"\nltx-version = "2.3"\n'
        "[saving]\nno_convert_to_comfy = true\nno_save_original_lora = false\nno_metadata = true\n"
        '[optimizer]\nlearning_rate = 1\nlr_warmup_steps = "10%"\nlr_args = "audio_=1e-5"\nsample_at_first = true\n',
        encoding="utf-8",
    )
    argv = ["--config_file", str(file), "--no-sample_at_first", "--learning-rate", "2e-4"]
    parsed = parse(TrainNetworkConfig, argv, prog="x.py", description="")
    config = parsed.config
    assert (config.checkpoint.ltx2_mode, config.version.ltx_version) == ("av", "2.3")
    assert config.compilation.compile_dynamic == "true"
    assert (config.save.convert_to_comfy, config.save.save_original_lora, config.network.metadata) == (
        False,
        True,
        False,
    )
    assert (config.optimizer.learning_rate, config.optimizer.lr_warmup_steps) == (2e-4, 0.1)
    assert config.optimizer.lr_args == ("audio_=1e-5",)
    assert config.preview.sample_at_first is False
    assert {"ltx2_mode", "convert_to_comfy", "lr_args"} <= parsed.explicit


def test_config_file_of_a_real_script_is_checked(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text(
        'ltx2_mode = "vid"\nltx_mode = "av"\nlora_target_preset = "t3v"\nseed = "x"\nmax_train_steps = 1.5\n'
        'save_state = "yes"\nnetwork_args = [1, [2]]\nfp8_bse = true\n',
        encoding="utf-8",
    )
    with pytest.raises(ConfigErrors) as caught:
        parse(TrainNetworkConfig, ["--config_file", str(file)], prog="x.py", description="")
    text = str(caught.value)
    for part in (
        "'ltx_mode' repeats 'ltx2_mode'",
        "lora_target_preset: expected one of t2v, v2v",
        "seed: expected an integer, got 'x'",
        "max_train_steps: expected an integer, got 1.5",
        "save_state: expected true or false, got 'yes'",
        "network_args: expected a string, got [1, [2]]",
        "unknown key 'fp8_bse' (did you mean 'fp8_base'?)",
    ):
        assert part in text


def test_config_file_suffix_is_optional(tmp_path: Path):
    (tmp_path / "run.toml").write_text("count = 9\n", encoding="utf-8")
    assert read("--config_file", str(tmp_path / "run")).config.group.count == 9


def test_config_file_reports_all_problems(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text('cuont = 1\ncount = "x"\nfast = "yes"\nrate = true\n[a.b]\nz = 1\n', encoding="utf-8")
    with pytest.raises(ConfigErrors) as caught:
        read("--config_file", str(file))
    text = str(caught.value)
    for part in (
        "unknown key 'cuont' (did you mean 'count'?)",
        "count: expected an integer",
        "fast: expected true or false",
        "rate: expected a number",
        "[a.b] is nested too deep",
    ):
        assert part in text
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize("content", ["count = ", b"\xff\xfe\x00"])
def test_broken_config_file_names_itself(tmp_path: Path, content):
    file = tmp_path / "run.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="run.toml"):
        read("--config_file", str(file))
    with pytest.raises(UserError, match="not found"):
        read("--config_file", str(tmp_path / "missing.toml"))


def test_config_file_that_is_a_folder_or_has_windows_paths(tmp_path: Path):
    with pytest.raises(UserError, match="is a folder"):
        read("--config_file", str(tmp_path))
    (tmp_path / "run.toml").write_text('path = "C:\\Users\\me"\n', encoding="utf-8")
    with pytest.raises(UserError, match="single quotes"):
        read("--config_file", str(tmp_path / "run.toml"))


def test_config_file_repeating_a_flag_is_an_error(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text('mode = "av"\nthe_mode = "video"\n', encoding="utf-8")
    with pytest.raises(UserError, match="'the_mode' repeats 'mode'"):
        read("--config_file", str(file))


@pytest.mark.parametrize("config", [TrainNetworkConfig, CacheLatentsConfig, CacheTextConfig, GenerateVideoConfig])
def test_no_flag_is_declared_twice(config: type):
    spellings = [s for spec in flag_specs(config) for s in (*spec.spellings, *spec.negations)]
    assert len(spellings) == len(set(spellings))


def test_entry_turns_errors_into_exit_codes(capsys: pytest.CaptureFixture[str]):
    @entry(Config, "test", rules=[lambda p: ["--count: too many"] if p.config.group.count > 5 else []])
    def main(parsed):
        if parsed.config.group.fast:
            raise UserError("cannot go fast")
        return 1 if parsed.config.group.names else None

    main([])
    for argv, code, text in [
        (["--fast"], 2, "error: cannot go fast"),
        (["--count", "6"], 2, "error: --count: too many"),
        (["--names", "a"], 1, ""),
        (["--x"], 2, "unknown flag --x"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == code
        assert text in capsys.readouterr().err


def test_files_that_cannot_be_written_give_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").touch()

    @entry(Config, "test")
    def main(parsed):
        (tmp_path / "file" / "below").mkdir()

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "file" in line


def test_names_that_the_output_cannot_show_do_not_end_a_script():
    code = (
        "from musubi_tuner.ltx2_merge_lora import MergeConfig\n"
        "from musubi_tuner.cli.entry import entry\n"
        "entry(MergeConfig, 'test')(lambda parsed: print('wrote 日本'))([])\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "wrote \\u65e5\\u672c\n")


@pytest.mark.parametrize(("given", "used"), [(None, "passive"), ("active", "active")])
def test_waiting_threads_leave_the_cores_to_others(monkeypatch, given: str | None, used: str):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    seen = []
    entry(Config, "test")(lambda parsed: seen.append(os.environ["OMP_WAIT_POLICY"]))([])
    assert seen == [used]
