"""Bars show what takes long and keep quiet about the rest."""

from __future__ import annotations

import pytest

from musubi_tuner.common.progress import bytes_progress


def test_pairs_pass_through_and_only_big_reads_get_a_bar(capsys: pytest.CaptureFixture[str]):
    pairs = [("a", 1), ("b", 2)]
    assert list(bytes_progress(pairs, {"a": 10, "b": 20}, desc="x", least=100)) == pairs
    assert capsys.readouterr().err == ""
    assert list(bytes_progress(pairs, {"a": 10, "b": 20}, desc="weights", least=30)) == pairs
    assert "weights: 100%" in capsys.readouterr().err
