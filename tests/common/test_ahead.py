"""Work done ahead: the order of a plain map, no more ahead than asked, and nothing left running."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from musubi_tuner.common.ahead import map_ahead
from musubi_tuner.common.devices import bind_thread


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_order(threads: int):
    def slow_first(number: int) -> int:
        time.sleep(0.02 if number % 3 == 0 else 0)
        return number * number

    assert list(map_ahead(slow_first, range(10), threads=threads, ahead=4)) == [n * n for n in range(10)]
    assert list(map_ahead(slow_first, [], threads=threads, ahead=4)) == []


@pytest.mark.parametrize("threads", [0, 2])
def test_no_more_is_begun_than_asked(threads: int):
    begun = []
    results = map_ahead(lambda n: begun.append(n) or n, range(20), threads=threads, ahead=3)
    for taken in range(1, 5):
        next(results)
        time.sleep(0.01)
        assert len(begun) <= taken + (2 if threads else 0)
    results.close()
    assert len(begun) < 10


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_comes_in_the_place_of_its_result(threads: int):
    results = map_ahead(lambda n: 1 // (2 - n), range(5), threads=threads, ahead=5)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]


def test_each_thread_is_initialised():
    made = []
    assert list(map_ahead(abs, range(4), threads=2, ahead=4, initializer=lambda: made.append(1))) == [0, 1, 2, 3]
    assert 1 <= len(made) <= 2


def test_a_thread_is_bound_to_the_gpu_of_its_process(monkeypatch: pytest.MonkeyPatch):
    """On one GPU the device has no index, which ``set_device`` would refuse."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cuda:1", "cuda", "cpu"):
        bind_thread(torch.device(name))
    assert chosen == [torch.device("cuda:1")]
