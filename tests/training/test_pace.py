"""The next item is made while the last one is in use, when its user says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from musubi_tuner.training.pace import Lookahead


def numbers(made: list[int], end: int = 5) -> Iterator[int]:
    for number in range(end):
        made.append(number)
        yield number


def wait_for(made: list[int], count: int) -> None:
    deadline = time.monotonic() + 5
    while len(made) < count and time.monotonic() < deadline:
        time.sleep(0.001)


def test_items_come_in_order_and_one_is_made_ahead():
    made: list[int] = []
    with Lookahead(numbers(made)) as items:
        assert next(items) == 0
        time.sleep(0.01)
        assert made == [0]  # not before it is asked for
        items.prepare()
        items.prepare()
        wait_for(made, 2)
        assert made == [0, 1]
        assert list(items) == [1, 2, 3, 4]
        assert list(items) == []


def test_only_waiting_counts_as_waiting():
    def slow() -> Iterator[int]:
        time.sleep(0.05)
        yield 1
        time.sleep(0.05)
        yield 2

    with Lookahead(slow()) as items:
        next(items)
        assert items.waited() >= 0.04
        items.prepare()
        time.sleep(0.2)
        next(items)
        assert items.waited() < 0.04
        assert items.waited() == 0


def test_an_error_reaches_the_one_who_takes_the_item():
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    with Lookahead(broken()) as items:
        assert next(items) == 1
        with pytest.raises(OSError, match="gone"):
            next(items)


def test_leaving_in_the_middle_ends_the_thread_and_the_source():
    made: list[int] = []
    source = numbers(made)
    with Lookahead(source) as items:
        next(items)
        items.prepare()
    assert list(source) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("lookahead")]
