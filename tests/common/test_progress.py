"""Bars show what takes long and keep quiet about the rest."""

from __future__ import annotations

import time

import pytest

from musubi_tuner.common.progress import bytes_progress, progress, restart_clock


def test_pairs_pass_through_and_only_big_reads_get_a_bar(capsys: pytest.CaptureFixture[str]):
    pairs = [("a", 1), ("b", 2)]
    assert list(bytes_progress(pairs, {"a": 10, "b": 20}, desc="x", least=100)) == pairs
    assert capsys.readouterr().err == ""
    assert list(bytes_progress(pairs, {"a": 10, "b": 20}, desc="weights", least=30)) == pairs
    drawn = capsys.readouterr().err
    assert "weights: 100%" in drawn
    assert "B/s]" in drawn
    assert "<00:00" in drawn  # time left


def test_a_restarted_clock_forgets_the_slow_first_step_and_draws_nothing_odd(capsys: pytest.CaptureFixture[str]):
    """As when a run is resumed at step 60 of 100."""
    with progress(total=100, initial=60, desc="steps", unit="step") as bar:
        bar.start_t -= 1000
        bar.update(1)
        capsys.readouterr()
        restart_clock(bar)
        assert capsys.readouterr().err == ""
        time.sleep(0.01)
        bar.update(1)
        assert (bar.n, bar.initial) == (62, 61)
        assert bar.format_dict["elapsed"] < 500
    assert "62/100" in capsys.readouterr().err
