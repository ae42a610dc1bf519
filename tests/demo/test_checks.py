"""The demo's own checks fail where they should."""

from __future__ import annotations

import os

import pytest
import torch

from musubi_tuner.demo.checks import check_outputs
from musubi_tuner.demo.run import ROOT, Command, _results
from musubi_tuner.generation.decode import Sound
from musubi_tuner.generation.write import write_mp4, write_wav
from musubi_tuner.ltx2_demo import main

SOUND = Sound(torch.zeros(2, 4800), 48000)
FRAMES = torch.zeros(9, 64, 64, 3, dtype=torch.uint8)


def test_missing_short_and_silent_outputs_fail(tmp_path):
    good, silent, sound = tmp_path / "good.mp4", tmp_path / "silent.mp4", tmp_path / "sound.wav"
    write_mp4(good, FRAMES, 25, SOUND)
    write_mp4(silent, FRAMES, 25)
    write_wav(sound, SOUND)

    def passed(files, **expected) -> list[bool]:
        return [check.passed for check in check_outputs(files, **expected)]

    assert passed([good, good], count=2, frames=9, sound=True) == [True, True, True]
    assert passed([], count=2, frames=9, sound=True) == [False]
    assert passed([good], count=1, frames=17, sound=True) == [True, False]
    assert passed([silent], count=1, frames=9, sound=True) == [True, False]
    assert passed([silent], count=1, frames=9, sound=False) == [True, True]
    assert passed([sound], count=1, frames=0, sound=True) == [True, True]


def test_results_of_an_earlier_run_are_left_out(tmp_path):
    old, new = tmp_path / "a_av.mp4", tmp_path / "b_av.mp4"
    old.touch()
    os.utime(old, (1000, 1000))
    new.touch()
    (tmp_path / "b.mp4").touch()
    (tmp_path / "b.wav").touch()
    assert _results(tmp_path, new.stat().st_mtime) == [new]


def test_shown_command_runs_from_where_the_demo_was_started(tmp_path, monkeypatch):
    command = Command("x", "ltx2_merge_lora.py", ("--lora_weight", "a b"))
    monkeypatch.chdir(ROOT)
    assert command.shown == 'python ltx2_merge_lora.py --lora_weight "a b"'
    monkeypatch.chdir(tmp_path)
    assert command.argv[-3] in command.shown


def test_too_few_steps_are_refused_before_anything_is_written(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--max_train_steps", "1", "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "--max_train_steps 1: expected at least 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
